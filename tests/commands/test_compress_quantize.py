"""``unimoe compress quantize`` on a tiny model: what is saved is what was quantized, or nothing is."""

import json

import pytest
import torch
import yaml
from PIL import Image

from unimoe.commands import main as cli
from unimoe.commands.compress_quantize import most_rows
from unimoe.model.loading import load_any
from unimoe.moe import SwiGLUExperts
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.packed_linear import PackedLinear
from unimoe.moe.view import view
from unimoe.testing import IMAGE, tiny_model
from unimoe.testing_stock import STOCK


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
    if "rtn" not in more:
        more = "--min-tokens", "1", *more
    options = ["--group", "32", "--output", str(bed / "small"), *more]
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
        (["--rules", "main_2.attn_4"], "attn holds for no weight of an expert"),
        (["--rules", "main_2.layer_7_4"], "layer_7 holds for no weight of an expert"),
        (["--rules", "main_2", "--bits", "4"], "--bits does nothing beside --rules"),
        (["--rules", "main_2", "--cost", "kl"], "--cost does nothing beside --rules"),
        (["--bits", "4", "--by-layer"], "--by-layer does nothing beside --bits 4, which is no mean,"),
        (["--how", "rtn", "--balanced"], "--balanced does nothing beside --how rtn"),
        (["--how", "rtn", "--memory", "1"], "--memory does nothing beside --how rtn"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(bed, options, message, capsys):
    assert run(bed, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (bed / "small").exists()


def refused_before_reading(bed, capsys, monkeypatch, *options):
    """The one line that is printed; no data was read."""
    monkeypatch.setattr(
        "unimoe.commands.compress_quantize.read_batches", lambda *_: pytest.fail("data was read")
    )
    assert run(bed, *options) == 2
    assert not (bed / "small").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(("name", "message"), [
    ("gpt_oss", "GptOssExperts cannot be packed (has_bias is True)"),
    ("mixtral", "the group 32 does not divide the width 48"),
])  # fmt: skip
def test_models_that_cannot_be_packed_are_refused_before_data_is_read(
    bed, name, message, capsys, monkeypatch
):
    model = STOCK[name](hidden_size=32, intermediate_size=32)
    model.model.layers[1].self_attn.o_proj = torch.nn.Linear(48, 32)
    monkeypatch.setattr("unimoe.commands.compress_quantize.open_mixture", lambda *_: (model, None))
    found = refused_before_reading(bed, capsys, monkeypatch, "--linears", "8")
    assert message in found and found.count("\n") == 1


class OtherExperts(SwiGLUExperts):
    pass


def test_unknown_experts_are_refused_before_data_is_read(bed, capsys, monkeypatch):
    model = load_any(bed / "model", device="cpu")[0]
    view(model)[1].block.experts = OtherExperts(4, 32, 64)
    monkeypatch.setattr("unimoe.commands.compress_quantize.open_mixture", lambda *_: (model, None))
    assert "OtherExperts cannot be packed" in refused_before_reading(bed, capsys, monkeypatch)


def test_a_packed_model_is_refused_before_data_is_read(bed, capsys, monkeypatch):
    assert run(bed, "--bits", "8", "--how", "rtn") == 0
    (bed / "small").rename(bed / "packed")
    (bed / "model").rename(bed / "old")
    (bed / "packed").rename(bed / "model")
    assert "packed already" in refused_before_reading(bed, capsys, monkeypatch)


@pytest.mark.parametrize(("samples", "expected"), [(4, 2 * 2 * 4 * 10 / 8), (64, 2 * 2 * 6 * 10 / 8)])
def test_twice_the_even_share_is_of_the_rows_that_there_are(samples, expected):
    batches = [{"attention_mask": torch.ones(3, 10)}] * 2
    layer = view(STOCK["qwen3_moe"](num_experts_per_tok=2))[0]
    assert most_rows(layer, [batches], samples) == expected
