import io

import pytest
from PIL import Image

from unimoe.errors import UserError
from unimoe.serve import decode_worker
from unimoe.serve.decode_worker import DecodeRequest


def png(*size, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", [(16_000, 16_000), (9_000, 9_000), (100_000, 1)])
def test_images_that_are_too_large_are_not_decoded(size, monkeypatch):
    def decode(self, *args):
        raise AssertionError("decoded")

    content = png(*size, mode="1")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    request = DecodeRequest("image", "x", 50_000_000, 16_384, 1.0)
    with pytest.raises(UserError, match="pixels; at most 50,000,000"):
        decode_worker.decode(request, content)
