"""``unimoe upcycle`` on tiny models of transformers."""

import json

import pytest
import torch
from transformers import AutoModelForMultimodalLM, MixtralConfig

import unimoe  # noqa: F401  the Auto classes load what was saved
from unimoe.artifacts import read_record
from unimoe.commands import main as cli
from unimoe.moe.install import moe_layers
from unimoe.testing_hosts import FAMILIES, inputs, question


@pytest.fixture
def base(tmp_path):
    model, processor = FAMILIES["qwen2_5_vl"][0]()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return model, processor, tmp_path / "base"


@torch.no_grad()
def test_the_result_is_the_same_model_with_experts(base, tmp_path, capsys):
    dense, processor, folder = base
    out = tmp_path / "moe"
    args = ["upcycle", str(folder), str(out), "--moe.preset", "sliced", "--moe.placement=all"]
    assert cli.main(args) == 0
    found = AutoModelForMultimodalLM.from_pretrained(out)
    assert type(found) is type(dense) and len(moe_layers(found)) == 2
    batch = inputs(processor, question("image"))
    torch.testing.assert_close(found(**batch).logits, dense(**batch).logits, rtol=0, atol=1e-5)
    record = read_record(out)
    assert record is not None and record.metrics["difference"] < 1e-5 and record.stage == "upcycle"
    assert "Qwen2_5_VLForConditionalGeneration" in (out / "README.md").read_text()
    assert cli.main(["upcycle", str(folder), str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


@torch.no_grad()
def test_experts_come_from_models_that_were_tuned(base, tmp_path):
    dense, processor, folder = base
    tuned = tmp_path / "tuned"
    for layer in dense.get_decoder().layers:
        layer.mlp.down_proj.weight.mul_(2)
    dense.save_pretrained(tuned)
    processor.save_pretrained(tuned)
    out = tmp_path / "moe"
    sources = ["--experts", str(folder), str(tuned), "--moe", "router.k=1"]
    assert cli.main(["upcycle", str(folder), str(out), *sources]) == 0
    experts = moe_layers(AutoModelForMultimodalLM.from_pretrained(out))[0].experts
    assert experts.num_experts == 2
    torch.testing.assert_close(experts.down_proj[1], 2 * experts.down_proj[0])


def config(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


def quantized(folder, method):
    config(folder, quantization_config={"quant_method": method})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: config(folder, quantization_config={"quant_method": "awq"}), "is quantized (awq)"),
        (
            lambda folder: config(folder, quantization_config={"quant_method": "unimoe"}),
            "has MoE layers already",
        ),
        (lambda folder: MixtralConfig().save_pretrained(folder), "holds a model of type 'mixtral'"),
        (
            lambda folder: config(folder, text_config={"model_type": "qwen2_5_vl_text", "num_experts": 8}),
            "a mixture of experts already",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_named(base, tmp_path, change, message, capsys):
    change(base[2])
    assert cli.main(["upcycle", str(base[2]), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_number_of_experts_follows_from_their_folders(base, tmp_path, capsys):
    args = [
        "upcycle",
        str(base[2]),
        str(tmp_path / "out"),
        "--experts",
        str(base[2]),
        "--moe.experts.copies",
        "3",
    ]
    assert cli.main(args) == 2
    assert "not the number of experts" in capsys.readouterr().err
