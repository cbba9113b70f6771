"""A tiny detector, a tokenizer with whole words, and eight pictures to learn by heart."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    PreTrainedTokenizerFast,
    SwinConfig,
    TimmBackboneConfig,
)

from unimoe.detection import DynamicDinoConfig, DynamicDinoForObjectDetection, Prompt, PromptBatch
from unimoe.detection.model.build import build_detector

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


COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "tree": (40, 40, 200), "car": (200, 200, 40)}


@pytest.fixture(scope="session")
def world(tmp_path_factory, tokenizer) -> Path:
    """Eight pictures of rectangles as COCO (``train.json``), and a text encoder (``text``)."""
    folder = tmp_path_factory.mktemp("world")
    images, annotations = [], []
    generator = torch.Generator().manual_seed(0)
    for number in range(8):
        picture = Image.new("RGB", (64, 64), (number * 12, 90, 90))
        for part in range(1 + number % 2):
            x = 2 + 32 * part + int(torch.randint(0, 6, (), generator=generator))
            y, w, h = torch.randint(10, 24, (3,), generator=generator).tolist()
            label = (number + 2 * part) % 4
            picture.paste(list(COLOURS.values())[label], (x, y, x + w, y + h))
            row = {"image_id": number + 1, "category_id": 10 * label + 5, "bbox": [x, y, w, h], "area": w * h}
            annotations.append({"id": len(annotations) + 1, "iscrowd": 0, **row})
        picture.save(folder / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "width": 64, "height": 64})
    categories = [{"id": 10 * label + 5, "name": name} for label, name in enumerate(COLOURS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for name in ("train.json", "val.json"):
        (folder / name).write_text(json.dumps(content))
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), **small)).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder


@pytest.fixture(scope="session")
def sizes(world) -> dict:
    """Arguments of ``build_detector`` for a detector that sees pictures of 64 pixels."""
    return {
        "backbone": "test_efficientnet",
        "text_encoder": str(world / "text"),
        "image_size": 64,
        "d_model": 32,
        "ffn_dim": 64,
        "num_heads": 4,
        "decoder_layers": 2,
        "num_queries": 12,
        "learned_queries": False,
        "csp_blocks": 1,
        "csp_expansion": 0.5,
    }


@pytest.fixture
def settings(world, sizes, tmp_path) -> dict:
    """A run on these pictures, as its YAML file would hold it."""
    return {
        "system": "detection",
        "stage": "tiny",
        "output": str(tmp_path / "tiny"),
        "checkpoint_every": 5,
        "model": {
            "detector": dict(sizes),
            "denoising": {"queries": 20},
            "freeze_encoders": False,
            "encoder_lr": 1.0,
            "lr": 4e-3,
        },
        "data": {
            "train": str(world / "train.json"),
            "val": str(world / "val.json"),
            "augment": {"sizes": [64], "longest": 64, "flip": 0.0, "crop": 0.0},
            "steps": 10,
            "batch_size": 8,
        },
    }


@pytest.fixture
def folder(settings, tmp_path) -> Path:
    """A random detector of these settings."""
    model, tokenizer = build_detector(**settings["model"]["detector"])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
