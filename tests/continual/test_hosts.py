"""Continual learning on a stock multimodal model."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForMultimodalLM

from unimoe.commands.main import main
from unimoe.continual.learner import AdapterConfig, Learner
from unimoe.continual.strategies import strategies
from unimoe.continual.stream import Experience, Stream, StreamConfig, TaskConfig
from unimoe.data import Sample
from unimoe.model.host_processor import HostProcessor
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.moe.adapt import PROJECTIONS
from unimoe.testing_hosts import FAMILIES, MIXTURES, inputs, question
from unimoe.training.resume import latest_checkpoint

KILLED = (
    "llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "glm4v", "gemma3"
)  # fmt: skip


def state(folder):
    return torch.load(folder / "state.pt", weights_only=True)["adapters"]


@pytest.fixture
def hosted(config, tmp_path, request):
    """Settings of a run on a dense model (Qwen2.5-VL unless a test names a family): a task of text, then one
    with an image in each sample."""
    for part in FAMILIES[getattr(request, "param", "qwen2_5_vl")][0]():
        part.save_pretrained(tmp_path / "base")
    tasks = config["stream"]["tasks"][:2]
    Image.new("RGB", (28, 28), "red").save(tmp_path / "data" / "red.png")
    for task, path in (("train", tasks[1]["train"]), ("test", tasks[1]["test"])):
        records = json.loads((tmp_path / "data" / path).read_text())
        for one in records:
            one["image"] = "red.png"
            if task == "train":
                one["conversations"][0]["value"] = "<image>\n" + one["conversations"][0]["value"]
        (tmp_path / "data" / path).write_text(json.dumps(records))
    config["stream"]["tasks"] = tasks
    config["model"] = {"init_from": str(tmp_path / "base")}
    return config


def test_dymoe_keeps_old_banks_and_peft_loads_the_new_one(hosted, command, tmp_path):
    assert main(command(hosted, "run", "--strategy", "dymoe")) == 0
    first, second = (state(tmp_path / "run" / folder) for folder in ("01-upper", "02-twice"))
    old = [name for name in first if ".banks.0." in name]
    assert old and all(torch.equal(first[name], second[name]) for name in old)
    assert main(["continual", "export", str(tmp_path / "run"), str(tmp_path / "bank")]) == 0
    stock = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(stock, str(tmp_path / "bank"))
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default"
    assert torch.equal(loaded.get_submodule(name).weight, second["layers.0.mlp.up_proj.banks.1.A"])
    batch = inputs(FAMILIES["qwen2_5_vl"][0]()[1], question("image"))
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(**batch).logits
    with torch.no_grad():
        assert (loaded(**batch).logits - plain).abs().max() > 1e-4


def test_a_run_with_cached_features_is_the_same(hosted, command, tmp_path):
    found = {}
    for features in (None, str(tmp_path / "features")):
        hosted["model"]["features"] = features
        assert main(command(hosted, "run", "--strategy", "lora")) == 0
        found[features] = state(tmp_path / "run" / "02-twice")
        shutil.rmtree(tmp_path / "run")
    plain, cached = found.values()
    assert len(list((tmp_path / "features").iterdir())) == 1
    for name, one in plain.items():
        torch.testing.assert_close(cached[name], one, rtol=0, atol=1e-5)


def base_of(model):
    """A copy of all weights but adapters."""
    state = model.state_dict()
    return {key: one.clone() for key, one in state.items() if "banks" not in key and ".router." not in key}


def learn(strategy, tasks):
    """Two steps on each task."""
    for task in tasks:
        strategy.model_adaptation(task.index)
        strategy.learner.train_bank(-1)
        strategy.before_training_exp(task)
        strategy.learner.check_budget()
        batch = strategy.learner.collate(task.samples[:3])
        trained = strategy.learner.trainable()
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        for step in range(2):
            strategy.before_training_iteration()
            (strategy.loss(batch, step, 2) + strategy.penalty()).backward()
            optimizer.step()
        assert any(weight.grad is not None and weight.grad.any() for weight in trained.values())
        strategy.after_training_exp(task)
        strategy.learner.train_bank(None)


FAMILIES_BESIDES = [name for name in FAMILIES if name not in ("paligemma", "qwen2_5_vl")]


@pytest.mark.parametrize("name", [*FAMILIES_BESIDES, *MIXTURES])
def test_dymoe_learns_two_tasks_with_every_family(name):
    model, processor = MIXTURES[name]() if name in MIXTURES else FAMILIES[name][0]()
    said = {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]}
    media = ("image",) if name in ("glm4v", *MIXTURES) else FAMILIES[name][1]  # it takes one modality
    targets = ["q_proj", "v_proj"] if name in MIXTURES else list(PROJECTIONS)
    tasks = [
        Experience(index, TaskConfig(str(index), "", ""), [Sample([*question(*kinds), said], "a")] * 2, [])
        for index, kinds in enumerate(((), media))
    ]
    strategy = strategies()["dymoe"](k=4, temperature=0.1)
    adapters = AdapterConfig(experts=4, rank=2, alpha=16, targets=targets)
    strategy.attach(Learner(model, HostProcessor(processor), adapters))
    base = base_of(model)
    learn(strategy, tasks[:1])
    first = {key: one.clone() for key, one in strategy.learner.adapters().items()}
    learn(strategy, tasks[1:])
    found = strategy.learner.adapters()
    assert len(found) > len(first) and all(torch.equal(found[key], one) for key, one in first.items())
    assert all(torch.equal(weight, base[key]) for key, weight in base_of(model).items())


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("name", strategies())
def test_every_strategy_learns_two_tasks(name, sparse, hosted):
    model, processor = FAMILIES["qwen2_5_vl"][0]()
    if sparse:
        upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 2}}))
    entries = [TaskConfig(**entry) for entry in hosted["stream"]["tasks"]]
    tasks = Stream(StreamConfig(entries, root=hosted["stream"]["root"]))
    strategy = strategies()[name]()
    strategy.attach(Learner(model, HostProcessor(processor), AdapterConfig(experts=4, rank=2, alpha=16)))
    base = base_of(model)
    learn(strategy, list(tasks))
    assert all(torch.equal(weight, base[key]) for key, weight in base_of(model).items())
    if name == "hide":
        first, second = strategy.memory["prototypes"].values()
        assert set(first) == {"text"} and set(second) == {"text", "image"}
        asked = strategy.learner.collator.prompts([tasks[1].questions[0].sample])
        strategy.before_eval(asked)
        assert strategy.mixed.weight_BK[0].argmax() == 1
        strategy.after_eval()


@pytest.mark.slow
@pytest.mark.parametrize("hosted", KILLED, indirect=True)
def test_kill_9_inside_the_second_task_changes_nothing(hosted, command, killed, tmp_path):
    assert main(command(hosted, "whole", "--strategy", "dymoe")) == 0
    arguments = command(hosted, "killed", "--strategy", "dymoe")
    killed("02-twice", 2, arguments)
    assert latest_checkpoint(tmp_path / "killed" / "02-twice" / "last.ckpt") is not None
    assert main(arguments) == 0
    one, other = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed"))
    assert one["matrix"] == other["matrix"]
    one, other = (state(tmp_path / name / "02-twice") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(other[key], one[key]) for key in one)
