import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForMultimodalLM

from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe import MoELayer, record
from unimoe.testing import AUDIO, IMAGE, SPEECH, VIDEO, run_together, tiny_model


@pytest.fixture(scope="module", params=["dense", "moe"])
def built(request, tmp_path_factory):
    moe = {"num_experts": 4, "top_k": 2, "placement": "interval"} if request.param == "moe" else None
    return tiny_model(tmp_path_factory.mktemp(request.param), moe)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A mixture that takes all media."""
    media = {"image": IMAGE, "video": VIDEO, "speech": SPEECH, "audio": AUDIO}
    return tiny_model(tmp_path_factory.mktemp("every"), {"num_experts": 4, "top_k": 2}, **media)


def image(color):
    return {"type": "image", "image": Image.new("RGB", (80, 50), color)}


def speech(seconds, seed=0):
    sound = np.random.default_rng(seed).normal(0, 0.1, int(16_000 * seconds)).astype(np.float32)
    return {"type": "speech", "speech": sound}


def audio(seconds, seed=0):
    return {"type": "audio", "audio": speech(seconds, seed)["speech"]}


def video(*colors):
    return {"type": "video", "video": [image(color)["image"] for color in colors]}


def text(value):
    return {"type": "text", "text": value}


CONVERSATIONS = [
    [{"role": "user", "content": [text("plain words only")]}],
    [{"role": "user", "content": [image("red"), text("what is this?")]}],
    [{"role": "user", "content": [speech(0.7)]}],
    [{"role": "user", "content": [image("blue"), speech(1.3, 1), image("green"), text("and these?")]}],
]


EVERY = [
    [{"role": "user", "content": [video("red", "blue"), text("what first?")]}],
    [{"role": "user", "content": [audio(31), text("what is heard?")]}],
    [
        {
            "role": "user",
            "content": [
                image("red"), audio(0.4, 2), text("and"), video("green", "red", "blue"),
                image("blue"), speech(0.6, 3), video("blue"), audio(0.9, 4),
            ],
        }
    ],
    *CONVERSATIONS,
]  # fmt: skip


def batch(processor, rows):
    return processor.apply_chat_template(rows, tokenize=True, add_generation_prompt=True)


def test_a_mixed_batch_equals_its_samples_one_by_one(every):
    model, processor = every
    with torch.no_grad():
        together = model(**batch(processor, EVERY)).logits
        for row, conversation in enumerate(EVERY):
            alone = model(**batch(processor, [conversation])).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=1e-4, rtol=1e-4)


def test_all_windows_of_all_rows_are_one_batch(every):
    model, processor = every
    batches = []
    encoder = model.model.encoders["audio"]
    handle = encoder.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    with torch.no_grad():
        model(**batch(processor, EVERY[1:3]))
    handle.remove()
    assert batches == [4]  # two windows of 31 s, and two short sounds


def test_the_order_of_frames_and_of_media_matters(every):
    model, processor = every
    first, last = EVERY[2][0]["content"], []
    with torch.no_grad():
        for content in (
            first,
            [*first[:3], video("blue", "red", "green"), *first[4:]],
            [first[4], *first[1:4], first[0], *first[5:]],
        ):
            last.append(model(**batch(processor, [[{"role": "user", "content": content}]])).logits[0, -1])
    assert (last[0] - last[1]).abs().max() > 1e-4 and (last[0] - last[2]).abs().max() > 1e-4


def test_several_answers_see_the_same_media_of_every_kind(every):
    model, processor = every
    inputs = batch(processor, EVERY[:3])
    settings = {"do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    logits = model.generate(**inputs, num_return_sequences=2, max_new_tokens=1, **settings).logits[0]
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
    torch.testing.assert_close(logits[::2], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[1::2], expected, atol=1e-4, rtol=1e-4)


def test_generation_in_a_batch_equals_generation_alone(built):
    model, processor = built
    settings = {"max_new_tokens": 6, "do_sample": False}
    inputs = batch(processor, CONVERSATIONS)
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    for row, conversation in enumerate(CONVERSATIONS):
        inputs = batch(processor, [conversation])
        alone = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_cached_decoding_equals_the_full_forward(built):
    model, processor = built
    inputs = batch(processor, [CONVERSATIONS[3]])
    generated = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    inputs["input_ids"] = generated.sequences
    inputs["attention_mask"] = torch.ones_like(generated.sequences)
    with torch.no_grad():
        full = model(**inputs).logits
    start = generated.sequences.shape[1] - len(generated.logits)
    for step, logits in enumerate(generated.logits):
        torch.testing.assert_close(logits[0], full[0, start + step - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("row", "runs"), [(0, set()), (1, {"image"}), (2, {"speech"}), (3, {"image", "speech"})]
)
def test_an_absent_medium_runs_no_encoder(built, row, runs):
    model, processor = built
    ran = set()
    handles = [
        encoder.register_forward_hook(lambda *_, kind=kind: ran.add(kind))
        for kind, encoder in model.model.encoders.items()
    ]
    with torch.no_grad():
        model(**batch(processor, [CONVERSATIONS[row]]))
    for handle in handles:
        handle.remove()
    assert ran == runs


def test_features_computed_beforehand_take_the_place_of_media(built):
    model, processor = built
    inputs = batch(processor, CONVERSATIONS)
    with torch.no_grad():
        expected = model(**inputs).logits
        encoded = {
            "image": model.model.encoders["image"](inputs.pop("pixel_values")),
            "speech": model.model.encoders["speech"](
                inputs.pop("speech_features"), inputs.pop("speech_frames")
            ),
        }
        found = model(**inputs, encoded_media=encoded).logits
    torch.testing.assert_close(found, expected)


def test_placeholders_without_their_media_are_refused(built):
    model, processor = built
    inputs = batch(processor, [CONVERSATIONS[3]])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    with pytest.raises(
        ValueError, match=r"\[8\] <image> placeholder tokens \(8 in all\), but the image inputs give 4"
    ):
        model(**inputs)


def test_a_medium_without_encoder_is_refused(tmp_path):
    model, processor = tiny_model(tmp_path, image=IMAGE)
    inputs = batch(processor, [CONVERSATIONS[0]])
    with pytest.raises(ValueError, match="this model has no speech encoder"):
        model(**inputs, speech_features=torch.zeros(1, 80, 100), speech_frames=torch.tensor([100]))


def test_saved_and_loaded_in_a_new_process_it_answers_the_same(built, tmp_path):
    """Bit for bit: both models have their weights in aligned memory, wherever the files have them."""
    model, processor = built
    assert all(weight.data_ptr() % 64 == 0 for weight in model.parameters())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = batch(processor, CONVERSATIONS)
    with torch.no_grad():
        logits = model(**inputs).logits
    greedy = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    torch.save({"inputs": dict(inputs), "logits": logits, "greedy": greedy}, tmp_path / "expected.pt")
    script = """
import sys, torch, unimoe
from transformers import AutoModelForMultimodalLM, AutoProcessor
torch.set_num_threads(1)
folder = sys.argv[1]
expected = torch.load(folder + "/expected.pt")
model = AutoModelForMultimodalLM.from_pretrained(folder)
assert all(weight.data_ptr() % 64 == 0 for weight in model.parameters())
AutoProcessor.from_pretrained(folder)
with torch.no_grad():
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"])
greedy = model.generate(**expected["inputs"], max_new_tokens=5, do_sample=False)
assert torch.equal(greedy, expected["greedy"])
print("same")
"""
    if not model.config.moe:  # what follows ``import unimoe`` alone is shown once
        assert run_together(1, script, str(tmp_path))[0].splitlines()[-1] == "same"
        return
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "same", run.stderr


def test_every_trainable_parameter_gets_a_gradient(built):
    model, processor = built
    inputs = processor.apply_chat_template(CONVERSATIONS, tokenize=True)
    model.train()
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    model.zero_grad()
    model.eval()
    if model.config.moe:
        assert output.aux_loss > 0


def test_router_logits_and_records_agree(built):
    model, processor = built
    inputs = batch(processor, CONVERSATIONS)
    layers = sum(isinstance(module, MoELayer) for module in model.modules())
    with torch.no_grad(), record() as records:
        output = model(**inputs, output_router_logits=True)
    assert len(output.router_logits) == len(records) == layers
    if layers:
        modality = records[0].ctx.modality_T.view(inputs["input_ids"].shape)
        assert (modality[3] == 1).sum() == 8 and (modality[2] == 3).sum() == 7
        assert torch.equal(records[0].ctx.pad_T.view_as(modality), inputs["attention_mask"] == 0)


def test_loading_reports_no_missing_and_no_unexpected_key(built, tmp_path):
    built[0].save_pretrained(tmp_path)
    model, info = AutoModelForMultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, UniMoeForConditionalGeneration)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_gradient_checkpointing_gives_the_same_gradients(built):
    model, processor = built
    inputs = processor.apply_chat_template(CONVERSATIONS, tokenize=True)
    gradients = []
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_embeddings_take_the_place_of_tokens_and_media(built):
    """In ``forward`` and in ``generate``."""
    model, processor = built
    inputs = batch(processor, CONVERSATIONS[1:2])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        embeds_BTH = model.model.embed(inputs["input_ids"], pixel_values=inputs["pixel_values"])
        logits = model(inputs_embeds=embeds_BTH, attention_mask=inputs["attention_mask"]).logits
        torch.testing.assert_close(logits, model(**inputs).logits)
    found = model.generate(inputs_embeds=embeds_BTH, attention_mask=inputs["attention_mask"], **settings)
    assert found[0].tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="media need input_ids alone"):
        model(inputs_embeds=embeds_BTH, pixel_values=inputs["pixel_values"])


def test_padding_is_known_without_ids(built):
    """So that it takes no expert's place and counts in no load."""
    model, processor = built
    inputs = batch(processor, CONVERSATIONS[:2])
    with torch.no_grad(), record() as records:
        embeds_BTH = model.model.embed(inputs["input_ids"], pixel_values=inputs["pixel_values"])
        model(inputs_embeds=embeds_BTH, attention_mask=inputs["attention_mask"])
    wanted_T = inputs["attention_mask"].flatten() == 0
    assert wanted_T.any()
    for entry in records:
        assert torch.equal(entry.ctx.pad_T, wanted_T) and not entry.ctx.modality_T.any()


def test_a_tuple_is_returned_on_request(built):
    model, processor = built
    inputs = batch(processor, CONVERSATIONS[:1])
    with torch.no_grad():
        found = model(**inputs, return_dict=False)
        assert isinstance(found, tuple) and torch.equal(found[0], model(**inputs).logits)


def test_misspelt_arguments_of_generate_are_refused(built):
    model, processor = built
    with pytest.raises(ValueError, match="pixel_valeus"):
        model.generate(**batch(processor, CONVERSATIONS[:1]), pixel_valeus=torch.zeros(1), max_new_tokens=1)


def test_a_loaded_model_does_not_read_the_file_any_more(built, tmp_path):
    """safetensors maps the file; a server whose folder is replaced must answer as before."""
    model, processor = built
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    inputs = batch(processor, CONVERSATIONS[1:2])
    with torch.no_grad():
        before = loaded(**inputs).logits
        file = tmp_path / "model.safetensors"
        size = file.stat().st_size
        with file.open("r+b") as opened:  # in place: whoever has mapped the file sees it
            opened.write(b"\xff" * size)
        assert torch.equal(loaded(**inputs).logits, before)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.parameters())


@pytest.mark.parametrize("way", ["device_map", "cpu_offload", "disk_offload"])
def test_offloaded_weights_answer_the_same(built, way, tmp_path):
    """accelerate fetches weights in the hooks of modules: those must be called, not read past."""
    model, processor = built
    model.save_pretrained(tmp_path / "model")
    inputs = batch(processor, CONVERSATIONS[1:2])
    settings = {
        "offload_folder": tmp_path / "offloaded",
        "device_map": "auto",
        "max_memory": {"cpu": "200KB"},
    }
    loaded = AutoModelForMultimodalLM.from_pretrained(
        tmp_path / "model", **(settings if way == "device_map" else {})
    )
    if way == "cpu_offload":
        cpu_offload(loaded, execution_device=torch.device("cpu"))
    elif way == "disk_offload":
        disk_offload(loaded, tmp_path / "offloaded", execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in loaded.parameters())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["encoders", "connectors", "router"]},
    ],
    ids=["all-linear", "experts", "whole modules"],
)
def test_adapters_of_peft_train_save_and_merge(settings, tmp_path):
    model, processor = tiny_model(tmp_path, {"num_experts": 4, "top_k": 2})
    model.save_pretrained(tmp_path / "model")
    inputs = processor.apply_chat_template(CONVERSATIONS[1:2], tokenize=True)

    def fresh():
        return AutoModelForMultimodalLM.from_pretrained(tmp_path / "model")

    def loss(of):
        with torch.no_grad():
            return float(of.eval()(**inputs, labels=inputs["input_ids"]).loss)

    adapters = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(fresh(), adapters)
    copies = {name: p for name, p in adapted.named_parameters() if ".modules_to_save." in name}
    assert {name.split(".modules_to_save.")[0].rpartition(".")[2] for name in copies} == set(
        settings.get("modules_to_save", [])
    )
    with torch.no_grad():
        for parameter in copies.values():  # as if they had been trained
            parameter.mul_(1.5)
    found = loss(adapted)
    assert abs(found - loss(fresh())) > 1e-3
    question = batch(processor, CONVERSATIONS[1:2])
    answers = adapted.generate(**question, do_sample=True, num_return_sequences=2, max_new_tokens=1)
    assert len(answers) == 2
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert loss(again) == pytest.approx(found, abs=1e-4)
    merged = again.merge_and_unload()
    assert loss(merged) == pytest.approx(found, abs=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert loss(AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged")) == pytest.approx(
        found, abs=1e-3
    )
