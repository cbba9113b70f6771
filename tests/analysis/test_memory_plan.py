import json

import yaml

from unimoe.analysis.memory_plan import Batch, build_frame, make_plan, measure, plan_batch
from unimoe.commands.main import main
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.stages.trainable import LoRA, Trainable, choose
from unimoe.testing import IMAGE, SPEECH, save_tiny_llm, tiny_model
from unimoe.testing_hosts import FAMILIES

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


def test_weights_of_16_bits_take_half(tmp_path):
    save_tiny_llm(tmp_path / "llm")
    stage = settings(tmp_path / "llm")
    frame = build_frame(stage)
    sizes = measure(frame)
    plans = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        batch = plan_batch(frame, {"model": stage, "trainer": {"precision": precision}}, 64)
        plans[precision] = {name: make_plan(frame, sizes, name, 2, batch) for name in ("ddp", "fsdp2")}
    whole, mixed, half = plans.values()
    for name in ("ddp", "fsdp2"):
        assert mixed[name].weights == whole[name].weights == 2 * half[name].weights
        assert whole[name].optimizer == 2 * half[name].optimizer == 4 * half[name].gradients
        assert half[name].activations == mixed[name].activations < whole[name].activations
    assert mixed["ddp"].gathered > 0 == half["ddp"].gathered
    assert whole["ddp"].sent == mixed["ddp"].sent == 2 * half["ddp"].sent
    assert half["fsdp2"].sent == mixed["fsdp2"].sent  # gradients are reduced in float32


def test_a_host_has_the_weights_of_the_real_model(tmp_path):
    model, processor = FAMILIES["qwen2_5_vl"][0]()
    upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 4}, "placement": "all"}))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    settings = {"init_from": str(tmp_path), "lora": [{"layers": "experts", "rank": 2}]}
    frame = build_frame(settings)
    choose(model, [], [LoRA("experts", rank=2)])
    sizes = measure(frame)
    assert sizes.total == sum(p.numel() for p in model.parameters())
    assert sizes.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.towers[0] == sum(p.numel() for p in model.model.visual.parameters())
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert sizes.experts[0] == sum(p.numel() for p in experts)
    assert make_plan(frame, sizes, "expert_parallel", 4, Batch(100)).traffic > 0


def test_a_host_is_planned_by_its_frame(tmp_path, capsys):
    model, _ = FAMILIES["llava"][0]()
    values = model.config.to_dict() | {"quantization_config": {"quant_method": "unimoe", "moe": MOE}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    stage = {"init_from": "runs/none", "lora": [{"layers": "experts", "rank": 2}]}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump({"model": stage, "data": {"batch_size": 2}}))
    words = ["plan", "-c", str(tmp_path / "stage.yaml"), "--frame"]
    assert main([*words, str(tmp_path / "config.json"), "--gpus", "1", "--tokens", "64"]) == 0
    assert "fsdp2" in capsys.readouterr().out
    (tmp_path / "frame.yaml").write_text("model_type: bert")
    assert main([*words, str(tmp_path / "frame.yaml")]) == 2
    assert "found a model of type 'bert'" in capsys.readouterr().err
