"""Incremental detokenization: emits complete characters only, and ends before a stop string."""

from collections.abc import Sequence

from dsv2_jax.data.tokenizer import Tokenizer

_PARTIAL = "\ufffd"  # the decoder's output for an incomplete character
_BYTES = 4  # of the longest UTF-8 character


class Text:
    """The text of one sequence's new tokens. `text` is what `add` and `end` have returned so far."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []  # tokens since the last complete character
        self._given = 0  # characters of `_ids` that were passed to `_append`
        self._waiting = ""  # held back: may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Returns the text that this token adds. Sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids)
        complete = decoded.rstrip(_PARTIAL)
        if len(decoded) - len(complete) >= _BYTES:
            complete = decoded  # no character is this long: the bytes are invalid
        new, self._given = complete[self._given :], len(complete)
        if complete == decoded:
            self._ids, self._given = [], 0
        return self._append(new)

    def end(self) -> str:
        """Returns the text that was held back, after the last token."""
        rest = self._waiting + (self._tokenizer.decode(self._ids)[self._given :] if self._ids else "")
        self._waiting, self._ids, self._given = "", [], 0
        at = self._first_stop(rest)
        rest = rest if at is None else rest[:at]
        self.text += rest
        return rest

    def _append(self, decoded: str) -> str:
        pending = self._waiting + decoded
        at = self._first_stop(pending)
        if at is not None:
            self.stopped, sure, self._waiting = True, pending[:at], ""
        else:
            begun = max((_overlap(pending, stop) for stop in self._stop), default=0)
            sure, self._waiting = pending[: len(pending) - begun], pending[len(pending) - begun :]
        self.text += sure
        return sure

    def _first_stop(self, text: str) -> int | None:
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        return min(places, default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
