"""Draw the images of the documentation from finished runs, into docs/images.

    python docs/make_images.py load runs/demo/moe runs/demo/data/val.spoken.jsonl
    python docs/make_images.py page runs/demo/moe runs/demo/try/image.jpg "What is this?"
    python docs/make_images.py samples mine/train.jsonl runs/demo/moe
    python docs/make_images.py loss runs/mine
    python docs/make_images.py boxes runs/demo-detection/base "cat, red car" street.jpg yard.jpg
    python docs/make_images.py matrix runs/continual/short/dymoe-0 runs/continual/short/lora-0
    python docs/make_images.py capacity runs/compare/capacity/results.json
    python docs/make_images.py sheet path/to/logs/test/samples.png restoration.png

All content is printed, drawn or served by the commands. Screenshots need playwright and a Chromium.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

IMAGES = Path(__file__).parent / "images"
LARGEST = 150_000  # bytes of an image
SIDE, GAP = 384, 8  # pixels of an image with boxes, and between two
ANSWER_SECONDS = 600  # a model on a busy CPU takes its time


def load(model: str, data: str):
    """expert_load.png: the share of each expert by layer and modality, as ``unimoe inspect`` draws it."""
    with TemporaryDirectory() as scratch, browser(1180, 700) as page:
        unimoe("inspect", model, data, "--output", f"{scratch}/found")
        page.goto(f"file://{scratch}/found/load.svg")
        shrink(page.locator("svg").first.screenshot, "expert_load.png")


def page(model: str, image: str, question: str, name: str = "web.png"):
    """web.png: ``unimoe web`` after a question about an image."""
    from unimoe.inference import web_ui

    served = web_ui.build_page(model)
    address = web_ui.launch(served, "127.0.0.1", 0, 100)
    try:
        with browser(1280, 900) as opened:
            opened.goto(address)
            opened.wait_for_selector(".multimodal-textbox textarea")
            opened.set_input_files("input[type=file] >> nth=0", image)
            opened.wait_for_selector(".multimodal-textbox img")
            opened.fill(".multimodal-textbox textarea", question)
            opened.press(".multimodal-textbox textarea", "Enter")
            opened.wait_for_selector("#experts img", timeout=1000 * ANSWER_SECONDS)
            opened.wait_for_timeout(1500)  # until the layout rests
            shrink(partial(opened.screenshot, full_page=True), name)
    finally:
        served.close()


def samples(data: str, model: str):
    """samples.png: the page of ``unimoe data show``."""
    with TemporaryDirectory() as scratch, browser(1000, 620) as opened:
        unimoe("data", "show", data, "--model", model, "--count", "3", "--output", f"{scratch}/samples.html")
        opened.goto(f"file://{scratch}/samples.html")
        shrink(opened.screenshot, "samples.png")


def loss(run: str):
    """loss.png: training and validation loss of a run."""
    from unimoe.analysis.plots import loss_curves
    from unimoe.training.curve import read_curve

    with TemporaryDirectory() as scratch, browser(620, 420) as opened:
        Path(scratch, "loss.svg").write_text(
            loss_curves({Path(run).name: read_curve(f"{run}/logs/metrics.csv")})
        )
        opened.goto(f"file://{scratch}/loss.svg")
        shrink(opened.locator("svg").first.screenshot, "loss.png")


def boxes(detector: str, prompt: str, *images: str):
    """detection.jpg: what ``unimoe detect`` draws into enlarged copies of square images, side by side."""
    with TemporaryDirectory() as scratch:
        copies = [f"{scratch}/{number}.png" for number in range(len(images))]
        for image, copy in zip(images, copies, strict=True):
            Image.open(image).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(copy)
        flags = ["--prompt", prompt, "--nms", "0.7", "--draw", f"{scratch}/drawn"]
        unimoe("detect", detector, *copies, *flags)
        drawn = [Image.open(file).convert("RGB") for file in sorted(Path(scratch, "drawn").iterdir())]
    row = Image.new("RGB", (SIDE * len(drawn) + GAP * (len(drawn) - 1), SIDE), "white")
    for index, one in enumerate(drawn):
        row.paste(one, (index * (SIDE + GAP), 0))
    row.save(IMAGES / "detection.jpg", quality=85)


def matrix(*runs: str):
    """accuracy_matrix.png: accuracy on each task after each task, as ``unimoe continual report`` draws it."""
    with TemporaryDirectory() as scratch:
        unimoe("continual", "report", *runs, "--output", scratch)
        shutil.copyfile(Path(scratch) / "matrices.png", IMAGES / "accuracy_matrix.png")


def capacity(results: str):
    """capacity.svg: difference to dense against parameters, as the page of ``unimoe compare`` draws it."""
    from unimoe.compare.report import size_plot

    (IMAGES / "capacity.svg").write_text(size_plot(json.loads(Path(results).read_text())))


def sheet(drawn: str, name: str):
    """A sheet that ``unimoe test`` drew, with fewer colours."""
    shrink(lambda path: shutil.copy(drawn, path), name)


DRAWN: dict[str, Callable[..., None]] = {
    one.__name__: one for one in (load, page, samples, loss, boxes, matrix, capacity, sheet)
}


def unimoe(*words: str):
    subprocess.run([sys.executable, "-P", "-m", "unimoe", *words], check=True)


@contextmanager
def browser(width: int, height: int) -> Iterator[Any]:
    """A page of a headless Chromium on a white ground."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        opened = found.new_page(viewport={"width": width, "height": height}, device_scale_factor=1.25)
        opened.set_default_timeout(120_000)
        yield opened
        found.close()


def shrink(screenshot: Callable[..., Any], name: str):
    """Take a screenshot and save it with as many colours as its size allows."""
    with TemporaryDirectory() as scratch:
        screenshot(path=f"{scratch}/shot.png")
        image = Image.open(f"{scratch}/shot.png").convert("RGB")
    for colours in (256, 128, 64, 32):
        image.quantize(colours, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
        if (IMAGES / name).stat().st_size < LARGEST:
            return


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in DRAWN:
        sys.exit(f"expected one of {', '.join(DRAWN)} and what it is drawn from; see the top of this file")
    IMAGES.mkdir(exist_ok=True)
    DRAWN[sys.argv[1]](*sys.argv[2:])
