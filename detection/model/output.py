"""What model, criterion and evaluation exchange.

Shapes: N decoder layers, B images, Q queries, L text tokens, D denoising queries, M objects of an image.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class Target:
    """The objects of one image, labelled by the names of its prompt."""

    boxes_M4: Tensor
    """Centre x, centre y, width, height, on a 0..1 scale of the (unpadded) image."""
    names_M: Tensor
    """int64, row of the prompt's ``name_tokens`` for each object."""


@dataclass
class DynamicDinoOutput(ModelOutput):
    """Output of :class:`DynamicDinoForObjectDetection`; boxes are (cx, cy, w, h) on a 0..1 scale."""

    logits: Tensor | None = None
    """[N, B, Q, L] for each decoder layer and text token, -inf on padding; the last layer gives the
    prediction."""
    boxes: Tensor | None = None
    """[N, B, Q, 4], not detached."""
    encoder_logits: Tensor | None = None
    """[B, Q, L] of the selected image tokens, not detached: their loss trains the selection."""
    encoder_boxes: Tensor | None = None
    """[B, Q, 4] boxes of these tokens, not detached."""
    references: Tensor | None = None
    """[N, B, Q, 4] the boxes that each layer started from, detached."""
    text_mask: Tensor | None = None
    """[B, L] bool, True on real tokens."""
    denoising_logits: Tensor | None = None
    """[N, B, D, L], with denoising queries."""
    denoising_boxes: Tensor | None = None
    """[N, B, D, 4], with denoising queries."""
    aux_loss: Tensor | None = None
    """The weighted load-balance loss of the MoE layers (0-d; 0 for a dense model)."""
