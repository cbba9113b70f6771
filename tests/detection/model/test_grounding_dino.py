"""transformers' own classes are the oracle."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close
from transformers import BertConfig, GroundingDinoConfig, GroundingDinoImageProcessor
from transformers.models.grounding_dino.modeling_grounding_dino import (
    generate_masks_with_special_tokens_and_transfer_map,
)

from unimoe.commands import main as cli
from unimoe.detection import DynamicDinoForObjectDetection
from unimoe.detection.model import grounding_dino
from unimoe.detection.model.grounding_dino import convert, convert_config, image_settings
from unimoe.errors import UserError

CLS, SEP, STOP = 101, 102, 1012


def inputs() -> dict:
    """Two pictures, one of them padded, and two prompts of different length."""
    ids = torch.tensor([[CLS, 7, 8, STOP, 9, STOP, SEP], [CLS, 5, STOP, SEP, 0, 0, 0]])
    pixel_mask = torch.ones(2, 96, 128, dtype=torch.long)
    pixel_mask[1, 70:], pixel_mask[1, :, 100:] = 0, 0
    pixels = torch.randn(2, 3, 96, 128) * pixel_mask[:, None]
    return {
        "pixel_values": pixels,
        "pixel_mask": pixel_mask,
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
    }


def as_ours(given: dict) -> dict:
    ids = given["input_ids"]
    mask, positions = generate_masks_with_special_tokens_and_transfer_map(ids, torch.tensor([CLS, SEP, STOP]))
    return {
        "pixel_values": given["pixel_values"],
        "pixel_mask": given["pixel_mask"],
        "input_ids": ids,
        "text_mask": given["attention_mask"].bool(),
        "text_attention_mask": mask,
        "text_position_ids": positions,
    }


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("plain", {}),
        ("plain", {"decoder_bbox_embed_share": False}),
        ("mm", {}),
        ("mm", {"decoder_bbox_embed_share": False, "decoder_cls_embed_share": False}),
    ],
)
def test_outputs_are_identical(hf_detector, kind, settings):
    """Differences are the rounding of another attention kernel: about 1e-6."""
    model, given = hf_detector(kind, **settings), inputs()
    with torch.no_grad():
        expected, found = model(**given), convert(model)(**as_ours(given))
    length = given["input_ids"].shape[1]
    assert_close(found.logits[-1], expected.logits[..., :length], atol=1e-4, rtol=1e-4)
    assert_close(found.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=1e-4)
    assert_close(found.references[0], expected.init_reference_points, atol=1e-5, rtol=1e-4)
    assert_close(found.encoder_boxes, expected.encoder_pred_boxes, atol=1e-5, rtol=1e-4)


def test_every_weight_of_theirs_is_taken(hf_detector):
    model = hf_detector("mm", decoder_bbox_embed_share=False)
    ours = convert(model)
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in model.parameters())


def test_a_converted_model_is_saved_and_loaded(hf_detector, tmp_path):
    ours = convert(hf_detector("mm"))
    ours.save_pretrained(tmp_path)
    again = DynamicDinoForObjectDetection.from_pretrained(tmp_path)
    given = as_ours(inputs())
    with torch.no_grad():
        assert_close(again(**given).logits, ours(**given).logits)


@pytest.fixture
def public(hf_detector, tokenizer, tmp_path, monkeypatch):
    """A folder as the hub has them; pictures are made small."""
    monkeypatch.setattr(grounding_dino, "IMAGE_SIZE", [128, 192])
    hf_detector("mm", num_queries=6).save_pretrained(tmp_path / "public")
    tokenizer.save_pretrained(tmp_path / "public")
    return tmp_path / "public"


def test_public_weights_are_used_and_tuned_by_the_command_line(public, world, tmp_path, capsys):
    """``configs/dynamic_dino/full_moe.yaml`` with other files, and ``unimoe detect`` before and after."""
    shipped = Path(str(files("unimoe.configs").joinpath("dynamic_dino")))
    run = yaml.safe_load((shipped / "full_moe.yaml").read_text())
    run |= {"output": str(tmp_path / "tuned"), "trainer": {"precision": "32-true"}}
    run["model"]["init_from"] = str(public)
    run["data"] |= {
        "train": str(world / "train.json"),
        "val": None,
        "images": None,
        "steps": 1,
        "num_workers": 0,
    }
    run["data"]["augment"] = {"sizes": [64], "longest": 96, "crop": 0.0}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    assert cli.main(["fit", "-c", str(shipped / "full.yaml"), "-c", str(path)]) == 0
    config = DynamicDinoForObjectDetection.from_pretrained(tmp_path / "tuned").config
    assert (
        config.moe["experts"]["copies"] * config.moe["experts"]["slices"] == 16 and config.enhancer == "full"
    )
    for model in (public, tmp_path / "tuned"):
        capsys.readouterr()
        args = [str(model), str(world / "0.png"), "--prompt", "cat, tree", "--threshold", "0", "--json"]
        assert cli.main(["detect", *args]) == 0
        (image,) = json.loads(capsys.readouterr().out)["images"]
        assert len(image["detections"]) == 12 and image["detections"][0]["label"] in ("cat", "tree")


def test_other_models_are_refused():
    with pytest.raises(UserError, match="type 'bert', expected one of grounding-dino"):
        convert_config(BertConfig())
    with pytest.raises(UserError, match="two_stage is False"):
        convert_config(GroundingDinoConfig(two_stage=False))
    with pytest.raises(UserError, match="encoder_ffn_dim is 64, expected decoder_ffn_dim 32"):
        convert_config(GroundingDinoConfig(encoder_ffn_dim=64, decoder_ffn_dim=32))


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({}, ([800, 1333], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])),
        (
            {
                "size": {"shortest_edge": 400, "longest_edge": 600},
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
            },
            ([400, 600], [0.5] * 3, [0.5] * 3),
        ),
        ({"do_normalize": False}, ([800, 1333], [0.0] * 3, [1.0] * 3)),
    ],
)
def test_images_are_prepared_as_the_checkpoint_says(tmp_path, processor, expected):
    assert image_settings(str(tmp_path)) == {}
    GroundingDinoImageProcessor(**processor).save_pretrained(tmp_path)
    found = image_settings(str(tmp_path))
    assert (found["image_size"], list(found["image_mean"]), list(found["image_std"])) == expected
    config = convert_config(GroundingDinoConfig(), found)
    assert (config.image_size, config.image_mean, config.image_std) == expected


def test_an_image_processor_that_stretches_is_refused(tmp_path):
    GroundingDinoImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="expected a shortest_edge and a longest_edge"):
        image_settings(str(tmp_path))
