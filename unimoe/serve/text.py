"""From tokens to text as they come, and stop strings."""

from typing import Any


class TextStream:
    """Text that is certain: whole characters, and nothing that may turn out to begin a stop string.

    What all calls return, joined, is what decoding all tokens at once gives, up to the first stop string.
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.stopped = False
        """Whether a stop string came; it and what follows is no part of the text."""
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded: a token's text may depend on the one before
        self._known = 0  # tokens before are in the text already
        self._held = ""

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain, often nothing."""
        self._tokens.append(token)
        text = self._decode(self._context, None)
        if text.endswith("\ufffd"):  # in the middle of a character
            return ""
        return self._release(text)

    def end(self) -> str:
        """What was held back, after the last token."""
        text = self._release(self._decode(self._context, None))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        new = self._held + text[len(self._decode(self._context, self._known)) :]
        self._context, self._known = self._known, len(self._tokens)
        found = [place for stop in self.stops if (place := new.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return new[: min(found)]
        held = max((_overlap(new, stop) for stop in self.stops), default=0)
        self._held = new[len(new) - held :]
        return new[: len(new) - held]

    def _decode(self, start: int, stop: int | None) -> str:
        return self.tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
