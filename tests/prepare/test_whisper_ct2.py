"""The reader of CTranslate2 files and the map to openai-whisper's names, on a tiny synthetic model."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from whisper.model import ModelDimensions, Whisper

from unimoe.errors import UserError
from unimoe.prepare import default_part
from unimoe.prepare.whisper_ct2 import dimensions, read_ct2, to_openai

DIMS = ModelDimensions(
    n_mels=5,
    n_audio_ctx=6,
    n_audio_state=128,
    n_audio_head=2,
    n_audio_layer=1,
    n_vocab=11,
    n_text_ctx=7,
    n_text_state=128,
    n_text_head=2,
    n_text_layer=2,
)


def pack(tensors: dict[str, np.ndarray], aliases: dict[str, str], spec: str = "WhisperSpec") -> bytes:
    """A file of the format, written from its description."""

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    data = struct.pack("<I", 6) + text(spec) + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        data += text(name) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        data += struct.pack("<BI", kinds[str(value.dtype)], value.nbytes) + value.tobytes()
    data += struct.pack("<I", len(aliases))
    for alias, name in aliases.items():
        data += text(alias) + text(name)
    return data


def from_openai(model: Whisper) -> dict[str, np.ndarray]:
    """The tensors of ``model`` under CTranslate2's names, float16, by asking each module, not by renaming."""
    tensors = {}

    def put(name: str, *values: Any, like: torch.Tensor | None = None) -> None:
        full = [
            torch.zeros(like.shape[0]) if value is None and like is not None else value for value in values
        ]
        tensors[name] = torch.cat([value for value in full if value is not None]).detach().half().numpy()

    def linear(name: str, *layers) -> None:
        put(name + "/weight", *(layer.weight for layer in layers))
        put(name + "/bias", *(layer.bias for layer in layers), like=layers[0].weight)

    def norm(name: str, layer) -> None:
        put(name + "/gamma", layer.weight)
        put(name + "/beta", layer.bias)

    stacks: tuple[tuple[str, Any], ...] = (("encoder", model.encoder), ("decoder", model.decoder))
    for side, stack in stacks:
        put(f"{side}/position_encodings/encodings", stack.positional_embedding)
        norm(f"{side}/layer_norm", stack.ln_post if side == "encoder" else stack.ln)
        for number, block in enumerate(stack.blocks):
            at = f"{side}/layer_{number}"
            linear(f"{at}/self_attention/linear_0", block.attn.query, block.attn.key, block.attn.value)
            linear(f"{at}/self_attention/linear_1", block.attn.out)
            norm(f"{at}/self_attention/layer_norm", block.attn_ln)
            if block.cross_attn is not None:
                linear(f"{at}/attention/linear_0", block.cross_attn.query)
                linear(f"{at}/attention/linear_1", block.cross_attn.key, block.cross_attn.value)
                linear(f"{at}/attention/linear_2", block.cross_attn.out)
                norm(f"{at}/attention/layer_norm", block.cross_attn_ln)
            linear(f"{at}/ffn/linear_0", block.mlp[0])
            linear(f"{at}/ffn/linear_1", block.mlp[2])
            norm(f"{at}/ffn/layer_norm", block.mlp_ln)
    linear("encoder/conv1", model.encoder.conv1)
    linear("encoder/conv2", model.encoder.conv2)
    put("decoder/embeddings/weight", model.decoder.token_embedding.weight)
    return tensors


@pytest.fixture
def tiny() -> Whisper:
    model = Whisper(DIMS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
        parameter.data = parameter.data.half().float()  # exact in the file
    model.encoder.positional_embedding = model.encoder.positional_embedding.half().float()
    return model.eval()


def test_reads_what_was_written():
    tensors = {
        "a/weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([[-3]], dtype=np.int8),
        "c": np.array(7, dtype=np.int32),
        "d": np.linspace(0, 1, 5, dtype=np.float16),
    }
    spec, found = read_ct2(pack(tensors, {"tied": "a/weight"}))
    assert spec == "WhisperSpec" and list(found) == ["a/weight", "b", "c", "d", "tied"]
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    np.testing.assert_array_equal(found["tied"], tensors["a/weight"])


@pytest.mark.parametrize("length", [2, 10, 40, 70, 100])
def test_cut_short(length: int):
    data = pack({"a/weight": np.zeros((3, 3), np.float32), "b": np.zeros(9, np.float32)}, {})
    with pytest.raises(UserError, match=r"truncated|ends within"):
        read_ct2(data[:length])


def test_another_version_or_type():
    data = bytearray(pack({"a": np.zeros(2, np.float32)}, {}))
    at = data.index(b"a\0") + 2 + 1 + 4
    data[at] = 5
    with pytest.raises(UserError, match="a has number type 5"):
        read_ct2(bytes(data))
    with pytest.raises(UserError, match="format version 5, expected 6"):
        read_ct2(struct.pack("<I", 5) + bytes(data[4:]))


def test_model_is_the_same_afterwards(tiny: Whisper):
    _, tensors = read_ct2(pack(from_openai(tiny), {"decoder/projection/weight": "decoder/embeddings/weight"}))
    state = to_openai(tensors)
    assert ModelDimensions(**dimensions(state)) == DIMS
    copy = Whisper(DIMS).eval()
    copy.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    mel_1MT, tokens_1S = torch.randn(1, DIMS.n_mels, 2 * DIMS.n_audio_ctx), torch.tensor([[1, 4, 2]])
    with torch.no_grad():
        assert torch.equal(copy(mel_1MT, tokens_1S), tiny(mel_1MT, tokens_1S))


def test_a_key_bias_is_refused(tiny: Whisper):
    tensors = from_openai(tiny)
    bias = tensors["encoder/layer_0/self_attention/linear_0/bias"].copy()
    bias[DIMS.n_audio_state] = 1
    tensors["encoder/layer_0/self_attention/linear_0/bias"] = bias
    with pytest.raises(UserError, match="key bias"):
        to_openai(tensors)


SPOKEN = Path(__file__).parent / "animal_in_the_picture.flac"  # flite, voice slt, 16 kHz


@pytest.mark.weights
def test_whisper_writes_down_what_was_said(weights: Path):
    import whisper
    from tokenizers import Tokenizer

    folder = default_part("speech")
    config = json.loads((folder / "config.json").read_text())
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**config["dims"])).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    mel_MF = whisper.log_mel_spectrogram(_samples(SPOKEN), n_mels=80, padding=0)
    mel_1MF = whisper.pad_or_trim(mel_MF, 3000)[None]
    ids = list(config["prompt"])
    with torch.no_grad():
        features_1SD = model.encoder(mel_1MF)
        assert features_1SD.shape == (1, 1500, 384)
        while ids[-1] != 50256 and len(ids) < 30:
            ids.append(int(model.decoder(torch.tensor([ids]), features_1SD)[0, -1].argmax()))
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids[len(config["prompt"]) : -1])
    assert text.strip().lower() == "what animal is in the picture?"


def _samples(file: Path) -> torch.Tensor:
    import soundfile

    samples, rate = soundfile.read(file, dtype="float32")
    assert rate == 16000
    return torch.nn.functional.pad(torch.from_numpy(samples), (0, 30 * rate - len(samples)))
