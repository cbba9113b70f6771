"""Schemas of requests and responses: the supported part of OpenAI's chat completions."""

import copy
import json
import logging
import time
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from transformers import GenerationConfig

from unimoe.compress.decoding import Decoding
from unimoe.errors import UserError, first_line
from unimoe.inference.engines import AnsweringModel, check_decoding
from unimoe.model.generation import decoding_settings

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
"""Fields without influence on the answer of one model without tools."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are not supported, and the values that are accepted because they request nothing."""

GREEDY_BELOW = 1e-4
"""A temperature below this is greedy decoding: logits divided by it overflow."""


class BadRequest(UserError):
    """A field of a request is invalid; becomes a 400 whose ``param`` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


def replace_surrogates(text: str) -> str:
    """``text`` with a question mark for each lone surrogate: JSON can hold those, tokenizers cannot."""
    return text.encode("utf-8", "replace").decode()


Text = Annotated[str, AfterValidator(replace_surrogates)]


class Url(BaseModel):
    """Media by URL: a data URL, or what the server's flags allow."""

    url: str


def _as_object(value: Any) -> Any:
    """A plain string in place of ``{"url": ...}``, as some clients send it."""
    return {"url": value} if isinstance(value, str) else value


UrlField = Annotated[Url, BeforeValidator(_as_object)]


class InputAudio(BaseModel):
    """Encoded audio."""

    data: str
    """Base64 of a whole file."""
    format: str = "wav"
    """Ignored: the format is detected from the content."""


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: UrlField


class InputAudioPart(BaseModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioPart(BaseModel):
    type: Literal["audio_url"]
    audio_url: UrlField


class VideoPart(BaseModel):
    type: Literal["video_url"]
    video_url: UrlField


PARTS = {
    "text": TextPart,
    "image_url": ImagePart,
    "input_audio": InputAudioPart,
    "audio_url": AudioPart,
    "video_url": VideoPart,
}

ContentPart = TextPart | ImagePart | InputAudioPart | AudioPart | VideoPart


def _part_tag(value: Any) -> str | None:
    found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{found}>" if isinstance(found, str) and found in PARTS else None


def _content_tag(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


# Tags are in angle brackets: they are no places in the request, and left out where errors name one.
_Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[InputAudioPart, Tag("<input_audio>")]
    | Annotated[AudioPart, Tag("<audio_url>")]
    | Annotated[VideoPart, Tag("<video_url>")],
    Discriminator(
        _part_tag,
        custom_error_type="part",
        custom_error_message=f"expected a part whose type is one of {', '.join(PARTS)}",
    ),
]

_Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[_Part], Field(max_length=256), Tag("<parts>")],
    Discriminator(
        _content_tag, custom_error_type="content", custom_error_message="expected a string or a list of parts"
    ),
]

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Stops = Annotated[
    Annotated[_Stop, Tag("<text>")] | Annotated[list[_Stop], Field(max_length=16), Tag("<parts>")],
    Discriminator(
        _content_tag, custom_error_type="stop", custom_error_message="expected a string or a list of strings"
    ),
]


class Message(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Content


class StreamOptions(BaseModel):
    """How a stream ends."""

    include_usage: bool | None = None


class SentSampling(BaseModel):
    """What is used of the ``generation_config`` that ``transformers chat`` sends."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


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
    stop: _Stops | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    n: Literal[1] | None = None
    contrast: Annotated[float, Field(ge=0, le=10)] | None = None
    rewire: Annotated[int, Field(ge=0, le=100)] | None = None
    experts: Annotated[int, Field(ge=0)] | None = None
    skip: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    """Thresholds of skipping: ``skip`` of :class:`unimoe.compress.decoding.Decoding`."""
    generation_config: Annotated[str, StringConstraints(max_length=20_000)] | None = None
    """JSON, as ``transformers chat`` sends it; fields of the request take precedence."""

    def check(self) -> None:
        """Check for fields that request what this server does not support.

        Raises:
            BadRequest: there is one.
        """
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in HARMLESS and value not in NEUTRAL.get(name, ()):
                raise BadRequest(name[:64], "this server does not support it; omit it")
        if self.top_logprobs is not None and not self.logprobs:
            raise BadRequest("top_logprobs", "needs logprobs to be true")

    def decoding(self, default: Decoding, model: AnsweringModel) -> Decoding:
        """How experts take part in the answer; what the request omits is as in ``default``.

        Raises:
            BadRequest: a setting has no meaning for the model.
        """
        asked = {name: value for name in vars(default) if (value := getattr(self, name)) is not None}
        for name, value in asked.items():
            try:
                check_decoding(model, Decoding(**{name: value}), "")
            except UserError as error:
                raise BadRequest(name, str(error).removeprefix(f"{name}: ")) from error
        return replace(default, **asked)

    def characters(self) -> int:
        """Length of all text."""
        contents = [message.content for message in self.messages]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        whole = sum(len(content) for content in contents if isinstance(content, str))
        return whole + sum(len(part.text) for part in parts if part.type == "text")

    def sampling(self, defaults: GenerationConfig | None, max_new_tokens: int, room: int) -> SamplingParams:
        """How to generate the answer; what the request omits is as in the model's generation_config.json.

        Args:
            defaults: of the model.
            max_new_tokens: longest answer, and the default.
            room: tokens that fit into the context after the prompt.

        Raises:
            BadRequest: a setting is invalid, or more tokens are requested than there is room for.
        """
        config: Any = copy.deepcopy(defaults) or GenerationConfig()
        asked = self._sent_sampling()
        if asked.get("temperature", 1.0) < GREEDY_BELOW:
            asked["do_sample"] = False
        if self.temperature is not None:
            asked |= {"temperature": self.temperature, "do_sample": self.temperature >= GREEDY_BELOW}
        asked |= {name: value for name in ("top_p", "top_k") if (value := getattr(self, name)) is not None}
        wanted = self.max_completion_tokens or self.max_tokens or asked.get("max_new_tokens")
        if room < (wanted or 1):
            raise BadRequest("max_tokens", f"found {wanted or 1}, the prompt leaves room for {max(room, 0)}")
        asked["max_new_tokens"] = longest = min(wanted or max_new_tokens, max_new_tokens, room)
        if not asked.setdefault("do_sample", config.do_sample):
            asked["temperature"] = None
        # greedy decoding drops the penalties of the model's folder, not those that the request itself sets
        settings = decoding_settings(longest, None if asked["do_sample"] else 0)
        for name, value in {**settings, **asked}.items():
            setattr(config, name, value)
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(config, self.seed, stops, (self.top_logprobs or 0) if self.logprobs else None)

    def _sent_sampling(self) -> dict[str, Any]:
        if self.generation_config is None:
            return {}
        try:
            sent = SentSampling.model_validate(json.loads(self.generation_config))
        except ValidationError as error:
            found = error.errors()[0]
            place = ".".join(["generation_config", *map(str, found["loc"])])
            raise BadRequest(place, found["msg"]) from error
        except (ValueError, RecursionError) as error:
            raise BadRequest("generation_config", f"not JSON: {first_line(error)}") from error
        if sent.do_sample and sent.temperature is not None and sent.temperature < GREEDY_BELOW:
            found = f"found {sent.temperature:g}, expected more than {GREEDY_BELOW:g} with do_sample"
            raise BadRequest("generation_config.temperature", found)
        return sent.model_dump(exclude_none=True)


class Completion:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, id: str, model: str, tokenizer: Any):
        self.id = id
        self.model = model
        self.tokenizer = tokenizer
        self.created = int(time.time())

    def complete(self, text: str, choices: list[Choice] | None, finish_reason: str, usage: dict) -> dict:
        """The answer as one object; ``choices`` if log-probabilities were requested."""
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
        """The last chunk, for clients that requested the usage."""
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
    """Token counts; media tokens are part of the prompt, the end-of-sequence token is part of the answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    return {"error": {"message": replace_surrogates(message), "type": kind, "param": param, "code": code}}
