"""What goes between the model, its criterion and its evaluation.

Shapes: N decoder layers, B images, Q queries, L text tokens, D denoising queries, M objects of an image.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils.generic import ModelOutput


@dataclass
class Target:
    """The objects of one image, in terms of its prompt."""

    boxes_M4: Tensor
    """Centre x, centre y, width, height, on a 0..1 scale of the (unpadded) image."""
    names_M: Tensor
    """int64, the row of the prompt's ``name_tokens`` that each object belongs to."""


@dataclass
class DynamicDinoOutput(ModelOutput):
    """Output of :class:`DynamicDinoForObjectDetection`; boxes are (cx, cy, w, h) on a 0..1 scale."""

    logits: Tensor | None = None
    """[N, B, Q, L] of each decoder layer against each text token, -inf on padding; the last layer is the
    answer."""
    boxes: Tensor | None = None
    """[N, B, Q, 4], undetached."""
    encoder_logits: Tensor | None = None
    """[B, Q, L] of the image tokens that query selection chose, undetached: this trains the selection."""
    encoder_boxes: Tensor | None = None
    """[B, Q, 4] their boxes, undetached."""
    references: Tensor | None = None
    """[N, B, Q, 4] the box each layer started from, detached."""
    text_mask: Tensor | None = None
    """[B, L] bool, True on real tokens."""
    denoising_logits: Tensor | None = None
    """[N, B, D, L], with denoising queries."""
    denoising_boxes: Tensor | None = None
    """[N, B, D, 4], with denoising queries."""
    aux_loss: Tensor | None = None
    """The weighted load-balance loss of the MoE layers (0-d; 0 for a dense model)."""
