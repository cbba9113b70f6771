import yaml

from unimoe.analysis.memory_plan import Batch, build_frame, make_plan, measure
from unimoe.commands.main import main
from unimoe.stages.trainable import LoRA, Trainable, choose
from unimoe.testing import IMAGE, SPEECH, save_tiny_llm, tiny_model

ROWS, TOKENS, LEARNED = 2, 192, 200
MOE = {"num_experts": 4, "top_k": 2, "placement": "all"}


def settings(llm) -> dict:
    return {
        "llm": str(llm),
        "modalities": {"image": IMAGE, "speech": SPEECH},
        "moe": MOE,
        "trainable": [{"match": "*.mlp.router.*", "lr": 1e-3}],
        "lora": [{"layers": "experts", "rank": 2}],
    }


def test_weights_are_those_of_the_real_model(tmp_path):
    real, _ = tiny_model(tmp_path, MOE)
    choose(real, [Trainable("*.mlp.router.*", 1e-3)], [LoRA("experts", rank=2)])
    frame = build_frame(settings(tmp_path / "llm"))
    sizes = measure(frame)
    assert sizes.total == sum(p.numel() for p in real.parameters())
    assert sizes.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    experts = [p for name, p in real.named_parameters() if ".experts." in name]
    assert sizes.experts[0] == sum(p.numel() for p in experts)
    for name, parts in (("ddp", 1), ("fsdp2", 4)):
        plan = make_plan(frame, sizes, name, 4, Batch(100))
        assert plan.gradients == 4 * sizes.trained / parts
        assert plan.optimizer == 2 * plan.gradients


def test_the_verb_says_what_fits(tmp_path, capsys):
    save_tiny_llm(tmp_path / "llm")
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump({"model": settings(tmp_path / "llm"), "data": {"batch_size": 2}}))
    assert main(["plan", "-c", str(file), "--gpus", "2", "--tokens", "64"]) == 0
    assert "expert_parallel" in (said := capsys.readouterr().out) and "NO" not in said
    assert main(["plan", "-c", str(file), "--gpus", "2", "--memory", "0.001"]) == 1
    assert "yes" not in capsys.readouterr().out
    file.write_text(yaml.safe_dump({"model": {"init_from": str(tmp_path / "nothing")}}))
    assert main(["plan", "-c", str(file)]) == 2
    assert "--frame" in capsys.readouterr().err
