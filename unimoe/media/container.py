"""Containers of audio and video, opened with PyAV (the extra ``video``)."""

from typing import TYPE_CHECKING, Any, BinaryIO

from unimoe.errors import UserError

from .source import Part, media_format, open_media

if TYPE_CHECKING:
    from av.container import InputContainer

DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,ogg,mpeg,mpegts,mpegvideo,flv,live_flv,asf,asf_o,gif,apng,webp,"
    "h264,hevc,av1,ivf,m4v,mjpeg,nut,mxf,rm,dv,wtv,yuv4mpegpipe,nsv,swf,"
    "aac,ac3,eac3,amr,amrnb,amrwb,aiff,ape,au,caf,dts,flac,loas,mp3,tta,voc,w64,wav,wv,truehd,xwma"
)
"""Formats that are opened. FFmpeg's other demuxers include playlists, which name further URLs and files."""


def require_av(what: str) -> Any:
    """PyAV. ``what`` needs it.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UserError(f"{what} needs PyAV: pip install 'unimoe[video]'") from error
    return av


def open_container(file: BinaryIO, what: str) -> "InputContainer":
    """Open an encoded file for demuxing, by its content.

    Raises:
        UserError: PyAV is not installed.
        av.error.FFmpegError: the format is not one of ``DEMUXERS``.
    """
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none"}
    return require_av(what).open(file, options=options)


def modality(part: Part, where: str) -> str | None:
    """``image``, ``video`` or ``audio``, by content; None if it is none of them.

    Without PyAV a container that may hold either is taken for video.

    Raises:
        UserError: the file cannot be read.
    """
    with open_media(part, where) as file:
        found = media_format(file.read(256))
        if found == "image":
            return found
        file.seek(0)
        try:
            with open_container(file, where) as container:
                # an album's cover is a video stream with the disposition "attached picture"
                videos = [stream for stream in container.streams.video if not is_cover(stream)]
                return "video" if videos else "audio" if container.streams.audio else found
        except (UserError, OSError, ValueError):  # no PyAV, or FFmpegError
            return found


def is_cover(stream: Any) -> bool:
    """Whether a video stream is an album cover."""
    return bool(int(stream.disposition) & 0x400)  # AV_DISPOSITION_ATTACHED_PIC
