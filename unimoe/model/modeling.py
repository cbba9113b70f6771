"""The model: encoders and connectors in front of a causal LM, some of whose FFNs are mixtures of experts.

Shapes: B rows, T tokens of a row, H hidden size of the LLM, V vocabulary, M media items (images, videos,
audio windows), S encoder positions of an item, D encoder width, N media tokens of a whole batch, K supervised
tokens of a batch.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import ModelOutput, can_return_tuple

from unimoe.encoders import Encoder, build_connector, build_encoder
from unimoe.encoders.weights import own_weights
from unimoe.moe import (
    MoEConfig,
    record,
    remember_context,
    routing_context,
)
from unimoe.moe.install import install_moe
from unimoe.moe.stock_records import leave_records

from .by_modality import ByModality
from .causal_head import CausalHead
from .configuration import MEDIA_INPUTS, UniMoeConfig
from .host import TokenInputs, token_context
from .inputs import EncodedMedia, MediaInputs, takes_media
from .loss import aux_loss, cross_entropy, supervised
from .rope_3d import install_time_rotary, time_ids

MEDIA_NAMES = tuple(MediaInputs.__annotations__)
"""The arguments of ``forward`` that hold media."""


@dataclass
class UniMoeOutput(ModelOutput):
    """Output of :class:`UniMoeForConditionalGeneration`; fields that do not apply are None."""

    loss: Tensor | None = None
    """Cross-entropy plus weighted auxiliary losses, with ``labels``."""
    aux_loss: Tensor | None = None
    """The weighted auxiliary losses alone (0-d)."""
    logits: Tensor | None = None
    """[B, T, V], or the last ``logits_to_keep`` positions."""
    last_hidden_state: Tensor | None = None
    """[B, T, H], from :class:`UniMoeModel`."""
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    """[B*T, E] for each MoE layer, with ``output_router_logits=True``."""


class UniMoePreTrainedModel(PreTrainedModel):
    """What both model classes declare to transformers."""

    config: UniMoeConfig
    base_model_prefix = "model"
    input_modalities = ["text", "image", "video", "audio"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, with weights that are independent of the files (:func:`own_weights`)."""
        loaded = super().from_pretrained(*args, **kwargs)
        own_weights(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any):
        super()._set_gradient_checkpointing(*args, **kwargs)
        remember_context(self)  # or routers that read their context choose other experts in the second run

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        reset = getattr(module, "reset_parameters", None)
        if isinstance(module, Encoder):
            module.reset_buffers()  # those that are not saved are empty after loading through the meta device
        elif callable(reset) and type(module).__module__.startswith("unimoe."):
            reset()
        else:
            super()._init_weights(module)


class MediaModel(UniMoePreTrainedModel):
    """Encoders and connectors: from media to tokens of the LLM's width."""

    def __init__(self, config: UniMoeConfig):
        super().__init__(config)
        modalities = config.modalities or {}
        hidden_size = config.get_text_config().hidden_size
        encoders = {modality: build_encoder(parts["encoder"]) for modality, parts in modalities.items()}
        self.encoders = ByModality(encoders)
        self.connectors = ByModality(
            {
                modality: build_connector(parts["connector"], encoders[modality].hidden_size, hidden_size)
                for modality, parts in modalities.items()
            }
        )

    def connect(self, modality: str, encoded: EncodedMedia) -> Tensor:
        """Media tokens [N, H] of all items of one modality, in order, from its encoder's output."""
        tokens_MNH, counts_M = self.connectors(modality, *encoded)
        valid_MN = torch.arange(tokens_MNH.shape[1], device=tokens_MNH.device) < counts_M[:, None]
        return tokens_MNH[valid_MN]

    def media_tokens(self, **media: Unpack[MediaInputs]) -> dict[str, Tensor]:
        """Media tokens [N, H] of a batch by modality, in the order of the items.

        Raises:
            ValueError: media of a modality that the model does not have.
        """
        encoded_media = dict(media.get("encoded_media") or {})
        for modality, names in MEDIA_INPUTS.items():
            if media.get(names[0]) is not None:
                if modality not in (self.config.modalities or {}):
                    raise ValueError(
                        f"{names[0]} given, but this model has no {modality} encoder; "
                        f"it has {list(self.config.modalities or {})}"
                    )
                encoded_media[modality] = self.encoders(modality, *(media.get(name) for name in names))
        return {modality: self.connect(modality, encoded) for modality, encoded in encoded_media.items()}


class UniMoeModel(MediaModel):
    """Encoders, connectors and the decoder, without the head.

    The forward pass:

    1. Embed ``input_ids``.
    2. For each modality that is present, encode its items, project them to the LLM's width, and put the
       resulting tokens in the places of its placeholder. A modality that is absent runs nothing.
    3. Run the decoder; routers see the modality of every token and the padding.
    """

    def __init__(self, config: UniMoeConfig):
        super().__init__(config)
        self.language_model = AutoModel.from_config(config.text_config)
        if config.moe:
            install_moe(self.language_model, MoEConfig.from_dict(config.moe))
        leave_records(self.language_model)
        if config.rope_sections:
            install_time_rotary(self.language_model, config.rope_sections)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def insert_media(self, modality: str, input_ids: Tensor, embeds_BTH: Tensor, tokens_NH: Tensor) -> Tensor:
        """Put the media tokens, in order, where ``input_ids`` hold the placeholder.

        Raises:
            ValueError: the number of tokens is not the number of placeholders.
        """
        places_BT = input_ids == self.config.token_ids()[modality]
        counts = places_BT.sum(1).tolist()
        if sum(counts) != len(tokens_NH):
            raise ValueError(
                f"the rows hold {counts} <{modality}> placeholder tokens ({sum(counts)} in all), but the "
                f"{modality} inputs give {len(tokens_NH)} tokens; scattering them would misplace media, so "
                "expand the placeholders with the processor"
            )
        return embeds_BTH.masked_scatter(places_BT[..., None], tokens_NH.to(embeds_BTH))

    def embed(self, input_ids: Tensor, **media: Unpack[MediaInputs]) -> Tensor:
        """Steps 1 and 2: [B, T, H], the tokens' embeddings with the media in their places.

        Raises:
            ValueError: media of a modality that the model does not have, or of another number of tokens than
                there are placeholders.
        """
        embeds_BTH = self.get_input_embeddings()(input_ids)
        for modality, tokens_NH in self.media_tokens(**media).items():
            embeds_BTH = self.insert_media(modality, input_ids, embeds_BTH, tokens_NH)
        return embeds_BTH

    @takes_media
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> UniMoeOutput:
        """Run the model.

        Args:
            input_ids: [B, T], media placeholders expanded to one for each media token.
            attention_mask: [B, T], 0 on padding (with a cache: [B, past + T]).
            position_ids: [B, T]; without an ``attention_mask`` a new sample begins wherever they do not
                increase by one, and attends to itself only (packing). With ``rope_sections`` they may be
                [3, B, T]: time, height and width (:mod:`unimoe.model.rope_3d`), or [4, B, T]: [B, T] in front
                of these.
            inputs_embeds: [B, T, H], from :meth:`embed`, with the media in their places; ``input_ids`` given
                as well only tell the modality of each token.
            kwargs: the media of the batch (:class:`~unimoe.model.inputs.MediaInputs`), and what else the
                decoder takes.

        Raises:
            ValueError: inputs that do not go together.
        """
        media = cast(MediaInputs, {name: kwargs.pop(name, None) for name in MEDIA_NAMES})
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, **media)
        elif any(value is not None for value in media.values()):
            raise ValueError("media need input_ids alone: their placeholders say where the media tokens go")
        axes = None
        if position_ids is not None and position_ids.dim() == 3:
            if not self.config.rope_sections:
                raise ValueError("position_ids of three axes need a model with config.rope_sections")
            axes, position_ids = position_ids[-3:], position_ids[0] if len(position_ids) == 4 else None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            kwargs.setdefault("use_cache", False)  # only without a cache are packed samples told apart
        with ExitStack() as around:
            mask = (
                attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
            )
            packed = position_ids if attention_mask is None else None
            seen = TokenInputs(input_ids, mask, packed, self.config.token_ids())
            rows, length = inputs_embeds.shape[:2]
            around.enter_context(routing_context(token_context(seen, rows, length, inputs_embeds.device)))
            if axes is not None:
                around.enter_context(time_ids(axes))
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        return UniMoeOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class UniMoeForConditionalGeneration(UniMoePreTrainedModel, GenerationMixin):
    """:class:`UniMoeModel` with a language-model head: trains with ``labels``, answers with ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = False  # the loss is a mean over this batch's tokens

    def __init__(self, config: UniMoeConfig):
        super().__init__(config)
        self.model = UniMoeModel(config)
        text = config.get_text_config()
        self.causal_head = CausalHead(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=self.causal_head.has_bias)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] or [N, V] of hidden states [B, T, H] or [N, H], as the LLM's own class computes
        them."""
        return self.causal_head(self.lm_head, hidden)

    @can_return_tuple
    @takes_media
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool = False,
        **kwargs: Any,
    ) -> UniMoeOutput:
        """Run :meth:`UniMoeModel.forward` and the head.

        Args:
            labels: [B, T], -100 where a token is not learned; adds ``loss`` and ``aux_loss``.
            logits_to_keep: compute the logits of the last so many positions only (0: all), or of the
                positions with these indices.
            output_router_logits: return the router logits of every MoE layer.
        """
        with record() as records:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(outputs.last_hidden_state[:, kept])
        loss = aux = None
        if labels is not None:
            aux = aux_loss(self, records)
            loss = aux + cross_entropy([supervised(logits, labels)])[0]
        return UniMoeOutput(
            loss=loss,
            aux_loss=aux,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=tuple(entry.routing.logits_TE for entry in records)
            if output_router_logits
            else None,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]  (the base has more by name)
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs,
    ) -> dict:
        """Media enter with the prompt; later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]  (their protocol for self)
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs |= dict.fromkeys(MEDIA_NAMES)
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]  (ids may be None, as in the base)
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **inputs,
    ) -> tuple[Tensor | None, dict]:
        """Repeat rows for beams or several answers.

        transformers repeats media one by one, so that a row's second image would go to its first copy."""
        media = {name: inputs.pop(name, None) for names in MEDIA_INPUTS.values() for name in names}
        encoded = inputs.pop("encoded_media", None)
        rows = input_ids
        input_ids, inputs = super()._expand_inputs_for_generation(  # type: ignore[misc]  (as above)
            expand_size, is_encoder_decoder, input_ids, **inputs
        )
        if expand_size > 1 and rows is not None:
            for modality, names in MEDIA_INPUTS.items():
                order = self._repeated_items(
                    modality, rows, [media[name] for name in names], encoded, expand_size
                )
                for name in names:
                    media[name] = None if media[name] is None else media[name][order]
                if encoded and modality in encoded:
                    features, lengths = encoded[modality]
                    encoded = {
                        **encoded,
                        modality: (features[order], None if lengths is None else lengths[order]),
                    }
        return input_ids, {**inputs, **media, "encoded_media": encoded}

    def _repeated_items(
        self, modality: str, rows_BT: Tensor, raw: list, encoded: dict[str, EncodedMedia] | None, times: int
    ) -> list[int]:
        """Indices of one modality's items when every row, with all its items, stands ``times`` times."""
        if modality not in (self.config.modalities or {}):
            return []
        encoder: Any = getattr(self.model.encoders, modality)
        connector: Any = getattr(self.model.connectors, modality)
        if encoded and modality in encoded:
            features, lengths = encoded[modality]
            positions = [features.shape[1]] * len(features) if lengths is None else lengths.tolist()
        elif raw[0] is None:
            return []
        elif len(raw) == 1:
            positions = [encoder.num_tokens] * len(raw[0])
        else:
            positions = [encoder.num_tokens(frames) for frames in raw[1].tolist()]
        tokens = [connector.num_tokens(count) for count in positions]
        order: list[int] = []
        item = 0
        for places in (rows_BT == self.config.token_ids()[modality]).sum(1).tolist():
            begin = item
            while places > 0:
                places -= tokens[item]
                item += 1
            order += list(range(begin, item)) * times
        return order
