"""BEATs: an encoder of environmental sound (Chen et al., 2212.09058), from the official checkpoints.

Shapes: B windows, N samples, M = 128 mel bins, F frames (10 ms), S = F // 16 * 8 patches (time first, then
frequency), D width, H heads, d width of a head.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from unimoe.errors import UserError

from .encoder import SpeechEncoder, add_missing
from .weights import fill, find_weights, read_file, read_tensors

RATE, MEL_BINS = 16_000, 128
PATCH = 16
"""Frames and mel bins of a patch."""
MEAN, STD = 15.41663, 6.55582
"""Mean and deviation of log mel energies over AudioSet; features are (x - MEAN) / (2 STD)."""

_WINDOW, _HOP, _FFT = 400, 160, 512
_FIXED = {
    "input_patch_size": PATCH,
    "conv_bias": False,
    "layer_norm_first": False,
    "activation_fn": "gelu",
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
"""What all published checkpoints say, and this module takes for granted."""


@dataclass
class BeatsConfig:
    """Sizes under the names of the official ``cfg``; the defaults are BEATs_iter3_plus_AS2M's."""

    embed_dim: int = 512
    """Width of a patch before the encoder."""
    encoder_layers: int = 12
    """Transformer layers."""
    encoder_embed_dim: int = 768
    """D."""
    encoder_ffn_embed_dim: int = 3072
    """Inner width of the FFNs."""
    encoder_attention_heads: int = 12
    """H."""
    conv_pos: int = 128
    """Kernel of the convolution that stands for positions."""
    conv_pos_groups: int = 16
    """Groups of that convolution."""
    num_buckets: int = 320
    """Distances that the relative position bias tells apart."""
    max_distance: int = 800
    """Patches further apart than this share a bucket."""
    deep_norm: bool = True
    """Residuals are scaled by (2 layers)^(1/4) before each norm."""
    max_windows: int = 20
    """Longest audio, in windows of 30 s, as for ``whisper``."""


class BeatsEncoder(SpeechEncoder):
    """``forward(fbank [B, M, F], frames_B) -> (features_BSD, lengths_B)``, S = F // 16 * 8.

    1. patches of 16 frames x 16 mel bins, norm, projection to D; patches beyond a window's length are zero
    2. plus a convolution over their sequence, norm
    3. post-norm transformer layers, with a relative position bias that each query gates

    30 s are 2998 frames and 1496 positions. What is left of fewer than 16 frames is dropped.
    """

    kind = "beats"
    modality = "audio"
    Config = BeatsConfig
    num_mel_bins = MEL_BINS
    max_frames = 3000

    def __init__(self, config: BeatsConfig):
        super().__init__(config)
        self.model = Beats(config)
        self.hidden_size = config.encoder_embed_dim
        self.preprocessing = {
            "spectrum": "beats",
            "mel_bins": MEL_BINS,
            "max_windows": config.max_windows,
        }

    @property
    def tower(self) -> nn.Module:
        return self.model

    @staticmethod
    def num_tokens(frames: int) -> int:
        return frames // PATCH * (MEL_BINS // PATCH)

    @classmethod
    def complete(cls, config: dict[str, Any], weights: str | None) -> dict[str, Any]:
        """Add the settings that lie with the weights, under ``cfg``.

        Raises:
            UserError: the weights are of another kind.
        """
        if weights is None:
            return config
        content = read_file(find_weights(weights))
        found = content.get("cfg", {})
        for name, value in _FIXED.items():
            if found.get(name, value) != value:
                raise UserError(f"{weights}: cfg.{name} is {found[name]!r}, expected {value!r}")
        names = [field.name for field in fields(BeatsConfig)]
        return add_missing(config, {name: found[name] for name in names if name in found})

    def load_weights(self, weights: str) -> None:
        """Fill from a file in the official names, or in ours."""
        fill(self.model, ours(read_tensors(weights)), weights)

    def forward(self, input_features: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        if input_features.ndim != 3 or input_features.shape[1] != MEL_BINS:
            found = list(input_features.shape)
            raise UserError(f"audio features have shape {found}, expected [windows, {MEL_BINS}, frames]")
        shortest, longest = int(frames_B.min()), int(frames_B.max())
        limit = min(input_features.shape[2], self.max_frames)
        if shortest < PATCH or longest > limit:
            raise UserError(f"windows of {shortest} to {longest} frames, expected {PATCH} to {limit}")
        lengths_B = frames_B.to(input_features.device) // PATCH * (MEL_BINS // PATCH)
        x_BFM = input_features[..., :longest].to(self.dtype).transpose(1, 2)
        return self.model(x_BFM, lengths_B), lengths_B


class Beats(nn.Module):
    """The tower; its parameters have the official names, see ``ours`` for two exceptions."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width = config.encoder_embed_dim
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, PATCH, PATCH, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj = nn.Linear(config.embed_dim, width)
        self.encoder = nn.Module()
        self.encoder.pos_conv = nn.Conv1d(
            width, width, config.conv_pos, padding=config.conv_pos // 2, groups=config.conv_pos_groups
        )
        self.encoder.layer_norm = nn.LayerNorm(width)
        self.encoder.relative_attention_bias = nn.Embedding(
            config.num_buckets, config.encoder_attention_heads
        )
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.encoder_layers))
        self.max_distance = config.max_distance

    def forward(self, x_BFM: Tensor, lengths_B: Tensor) -> Tensor:
        """Features [B, S, D], zero beyond ``lengths_B`` patches."""
        encoder: Any = self.encoder
        x_BSD = self.patch_embedding(x_BFM[:, None]).flatten(2).transpose(1, 2)
        x_BSD = self.post_extract_proj(self.layer_norm(x_BSD))
        positions = x_BSD.shape[1]
        inside_BS = torch.arange(positions, device=x_BSD.device) < lengths_B[:, None]
        x_BSD = x_BSD * inside_BS[..., None]
        around_BDS = encoder.pos_conv(x_BSD.transpose(1, 2))[..., :positions]  # an even kernel gives one more
        x_BSD = encoder.layer_norm(x_BSD + nnf.gelu(around_BDS).transpose(1, 2))
        bias_HSS = self.position_bias(positions)
        outside_B1S = None if bool(inside_BS.all()) else ~inside_BS[:, None]
        for layer in encoder.layers:
            x_BSD = layer(x_BSD, bias_HSS, outside_B1S)
        return x_BSD * inside_BS[..., None]

    def position_bias(self, positions: int) -> Tensor:
        """[H, S, S] bias of each key for each query, by buckets of their distance (T5, 1910.10683): half of
        the buckets for keys that follow, and of each half one part exact, one logarithmic."""
        table: Any = self.encoder.relative_attention_bias
        place_S = torch.arange(positions, device=table.weight.device)
        distance_SS = place_S[None] - place_S[:, None]
        half = table.num_embeddings // 2
        exact = half // 2
        far_SS = distance_SS.abs()
        ratio = torch.log(far_SS.float() / exact) / math.log(self.max_distance / exact)
        coarse_SS = (exact + (ratio * (half - exact)).clamp(min=0)).long().clamp(max=half - 1)
        bucket_SS = torch.where(far_SS < exact, far_SS, coarse_SS) + half * (distance_SS > 0)
        return table(bucket_SS).permute(2, 0, 1)


class Layer(nn.Module):
    """``x = norm(a x + attention(x)); x = norm(a x + ffn(x))``."""

    def __init__(self, config: BeatsConfig):
        super().__init__()
        width, inner = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.self_attn = GatedAttention(width, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.final_layer_norm = nn.LayerNorm(width)
        self.alpha = (2 * config.encoder_layers) ** 0.25 if config.deep_norm else 1.0

    def forward(self, x_BSD: Tensor, bias_HSS: Tensor, outside_B1S: Tensor | None) -> Tensor:
        attended = self.self_attn(x_BSD, bias_HSS, outside_B1S)
        x_BSD = self.self_attn_layer_norm(self.alpha * x_BSD + attended)
        return self.final_layer_norm(self.alpha * x_BSD + self.fc2(nnf.gelu(self.fc1(x_BSD))))


class GatedAttention(nn.Module):
    """Self-attention whose position bias is scaled for each query by ``1 <= gate`` (WavLM, 2110.13900, eq.
    4-6, with the query's projection in place of the query)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.grep_linear = nn.Linear(width // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x_BSD: Tensor, bias_HSS: Tensor, outside_B1S: Tensor | None) -> Tensor:
        query, key, value = (
            project(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        update, reset = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid().chunk(2, dim=-1)
        bias_BHSS = (update * (reset * self.grep_a - 1) + 2) * bias_HSS
        if outside_B1S is not None:
            bias_BHSS = bias_BHSS.masked_fill(outside_B1S[:, None], -torch.inf)
        y_BHSd = nnf.scaled_dot_product_attention(query, key, value, attn_mask=bias_BHSS)
        return self.out_proj(y_BHSd.transpose(1, 2).flatten(2))


def ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official checkpoint's tensors under our names: the convolution's weight norm is multiplied out, and
    the position bias, which the layers share, stands once."""
    renamed = dict(tensors)
    conv, bias = "encoder.pos_conv", "self_attn.relative_attention_bias.weight"
    if f"{conv}.0.weight_g" in renamed:
        scale, direction = renamed.pop(f"{conv}.0.weight_g"), renamed.pop(f"{conv}.0.weight_v")
        renamed[f"{conv}.weight"] = direction * (scale / direction.norm(dim=(0, 1), keepdim=True))
        renamed[f"{conv}.bias"] = renamed.pop(f"{conv}.0.bias")
    if f"encoder.layers.0.{bias}" in renamed:
        renamed["encoder.relative_attention_bias.weight"] = renamed[f"encoder.layers.0.{bias}"]
    return renamed


def fbank(audio_N: Tensor) -> Tensor:
    """Kaldi's log mel energies of mono audio at 16 kHz in -1..1, normalised as BEATs expects them: [M, F].

    Windows of 25 ms every 10 ms, F = 1 + (N - 400) // 160: mean removed, pre-emphasis 0.97, Povey window,
    power spectrum of 512 points, triangles from 20 Hz to 8 kHz on Kaldi's mel scale.

    Raises:
        UserError: there are fewer than 400 samples.
    """
    if audio_N.ndim != 1 or len(audio_N) < _WINDOW:
        raise UserError(f"audio has shape {list(audio_N.shape)}, expected [samples], at least {_WINDOW}")
    frames_FW = (audio_N.float() * 2**15).unfold(0, _WINDOW, _HOP)
    frames_FW = frames_FW - frames_FW.mean(1, keepdim=True)
    before_FW = torch.cat([frames_FW[:, :1], frames_FW[:, :-1]], 1)
    window_W = torch.hann_window(_WINDOW, periodic=False, device=audio_N.device) ** 0.85
    power_FK = torch.fft.rfft((frames_FW - 0.97 * before_FW) * window_W, _FFT).abs() ** 2
    energy_FM = power_FK @ mel_filters().to(power_FK)
    log_FM = energy_FM.clamp(min=torch.finfo(torch.float32).eps).log()
    return (log_FM.T - MEAN) / (2 * STD)


def mel_filters() -> Tensor:
    """[257, M] weight of each frequency of the spectrum in each mel bin."""
    edges = torch.linspace(_mel(20.0), _mel(RATE / 2), MEL_BINS + 2, dtype=torch.float64)
    mel_K1 = torch.tensor([[_mel(k * RATE / _FFT)] for k in range(_FFT // 2 + 1)], dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (mel_K1 - left) / (centre - left), (right - mel_K1) / (right - centre)
    return torch.minimum(rise, fall).clamp(min=0).float()


def _mel(hertz: float) -> float:
    return 1127.0 * math.log(1.0 + hertz / 700.0)
