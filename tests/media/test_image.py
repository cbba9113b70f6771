import base64
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from unimoe.errors import UserError
from unimoe.media.image import count_jpeg_scans, load_image, to_8_bits


def encoded(picture, format="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def image(content, **options):
    return load_image({"type": "image", "bytes": content}, "f:1", **options)


def fault(part):
    with pytest.raises(UserError) as caught:
        load_image({"type": "image", **part}, "data.jsonl:4")
    message = str(caught.value)
    assert message.startswith("data.jsonl:4: ") and "\n" not in message
    return message


def test_rotated_by_exif():
    picture = Image.new("RGB", (4, 2), (255, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn to the right
    loaded = image(encoded(picture, exif=exif))
    assert loaded.size == (2, 4)
    assert loaded.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).resize((8, 4), Image.Resampling.NEAREST)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGB").convert(mode)
    loaded = image(encoded(picture, "TIFF" if mode == "CMYK" else "PNG"))
    assert loaded.mode == "RGB" and loaded.size == (8, 4)
    assert loaded.getpixel((0, 0)) == (0, 0, 0) and loaded.getpixel((7, 3)) == (255, 255, 255)


def test_sixteen_bit_colour_and_floating_point():
    grey = np.array([[0, 65535]], dtype=np.uint16)
    assert [image(encoded(Image.fromarray(grey), "TIFF")).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]
    floating = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    assert [image(encoded(floating, "TIFF")).getpixel((x, 0))[0] for x in (0, 1)] == [0, 255]


def test_of_an_animation_the_first_frame_is_taken_and_it_is_said(caplog):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert image(content).getpixel((0, 0)) == (255, 0, 0)
    assert "f:1: the image given as bytes is an animation; only its first frame is used" in caplog.text
    caplog.clear()
    image(encoded(frames[0], "GIF"))
    assert not caplog.text


def test_of_pages_and_of_a_phones_pictures_the_first_is_taken(caplog):
    def pages(format):
        first, *others = (Image.new("RGB", (8, 8), color) for color in ("red", "blue", "blue"))
        return image(encoded(first, format, save_all=True, append_images=others))

    assert pages("MPO").getpixel((0, 0))[0] > 240 and not caplog.text
    assert pages("TIFF").getpixel((0, 0)) == (255, 0, 0)
    assert "f:1: the image given as bytes has 3 pages; only the first is used" in caplog.text


@pytest.mark.parametrize(
    ("format", "mode"), [("PNG", "RGB"), ("JPEG", "RGB"), ("PNG", "P"), ("JPEG", "CMYK")]
)
def test_a_huge_picture_is_scaled_down_while_it_is_read(format, mode):
    wide = Image.new("RGB", (30_000, 200), (200, 30, 30)).convert(mode)
    loaded = load_image({"type": "image", "bytes": encoded(wide, format)}, "f:1", longest=1024)
    assert loaded.size == (1024, 7)
    assert np.abs(np.array(loaded.getpixel((500, 3))) - (200, 30, 30)).max() < 40
    small = load_image({"type": "image", "image": Image.new("RGB", (30, 20))}, "f:1", longest=1024)
    assert small.size == (30, 20)


def test_more_pixels_than_are_safe_are_refused():
    content = encoded(Image.new("1", (30_000, 30_000)))  # 113 kB
    assert "exceeds limit" in fault({"bytes": content})


def test_transparency_is_laid_on_white():
    assert image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)))).getpixel((0, 0)) == (255, 255, 255)
    assert image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 255)))).getpixel((0, 0)) == (255, 0, 0)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((1, 1), 1)
    loaded = image(encoded(palette, transparency=0))
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((1, 1)) == (200, 0, 0)


def test_image_from_path_data_url_and_memory(tmp_path):
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    content = encoded(picture)
    (tmp_path / "a.png").write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for part in ({"path": str(tmp_path / "a.png")}, {"url": url}, {"image": picture}):
        assert load_image({"type": "image", **part}, "f:1").getpixel((2, 1)) == (1, 2, 3)


def test_broken_images(tmp_path):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    path = tmp_path / "a.png"
    for broken in (content[: len(content) // 2], content[:20], content[:30] + b"\0" * 50, b"<svg></svg>"):
        path.write_bytes(broken)
        assert f"cannot decode the image {path}" in fault({"path": str(path)})
    path.write_bytes(b"")
    assert "is empty (0 bytes)" in fault({"path": str(path)})
    assert "cannot read" in fault({"path": str(tmp_path / "gone.png")})
    assert "cannot read" in fault({"path": str(tmp_path)})
    assert "not valid base64" in fault({"url": "data:image/png;base64,???"})
    assert "not a data URL" in fault({"url": "https://example.org/a.png"})
    assert "has no content" in fault({})


def grey_of(values, format="PNG"):
    loaded = np.asarray(image(encoded(Image.fromarray(values), format)))
    assert (loaded == loaded[..., :1]).all()
    return loaded[..., 0]


RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_a_ramp_of_any_depth_keeps_its_contrast(bits):
    grey = grey_of((RAMP * ((1 << bits) - 1)).round().astype(np.uint16))
    assert np.abs(grey.astype(float) - 255 * RAMP).max() <= 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_signed_scans_are_scaled_from_their_range(dtype):
    grey = grey_of((RAMP * 4095 - 1024).astype(dtype), "TIFF")  # Hounsfield units
    assert np.abs(grey.astype(float) - 255 * RAMP).max() <= 1


def test_values_that_are_not_finite_are_black_and_constant_images_have_a_value():
    values = np.array([[np.nan, np.inf, 0.0, 0.5, 1.0]], np.float32)
    assert grey_of(values, "TIFF").tolist() == [[0, 0, 0, 128, 255]]
    assert set(grey_of(np.full((4, 4), 7, np.uint16)).flat) == {7}
    assert set(grey_of(np.zeros((4, 4), np.float32), "TIFF").flat) == {0}


def test_strips_of_a_tall_image_are_one_image():
    values = np.arange(700, dtype=np.uint16)[:, None].repeat(3, axis=1) * 90
    grey = np.asarray(to_8_bits(Image.fromarray(values)))
    assert np.abs(grey - values * (255 / 65535)).max() < 1 and grey.shape == (700, 3)


def test_a_png_with_megabytes_of_text_is_an_image(tmp_path):
    picture = Image.new("RGB", (48, 32), "orange")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a workflow " * 150_000, zip=True)
    info.add_itxt("workflow", "a workflow " * 150_000, zip=True)
    info.add_text("plain", "a workflow " * 150_000)
    content = encoded(picture, pnginfo=info, icc_profile=b"profile " * 200_000)
    assert image(content).tobytes() == picture.tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    assert image(encoded(picture, pnginfo=info, exif=exif)).size == (32, 48)  # metadata that are used stay


def test_broken_exif_does_not_matter():
    def entry(tag, kind, count, value):
        return struct.pack("<HHII", tag, kind, count, value)

    orientation, beyond = entry(0x0112, 3, 1, 6), entry(0x011A, 5, 1, 1 << 20)
    start = b"Exif\0\0II*\0\x08\0\0\0"
    exifs = {
        start + struct.pack("<H", 2) + orientation + beyond + bytes(4): (4, 6),
        start + struct.pack("<H", 900) + orientation: (4, 6),  # announces 900 entries
        start + struct.pack("<H", 1) + entry(0x0112, 2, 4, 0x41414141) + bytes(4): (6, 4),  # text
        start + struct.pack("<H", 1) + entry(0x0112, 3, 1, 77) + bytes(4): (6, 4),
        b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12" * 40: (6, 4),
        b"Exif\0\0no TIFF at all": (6, 4),
    }
    for exif, size in exifs.items():
        assert image(encoded(Image.new("RGB", (6, 4), "red"), "JPEG", exif=exif)).size == size


def test_an_upright_image_is_not_turned_again():
    exif = Image.Exif()
    exif[0x0112] = 6
    once = image(encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif))
    assert load_image({"type": "image", "image": once}, "f:1").size == once.size == (4, 6)


@pytest.mark.parametrize("format", ["AVIF", "JPEG2000", "PPM", "WEBP", "TGA", "BMP"])
def test_formats_are_told_by_content(format, tmp_path):
    path = tmp_path / "named.png"
    path.write_bytes(encoded(Image.new("RGB", (32, 16), (200, 30, 30)), format))
    loaded = load_image({"type": "image", "path": str(path)}, "f:1")
    assert loaded.size == (32, 16) and np.abs(np.array(loaded.getpixel((5, 5))) - (200, 30, 30)).max() < 12


def test_heic_says_what_to_do():
    head = b"\0\0\0\x18ftypheic" + bytes(100)
    assert "it is HEIC, as phones write: convert it to JPEG" in fault({"bytes": head})


def test_arrays_and_tensors_in_either_order_of_axes():
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    forms = [
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
    ]
    forms += [array / 255, (array / 255).astype(np.float32).transpose(2, 0, 1), array.astype(np.int64)]
    for form in forms:
        assert np.array_equal(np.asarray(load_image({"type": "image", "image": form}, "f:1")), array)
    grey = load_image({"type": "image", "image": array[..., :1]}, "f:1")
    assert np.array_equal(np.asarray(grey)[..., 0], array[..., 0])
    assert "floats outside 0..1" in fault({"image": array.astype(np.float32)})
    assert "has the shape [20, 30, 2], expected [H, W, 3]" in fault({"image": array[..., :2]})


def test_an_image_of_the_caller_is_not_changed():
    picture = Image.new("RGB", (40, 20))
    picture.getexif()[0x0112] = 6
    assert load_image({"type": "image", "image": picture}, "f:1", longest=10).size == (5, 10)
    assert picture.size == (40, 20)


def test_scans_of_a_jpeg_are_counted():
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    plain, progressive = encoded(picture, "JPEG"), encoded(picture, "JPEG", progressive=True)
    assert count_jpeg_scans(plain) == 1 and count_jpeg_scans(encoded(picture)) == 0
    scans = count_jpeg_scans(progressive)
    assert scans == progressive.count(b"\xff\xda") > 5
    many = progressive[:-2] + progressive[progressive.rindex(b"\xff\xda") : -2] * 300 + b"\xff\xd9"
    assert count_jpeg_scans(many) == scans + 300
    preview = encoded(picture, "JPEG", exif=b"Exif\0\0" + progressive)
    assert count_jpeg_scans(preview) == 1
