"""Answers of a model whose LLM runs in llama.cpp against those of torch, in float32."""

import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.commands import main as cli
from unimoe.data import Collator, Sample
from unimoe.errors import UserError
from unimoe.inference import llama as module
from unimoe.inference.conversation import Conversation, Settings
from unimoe.inference.engines import load_engine
from unimoe.inference.generate import ask_all, generate
from unimoe.inference.gguf import source_hash, write_gguf
from unimoe.inference.llama import LlamaBatch, LlamaPrompt
from unimoe.testing import AUDIO, IMAGE, SPEECH, VIDEO, tiny_model


def text(words):
    return {"type": "text", "text": words}


def image(red):
    return {"type": "image", "image": Image.new("RGB", (40, 30), (red, 90, 160))}


def speech(seconds):
    wave = np.sin(np.arange(int(16000 * seconds)) / 20).astype(np.float32)
    return {"type": "speech", "speech": wave}


def video(*reds):
    frames = [Image.new("RGB", (40, 30), (red, 90, 160)) for red in reds]
    return {"type": "video", "video": frames}


def audio(seconds):
    wave = np.cos(np.arange(int(16000 * seconds)) / 50).astype(np.float32)
    return {"type": "audio", "audio": wave}


QUESTIONS = [
    [text("hi")],
    [image(20), text("What is this?")],
    [image(250), image(90), text("Which of the two is redder, and why?")],
    [image(120), speech(0.5), video(10, 200, 90), audio(0.7), text("What belongs together?")],
    [text("Listen: "), speech(1.5), text(" and answer")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model whose answers do not end by themselves."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    moe = {"experts": {"copies": 3}, "placement": "interval"}
    model, processor = tiny_model(folder.parent, moe, image=IMAGE, video=VIDEO, speech=SPEECH, audio=AUDIO)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.named_parameters():
        if "experts" in name or "router" in name:
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    model.generation_config.eos_token_id = 105
    for part in (model, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNIMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def torch_model(folder):
    return load_engine(str(folder), device="cpu")


@pytest.fixture(scope="module")
def llama(folder):
    loaded = load_engine(str(folder), "llama.cpp", "f32", rows=4, device="cpu")
    yield loaded
    loaded[0].llama.close()


def batch(processor, questions):
    encoded = [
        processor.encode([{"role": "user", "content": question}], add_generation_prompt=True)
        for question in questions
    ]
    return processor.pad(encoded, "left")


def test_the_llm_is_not_in_torch(llama):
    names = {name.split(".")[1] for name, _ in llama[0].named_parameters()}
    assert names == {"encoders", "connectors"}


def test_answers_to_text_and_media_alone_and_in_a_batch_are_those_of_torch(torch_model, llama):
    expected = [generate(*torch_model, batch(torch_model[1], [question]), 20) for question in QUESTIONS]
    alone = [generate(*llama, batch(llama[1], [question]), 20) for question in QUESTIONS]
    assert alone == expected
    assert len({len(answer) for (answer,) in expected}) > 1, "one answer at least ends before the others"
    together = generate(*llama, batch(llama[1], QUESTIONS[:4]), 20)
    assert together == [answer for (answer,) in expected[:4]]
    assert llama[0].llama.lengths == {}


def answers(model, processor, samples):
    batches = ask_all(model, Collator(processor), samples, batch_size=4, max_new_tokens=8)
    return {index: said for one in batches for index, said in one.items()}


def test_questions_of_evaluation(torch_model, llama):
    samples = [Sample([{"role": "user", "content": question}], "test") for question in QUESTIONS]
    found = answers(*llama, samples)
    assert found == answers(*torch_model, samples) and len(found) == len(QUESTIONS)


def test_sampling_follows_the_seed(llama):
    inputs = batch(llama[1], QUESTIONS[:2])

    def sampled(seed):
        torch.manual_seed(seed)
        return generate(*llama, inputs, 12, temperature=2.0)

    assert sampled(1) == sampled(1) != sampled(2)


def test_placeholders_are_never_generated(llama):
    model, processor = llama
    suppressed = model.generation_config.suppress_tokens
    ids = processor.tokenizer.convert_tokens_to_ids(["<image>", "<video>", "<speech>", "<audio>"])
    assert set(ids) <= set(suppressed)
    torch.manual_seed(0)
    with torch.inference_mode():
        found = model.generate(
            **batch(processor, QUESTIONS[:1]), max_new_tokens=300, do_sample=True, temperature=50.0
        )
    prompt = batch(processor, QUESTIONS[:1])["input_ids"].shape[1]
    assert not set(found[0, prompt:].tolist()) & set(suppressed)


def test_chunks_of_a_prompt_and_a_prompt_that_never_joins(llama):
    model, processor = llama
    (segments,) = model.segments(**batch(processor, QUESTIONS[2:3]))
    whole = LlamaPrompt(LlamaBatch(model), list(segments))
    (read, logits_V) = whole.advance(10_000)
    assert read == whole.length
    rows = LlamaBatch(model)
    chunked, counts = LlamaPrompt(rows, list(segments)), []
    while (step := chunked.advance(7))[1] is None:
        counts.append(step[0])
    assert set(counts) == {7}
    torch.testing.assert_close(step[1], logits_V, atol=1e-4, rtol=0)
    LlamaPrompt(rows, [[1, 2, 3]]).advance(3)  # takes its place
    assert list(model.llama.lengths.values()) == [3]
    LlamaBatch(model)
    assert model.llama.lengths == {}


def test_a_conversation(torch_model, llama, capsys):
    said = []
    for model, processor in (torch_model, llama):
        talk = Conversation(model, processor, Settings(max_new_tokens=8))
        talk.attached = [image(40)]
        said.append([talk.ask("What is this?", lambda _: None), talk.ask("And this?", lambda _: None)])
    assert said[0] == said[1]
    assert "".join(talk.stream("More")) == talk.turns[-1]["content"][0]["text"] != ""


def test_it_computes_no_loss(llama):
    with pytest.raises(TypeError, match="only generates"):
        llama[0](input_ids=torch.tensor([[1]]))


def test_other_settings_and_files_are_refused(folder, tmp_path, torch_model, monkeypatch):
    def refused(match, *settings, **more):
        with pytest.raises(UserError, match=match) as error:
            load_engine(*settings, **more)
        assert "\n" not in str(error.value)

    mine = str(folder)
    refused("--type q8_0: the engine torch has no such setting", mine, "torch", "q8_0")
    refused("give one of the two", mine, "llama.cpp", "f32", tmp_path / "m.gguf")
    refused("there is no such file", mine, "llama.cpp", gguf=tmp_path / "m.gguf")
    (tmp_path / "no.gguf").write_bytes(b"not a GGUF file")
    refused("llama.cpp cannot load it", mine, "llama.cpp", gguf=tmp_path / "no.gguf")
    write_gguf(torch_model[0], torch_model[1].tokenizer, tmp_path / "other.gguf", "f32", "another")
    refused("was made of another model", mine, "llama.cpp", gguf=tmp_path / "other.gguf")
    refused("found 300", mine, "llama.cpp", rows=300)
    refused("does not exist", str(tmp_path / "nothing"), "llama.cpp")
    monkeypatch.setattr(module, "find_model", lambda model: ("owner/name", "unimoe"))
    refused("needs a folder", "owner/name", "llama.cpp")


def test_the_cache_keeps_a_file_of_each_type_and_model(folder, llama, monkeypatch):
    monkeypatch.setattr(module, "write_gguf", None)  # nothing is converted again
    assert load_engine(str(folder), "llama.cpp", "f32", device="cpu")[0].file == llama[0].file
    assert source_hash(folder) in llama[0].file.name


def test_the_commands_take_an_engine(folder, tmp_path, capsys):
    flags = ["--engine", "llama.cpp", "--type", "f32"]
    said = {}
    for more in ([], flags):
        assert cli.main(["chat", str(folder), "-p", "hi", "--max-new-tokens", "8", *more]) == 0
        said[len(more)] = capsys.readouterr().out
    assert said[0] == said[4] != "\n"
    assert cli.main(["chat", str(folder), "-p", "hi", "--engine", "llama.cpp", "--type", "q4_1"]) == 2
    assert "q4_1" in capsys.readouterr().err
    data = tmp_path / "questions.jsonl"
    data.write_text('{"id": "1", "text": "hi", "answer": "x"}\n')
    output = ["--output", str(tmp_path / "out"), "--max-new-tokens", "4"]
    asked = ["evaluate", str(folder), str(data), "--task", "vqa", *output]
    assert cli.main([*asked, *flags]) == 0
    assert cli.main(asked) == 2, "predictions of another engine are not continued"
    assert "another engine" in capsys.readouterr().err
