"""Our models on vLLM's Transformers backend.

The backend builds our own model class and replaces its parts: the experts of every MoE layer by one fused
operator, attention by its paged one, the linear layers of the decoder by fused and divided ones. Encoders and
connectors stay as they are.

Shapes: T tokens of all running requests, D hidden, M encoder items, N media tokens of an item, V vocabulary.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.moe import MoEMixin
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from unimoe.model.configuration import MEDIA_INPUTS, PLACEHOLDERS
from unimoe.moe.layer import MoELayer
from unimoe.moe.slot_layer import SlotMoELayer

from .vllm_inputs import DummyMedia, MediaProcessor, MediaSettings

KEPT = ("encoders", "connectors")
"""Parts of the model that vLLM does not touch."""


@MULTIMODAL_REGISTRY.register_processor(MediaProcessor, info=MediaSettings, dummy_inputs=DummyMedia)
class UniMoeForVllm(MoEMixin, CausalMixin, SupportsMultiModal):
    """:class:`~unimoe.model.modeling.UniMoeForConditionalGeneration` as vLLM runs it."""

    requires_raw_input_tokens = True  # routers may read the ids, and from them the modality of each token

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = vllm_config.model_config.try_get_generation_config()
        self.suppressed = settings.get("suppress_tokens") or []

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACEHOLDERS[modality]

    def get_language_model(self) -> "UniMoeForVllm":
        return self

    def recursive_replace(self) -> None:
        kept = {name: self.model._modules.pop(name) for name in KEPT}
        for layer in self.model.modules():
            if isinstance(layer, MoELayer):
                SlotMoELayer.convert(layer, self.text_config.num_experts_per_tok)
                down_proj: Any = layer.experts.down_proj
                self.text_config.moe_intermediate_size = down_proj.shape[2]
        if self.config.moe:
            super().recursive_replace()
        else:  # vLLM has no group of processes for the experts of a dense model
            super(MoEMixin, self).recursive_replace()
        self.model._modules.update(kept)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """vLLM loads what it replaced; encoders, connectors and buffers are copied here."""
        parts = (getattr(self.model, name).named_parameters(f"model.{name}") for name in KEPT)
        ours = dict(chain(*parts, self.model.named_buffers("model")))
        loaded = set()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name in ours:
                    ours[name].data.copy_(tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        return super().load_weights(others()) | loaded

    def embed_multimodal(self, **media: Any) -> list[Tensor]:
        """[N, D] of each media item of one modality."""
        dtype = self.model_config.dtype
        embedded = []
        for modality, names in MEDIA_INPUTS.items():
            if names[0] in media:
                for features_MX, *lengths in zip(*(media[name] for name in names), strict=True):
                    encoded = self.model.encoders(modality, features_MX.to(dtype), *lengths)
                    embedded.append(self.model.connect(modality, encoded))
        return embedded

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """[T, D], the tokens' embeddings with the media in their places."""
        embeds_TD = self.model.get_input_embeddings()(input_ids)
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return embeds_TD
        return _merge_multimodal_embeddings(embeds_TD, multimodal_embeddings, is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """[T, D], the last hidden states of all requests, one behind the other."""
        if intermediate_tensors is not None:  # a later stage of pipeline parallelism
            inputs_embeds = intermediate_tensors["hidden_states"]
        hidden_TD = self.model(
            input_ids=None if input_ids is None else input_ids[None],
            inputs_embeds=None if inputs_embeds is None else inputs_embeds[None],
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state[0]
        return hidden_TD if self.pp_group.is_last_rank else IntermediateTensors({"hidden_states": hidden_TD})

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """[T, V]; placeholders of media cannot be generated."""
        logits_TV = super().compute_logits(hidden_states)
        if logits_TV is not None and self.suppressed:
            logits_TV[:, self.suppressed] = -torch.inf
        return logits_TV
