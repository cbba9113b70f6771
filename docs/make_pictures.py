"""Draw the documentation's pictures from finished runs, into docs/images.

    python docs/make_pictures.py load runs/demo/moe runs/demo/data/val.spoken.jsonl
    python docs/make_pictures.py page runs/demo/moe runs/demo/try/picture.png "What is this?"
    python docs/make_pictures.py samples mine/train.jsonl runs/demo/moe
    python docs/make_pictures.py loss runs/mine
    python docs/make_pictures.py boxes runs/demo-detection/moe-0 street.jpg "cat, red car"
    python docs/make_pictures.py matrix runs/continual/short/dymoe-0 runs/continual/short/lora-0

Everything in them is what the commands print, draw or serve. Screenshots need playwright and a Chromium.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

IMAGES = Path(__file__).parent / "images"
LARGEST = 150_000  # bytes of a picture
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
            opened.wait_for_timeout(1500)  # the last words and the layout
            shrink(opened.screenshot, name)
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


def boxes(detector: str, image: str, prompt: str, threshold: str = "0.3"):
    """detection.jpg: what ``unimoe detect`` draws."""
    with TemporaryDirectory() as scratch:
        unimoe("detect", detector, image, "--prompt", prompt, "--threshold", threshold, "--draw", scratch)
        (drawn,) = Path(scratch).iterdir()
        picture = Image.open(drawn).convert("RGB")
        if picture.width < 480:
            picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS)
        picture.thumbnail((900, 600))
        picture.save(IMAGES / "detection.jpg", quality=85)


def matrix(*runs: str):
    """accuracy_matrix.png: accuracy on each task after each task, as ``unimoe continual report`` draws it."""
    with TemporaryDirectory() as scratch:
        unimoe("continual", "report", *runs, "--output", scratch)
        shutil.copyfile(Path(scratch) / "matrices.png", IMAGES / "accuracy_matrix.png")


PICTURES: dict[str, Callable[..., None]] = {
    one.__name__: one for one in (load, page, samples, loss, boxes, matrix)
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
        picture = Image.open(f"{scratch}/shot.png").convert("RGB")
    for colours in (256, 128, 64, 32):
        picture.quantize(colours, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)
        if (IMAGES / name).stat().st_size < LARGEST:
            return


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in PICTURES:
        sys.exit(f"expected one of {', '.join(PICTURES)} and what it is drawn from; see the top of this file")
    IMAGES.mkdir(exist_ok=True)
    PICTURES[sys.argv[1]](*sys.argv[2:])
