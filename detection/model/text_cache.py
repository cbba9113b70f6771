"""Caches the text features of each name.

Shapes: B prompts, L tokens of the longest, W width of the text encoder, M segments, K tokens of the first
segment and the longest other one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import Prompt


class TextFeatureCache:
    """Outputs of ``encode_text`` of a frozen text encoder, cached by segment (a name and its full stop).

    Segments do not attend to one another, so a prompt has the features of its segments, concatenated. They
    are kept in float32 on the model's device, also under mixed precision.
    """

    def __init__(self, model: DynamicDinoForObjectDetection):
        self.model = model
        self.kept: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt]) -> Tensor:
        """``text_features`` [B, L, W] for the model's ``forward``, zeros on padding."""
        rows = [_segments(prompt) for prompt in prompts]
        missing = dict.fromkeys(segment for row in rows for segment in row if segment not in self.kept)
        if missing:
            self._encode(rows[0][0], list(missing))
        return torch.nn.utils.rnn.pad_sequence(
            [torch.cat([self.kept[segment] for segment in row]) for row in rows], batch_first=True
        )

    def _encode(self, start: tuple[int, ...], segments: list[tuple[int, ...]]) -> None:
        """Encode each behind the first segment of the prompt, which it may attend to."""
        skip, device = len(start), self.model.device
        width = skip + max(len(segment) for segment in segments)
        ids_MK = torch.tensor(
            [[*start, *segment, *[0] * (width - skip - len(segment))] for segment in segments]
        )
        end_M1 = torch.tensor([[skip + len(segment)] for segment in segments])
        place_K = torch.arange(width)
        part_MK = (place_K >= skip).int() + (place_K >= end_M1).int()
        same_MKK = part_MK[:, None] == part_MK[..., None]
        positions_MK = torch.where(place_K < skip, place_K, place_K - skip).expand(len(segments), -1)
        with torch.autocast(device.type, enabled=False):
            features_MKW = self.model.encode_text(
                ids_MK.to(device), same_MKK.to(device), positions_MK.to(device)
            )
        self.kept[start] = features_MKW[0, :skip].clone()
        for segment, features_KW in zip(segments, features_MKW, strict=True):
            if segment != start:
                self.kept[segment] = features_KW[skip : skip + len(segment)].clone()


def _segments(prompt: Prompt) -> list[tuple[int, ...]]:
    ids = prompt.input_ids.tolist()
    starts = [*(prompt.position_ids == 0).nonzero().flatten().tolist(), len(ids)]
    return [tuple(ids[start:end]) for start, end in zip(starts, starts[1:], strict=False)]
