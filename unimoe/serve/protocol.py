"""What a request may say, and how answers look: this server's part of OpenAI's chat completions."""

import copy
import json
import logging
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from transformers import GenerationConfig

from unimoe.errors import UserError

from .answer import Choice, SamplingParams

logger = logging.getLogger(__name__)

HARMLESS = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
"""Fields that change nothing about the answer of one model without tools."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are not supported, and the values that ask for nothing."""

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")
"""What is taken from the ``generation_config`` that ``transformers chat`` sends along."""


def whole_characters(text: str) -> str:
    """``text`` with a question mark for each half of a character: JSON can hold those, tokenizers cannot."""
    return text.encode("utf-8", "replace").decode()


Text = Annotated[str, AfterValidator(whole_characters)]


class Url(BaseModel):
    """A medium by its address: a data URL, or what the server's flags allow."""

    url: str


class InputAudio(BaseModel):
    """Encoded sound."""

    data: str
    """Base64 of a whole file."""
    format: str = "wav"
    """Not needed: the file says it."""


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: Url


class InputAudioPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioPart(BaseModel):
    type: Literal["audio_url"]
    audio_url: Url


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: Url


ContentPart = Annotated[
    TextPart | ImagePart | InputAudioPart | AudioPart | VideoPart, Field(discriminator="type")
]


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(max_length=256)]


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """Body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[str, StringConstraints(min_length=1, max_length=1000)]
        | Annotated[
            list[Annotated[str, StringConstraints(min_length=1, max_length=1000)]], Field(max_length=16)
        ]
        | None
    ) = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Literal[1] | None = None
    generation_config: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    """As ``transformers chat`` sends it: JSON; fields of the request go before it."""

    def check(self):
        """Raises UserError for a field that asks for something this server cannot do."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in HARMLESS and value not in NEUTRAL.get(name, ()):
                raise UserError(f"{name}: this server does not support it; leave it out")
        if self.top_logprobs is not None and not self.logprobs:
            raise UserError("top_logprobs: needs logprobs to be true")

    def characters(self) -> int:
        """Length of all its text."""
        contents = [message.content for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        whole = sum(len(content) for content in contents if isinstance(content, str))
        return whole + sum(len(part.text) for part in parts if part.type == "text")

    def sampling(self, defaults: GenerationConfig | None, max_new_tokens: int, room: int) -> SamplingParams:
        """Settings of the answer; what the request leaves out is as in the model's generation_config.json.

        Args:
            defaults: of the model.
            max_new_tokens: longest answer when the request names none, or more.
            room: tokens that the model can still see after the prompt.

        Raises UserError when the request wants more tokens than there is room for.
        """
        config: Any = copy.deepcopy(defaults) or GenerationConfig()
        config.max_new_tokens = None
        for name, value in self._sent_sampling().items():
            setattr(config, name, value)
        if self.temperature is not None:
            config.do_sample = self.temperature > 0
            config.temperature = self.temperature or None
        for name in ("top_p", "top_k"):
            if getattr(self, name) is not None:
                setattr(config, name, getattr(self, name))
        wanted = self.max_completion_tokens or self.max_tokens or config.max_new_tokens
        if room < (wanted or 1):
            raise UserError(f"max_tokens: found {wanted or 1}, the prompt leaves room for {max(room, 0)}")
        config.max_new_tokens = min(wanted or max_new_tokens, max_new_tokens, room)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(config, self.seed, stops, (self.top_logprobs or 0) if self.logprobs else None)

    def _sent_sampling(self) -> dict[str, Any]:
        if self.generation_config is None:
            return {}
        try:
            sent = GenerationConfig(**json.loads(self.generation_config))
            sent.validate()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"generation_config: {str(error).splitlines()[0]}") from error
        return {name: value for name in SAMPLING if (value := getattr(sent, name, None)) is not None}


class Completion:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, id: str, model: str, tokenizer: Any):
        self.id = id
        self.model = model
        self.tokenizer = tokenizer
        self.created = int(time.time())

    def whole(self, text: str, choices: list[Choice] | None, finish_reason: str, usage: dict) -> dict:
        """The answer as one object; ``choices`` where log-probabilities were asked for."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        choice["logprobs"] = None if choices is None else self._logprobs(choices)
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def chunk(self, delta: dict, choices: list[Choice], finish_reason: str | None = None) -> dict:
        """A part of the answer."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        choice["logprobs"] = self._logprobs(choices) if choices else None
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, usage: dict) -> dict:
        """The last chunk, for clients that asked for usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, choices: list[Choice]) -> dict:
        content = []
        for choice in choices:
            top = [self._token(token, logprob) for token, logprob in choice.top]
            content.append({**self._token(choice.token, choice.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict:
        text = self.tokenizer.decode([token])
        whole = "\ufffd" not in text  # else the token is a part of a character
        finite = max(logprob, -9999.0)  # JSON has no infinity
        return {"token": text, "logprob": finite, "bytes": list(text.encode()) if whole else None}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts; those of media are part of the prompt, the token that ends an answer is part of it."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": whole_characters(message), "type": kind, "param": param, "code": code}}
