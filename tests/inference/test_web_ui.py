"""The page of ``unimoe web`` with tiny models: in headless Chromium, where there is one, and without."""

import importlib.util
import json
import shutil
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from unimoe.analysis.routing_stats import RoutingStats
from unimoe.commands import main as cli
from unimoe.inference import web_ui as web
from unimoe.inference.conversation import Conversation
from unimoe.media.video import write_video

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WITH_GRADIO = importlib.util.find_spec("gradio") is not None
BOX = ".multimodal-textbox textarea"

needs_gradio = pytest.mark.skipif(not WITH_GRADIO, reason="NO GRADIO: the page is not tested")


@pytest.fixture(scope="module")
def wordy(tiny_folder, tmp_path_factory):
    """A model that often says a space, so that its answers have words to come one by one."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("wordy"), dirs_exist_ok=True)
    space = PreTrainedTokenizerFast.from_pretrained(folder).convert_tokens_to_ids("\u0120")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**settings, "sequence_bias": [[[space], 8.0]]})
    )
    return folder


@pytest.fixture(scope="module")
def address(wordy, tiny_detector_folder):
    page = web.build_page(str(wordy), str(tiny_detector_folder))
    yield web.launch(page, "127.0.0.1", 0, 100).rstrip("/")
    page.close()


@pytest.fixture(scope="module")
def browser():
    """Chromium; skips, loudly, where there is none."""
    if not CHROMIUM or importlib.util.find_spec("playwright") is None:
        warnings.warn("NOTHING IS TESTED IN A BROWSER: no chromium or no playwright", stacklevel=1)
        pytest.skip("NO BROWSER: no chromium or no playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def page(browser, address):
    """The page, opened; ``page.asked`` are the addresses that the browser asked for."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    opened.set_default_timeout(120_000)
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.wait_for_selector(BOX)
    yield SimpleNamespace(page=opened, asked=asked)
    opened.close()


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@needs_gradio
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_question_about_a_picture(page, address, picture):
    tab = page.page
    tab.get_by_text("Settings").click()
    tab.get_by_label("max new tokens").first.fill("400")
    tab.get_by_label("temperature").first.fill("1")
    tab.set_input_files("input[type=file] >> nth=0", picture)
    tab.wait_for_selector(".multimodal-textbox img")
    tab.fill(BOX, "What is this?")
    tab.keyboard.press("Enter")
    word = "document.querySelector('#turns .bot')?.innerText.trim().length > 20"
    tab.wait_for_function(
        f"{word} && !document.querySelector('#experts img')"
    )  # words before the answer's end
    tab.wait_for_selector("#experts img")
    first = tab.get_attribute("#experts img", "src")
    assert "4 image" in tab.inner_text("#experts") and first.startswith("data:image/svg+xml")
    assert tab.query_selector("#turns .user img")  # the picture is among the turns
    tab.get_by_label("max new tokens").first.fill("20")
    tab.fill(BOX, "And now, without a picture?")
    tab.keyboard.press("Enter")
    tab.wait_for_function("old => document.querySelector('#experts img').src != old", arg=first)
    assert tab.locator("#turns .bot").count() == 2
    outside = [url for url in page.asked if not url.startswith((address, "data:", "blob:"))]
    assert len(page.asked) > 10 and outside == []


@needs_gradio
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_answer_is_stopped(page, monkeypatch):
    stopped, tab, ask = threading.Event(), page.page, Conversation.ask

    def watched(self, text, write, *args):
        def slowly(words):  # a tiny model is done before a busy browser has drawn the first words
            time.sleep(0.05)
            write(words)

        try:
            return ask(self, text, slowly, *args)
        finally:
            stopped.set()

    monkeypatch.setattr(Conversation, "ask", watched)
    tab.get_by_text("Settings").click()
    tab.get_by_label("max new tokens").first.fill("1024")
    tab.get_by_label("temperature").first.fill("1")
    tab.fill(BOX, "Tell me all.")
    tab.keyboard.press("Enter")
    tab.wait_for_function("document.querySelector('#turns .bot')?.innerText.length > 20")
    assert not stopped.is_set()
    tab.locator(".stop-button").dispatch_event("click")  # at once: it is drawn anew with every word
    tab.wait_for_selector(".submit-button")
    assert stopped.wait(60) and not tab.query_selector("#experts img")  # it would have gone on for a while


@needs_gradio
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_boxes_in_the_detectors_tab(page, picture):
    tab = page.page
    tab.get_by_role("tab", name="Detector").click()
    tab.set_input_files("#image input[type=file]", picture)
    tab.wait_for_selector("#image img")
    tab.get_by_label("lowest score").first.fill("0")
    tab.get_by_label("what to look for").fill("cat, red car")
    tab.get_by_role("button", name="Look", exact=True).click()
    tab.wait_for_selector("#found img")
    tab.wait_for_function("/cat|red car/.test(document.querySelector('#boxes').textContent)")


@needs_gradio
def test_the_server_keeps_to_itself(address):
    import httpx
    from gradio.analytics import analytics_enabled

    assert address.startswith("http://127.0.0.1:")
    page = httpx.get(address)
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "fonts.googleapis" not in page.text and "cdnjs" not in page.text
    assert analytics_enabled() is False
    # without the refusal the server would go there, and say 502
    for place in ("http://192.0.2.1/a.png", "https://huggingface.co/a.png", "/etc/passwd"):
        assert httpx.get(f"{address}/gradio_api/file={place}").status_code == 403


@needs_gradio
def test_what_cannot_be_answered_is_said(tiny_folder, tmp_path, monkeypatch):
    import gradio

    said: list[str] = []
    monkeypatch.setattr(gradio, "Warning", said.append)
    chat = web.ChatTab(str(tiny_folder))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "notes.txt").write_text("words")
    write_video(tmp_path / "video.mp4", [Image.new("RGB", (16, 16), "red")] * 4, 2)
    for files, text, says in (
        ([], " ", "the message is empty"),
        ([str(tmp_path / "broken.png")], "what?", "cannot decode the image"),
        ([str(tmp_path / "video.mp4")], "what?", "takes no video"),
        ([str(tmp_path / "notes.txt")], "what?", "expected an image, video or audio file"),
        (["nowhere.png"], "what?", "cannot read nowhere.png"),
        ([], "x" * 5000, "more than the 4096"),
    ):
        assert list(chat.answer({"text": text, "files": files}, [], 8, 0, 0, "")) == []
        assert says in said.pop()
    assert "is dense" in chat.panel(RoutingStats())


@needs_gradio
def test_the_turns_before_are_taken_from_the_page(tiny_folder, picture):
    chat = web.ChatTab(str(tiny_folder))
    history = [
        {"role": "user", "content": [file(picture), {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A fox."}]},
    ]
    *_, (said, panel) = chat.answer({"text": "why?", "files": []}, history, 8, 0, 0, "")
    assert said and "4 image" in panel  # the earlier picture is still seen
    unanswered = {"role": "user", "content": [{"type": "text", "text": "who?"}]}
    *_, (same, _) = chat.answer({"text": "why?", "files": []}, [*history, unanswered], 8, 0, 0, "")
    assert same == said
    *_, (again, _) = chat.answer({"text": "why?", "files": []}, [], 8, 0, 0, "")
    assert again != said


def file(path):
    return {"type": "file", "file": {"path": str(path)}}


@pytest.mark.parametrize(
    ("args", "says"),
    [(["nowhere/at/all"], "MODEL nowhere/at/all"), (["{}", "--detector", "{}"], "--detector")],
)
def test_bad_arguments_are_one_line(tiny_folder, capsys, args, says):
    assert cli.main(["web", *(arg.replace("{}", str(tiny_folder)) for arg in args)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("unimoe: error: ") and (says in line or not WITH_GRADIO)
