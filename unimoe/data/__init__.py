"""Data: files -> Samples -> batches of like with like -> the model's inputs with labels."""

from unimoe.media.audio import load_audio
from unimoe.media.image import load_image
from unimoe.media.source import Part
from unimoe.media.video import load_video

from .collate import Collator
from .feature_cache import FeatureCache
from .host_features import HostFeatures, open_feature_cache
from .read import read_samples
from .records import parse_record
from .sample import Message, Sample
from .sampler import ModalityBatchSampler
from .write import write_samples

__all__ = [
    "Collator",
    "FeatureCache",
    "HostFeatures",
    "Message",
    "ModalityBatchSampler",
    "Part",
    "Sample",
    "load_audio",
    "load_image",
    "load_video",
    "open_feature_cache",
    "parse_record",
    "read_samples",
    "write_samples",
]
