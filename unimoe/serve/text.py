"""Incremental detokenization, and stop strings."""

from typing import Any


class TextStream:
    """Releases text once it is final: complete characters, and nothing that may be the start of a stop
    string.

    The texts of all calls, joined, are what decoding all tokens at once gives, up to the first stop string.
    Control tokens are not part of the text, but stop strings match theirs.
    """

    def __init__(self, tokenizer: Any, stops: list[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.stopped = False
        """Whether a stop string was generated; neither it nor what follows is part of the text."""
        added = tokenizer.added_tokens_decoder
        control = {token for token, entry in added.items() if entry.special} | set(tokenizer.all_special_ids)
        self._control = {token: tokenizer.convert_ids_to_tokens(token) for token in control}
        self._tokens: list[int] = []
        self._context = 0  # tokens from here on are decoded: a token's text may depend on the one before
        self._known = 0  # tokens before this one are in the text already
        self._held = ""  # not yet released, control tokens included
        self._visible: list[bool] = []  # of each held character: whether it is part of the text

    def push(self, token: int) -> str:
        """The text that becomes final with ``token``, often none."""
        if token in self._control:
            return self._add(self._control[token], visible=False)
        self._tokens.append(token)
        text = self._decode(self._context, None)
        if text.endswith("\ufffd"):  # in the middle of a character
            return ""
        return self._release(text)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        text = self._release(self._decode(self._context, None))
        return text if self.stopped else text + self._take(len(self._held))

    def _release(self, text: str) -> str:
        new = text[len(self._decode(self._context, self._known)) :]
        self._context, self._known = self._known, len(self._tokens)
        return self._add(new, visible=True)

    def _add(self, new: str, visible: bool) -> str:
        """Append to what is held, and take from it what is final."""
        self._held += new
        self._visible += [visible] * len(new)
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        overlap = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        return self._take(len(self._held) - overlap)

    def _take(self, count: int) -> str:
        """The visible ones of the first ``count`` held characters, which are then held no longer."""
        text = "".join(c for c, seen in zip(self._held[:count], self._visible, strict=False) if seen)
        self._held, self._visible = self._held[count:], self._visible[count:]
        return text

    def _decode(self, start: int, stop: int | None) -> str:
        return self.tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
