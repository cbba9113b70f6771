"""A detector of a few thousand weights, and a tokenizer with whole words."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    PreTrainedTokenizerFast,
    SwinConfig,
    TimmBackboneConfig,
)

from unimoe.detection import DynamicDinoConfig, DynamicDinoForObjectDetection, Prompt, PromptBatch

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    ".",
    "?",
    "a",
    "cat",
    "dog",
    "red",
    "car",
    "on",
    "mat",
    "##s",
    "tree",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece; its delimiters have other ids than BERT's."""
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def tiny_detector():
    """Makes a random detector in training mode; keyword arguments are fields of its configuration."""

    def make(**settings) -> DynamicDinoForObjectDetection:
        backbone = TimmBackboneConfig(backbone="test_efficientnet", out_indices=[2, 3, 4])
        text = BertConfig(
            vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        small = {"d_model": 32, "ffn_dim": 32, "num_heads": 4, "decoder_layers": 2, "num_queries": 10}
        sizes = {**small, "csp_blocks": 1, "csp_expansion": 0.5, **settings}
        model = DynamicDinoForObjectDetection(
            DynamicDinoConfig(backbone_config=backbone, text_config=text, **sizes)
        )
        return model.train()

    return make


@pytest.fixture
def prompts(tokenizer) -> PromptBatch:
    """Two prompts of different length."""
    return PromptBatch.stack(
        [Prompt.from_names(["cat", "red car", "dog"], tokenizer), Prompt.from_names(["tree"], tokenizer)]
    )


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 96)


@pytest.fixture
def hf_detector():
    """Makes a random model of transformers, of kind "plain" or "mm", none of whose weights is at a special
    value."""

    def make(kind: str, **settings):
        swin = SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_indices=[2, 3, 4],
        )  # fmt: skip
        bert = BertConfig(
            vocab_size=1100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        parts = {"backbone_config": swin, "text_config": bert, "d_model": 32, "num_queries": 12}
        parts |= {"encoder_layers": 2, "encoder_ffn_dim": 32, "encoder_attention_heads": 4}
        parts |= {"decoder_layers": 3, "decoder_ffn_dim": 32, "decoder_attention_heads": 4, **settings}
        if kind == "plain":
            model = GroundingDinoForObjectDetection(GroundingDinoConfig(**parts))
        else:
            model = MMGroundingDinoForObjectDetection(MMGroundingDinoConfig(**parts))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return make
