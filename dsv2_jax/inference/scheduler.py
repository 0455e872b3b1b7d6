"""The scheduler of one replica, on the host: which sequences run, on which pages, and what each step computes."""

import collections
import dataclasses
from collections.abc import Iterator

from dsv2_jax.inference.pages import Digest, Pages, digests
from dsv2_jax.inference.request import Request
from dsv2_jax.inference.text import Text


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request that waits or runs. tokens: the prompt and new tokens; the cache holds the first `computed` of them."""

    id: int
    request: Request
    text: Text | None
    tokens: list[int]
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    digests: list[Digest] = dataclasses.field(default_factory=list)
    published: int = 0  # full pages that other sequences can reuse
    reused: int = 0
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=list)
    scores: list[tuple[float, bool]] = dataclasses.field(default_factory=list)

    @property
    def goal(self) -> int:
        """Number of tokens to compute: all, except the last token of a prompt that is only scored."""
        return len(self.tokens) - (self.request.max_new == 0)

    @property
    def scoring(self) -> bool:
        """Whether prompt tokens remain to be scored, which happens only in a chunk."""
        start, prompt = self.request.score_from, len(self.request.prompt)
        return start is not None and start + len(self.scores) < prompt

    @property
    def decodes(self) -> bool:
        """Whether exactly one token remains to compute, after others."""
        return self.goal - self.computed == 1 and self.computed > 0 and not self.scoring


@dataclasses.dataclass(frozen=True)
class Part:
    """The tokens `start` to `stop` - 1 of a sequence that a step computes: in the chunk, or as a row of one token."""

    sequence: Sequence
    start: int
    stop: int
    chunk: bool


class Scheduler:
    """Admits sequences in the order of arrival, while rows and pages are available.

    A sequence is admitted when pages for all its tokens are available, and allocates more as it grows. When no page is
    left, the youngest sequence is preempted: it frees its pages, returns to the head of the queue, and later recomputes
    the pages that are no longer cached.
    """

    def __init__(self, pages: int, slots: int, rows: int, chunk: int, block: int):
        self.pages, self.slots = Pages(pages), slots
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preemptions = 0
        self._rows, self._chunk, self._block = rows, chunk, block

    @property
    def load(self) -> int:
        """An upper bound of the tokens that its sequences still have to compute."""
        every = (*self.waiting, *self.running)
        return sum(len(s.request.prompt) + s.request.max_new - s.computed for s in every)

    def plan(self) -> list[Part]:
        """The parts of the next step, in the order of the rows. Their pages are allocated.

        Rows of one token come first, longest sequence first: attention computes rows in groups, and each group takes as
        long as its longest row.
        """
        self._grow()
        self._admit()
        parts, left = [], self._chunk
        for sequence in self.running:
            missing = sequence.goal - sequence.computed
            if sequence.decodes:
                parts.append(Part(sequence, sequence.computed, sequence.computed + 1, False))
                continue
            take = min(missing, left)
            if take > 0 or missing == 0:  # all tokens of a scored sequence may have been cached
                left -= -(-take // self._block) * self._block
                parts.append(Part(sequence, sequence.computed, sequence.computed + take, True))
        return sorted(parts, key=lambda part: (part.chunk, -part.stop))

    def done(self, part: Part) -> None:
        """Records that the part is in the cache, and publishes pages that became full."""
        sequence = part.sequence
        sequence.computed = part.stop
        full = sequence.computed // self.slots
        if full > sequence.published:
            sequence.digests = digests(sequence.tokens[: full * self.slots], self.slots, sequence.digests)
            for i in range(sequence.published, full):
                self.pages.publish(sequence.pages[i], sequence.digests[i])
            sequence.published = full

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended or was cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.pages, sequence.published, sequence.computed = [], 0, 0

    def _grow(self) -> None:
        """Allocates pages for the next token of every running sequence, oldest first."""
        for sequence in list(self.running):
            if sequence not in self.running or sequence.computed < len(sequence.pages) * self.slots:
                continue
            while not self.pages.available:
                youngest = self.running.pop()
                self._release(youngest)
                self.waiting.appendleft(youngest)
                self.preemptions += 1
                if youngest is sequence:
                    break
            else:
                sequence.pages += self.pages.take(1)

    def _admit(self) -> None:
        """Admits waiting sequences in order, while rows and pages are available.

        A sequence whose next page is being computed by another one waits for it. Later sequences may overtake it.
        """
        computing = set(self._being_computed())
        for sequence in list(self.waiting):
            if len(self.running) == self._rows:
                return
            most = self._reusable(sequence) // self.slots
            sequence.digests = digests(sequence.tokens[: sequence.goal], self.slots, sequence.digests)
            found = self.pages.find(sequence.digests[:most])
            if len(found) < most and sequence.digests[len(found)] in computing:
                continue
            needed = -(-max(sequence.goal, 1) // self.slots) - len(found)
            if needed > self.pages.available - self.pages.kept(found):
                return
            self.waiting.remove(sequence)
            self.pages.hold(found)
            sequence.pages = found + self.pages.take(needed)
            sequence.computed = len(found) * self.slots
            sequence.published = len(found)
            if not sequence.logprobs:
                sequence.reused = sequence.computed
            computing.update(sequence.digests[len(found) :])
            self.running.append(sequence)

    def _being_computed(self) -> Iterator[Digest]:
        for sequence in self.running:
            yield from sequence.digests[sequence.published :]

    def _reusable(self, sequence: Sequence) -> int:
        """Tokens whose hidden states are not needed: those before the last token, or before the first scored one."""
        if sequence.scoring:
            assert sequence.request.score_from is not None
            return sequence.request.score_from - 1 + len(sequence.scores)
        return sequence.goal - 1
