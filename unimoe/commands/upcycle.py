"""``unimoe upcycle``: MoE layers for a multimodal model of transformers as it is.

unimoe upcycle path/to/Qwen2.5-VL-3B-Instruct runs/moe
unimoe upcycle path/to/SmolVLM2-2.2B-Instruct runs/moe --moe.preset sliced
unimoe upcycle path/to/base runs/moe --experts runs/charts runs/photos runs/documents
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unimoe.artifacts import StageRecord, check_savable, folder_hash, write_model
from unimoe.errors import UserError, check_seed
from unimoe.files import new_folder
from unimoe.model.card import model_card
from unimoe.model.loading import find_dense_host, load_stock
from unimoe.model.structure import upcycle_model
from unimoe.model.utils import count_parameters
from unimoe.moe import MoEConfig
from unimoe.moe.settings import merge, parse_settings

log = logging.getLogger(__name__)


def upcycle(
    model: str, output: str, *, moe: Sequence[str] = (), experts: Sequence[str] = (), seed: int = 0
) -> None:
    """Replace FFNs of a multimodal model of transformers with MoE layers (sparse upcycling).

    The result keeps the model's class: after `import unimoe`, AutoModelForMultimodalLM loads it.

    Args:
        model: folder or hub id of a dense model that takes images, video or audio, such as Qwen2.5-VL.
        output: new folder of the result.
        moe: settings of the MoE layers, such as router.k=2, or --moe.preset NAME (`unimoe moe list`).
        experts: folders of models that were fine-tuned from MODEL, one for each copy of an FFN; everything
            else is MODEL's. Without them all copies are those of MODEL.
        seed: seed of the fresh routers.

    Raises:
        UserError: the model is no dense host, a setting is wrong, or the output is there already.
    """
    folder = new_folder(output, "OUTPUT")
    check_seed(seed, "--seed")
    settings = parse_settings(moe, copies=not experts)
    if experts:
        settings = merge(settings, {"experts": {"copies": len(experts)}})
    config = MoEConfig.for_upcycling(settings)
    find_dense_host(model)
    built, processor = load_stock(model, dtype="auto", device="cpu")
    sources = [load_stock(one, "--experts", dtype="auto", device="cpu")[0] for one in experts]
    for one, source in zip(experts, sources, strict=True):
        if type(source) is not type(built):
            found, expected = type(source).__name__, type(built).__name__
            raise UserError(f"--experts {one} is a {found}, expected a {expected} as MODEL is")
    dense_TV = probe(built)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        upcycle_model(built, config, sources or None)
    difference = float((probe(built) - dense_TV).abs().max() / dense_TV.abs().max().clamp(min=1e-9))
    check_savable(built, processor)
    total, active = count_parameters(built)
    parents = [{"folder": one, "sha256": folder_hash(one)} for one in (model, *experts) if Path(one).is_dir()]
    record = StageRecord(
        "upcycle",
        {"model": model, "experts": list(experts), "moe": config.to_dict(), "seed": seed},
        parents,
        metrics={"difference": difference},
        parameters={"total": total, "active": active},
    )
    write_model(folder, built, processor, record, model_card(built, model, config))
    log.info("%s: %s parameters, %s active per token", folder, f"{total:,}", f"{active:,}")
    log.info("its logits differ from the dense model's by %.1g of the largest", difference)


@torch.no_grad()
def probe(model: Any) -> torch.Tensor:
    """[T, V] logits of a few tokens of text, in float32."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(16, device=model.device)[None] % vocabulary
    mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
