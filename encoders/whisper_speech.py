"""openai-whisper's audio encoder, at a cost in proportion to the clip.

Shapes: B clips, M mel bins, F mel frames (10 ms), S = ceil(F / 2) positions, D width.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from unimoe.errors import UserError

from .encoder import SpeechEncoder
from .weights import find_weights, read_file

_DIMS = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")


@dataclass
class WhisperConfig:
    dims: dict[str, int] = field(default_factory=dict)
    """openai-whisper's dimensions; the encoder reads n_mels, n_audio_ctx, n_audio_state, n_audio_head,
    n_audio_layer. May be left out when loading weights that come with their dims."""
    max_windows: int = 20
    """Longest audio, in windows of 30 s; longer audio is truncated with a warning. 20, ten minutes, is what
    Uni-MoE takes."""


class WhisperSpeechEncoder(SpeechEncoder):
    """Whisper's encoder over clips of any length up to its window (Radford et al., 2212.04356, section 2.2).

    1. zero each clip beyond its length, convolution of stride 1, GELU;
    2. zero again (the bias made the padding non-zero), convolution of stride 2, GELU: S = ceil(F / 2)
       positions;
    3. add the first S rows of the sinusoidal table;
    4. transformer blocks, in which no position attends to another clip's padding;
    5. final norm; zero beyond the length.

    At the full 30 s this equals openai-whisper's own forward; shorter clips pay for their own frames only.
    """

    kind = "whisper"
    Config = WhisperConfig
    prefixes = ("", "encoder.", "model.encoder.")

    def __init__(self, config: WhisperConfig):
        missing = [name for name in _DIMS if name not in config.dims]
        if missing:
            raise UserError(
                f"whisper: dims lacks {', '.join(missing)}; found {', '.join(config.dims) or 'nothing'}"
            )
        super().__init__(config)
        from whisper.model import AudioEncoder  # pulls numba, a second or more

        dims = config.dims
        self.encoder = AudioEncoder(*(dims[name] for name in _DIMS))
        self.num_mel_bins = dims["n_mels"]
        self.max_frames = 2 * dims["n_audio_ctx"]
        self.hidden_size = dims["n_audio_state"]
        self.preprocessing = {"mel_bins": dims["n_mels"], "max_windows": config.max_windows}

    @property
    def tower(self) -> nn.Module:
        return self.encoder

    @classmethod
    def complete(cls, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
        """Add missing dims from the ``config.json`` beside the weights, or from openai-whisper's own file."""
        if config.get("dims") or weights is None:
            return config
        file = find_weights(find_whisper(weights))
        beside = file.parent / "config.json"
        found = json.loads(beside.read_text()) if beside.is_file() else read_file(file)
        dims = found.get("dims", found)
        return {**config, "dims": {name: value for name, value in dims.items() if name.startswith("n_")}}

    def load_weights(self, weights: str) -> None:
        """Fill from a file or folder in openai-whisper's names, or by one of its model names."""
        super().load_weights(find_whisper(weights))

    def forward(self, input_features: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        x_BMF, frames_B, longest = self._check(input_features, frames_B)
        encoder, lengths_B = self.encoder, (frames_B + 1) // 2
        ragged = bool((frames_B != longest).any())
        inside_B1F = (torch.arange(longest, device=x_BMF.device) < frames_B[:, None])[:, None]
        if ragged:
            x_BMF = x_BMF * inside_B1F
        x_BDF = nnf.gelu(encoder.conv1(x_BMF))
        if ragged:
            x_BDF = x_BDF * inside_B1F
        x_BSD = nnf.gelu(encoder.conv2(x_BDF)).transpose(1, 2)
        positions = x_BSD.shape[1]
        x_BSD = x_BSD + encoder.get_buffer("positional_embedding")[:positions].to(x_BSD.dtype)
        inside_BS = torch.arange(positions, device=x_BSD.device) < lengths_B[:, None]
        mask = inside_BS[:, None, None] if ragged else None
        for block in encoder.blocks:
            x_BSD = x_BSD + _attend(block.attn, _norm(block.attn_ln, x_BSD), mask)
            x_BSD = x_BSD + block.mlp(_norm(block.mlp_ln, x_BSD))
        x_BSD = _norm(encoder.ln_post, x_BSD)
        return (x_BSD * inside_BS[..., None] if ragged else x_BSD), lengths_B

    def _check(self, input_features: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor, int]:
        """Inputs in the encoder's dtype and cut to the longest clip."""
        if input_features.ndim != 3 or input_features.shape[1] != self.num_mel_bins:
            found = list(input_features.shape)
            raise UserError(
                f"speech features have shape {found}, expected [clips, {self.num_mel_bins}, frames]"
            )
        frames_B = frames_B.to(input_features.device)
        shortest, longest = int(frames_B.min()), int(frames_B.max())
        limit = min(input_features.shape[2], self.max_frames)
        if shortest < 1 or longest > limit:
            raise UserError(f"clips of {shortest} to {longest} mel frames, expected 1 to {limit}")
        return input_features[..., :longest].to(self.dtype), frames_B, longest


def find_whisper(weights: str) -> str:
    """``weights`` itself, or the file of openai-whisper's model of that name, downloaded unless cached."""
    import whisper

    if Path(weights).expanduser().exists() or weights not in whisper.available_models():
        return weights
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "whisper"  # whisper's own place
    try:
        return str(whisper._download(whisper._MODELS[weights], str(cache), False))
    except (OSError, RuntimeError) as error:
        raise UserError(f"whisper: cannot download {weights} ({error})") from error


def _norm(layer: Any, x_BSD: Tensor) -> Tensor:
    """Plain layer norm; whisper's own class computes in float32 and fails on bfloat16 weights."""
    return nnf.layer_norm(x_BSD, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _attend(attention: Any, x_BSD: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention with a mask over the keys, ``[B, 1, 1, S]``, True where attended."""
    heads = (attention.n_head, x_BSD.shape[-1] // attention.n_head)
    query, key, value = (
        project(x_BSD).unflatten(-1, heads).transpose(1, 2)
        for project in (attention.query, attention.key, attention.value)
    )
    y_BNSd = nnf.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out(y_BNSd.transpose(1, 2).flatten(2))
