"""``unimoe compress quantize`` on a tiny model: what is saved is what was quantised, or nothing is."""

import json

import pytest
import torch
import yaml
from PIL import Image

from unimoe.commands import main as cli
from unimoe.model.loading import load_any
from unimoe.moe.packed import PackedExperts, PackedLinear
from unimoe.moe.view import view
from unimoe.testing import IMAGE, tiny_model


@pytest.fixture
def bed(tmp_path):
    """A model of two layers of four experts, and a file of conversations."""
    moe = {"experts": {"copies": 4}, "router": {"k": 2}, "placement": "all"}
    model, processor = tiny_model(tmp_path / "parts", moe, image=IMAGE)
    for layer in view(model):
        for stack in layer.stacks().values():
            torch.nn.init.normal_(stack, std=0.2)
        torch.nn.init.normal_(layer.router_rows(), std=1)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    image = [{"type": "image", "path": "a.png"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": [*image * (i % 2), {"type": "text", "text": f"word {i * 37}"}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"answer {i * 91}"}]},
            ]
        }
        for i in range(12)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(bed, *more):
    model, data = str(bed / "model"), str(bed / "train.jsonl")
    options = ["--group", "32", "--output", str(bed / "small"), "--min-tokens", "1", *more]
    return cli.main(["compress", "quantize", model, data, *options])


def logits(folder):
    model = load_any(folder, device="cpu")[0]
    ids = torch.arange(1, 10)[None]
    with torch.no_grad():
        return model, model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)


def test_experts_linear_layers_and_the_head_are_packed_and_loaded(bed, caplog):
    assert run(bed, "--bits", "4", "--linears", "8", "--head", "8") == 0
    model, after = logits(bed / "small")
    before = logits(bed / "model")[1]
    assert all(type(layer.experts) is PackedExperts for layer in view(model))
    assert type(model.get_output_embeddings()) is PackedLinear
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert 0 < kl < 0.05
    plan = yaml.safe_load((bed / "small" / "plan.yaml").read_text())
    assert plan["bits"] == [[4] * 4] * 2 and plan["linears"] == plan["head"] == 8 and plan["made_of"]
    small, large = ((bed / name / "model.safetensors").stat().st_size for name in ("small", "model"))
    experts = 4 * 2 * 4 * 3 * 32 * 64
    assert large - small > 0.8 * experts and "4.00 bits a weight and 0.50 of scales" in caplog.text


def test_a_mean_of_bits_is_kept(bed):
    assert run(bed, "--bits", "3.0", "--choices", "2", "4", "--how", "rtn", "--cost", "kl") == 0
    bits = yaml.safe_load((bed / "small" / "plan.yaml").read_text())["bits"]
    assert sorted(sum(bits, [])) == [2] * 4 + [4] * 4
    experts = [layer.experts for layer in view(logits(bed / "small")[0])]
    assert [list(one.expert_bits) for one in experts] == bits


def test_rules_smoothing_and_balance(bed, caplog):
    assert run(bed, "--rules", "main_2.layer_1_4.exp_l0e3_8", "--smooth", "--balanced") == 0
    bits = yaml.safe_load((bed / "small" / "plan.yaml").read_text())["bits"]
    assert bits == [[2, 2, 2, 8], [4] * 4]
    assert torch.isfinite(logits(bed / "small")[1]).all()


def test_a_modality_without_calibration_is_named(bed, caplog):
    text = [row for row in (bed / "train.jsonl").read_text().splitlines() if '"image"' not in row]
    (bed / "train.jsonl").write_text("\n".join(text) + "\n")
    assert run(bed, "--bits", "8", "--how", "rtn") == 0
    assert "no calibration sample has image" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5"], "--bits is 5, expected one of"),
        (["--bits", "three"], "--bits is three, expected one of"),
        (["--bits", "1.5"], "--bits 1.5 cannot be met with --choices 2 3 4"),
        (["--group", "48"], "plan.group is 48, expected a divisor of 32 (the inputs of gate"),
        (["--samples", "0"], "0 calibration tokens"),
        (["--rules", "attn_4"], "no main_B"),
        (["--linears", "5"], "plan.linears is 5, expected one of"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(bed, options, message, capsys):
    assert run(bed, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (bed / "small").exists()
