import pytest
import torch
from transformers.models.grounding_dino.modeling_grounding_dino import (
    generate_masks_with_special_tokens_and_transfer_map,
)

from unimoe.detection import Prompt, PromptBatch, chunk_names
from unimoe.detection.model.prompt import clean_name
from unimoe.errors import UserError


def tokens_of(prompt: Prompt, name: int, tokenizer) -> list[str]:
    return tokenizer.convert_ids_to_tokens(prompt.input_ids[prompt.name_tokens[name]].tolist())


def test_names_are_cleaned():
    assert clean_name("Truck_(pickup)") == "truck"
    assert clean_name("  Traffic_Light ") == "traffic light"


def test_each_name_keeps_its_tokens(tokenizer):
    prompt = Prompt.from_names(["Cats", "red_car", "dog"], tokenizer)
    assert [tokens_of(prompt, i, tokenizer) for i in range(3)] == [["cat", "##s"], ["red", "car"], ["dog"]]
    assert tokenizer.decode(prompt.input_ids) == "[CLS] cat ##s . red car . dog . [SEP]"


def test_structure_is_that_of_grounding_dino(tokenizer):
    prompt = Prompt.from_names(["cat", "red car", "a red cat on a mat"], tokenizer)
    delimiters = torch.tensor(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))
    mask, positions = generate_masks_with_special_tokens_and_transfer_map(prompt.input_ids[None], delimiters)
    assert torch.equal(prompt.attention_mask, mask[0])
    assert torch.equal(prompt.position_ids, positions[0])


def test_caption_phrases_and_sentences(tokenizer):
    caption = "A red car on a mat. A dog? a CAT"
    spans = [[(2, 9)], [(22, 25)], [(29, 32)], [(2, 5), (15, 18)]]
    prompt = Prompt.from_caption(caption, spans, tokenizer)
    found = [tokens_of(prompt, i, tokenizer) for i in range(4)]
    assert found == [["red", "car"], ["dog"], ["cat"], ["red", "mat"]]
    delimiters = torch.tensor(tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"]))
    mask, positions = generate_masks_with_special_tokens_and_transfer_map(prompt.input_ids[None], delimiters)
    assert torch.equal(prompt.attention_mask, mask[0]) and torch.equal(prompt.position_ids, positions[0])


def test_a_long_caption_is_cut(tokenizer):
    prompt = Prompt.from_caption("a cat on a mat and a dog", [[(2, 5)], [(21, 24)]], tokenizer, max_tokens=6)
    assert len(prompt.input_ids) == 6
    assert prompt.name_tokens.any(dim=1).tolist() == [True, False]


def test_padding_sees_itself_only(prompts):
    length = int(prompts.text_mask[1].sum())
    pad = prompts.text_attention_mask[1, length:]
    assert torch.equal(pad.nonzero()[:, 1], torch.arange(length, pad.shape[1]))
    assert not prompts.text_attention_mask[1, :length, length:].any()
    assert not prompts.name_tokens[1][:, length:].any()


def test_chunks_fit_and_every_name_keeps_its_id(tokenizer):
    names = ["cat", "red car", "a red cat on a mat"] * 401
    chunks = chunk_names(names, tokenizer, max_tokens=64)
    assert [index for chunk in chunks for index in chunk] == list(range(1203))
    for chunk in chunks:
        assert len(Prompt.from_names([names[i] for i in chunk], tokenizer, 64).input_ids) <= 64
    longer = [len(Prompt.from_names([names[i] for i in [*a, b[0]]], tokenizer).input_ids)
              for a, b in zip(chunks, chunks[1:], strict=False)]  # fmt: skip
    assert min(longer) > 64, "a chunk had room for another name"
    assert max(map(len, chunk_names(names, tokenizer, max_names=5))) == 5


def test_bad_prompts(tokenizer):
    with pytest.raises(UserError, match="names nothing to look for"):
        Prompt.from_names([], tokenizer)
    with pytest.raises(UserError, match="name 1 of the prompt is empty: '\\(x\\)'"):
        Prompt.from_names(["cat", "(x)"], tokenizer)
    with pytest.raises(UserError, match="300 names have 602 tokens, expected at most 256"):
        Prompt.from_names(["cat"] * 300, tokenizer)
    with pytest.raises(UserError, match="name 1 has 301 tokens, expected at most 254"):
        chunk_names(["cat", "cat " * 300], tokenizer)


def test_prompts_move_together(prompts):
    moved = prompts.to("meta")
    assert isinstance(moved, PromptBatch)
    assert moved.input_ids.is_meta and all(rows.is_meta for rows in moved.name_tokens)
