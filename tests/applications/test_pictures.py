import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.applications.pictures import image_size, read_image, scaled_pixels, sheet, write_sheet
from unimoe.errors import UserError


def test_images_are_read_and_broken_files_are_named(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    assert image_size(path) == (30, 20) and read_image(path, "L").mode == "L"
    found = scaled_pixels(read_image(path, "RGB"))
    assert found.dtype == np.float32 and np.array_equal(
        np.rint((found + 1) * 127.5), noise.transpose(2, 0, 1)
    )
    path.write_bytes(path.read_bytes()[:400])
    assert image_size(path) == (30, 20), "the header is whole"
    with pytest.raises(UserError, match=r"a.png cannot be read as an image \(.*truncated"):
        read_image(path, "RGB")
    for read in (image_size, lambda path: read_image(path, "RGB")):
        with pytest.raises(UserError, match="b.png cannot be read as an image"):
            read(tmp_path / "b.png")


def test_a_sheet_is_written_in_the_format_of_its_suffix(tmp_path):
    write_sheet(tmp_path / "new/sheet.jpg", torch.zeros(2, 3, 8, 8), columns=1, scale=1)
    with Image.open(tmp_path / "new/sheet.jpg") as page:
        assert page.format == "JPEG" and page.size == (12, 24)


def test_a_sheet_is_filled_row_by_row():
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 1.0, 5.0)])
    page = sheet(images, columns=2, scale=1)
    assert page.size == (24, 24)
    assert page.getpixel((6, 6)) == (0, 0, 0) and page.getpixel((18, 6)) == (255, 255, 255)
