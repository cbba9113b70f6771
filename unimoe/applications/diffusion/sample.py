"""Images from a trained model.

Shapes: B images, C channels, S side.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unimoe.applications.pictures import image_format, write_sheet
from unimoe.applications.process import PROCESSES, Process, draw_guided
from unimoe.errors import UserError
from unimoe.files import atomic_file
from unimoe.training.application import load_weights, read_network

from .dit import DiT


def load_diffusion(folder: str | Path) -> tuple[DiT, Process, list[str]]:
    """A finished run: model, process, and the names of its classes.

    Raises:
        UserError: ``folder`` holds no finished diffusion model.
    """
    network = read_network(folder, "diffusion")
    model = DiT.of(network)
    load_weights(model, folder)
    return model.eval(), PROCESSES[network["process"]](), network["data"]["classes"]


def draw(
    model: DiT,
    process: Process,
    label_B: Tensor,
    texts: Tensor | None = None,
    steps: int = 40,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """[B, C, S, S] images of classes [B] (-1 for any), each from a noise of its own.

    Args:
        model: the transformer.
        process: that it was trained for.
        label_B: classes; zeros with texts. On any device, as ``texts``.
        texts: [B, X] embeddings of texts, for a model conditioned on these.
        steps: evaluations of the model, twice as many with guidance.
        guidance: scale; 1 is none.
        seed: of the noise, which is the same on every device.

    Returns:
        The images, on the CPU.
    """
    device = next(model.parameters()).device
    label_B, texts = label_B.to(device), None if texts is None else texts.to(device)
    none_B = torch.full_like(label_B, -1)
    return draw_guided(
        process,
        lambda x, time_B: model(x, time_B, label_B, texts),
        lambda x, time_B: model(x, time_B, none_B, texts),
        (len(label_B), model.channels, model.side, model.side),
        device,
        steps,
        guidance,
        seed,
    ).cpu()


def find_classes(names: list[str], known: list[str]) -> list[int]:
    """Numbers of the named classes.

    Raises:
        UserError: an unknown name.
    """
    for name in names:
        if name not in known:
            raise UserError(f"--class {name}: the model knows {', '.join(known)}")
    return [known.index(name) for name in names]


def check_output(path: Path, channels: int) -> None:
    """Check, before anything is drawn, that samples of so many channels can be written to ``path``.

    Raises:
        UserError: its suffix is none of an image, or the samples are no images.
    """
    if path.suffix == ".npy":
        return
    if image_format(path) not in Image.SAVE:
        raise UserError(f"--output {path}: expected an image file such as samples.png, or a .npy file")
    if channels != 3:
        raise UserError(
            f"--output {path}: the model draws latents of {channels} channels, not images; write them to a "
            ".npy file"
        )


def write_samples(path: Path, images: Tensor, columns: int) -> None:
    """A sheet, or the numbers themselves where ``path`` ends in .npy; see :func:`check_output`."""
    if path.suffix != ".npy":
        return write_sheet(path, images, columns)
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, images.numpy())
