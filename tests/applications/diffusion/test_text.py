import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from unimoe.applications.diffusion.text import embed_texts


def test_padding_does_not_change_an_embedding(tmp_path):
    words = ["[PAD]", "[UNK]", "red", "green", "apple"]
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        tmp_path
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=5, **sizes)).save_pretrained(tmp_path)
    both = embed_texts(["apple", "red green apple"], tmp_path)
    assert both.shape == (2, 8) and not torch.allclose(both[0], both[1])
    assert_close(both.norm(dim=1), torch.ones(2))
    assert_close(embed_texts(["apple"], tmp_path)[0], both[0])
