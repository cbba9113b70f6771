"""Data: files -> Samples -> batches of like with like -> the model's inputs with labels."""

from .collate import Collator
from .features import FeatureCache
from .media import load_audio, load_image
from .readers import read_samples
from .records import parse_record
from .sample import Message, Part, Sample
from .sampler import ModalityBatchSampler
from .video import load_video
from .writers import write_samples

__all__ = [
    "Collator",
    "FeatureCache",
    "Message",
    "ModalityBatchSampler",
    "Part",
    "Sample",
    "load_audio",
    "load_image",
    "load_video",
    "parse_record",
    "read_samples",
    "write_samples",
]
