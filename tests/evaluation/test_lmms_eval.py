"""The class for lmms-eval, on its own base class where it is installed, else on one of the same signatures.

lmms-eval 0.7.3 cannot be installed beside our pins (it wants av < 16); to try the real one, make an
environment with `pip install pytest -e '.[lmms-eval]'`.
"""

import abc
import sys
import tomllib
import types
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.errors import UserError
from unimoe.inference.generate import generate
from unimoe.testing import run_together, tiny_model

INSTALLED = find_spec("lmms_eval") is not None
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def harness():
    if INSTALLED:
        yield
        return

    class Lmms(abc.ABC):  # noqa: B024  (the methods are made below)
        is_simple = True

        def __init__(self):
            self.rank, self.task_dict, self.cached = 0, {}, []
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))

        loglikelihood = abc.abstractmethod(lambda self, requests: None)
        generate_until = abc.abstractmethod(lambda self, requests: None)
        generate_until_multi_round = abc.abstractmethod(lambda self, requests: None)

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple[str, ...] = ()

    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    modules["lmms_eval.api.model"] = types.ModuleType("lmms_eval.api.model")
    modules["lmms_eval.api.model"].lmms = Lmms
    modules["lmms_eval.models.registry_v2"] = types.ModuleType("lmms_eval.models.registry_v2")
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield
    sys.modules.pop("unimoe.evaluation.lmms_eval", None)  # made on the stand-in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, processor = tiny_model(tmp_path_factory.mktemp("parts"))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture
def asked(folder):
    """The model in the harness, with a task of three documents."""
    model = import_module("unimoe.evaluation.lmms_eval").UniMoe(
        pretrained=str(folder), batch_size="2", device="cpu"
    )
    sound = {"array": np.full(22050, 0.1, np.float32), "sampling_rate": 22050}
    red = Image.new("RGB", (30, 20), "red")
    documents = [
        [{"type": "image", "url": red}, {"type": "text", "text": "What is it?"}],
        [{"type": "audio", "url": sound}],
        [{"type": "text", "text": "Say something long, please."}],
    ]
    model.task_dict = {"things": {"test": documents}}
    return model


def request(number, **settings):
    def to_messages(content):
        return [{"role": "user", "content": content}]

    arguments = ("context", to_messages, {"max_new_tokens": 4, **settings}, number, "things", "test")
    return types.SimpleNamespace(args=arguments)


def test_the_entry_point_names_a_class_for_messages():
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, name = entries["lmms_eval.models"]["unimoe"].split(":")
    manifest = getattr(import_module(module), name)()
    assert manifest.model_id == "unimoe"
    module, _, name = manifest.chat_class_path.rpartition(".")
    assert getattr(import_module(module), name).is_simple is False


def test_answers_are_those_of_the_model_in_the_order_of_the_requests(asked):
    answers = asked.generate_until([request(2), request(0), request(1), request(0, max_new_tokens=2)])
    for answer, (number, most) in zip(answers, [(2, 4), (0, 4), (1, 4), (0, 2)], strict=True):
        content = asked._sample(*request(number).args).messages
        batch = asked.processor.apply_chat_template([content], tokenize=True, add_generation_prompt=True)
        assert [answer] == generate(asked.model, asked.processor, batch, most)


PROCESS = """
import os, sys, types
os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch --cpu` says it
stand_in = types.ModuleType("lmms_eval.api.model")
stand_in.lmms = object
for name in ("lmms_eval", "lmms_eval.api"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["lmms_eval.api.model"] = stand_in
import torch
from unimoe.evaluation.lmms_eval import UniMoe
model = UniMoe(sys.argv[1], device="cpu")
questions = torch.tensor(3 + model._rank, device=model.device)
print("shares", model._rank, model._world_size, model.accelerator.gather(questions).tolist())
model.accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_every_process_knows_its_share(folder):
    said = run_together(2, PROCESS, str(folder))
    assert ["shares 0 2 [3, 4]" in said[0], "shares 1 2 [3, 4]" in said[1]] == [True, True], said


def test_sounds_are_resampled_and_go_where_the_model_hears(asked, folder):
    part = asked._part({"type": "audio", "url": {"array": np.zeros(9), "sampling_rate": 8000}})
    assert part["type"] == "speech" and part["sampling_rate"] == 8000
    decoded = types.SimpleNamespace(data=torch.zeros(2, 9), sample_rate=8000)
    part = asked._part({"type": "audio", "url": types.SimpleNamespace(get_all_samples=lambda: decoded)})
    assert part["speech"].shape == (9, 2) and part["sampling_rate"] == 8000
    assert asked._part({"type": "video", "url": "a.mp4"}) == {"type": "video", "path": "a.mp4"}
    with pytest.raises(UserError, match="the model understands speech"):
        type(asked)(pretrained=str(folder), device="cpu", audio_modality="audio")


def test_answers_end_where_the_task_says_and_what_is_not_heeded_is_heard(asked, caplog):
    most, until = asked._settings({"until": ["\n\n"], "do_sample": False, "temperature": 0, "top_p": 1.0})
    assert (most, until, caplog.text) == (128, ["\n\n"], "")
    asked._settings({"do_sample": True, "num_beams": 4})
    assert "do_sample True is ignored" in caplog.text and "num_beams 4 is ignored" in caplog.text
    assert import_module("unimoe.evaluation.lmms_eval").cut("one\n\ntwo", ["\n\n", "w"]) == "one"


def test_what_it_cannot_do_is_one_line(asked, folder):
    with pytest.raises(UserError, match="not for likelihoods"):
        asked.loglikelihood([])
    with pytest.raises(UserError, match="tasks of one round"):
        asked.generate_until_multi_round([])
    with pytest.raises(UserError, match="batch_size is auto, expected a whole number"):
        type(asked)(pretrained=str(folder), batch_size="auto", device="cpu")


@pytest.mark.skipif(not INSTALLED, reason="LMMS-EVAL IS NOT INSTALLED: its evaluator is not run")
def test_lmms_evals_own_evaluator_runs_a_task(folder, tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    rows = "".join(f'{{"question": "Say {word}.", "answer": "{word}"}}\n' for word in ("a", "b", "c"))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "things.yaml").write_text(
        "task: things_of_unimoe\noutput_type: generate_until\ntest_split: test\n"
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {max_new_tokens: 3, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    found = simple_evaluate(
        model="unimoe",
        model_args=f"pretrained={folder}",
        tasks=["things_of_unimoe"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        batch_size=2,
        device="cpu",
        log_samples=True,
    )
    assert len(found["samples"]["things_of_unimoe"]) == 3
    assert "exact_match,none" in found["results"]["things_of_unimoe"]
