"""Decode images to upright RGB with 8 bits per channel."""

import io
import logging
import re
import struct
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from unimoe.errors import UserError, first_line

from .source import Part, describe, open_media

logger = logging.getLogger(__name__)

_ROWS = 256  # of an image that are converted at a time
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG segment; others stand in compressed data


def load_image(part: Part, where: str, longest: int | None = None) -> Image.Image:
    """Decode an image part to RGB, upright (EXIF orientation applied), transparency blended onto white.

    The first frame of an animation or page of a document is taken, with a warning. Values of more than 8 bits
    are scaled to 8, see :func:`to_8_bits`.

    Args:
        part: holds ``path``, ``bytes``, a data URL ``url``, or under ``image`` an opened image, or an array
            or tensor ([H, W], [H, W, C] or [C, H, W]; integers, or floats in 0..1).
        where: what errors start with.
        longest: an image with a longer side, in pixels, is scaled down to it; a JPEG already while decoding.

    Raises:
        UserError: the image cannot be read or decoded, or has more pixels than Pillow considers safe (179
            million).
    """
    try:
        image = part.get("image")
        if image is None:
            with open_media(part, where) as file:
                image = open_image(file)
                if more := _more_frames(image):
                    logger.warning("%s: the image %s %s", where, describe(part), more)
                if longest:  # of a JPEG only every 2nd, 4th or 8th pixel has to be decoded
                    image.draft(image.mode, (longest, longest))
                image.load()
        elif not isinstance(image, Image.Image):
            image = _from_array(image)
        image = _upright(image, part, where)
        if image.mode[0] in "IF":
            image = to_8_bits(image)
        if longest and max(image.size) > longest:
            if image.mode not in ("L", "RGB", "RGBA", "CMYK"):
                image = _rgb(image)  # indices of a palette cannot be averaged
            if image is part.get("image"):
                image = image.copy()  # thumbnail works in place
            image.thumbnail((longest, longest), reducing_gap=2.0)
        return _rgb(image)
    except UserError:
        raise
    except Exception as error:  # on broken files Pillow raises nearly anything, also SyntaxError
        known = not isinstance(error, UnidentifiedImageError)  # whose message names our buffer
        reason = first_line(error) if known else f"no format that Pillow knows{_advice(part)}"
        raise UserError(f"{where}: cannot decode the image {describe(part)}: {reason}") from error


def open_image(file: BinaryIO, formats: list[str] | tuple[str, ...] | None = None) -> Image.Image:
    """Open an encoded image: its header is read, nothing decoded. ``formats``: those of Pillow that are
    tried."""
    return Image.open(_without_text(file), formats=formats)


def to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or floats as 8 bits, so that contrast survives whatever depth the file uses.

    Values in 0..1 (floats) fill 0..255. Other non-negative values are scaled from the smallest of 8, 10, 12,
    14 and 16 bits that holds the largest one: 12-bit X-rays and depth maps are stored in 16 bits. Signed
    values (CT scans) and larger ones are scaled from their own range. Values that are not finite become
    black.
    """
    low, high = _range(image)
    if low >= 0 and high <= 1 and image.mode == "F":
        high = 1.0
    elif low >= 0 and high < 1 << 16:
        high = next(float((1 << bits) - 1) for bits in (8, 10, 12, 14, 16) if high < 1 << bits)
        low = 0.0
    low = min(low, 0.0)
    scale = 255 / (high - low) if high > low else 0.0
    grey = Image.new("L", image.size)
    for top, rows in _strips(image):
        values = np.nan_to_num((rows - low) * scale, nan=0.0, posinf=0.0, neginf=0.0)
        grey.paste(Image.fromarray(values.clip(0, 255).round().astype(np.uint8)), (0, top))
    return grey


def count_jpeg_scans(content: bytes) -> int:
    """Scans of a JPEG, 1 unless it is progressive; 0 for any other format. Each costs a pass over all
    pixels."""
    if not content.startswith(b"\xff\xd8"):
        return 0
    scans, at = 0, 2
    while marker := _MARKER.search(content, at):
        at = marker.end()
        if marker[0] == b"\xff\xd9":
            break
        scans += marker[0] == b"\xff\xda"
        at += int.from_bytes(
            content[at : at + 2], "big"
        )  # skip the segment: previews in metadata do not count
    return scans


def _range(image: Image.Image) -> tuple[float, float]:
    """Smallest and largest finite value."""
    low, high = np.inf, -np.inf
    for _, rows in _strips(image):
        finite = rows[np.isfinite(rows)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return (low, high) if low <= high else (0.0, 0.0)


def _strips(image: Image.Image) -> Any:
    """(first row, values [rows, W] float32 or float64) of all strips: a whole large image would be 8 bytes
    a pixel."""
    width, height = image.size
    for top in range(0, height, _ROWS):
        rows = np.asarray(image.crop((0, top, width, min(top + _ROWS, height))))
        yield top, rows.astype(np.float64 if rows.dtype.itemsize > 2 else np.float32)


def _from_array(array: Any) -> Image.Image:
    values = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(f"the array has the shape {list(values.shape)}, expected [H, W, 3] or [3, H, W]")
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("the array holds floats outside 0..1; scale them, or give uint8")
        values = (values * 255).round().astype(np.uint8)
    if values.ndim == 3 and values.dtype != np.uint8:
        if values.min() < 0 or values.max() > 255:
            raise ValueError(f"the array holds {values.dtype} outside 0..255; scale it, or give uint8")
        values = values.astype(np.uint8)
    if values.ndim == 2 and values.dtype not in (np.uint8, np.uint16):
        values = values.astype(np.int32)
    return Image.fromarray(np.ascontiguousarray(values))


_ORIENTATION = 0x0112
_METHODS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, part: Part, where: str) -> Image.Image:
    """The image as its metadata say it is held. ``ImageOps.exif_transpose`` would also write the rest of the
    metadata anew, which fails on broken ones, and copy images that are upright."""
    try:
        method = _METHODS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # noqa: BLE001  (broken metadata raise nearly anything, and are optional)
        found = f"the EXIF data of the image {describe(part)} are ignored"
        logger.warning("%s: %s: %s", where, found, first_line(error))
        return image
    if method is None:
        return image
    turned = image.transpose(method)
    for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
        turned.info.pop(name, None)  # else it would be turned again
    return turned


_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_XMP, _LONGEST_XMP = b"XML:com.adobe.xmp", 1 << 16  # may hold the orientation


def _without_text(file: BinaryIO) -> BinaryIO:
    """A PNG without the chunks of text and colour profiles, which are not used: Pillow refuses files with
    more than 1 MB of them, and image generators write such. Any other file as it is."""
    if file.read(len(_PNG)) != _PNG:
        file.seek(0)
        return file
    content, at, kept = memoryview(file.read()), 0, [memoryview(_PNG)]
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if name not in _TEXT_CHUNKS or content[at + 8 : at + 25] == _XMP and length < _LONGEST_XMP:
            kept.append(content[at : at + length + 12])
        at += length + 12  # length, name and checksum
    return io.BytesIO(b"".join(kept))


def _more_frames(image: Image.Image) -> str | None:
    """What the warning says of a file with more images than the one that is taken."""
    if not getattr(image, "is_animated", False) or image.format == "MPO":
        return None  # an MPO is a phone's JPEG, followed by a preview or a depth map
    if image.format == "TIFF":
        return f"has {cast(Any, image).n_frames} pages; only the first is used"
    return "is an animation; only its first frame is used (as a video, its timing would count)"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _advice(part: Part) -> str:
    """What to install for formats that Pillow reads with a plug-in."""
    try:
        with open_media(part, "") as file:
            head = file.read(12)
    except UserError:
        return ""
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"):
        return "; it is HEIC, as phones write: convert it to JPEG"
    return ""
