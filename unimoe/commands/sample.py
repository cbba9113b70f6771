"""``unimoe sample``: draw images with a trained diffusion model."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from unimoe.applications.diffusion.sample import (
    check_output,
    draw,
    find_classes,
    load_diffusion,
    write_samples,
)
from unimoe.applications.diffusion.text import embed_texts
from unimoe.applications.process import DDPM
from unimoe.errors import UserError

log = logging.getLogger(__name__)


def sample(
    model: str,
    *,
    class_: Sequence[str] = (),
    text: Sequence[str] = (),
    count: int = 8,
    steps: int = 40,
    guidance: float = 3.0,
    seed: int = 0,
    output: str = "samples.png",
) -> None:
    """Draw images of classes or texts with a diffusion model, one row for each.

    Args:
        model: folder of `unimoe fit -c configs/applications/diffusion.yaml`.
        class_: names of classes (default: all), for a model of classes.
        text: texts, such as "red apple", for a model of texts.
        count: images of each class.
        steps: steps from noise to image.
        guidance: strength of the class; 1 is none.
        seed: seed of the noise.
        output: an image file, or a .npy file for the numbers.

    Raises:
        UserError: no such model or class, the condition is of the other kind, a number is out of range, or
            ``output`` is no such file.
    """
    if min(count, steps) < 1:
        raise UserError(f"--count and --steps must be at least 1, found {count} and {steps}")
    network, process, known = load_diffusion(model)
    if isinstance(process, DDPM) and steps > process.steps:
        raise UserError(f"--steps is {steps}, expected at most {process.steps}: {model} is a ddpm of as many")
    check_output(Path(output), network.channels)
    reads_text = bool(network.text)
    if reads_text != bool(text) or (reads_text and class_):
        asked, other = ("--text", "--class") if reads_text else ("--class", "--text")
        raise UserError(f"{model} draws what {asked} says; leave {other} out")
    names = list(text) if reads_text else list(class_) or known
    embedded = embed_texts(names).repeat_interleave(count, dim=0) if reads_text else None
    numbers = [0] * len(names) if reads_text else find_classes(names, known)
    chosen = torch.tensor(numbers).repeat_interleave(count)
    write_samples(Path(output), draw(network, process, chosen, embedded, steps, guidance, seed), count)
    log.info("%s: %d images of %s", output, len(chosen), ", ".join(names))
