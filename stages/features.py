"""Features of frozen encoders: computed once for a cache, or for some samples."""

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as nnf

from unimoe.data import Collator, FeatureCache, HostFeatures, Sample, open_feature_cache
from unimoe.model.configuration import MEDIA_INPUTS
from unimoe.model.inputs import EncodedMedia
from unimoe.model.modeling import UniMoeForConditionalGeneration


def fill_cache(
    model: Any, processor: Any, folder: str | Path, samples: list[Sample], trainer: Any
) -> FeatureCache | HostFeatures:
    """Cache the outputs of the frozen encoders for all media of ``samples`` in ``folder``.

    Every process of the ``trainer`` encodes its share.

    Raises:
        UserError: a sample that cannot be encoded, or a model of transformers whose features cannot be
            cached.
    """
    cache = open_feature_cache(model, processor, Path(folder).resolve(), "data.cache_features")
    cache.fill(samples, trainer.global_rank, trainer.world_size)
    trainer.strategy.barrier("features")
    cache.refresh()
    return cache


@torch.no_grad()
def encode(
    model: UniMoeForConditionalGeneration, collator: Collator, samples: list[Sample], modality: str
) -> EncodedMedia:
    """The frozen encoder's features of one media item of each sample: features_nSD, and lengths_n or None."""
    encoder = model.model.encoders[modality]
    features: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []
    for start in range(0, len(samples), 16):
        batch = collator(samples[start : start + 16])
        encoded = (batch.get("encoded_media") or {}).get(modality)
        if encoded is None:
            encoded = encoder(*(batch[name].to(model.device) for name in MEDIA_INPUTS[modality]))
        features_MSD, lengths_M = encoded
        features.append(features_MSD.to(model.device))
        if lengths_M is not None:
            lengths.append(lengths_M.to(model.device))
    longest = max(part.shape[1] for part in features)
    whole = torch.cat([nnf.pad(part, (0, 0, 0, longest - part.shape[1])) for part in features])
    return whole, torch.cat(lengths) if lengths else None
