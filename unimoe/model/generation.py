"""What a model keeps of an LLM's generation settings, and what an answer is decoded with."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor

SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
)
"""Settings of an LLM that are kept, and used where an answer is sampled."""

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "do_sample", *SAMPLING)

_PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
}
"""Settings of both ways of decoding, whatever a folder's settings say."""

_GREEDY: dict[str, Any] = {"do_sample": False, **dict.fromkeys(SAMPLING), "repetition_penalty": 1.0}


def clean_generation_config(given: GenerationConfig | None, **ids: Any) -> GenerationConfig:
    """Generation settings that can be saved and that mean what they say.

    Kept are the token ids and the sampling settings; beam search, length limits, penalties of n-grams and the
    like are dropped: greedy decoding is what the command line promises without a temperature. Sampling
    settings without ``do_sample``, as Vicuna has them, switch it on: transformers refuses to save them
    otherwise. A temperature of 0 switches it off.

    Args:
        given: of the LLM or of a folder.
        ids: token ids that replace those of ``given``.
    """
    kept = {name: value for name in _KEPT if (value := getattr(given, name, None)) is not None} | ids
    if kept.get("temperature", 1.0) <= 0:  # greedy decoding is meant
        kept = {name: value for name, value in kept.items() if name not in ("do_sample", *SAMPLING)}
    if any(name in kept for name in SAMPLING if name != "repetition_penalty"):
        kept["do_sample"] = True
    return GenerationConfig(**kept)


def end_tokens(config: GenerationConfig | None) -> list[int]:
    """Ids that end an answer; none where the settings name none."""
    ends = None if config is None else config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def decoding_settings(max_new_tokens: int, temperature: float | None) -> dict[str, Any]:
    """Arguments of ``generate``: greedy at temperature 0, else sampling as the model's own settings say, at
    their own temperature for None."""
    if temperature == 0:
        return {"max_new_tokens": max_new_tokens, **_PLAIN, **_GREEDY}
    given = {} if temperature is None else {"temperature": temperature}
    return {"max_new_tokens": max_new_tokens, **_PLAIN, "do_sample": True, **given}


class SuppressTokens(LogitsProcessor):
    """Forbids tokens as transformers' processor does, which compares each token of the vocabulary: that
    takes half a millisecond for each token of an answer.

    Args:
        tokens: ids [N] that no answer may have; those outside the vocabulary mean nothing.
    """

    def __init__(self, tokens: Tensor):
        self.tokens = tokens
        self._of: tuple[int, torch.device] | None = None
        """The vocabulary's size and the device that ``tokens`` were made ready for."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if self._of != (found := (scores.shape[-1], scores.device)):
            tokens = self.tokens.to(scores.device)
            self._inside, self._of = tokens[(tokens >= 0) & (tokens < found[0])], found
        return scores.index_fill(-1, self._inside, -torch.inf)


def logits_processors(model: Any, config: GenerationConfig, prompt_tokens: int) -> LogitsProcessorList:
    """What scores [B, V] pass before a token is chosen, as in transformers' ``generate``.

    Args:
        model: any that generates.
        config: settings of the answer.
        prompt_tokens: length of the prompt.
    """
    found = model._get_logits_processor(config, input_ids_seq_length=prompt_tokens, device=str(model.device))
    for index, one in enumerate(found):
        if type(one) is SuppressTokensLogitsProcessor:
            found[index] = SuppressTokens(one.suppress_tokens)
    return found
