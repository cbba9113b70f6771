"""The whole path on red and blue squares: training, adaptation, the test's report and samples."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from unimoe.applications.unified.data import UnifiedData
from unimoe.applications.unified.module import UnifiedModule
from unimoe.applications.unified.network import IS, NO, WHAT, WORDS, YES, UnifiedNetConfig
from unimoe.artifacts import read_record
from unimoe.commands import main as cli


def weights(settings: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(settings["output"]) / "model.safetensors")


def test_a_model_answers_and_draws(drawings, command, scores):
    drawings["data"]["steps"], drawings["model"]["lr"] = 100, 0.01
    assert cli.main(command(drawings)) == 0
    assert cli.main(command(drawings, "test")) == 0
    found = scores(drawings)
    assert found["images"] == 10 and 0 < found["loss"] < 1.2
    assert found["accuracy"] == 1.0 and found["accuracy_yes_no"] > 0.5, "red or blue"
    assert 0 <= found["recognised"] <= 1
    picture = Image.open(Path(drawings["output"]) / "logs/test/samples.png")
    assert picture.size == (20, 40)  # two classes, one sample of each


def test_an_adapted_model_trains_its_drawing_branch_and_first_the_routers(adapted, drawings, command, scores):
    adapted["model"]["frozen"] = 1.0
    assert cli.main(command(adapted)) == 0
    base, gates = weights(drawings), weights(adapted)
    for name in base.keys() & gates.keys():
        assert gates[name].equal(base[name]), f"{name} is frozen"
    ffn = base["blocks.1.draw.ffn.gate_proj.weight"]
    experts = gates["blocks.1.draw.ffn.experts.gate_up_proj"].chunk(2, dim=1)[0].flatten(0, 1)
    assert experts.sort(dim=0).values.equal(ffn.sort(dim=0).values), "the units are where they were"
    assert gates["blocks.1.draw.ffn.router.weight"].abs().max() > 5e-4, "init_std is 1e-4"

    adapted["model"]["frozen"], adapted["output"] = 0.5, adapted["output"] + "2"
    assert cli.main(command(adapted)) == 0
    full = weights(adapted)
    assert not full["blocks.1.draw.ffn.experts.down_proj"].equal(gates["blocks.1.draw.ffn.experts.down_proj"])
    assert full["blocks.1.understand.qkv.weight"].equal(base["blocks.1.understand.qkv.weight"])
    for settings in (adapted, drawings):
        assert cli.main(command(settings, "test")) == 0
    assert scores(adapted)["accuracy"] == scores(drawings)["accuracy"]
    assert scores(adapted)["loss"] != scores(drawings)["loss"]


@pytest.mark.parametrize("design", ["moe", "pruned"])
def test_the_dense_model_runs_on_the_cpu_whatever_the_default_device(adapted, drawings, design):
    """Lightning builds models under the device and the dtype of the run; meta has no values to run on."""
    settings = {
        **adapted["model"],
        "unified": UnifiedNetConfig(**adapted["model"]["unified"] | {"design": design}),
    }
    module, data = UnifiedModule(**settings), UnifiedData(**drawings["data"])
    data.setup("fit")
    module._trainer = SimpleNamespace(datamodule=data, state=SimpleNamespace(fn="fit"))
    module.configure_model()
    wanted = {name: value.clone() for name, value in module.model.state_dict().items()}
    for parameter in module.model.parameters():
        parameter.data.zero_()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            module._adapt(drawings["output"])
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in module.model.state_dict().items():
        assert ".router." in name or value.equal(wanted[name]), name


def test_a_run_knows_what_it_was_adapted_from_and_is_continued_by_init_from(
    adapted, drawings, command, capsys
):
    assert cli.main(command(adapted)) == 0
    record, base = read_record(adapted["output"]), Path(drawings["output"]) / "model.safetensors"
    assert [parent["folder"] for parent in record.parents] == [drawings["output"]]
    base.write_bytes(base.read_bytes() + b" ")
    assert cli.main(command(adapted)) == 2
    assert "content of adapt_from" in capsys.readouterr().err
    model = {**adapted["model"], "init_from": adapted["output"]}
    on = {**adapted, "output": adapted["output"] + "2", "model": model}
    assert cli.main(command(on)) == 2
    assert "leaves unread; set one of them" in capsys.readouterr().err
    del model["adapt_from"]
    assert cli.main(command(on)) == 0
    assert weights(on)["see.weight"].equal(weights(adapted)["see.weight"]), "answers stay"


def test_mistakes_are_errors(drawings, command, capsys):
    def message(*flags: str) -> str:
        assert cli.main([*command(drawings), *flags]) == 2
        return capsys.readouterr().err

    assert "which is made of a dense model; set model.adapt_from" in message("--model.unified.design", "moe")
    assert "model.frozen is 2.0, expected 0 to 1" in message("--model.frozen", "2")
    assert "model.unified.design dense has no routers" in message("--model.frozen", "0.5")
    assert "model.samples is -1, expected at least 0" in message("--model.samples", "-1")
    assert "holds no finished run" in message("--model.adapt_from", "nowhere")
    drawings["data"]["steps"] = 1
    assert cli.main(command(drawings)) == 0
    drawings["model"]["adapt_from"], drawings["output"] = drawings["output"], drawings["output"] + "2"
    found = message("--model.unified.inner", "64")
    assert "is no dense model of these data and sizes (unified.inner: there 32, now 64)" in found


@pytest.mark.parametrize(
    ("uniform", "first", "answer"), [(0.0, WHAT, None), (0.49, WHAT, None), (0.6, IS, YES), (0.9, IS, NO)]
)
def test_questions_are_about_the_image(uniform, first, answer):
    module, label_B = UnifiedModule(), torch.tensor([0, 1, 2])
    module.model = SimpleNamespace(classes=3)
    text_BW, answer_B = module._ask(label_B, torch.full((3,), uniform))
    assert text_BW[:, 0].tolist() == [first] * 3
    assert answer_B.equal(label_B + len(WORDS) if answer is None else torch.full((3,), answer))
    assert bool((text_BW[:, 1] == label_B + len(WORDS)).all()) == (answer == YES)
