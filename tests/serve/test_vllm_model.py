"""vLLM's answers beside those of ``model.generate``; needs benchmarks/make_vllm_env.sh."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy as np
import openai
import pytest
import soundfile
import torch
from PIL import Image

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# a process without Whisper's numba, some of whose objects vLLM cannot look into
os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"

vllm = pytest.importorskip("vllm", reason="NOT RUN: vLLM is not installed (benchmarks/make_vllm_env.sh)")

from unimoe.media.video import write_video  # noqa: E402
from unimoe.model.loading import load_model  # noqa: E402
from unimoe.testing import AUDIO, IMAGE, SPEECH, VIDEO, save_tiny_llm, tiny_model  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MEDIA = {"image": IMAGE, "video": VIDEO, "speech": SPEECH, "audio": AUDIO}
TOP_K = {"placement": [1], "shared": {"count": 1}, "experts": {"slices": 2}, "router": {"k": 3}}
TOP_P = {"placement": "all", "router": {"kind": "top_p", "p": 0.5, "init_std": 0.5, "null_experts": 1}}
TOKENS = 20


def url(kind, content):
    return {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}


def noise(seed, shape):
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Content parts as clients send them, and our modality of each."""
    png, wav = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise(0, (50, 70, 3))).save(png, "png")
    soundfile.write(wav, noise(1, 20_000) / 128 - 1, 22_050, format="wav")
    mp4 = tmp_path_factory.mktemp("video") / "video.mp4"
    write_video(mp4, [Image.fromarray(noise(seed, (64, 64, 3))) for seed in range(6)], 2)
    sound = base64.b64encode(wav.getvalue()).decode()
    return {
        "image": {"type": "image_url", "image_url": url("image/png", png.getvalue())},
        "video": {"type": "video_url", "video_url": url("video/mp4", mp4.read_bytes())},
        "speech": {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        "audio": {"type": "audio_url", "audio_url": url("audio/wav", wav.getvalue())},
    }


def to_ours(modality, part):
    sound = part.get("input_audio")
    given = url("audio/wav", base64.b64decode(sound["data"])) if sound else part[part["type"]]
    return {"type": modality, **given}


def questions(parts):
    """Content as vLLM and as our processor take it."""
    text = {"type": "text", "text": "what does <image> mean?"}
    yield [text], [text]
    for names in (*((name,) for name in parts), ("audio", "speech"), ("image", "speech", "image"), parts):
        yield [*map(parts.get, names), text], [*(to_ours(n, parts[n]) for n in names), text]


def save_model(folder, moe):
    """The folder of a random model of all modalities that never ends an answer."""
    save_tiny_llm(folder / "llm", hidden_size=128)  # vLLM knows no attention heads below 32 on a CPU
    model, processor = tiny_model(folder, moe, **MEDIA)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize("moe", [TOP_K, TOP_P, None], ids=["top_k", "top_p", "dense"])
def test_greedy_answers_equal_those_of_generate(tmp_path, parts, moe):
    folder = save_model(tmp_path, moe)
    model, processor = load_model(folder, dtype="float32", device="cpu")
    asked = list(questions(parts))
    engine = vllm.LLM(folder, dtype="float32", enforce_eager=True, max_model_len=2048)
    try:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        found = engine.chat([[{"role": "user", "content": content}] for content, _ in asked], sampling)
    finally:
        engine.llm_engine.engine_core.shutdown()
    for (_, content), answer in zip(asked, found, strict=True):
        batch = processor.pad([processor.encode([{"role": "user", "content": content}], True)])
        assert answer.prompt_token_ids == batch["input_ids"][0].tolist()
        with torch.inference_mode():
            expected = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
        expected = expected[0, batch["input_ids"].shape[1] :].tolist()
        assert list(answer.outputs[0].token_ids) == expected


@pytest.fixture
def client(tmp_path):
    """An OpenAI client of a vLLM server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = "--served-model-name tiny --dtype float32 --enforce-eager --max-model-len 2048 --host 127.0.0.1"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags.split(), "--port", port]
    server = subprocess.Popen([*command, "--model", save_model(tmp_path, TOP_P)])
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            for _ in range(600):
                assert server.poll() is None, "the server ended"
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    time.sleep(1)
            yield client
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_an_openai_client_gets_answers(client, parts):
    content = [*parts.values(), {"type": "text", "text": "what does <image> mean?"}]
    ask = partial(
        client.chat.completions.create, model="tiny", messages=[{"role": "user", "content": content}]
    )
    answer = ask(max_tokens=8)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(max_tokens=8, stream=True)]
    assert "".join(streamed) == answer.choices[0].message.content  # greedy, though no temperature was given
    schema = {"type": "object", "properties": {"kind": {"enum": ["cat", "dog"]}}, "required": ["kind"]}
    wanted = {"name": "answer", "schema": {**schema, "additionalProperties": False}}
    found = ask(max_tokens=200, response_format={"type": "json_schema", "json_schema": wanted})
    assert json.loads(found.choices[0].message.content)["kind"] in ("cat", "dog")
    with pytest.raises(openai.BadRequestError, match="no tools"):
        ask(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")
