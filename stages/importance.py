"""Which hidden units of a dense model's FFNs matter on given samples, for experts of kind importance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unimoe.data import Collator, FeatureCache
from unimoe.model.host_loss import last_hidden
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe.install import dense_mlp
from unimoe.moe.upcycle.importance import measure_importance

from .router_start import choose_samples

SAMPLES = 300


def measure_units(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    files: Sequence[str],
    layers: Sequence[int],
    cache: str | Path,
    seed: int,
) -> None:
    """Note the mean absolute activation of the units of some layers on at most ``SAMPLES`` samples.

    Args:
        model: dense; its FFNs remember what was measured.
        processor: of the model.
        files: of samples, which count equally.
        layers: decoder layers.
        cache: folder of the frozen encoders' features; missing ones are computed.
        seed: of the choice of samples.
    """
    towers: Any = model.model.encoders
    features = FeatureCache(cache, processor, towers)
    chosen = choose_samples(files, SAMPLES, seed)
    features.fill(chosen)
    batches = Collator(processor, features=features).bucket_by_length(chosen)

    def run() -> None:
        for batch in batches:
            last_hidden(model, batch)

    measure_importance([dense_mlp(model.model.language_model, layer) for layer in layers], run)
