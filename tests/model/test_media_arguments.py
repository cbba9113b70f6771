"""Media as callers of other processors give them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from unimoe.errors import UserError
from unimoe.model.media_arguments import as_parts
from unimoe.testing import IMAGE, tiny_model

RED, BLUE = Image.new("RGB", (48, 32), "red"), Image.new("RGB", (32, 48), "blue")
ARRAY = np.asarray(RED)
PROMPT = "<image>what?"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))[1]


@pytest.mark.parametrize(
    "image",
    [
        RED,
        [RED],
        [[RED]],
        ARRAY,
        ARRAY.transpose(2, 0, 1),
        torch.from_numpy(ARRAY.copy()).permute(2, 0, 1),
        ARRAY / 255,
        "{path}",
    ],
)
def test_every_form_of_an_image_gives_the_same_pixels(processor, image, tmp_path):
    RED.save(tmp_path / "a.png")
    image = str(tmp_path / "a.png") if isinstance(image, str) else image
    wanted = processor(text=PROMPT, images=RED)["pixel_values"]
    assert torch.equal(processor(text=PROMPT, images=image)["pixel_values"], wanted)


def test_images_by_prompt_go_to_their_prompt(processor):
    batch = processor(text=[PROMPT, "hi", PROMPT * 2], images=[[RED], [], [BLUE, RED]])
    flat = processor(text=[PROMPT, "hi", PROMPT * 2], images=[RED, BLUE, RED])
    assert torch.equal(batch["pixel_values"], flat["pixel_values"])
    with pytest.raises(UserError, match=r"the prompts hold \[1, 0\] <image>, but \[0, 1\] image inputs"):
        processor(text=[PROMPT, "hi"], images=[[], [RED]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "an image is given as int, expected a PIL image, an array, a tensor, a path or a data URL"),
        (np.zeros((5, 6, 7)), r"an image has the shape \[5, 6, 7\], expected \[height, width, 3\]"),
        (ARRAY.astype(float), "an image of floats has values outside of 0..1"),
        ("nowhere.png", "nowhere.png"),
    ],
)
def test_what_is_no_image_is_named(processor, image, message):
    with pytest.raises(UserError, match=message):
        processor(text=PROMPT, images=image)


def test_videos_and_waveforms_are_lists_too():
    one, two = [RED, BLUE], [BLUE]
    assert [len(row) for row in as_parts("video", one, [1])] == [1]
    assert [len(row) for row in as_parts("video", [one, two], [1, 1])] == [1, 1]
    assert [len(row) for row in as_parts("video", [[one, two], []], [2, 0])] == [2, 0]
    assert as_parts("video", "a.mp4", [1]) == [[{"type": "video", "path": "a.mp4"}]]
    assert as_parts("speech", [0.1, 0.2], [1])[0][0]["speech"].tolist() == [0.1, 0.2]
    assert [len(row) for row in as_parts("audio", [[np.zeros(2)], [np.zeros(3)]], [1, 1])] == [1, 1]


def test_pipelines_take_chats_and_prompts(tmp_path):
    """Those of transformers: media decoded, as paths, and as paths under ``url``."""
    model, processor = tiny_model(tmp_path, image=IMAGE)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    file = str(tmp_path / "a.png")
    RED.save(file)
    ask = pipeline("image-text-to-text", model=str(tmp_path / "model"))
    words = {"type": "text", "text": "what?"}
    chats = [
        [{"role": "user", "content": [{"type": "image", key: value}, words]}]
        for key, value in (("image", RED), ("path", file), ("url", file))
    ]
    answers = [ask(text=chat, max_new_tokens=4)[0]["generated_text"][-1]["content"] for chat in chats]
    assert answers[0] == answers[1] == answers[2]
    prompt = "<|im_start|>user\n<image>what?<|im_end|>\n<|im_start|>assistant\n"
    for images in ([RED], file):
        found = ask(images=images, text=prompt, max_new_tokens=4)[0]["generated_text"]
        assert found == prompt + answers[0]
