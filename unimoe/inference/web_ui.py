"""``unimoe web``: a chat page that shows the expert load of each answer, with an optional detector tab.

    browser -> Gradio's queue -> Conversation.stream -> words, then the panel of the experts
                              -> Detector            -> boxes

The page loads no external assets and sends no telemetry, and the server fetches no URLs.
"""

import os
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from unimoe.analysis.expert_names import names_of
from unimoe.analysis.plots import plot_expert_load
from unimoe.analysis.routing_stats import RoutingStats
from unimoe.detection.inference.drawing import draw_boxes
from unimoe.detection.inference.predictor import Detector
from unimoe.detection.inference.sources import split_prompt
from unimoe.detection.model.loading import load_detector
from unimoe.errors import UserError
from unimoe.files import data_url
from unimoe.model.loading import load_any

from .conversation import Conversation, Settings, detect_modality

POLICY = "; ".join(
    [
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:",
        "frame-ancestors 'self'",
        "form-action 'self'",
        "base-uri 'self'",
    ]
)
"""Content-Security-Policy of the page: the browser contacts this server only, whatever an answer contains."""

STYLE = """
footer, button[aria-label="Share"], button[title="Share"] { display: none !important; }
#experts img { width: 100%; }
#experts p { margin: 0 0 .6em; opacity: .75; }
"""

EXTRA = "the page needs Gradio, found none: pip install 'unimoe[web]'"


def web(
    model: str,
    detector: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_file_mb: int = 100,
    device: str | None = None,
) -> None:
    """Serve a chat page with a panel that shows the expert load of each answer.

    It takes text, and images, video, audio files and the microphone as far as the model does.

    Args:
        model: folder of a finished stage (or a hub id of a unimoe model).
        detector: folder of a detector, shown in a tab of its own.
        host: address to listen on; 0.0.0.0 for all interfaces, which opens the page to the network.
        port: to listen on; 0 picks a free one.
        max_file_mb: largest file that may be uploaded, in megabytes.
        device: such as cpu or cuda (default: a GPU if available).
    """
    disable_progress_bar()
    page = build_page(model, detector, device)
    address = launch(page, host, port, max_file_mb)
    print(f"{model} listens on {address} (Ctrl-C to stop)", flush=True)
    page.block_thread()


def build_page(model: str, detector: str | None = None, device: str | None = None) -> Any:
    """The page as Gradio Blocks, its models loaded.

    Raises:
        UserError: Gradio or a model is missing.
    """
    gr = _gradio()
    chat = ChatTab(model, device)
    looker = DetectorTab(detector, device) if detector else None
    kept = (3600, 86400)  # every hour what was uploaded a day ago is deleted
    with gr.Blocks(title="unimoe", analytics_enabled=False, fill_height=True, delete_cache=kept) as page:
        with gr.Tab("Chat"):
            chat.build(gr)
        if looker is not None:
            with gr.Tab("Detector"):
                looker.build(gr)
    return page


def launch(page: Any, host: str, port: int, max_file_mb: int) -> str:
    """Serve the page from a thread; returns its address.

    Raises:
        UserError: the port is taken.
    """
    gr = _gradio()
    from fastapi.middleware import Middleware

    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            share=False,
            ssr_mode=False,
            quiet=True,
            show_error=True,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=max_file_mb << 20,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(_Policy)], "docs_url": None, "redoc_url": None},
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port {port} of {host} cannot be bound: {error}") from error
    return address


class ChatTab:
    """The conversation and its panel; every visitor's turns are in their own page."""

    def __init__(self, model: str, device: str | None = None):
        self.name = model
        self.model, self.processor = load_any(model, device=device)

    def build(self, gr: Any):
        """Add the components to the surrounding Blocks."""
        modalities = self.processor.modalities
        files = [modality for modality in ("image", "video") if modality in modalities]
        audio = "speech" in modalities or "audio" in modalities
        sources = (["upload"] if files or audio else []) + (["microphone"] if audio else [])
        empty = _note("Ask something: the expert load of the answer is shown here.")
        panel = gr.HTML(empty, elem_id="experts", render=False)  # what follows places such things later
        settings = [
            gr.Slider(1, 1024, 256, step=1, label="max new tokens", render=False),
            gr.Slider(0, 2, 0, step=0.05, label="temperature (0: greedy)", render=False),
            gr.Number(0, precision=0, minimum=0, label="seed", render=False),
            gr.Textbox(label="system prompt", render=False),
        ]
        if {"speech", "audio"} <= set(modalities):
            settings.append(gr.Checkbox(label="audio is not speech", render=False))
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=420):
                gr.ChatInterface(
                    self.answer,
                    multimodal=True,
                    chatbot=gr.Chatbot(
                        height="62vh",
                        show_label=False,
                        buttons=["copy"],
                        elem_id="turns",
                        render=False,
                        placeholder=f"**{Path(self.name).name}** takes {', '.join(['text', *modalities])}.",
                    ),
                    textbox=gr.MultimodalTextbox(
                        file_types=files + (["audio"] if audio else []),
                        file_count="multiple",
                        sources=sources or None,
                        placeholder="Ask about an image, or just ask",
                        stop_btn=True,
                        show_label=False,
                        render=False,
                    ),
                    additional_inputs=settings,
                    additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
                    additional_outputs=[panel],
                    flagging_mode="never",
                    analytics_enabled=False,
                    api_name="chat",
                )
            with gr.Column(scale=2, min_width=360):
                gr.Markdown("### Expert load of the last answer")
                panel.render()

    def answer(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        system: str,
        no_speech: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """The answer so far and the panel, again and again, as Gradio's ChatInterface asks for it."""
        gr = _gradio()
        try:
            opening = (system or "").strip()
            settings = Settings(int(max_new_tokens), float(temperature), int(seed or 0), opening)
            settings.check()
            talk = Conversation(self.model, self.processor, settings)
            for turn in _answered(history):
                files = [part["file"] for part in turn["content"] if part["type"] == "file"]
                self._attach(talk, files, not no_speech)
                texts = [{"type": "text", "text": p["text"]} for p in turn["content"] if p["type"] == "text"]
                talk.turns.append({"role": turn["role"], "content": [*talk.attached, *texts]})
                talk.attached = []
            self._attach(talk, [{"path": path} for path in message["files"]], not no_speech)
            if not message["text"].strip() and not talk.attached:
                raise UserError("the message is empty; write, speak or attach something")
            said = ""
            for words in talk.stream(message["text"].strip()):
                said += words
                yield said, gr.skip()
            yield said or "(empty answer)", self.panel(talk.stats)
        except UserError as error:
            gr.Warning(str(error))  # the question stays, without an answer

    def _attach(self, talk: Conversation, files: Sequence[dict[str, Any]], speech: bool):
        for file in files:
            name = Path(file["path"]).name
            talk.attach(detect_modality(file["path"], self.processor, speech), file["path"], name)

    def panel(self, stats: RoutingStats) -> str:
        """The expert load of an exchange by layer and modality, as HTML."""
        load = stats.expert_load()
        if not load:
            return _note("This model is dense: it has no experts.")
        counts = ", ".join(f"{count} {kind}" for kind, count in stats.tokens().items())
        plot = plot_expert_load(load, names_of(self.model, self.name, len(load["all"][0])), columns=2)
        source = data_url("image/svg+xml", plot.encode())
        text = "Expert load of the last prompt and its answer, in per cent per layer"
        return _note(f"{text}: {counts} tokens.") + (
            f'<img alt="expert load by layer and modality" src="{source}">'
        )


class DetectorTab:
    """An image and words in, boxes out."""

    def __init__(self, folder: str, device: str | None = None):
        model, self.tokenizer = load_detector(folder, "--detector")
        self.model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
        self.detector: Detector | None = None

    def build(self, gr: Any):
        """Add the components to the surrounding Blocks."""
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                sources = ["upload", "clipboard", "webcam"]
                image = gr.Image(type="pil", label="image", sources=sources, height=380, elem_id="image")
                words = gr.Textbox(label="what to look for, separated by commas", placeholder="cat, red car")
                threshold = gr.Slider(0, 1, 0.3, step=0.01, label="lowest score")
                button = gr.Button("Look", variant="primary")
            with gr.Column(scale=3, min_width=420):
                buttons = ["download", "fullscreen"]
                drawn = gr.Image(
                    type="pil", label="found", interactive=False, buttons=buttons, height=380, elem_id="found"
                )
                table = gr.Dataframe(
                    headers=["what", "score", "left", "top", "right", "bottom"],
                    datatype=["str", *["number"] * 5],
                    label="boxes, in pixels",
                    elem_id="boxes",
                    interactive=False,
                )
        asked = {"fn": self.look, "inputs": [image, words, threshold], "outputs": [drawn, table]}
        button.click(**asked, api_name="detect", concurrency_limit=1)
        words.submit(**asked, api_name=False, concurrency_limit=1)

    def look(self, image: Image.Image | None, words: str, threshold: float) -> tuple[Any, Any]:
        """The image with boxes, and a row for each, best first."""
        gr = _gradio()
        try:
            if image is None:
                raise UserError("there is no image yet; choose one on the left")
            names = split_prompt(words)
            if self.detector is None or self.detector.names != names:  # their text features are kept
                self.detector = Detector(self.model, self.tokenizer, names)
            (found,) = self.detector([image.convert("RGB")], threshold)
        except UserError as error:
            gr.Warning(str(error))
            return gr.skip(), gr.skip()
        if not len(found.boxes_K4):
            gr.Info(f"Nothing of that scores {threshold:g} or more.")
        boxes, labels, scores = found.boxes_K4.tolist(), found.labels_K.tolist(), found.scores_K.tolist()
        texts = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        rows = [
            [names[label], round(score, 3), *(round(value) for value in box)]
            for label, score, box in zip(labels, scores, boxes, strict=True)
        ]
        return draw_boxes(image, boxes, labels, texts), rows


def _answered(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns without questions that got no answer."""
    roles = [turn["role"] for turn in history]
    nexts = zip(history, [*roles[1:], "user"], strict=False)
    return [turn for turn, after in nexts if turn["role"] != after]


class _Policy:
    """Adds POLICY to every answer of an ASGI application."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any):
        async def with_policy(message: Any):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def _gradio() -> Any:
    """Gradio without telemetry and without fetching URLs."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
        import safehttpx
        from gradio import processing_utils
    except ImportError as error:
        raise UserError(EXTRA) from error
    # Its server would fetch any public URL that a client sends in place of an uploaded file. All of these
    # requests pass these two checks, which now refuse every host.
    safehttpx.async_validate_url = _nobody
    processing_utils.PUBLIC_HOSTNAME_WHITELIST.clear()
    return gradio


async def _nobody(hostname: str) -> str:
    raise ValueError(f"{hostname}: remote addresses are not fetched")


def _free_port(host: str) -> int:
    import socket

    with socket.socket() as found:
        found.bind((host, 0))
        return found.getsockname()[1]


def _note(text: str) -> str:
    return f"<p>{escape(text)}</p>"
