"""Tokens to text as they come: whole characters only, and up to a stop string, of which nothing is shown."""

from collections.abc import Sequence

from dsv2_jax.data.tokenizer import Tokenizer

_PARTIAL = "\ufffd"  # what decoding makes of bytes that are not a character yet
_BYTES = 4  # of the longest character


class Text:
    """The text of one sequence's new tokens. `text` grows by what is certain; `feed` says by how much."""

    def __init__(self, words: Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._words, self._stop = words, tuple(stop)
        self._ids: list[int] = []  # since the last token that ended with a character
        self._given = 0  # characters of these that were passed on
        self._waiting = ""  # passed on, but perhaps the beginning of a stop string

    def feed(self, token: int) -> str:
        """The text that this token adds; `stopped` is set when a stop string is complete."""
        self._ids.append(token)
        decoded = self._words.decode(self._ids)
        whole = decoded.rstrip(_PARTIAL)
        if len(decoded) - len(whole) >= _BYTES:
            whole = decoded  # no character is so long: these bytes are none
        new, self._given = whole[self._given :], len(whole)
        if whole == decoded:
            self._ids, self._given = [], 0
        return self._add(new)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        rest = self._waiting + (self._words.decode(self._ids)[self._given :] if self._ids else "")
        self._waiting, self._ids, self._given = "", [], 0
        at = self._first_stop(rest)
        rest = rest if at is None else rest[:at]
        self.text += rest
        return rest

    def _add(self, decoded: str) -> str:
        whole = self._waiting + decoded
        at = self._first_stop(whole)
        if at is not None:
            self.stopped, sure, self._waiting = True, whole[:at], ""
        else:
            begun = max((_overlap(whole, stop) for stop in self._stop), default=0)
            sure, self._waiting = whole[: len(whole) - begun], whole[len(whole) - begun :]
        self.text += sure
        return sure

    def _first_stop(self, text: str) -> int | None:
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return min(places, default=None)


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
