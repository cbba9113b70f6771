"""Encoders of images, video, speech and audio, and the connectors that project into the language model."""

from .build_connector import build_connector, copy_connector, fill_connector
from .connector import Connector, ConnectorConfig, num_tokens
from .encoder import Encoder, ImageEncoder, SpeechEncoder, build_encoder, load_encoder
from .ridge import ridge_init, ridge_map

__all__ = [
    "Connector",
    "ConnectorConfig",
    "Encoder",
    "ImageEncoder",
    "SpeechEncoder",
    "build_connector",
    "build_encoder",
    "copy_connector",
    "fill_connector",
    "load_encoder",
    "num_tokens",
    "ridge_init",
    "ridge_map",
]
