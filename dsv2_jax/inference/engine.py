"""The engine: many requests at once over a paged cache, joining and leaving between steps.

engine = Engine(params, model)
results = engine.generate([Request(prompt=(1, 2, 3), max_new=8)])      # a batch
id = engine.add(request); events = engine.step(); engine.cancel(id)    # a server
engine.score([[1, 2, 3, 4]])                                           # log-probabilities of given tokens
engine.replace(params); engine.release()                               # new weights, the same programs; none
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dsv2_jax.config import Compute, Model, check
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference import programs, sampling
from dsv2_jax.inference.quantize import Weights
from dsv2_jax.inference.request import TOP, Event, Reason, Request, Result
from dsv2_jax.inference.routes import Routes
from dsv2_jax.inference.sampling import Adjust
from dsv2_jax.inference.scheduler import Part, Scheduler
from dsv2_jax.inference.scheduler import Sequence as Running
from dsv2_jax.inference.text import Text
from dsv2_jax.model import paged
from dsv2_jax.model.formats import Format
from dsv2_jax.model.layers import Kernels, kernels
from dsv2_jax.parallel import processes
from pallas_kernels.latent_attention import max_sequences

_FEW_SCORED = 64  # tokens of a chunk, up to which scoring them multiplies by the head for these alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """How much the engine takes on; of a mesh, each group of devices with sequences of its own."""

    rows: int = 16  # sequences that run at a time
    length: int = 0  # tokens of the longest sequence; 0: the model's positions
    chunk: int = 512  # tokens of prompts that a step computes beside the new tokens
    page: int = 0  # tokens of a page; 0: 64, or 256 where the TPU's kernel reads them, which takes multiples of 128
    pages: int = 0  # of the cache; 0: as many as `rows` sequences of `length` need
    weights: Weights = "compute"  # matrices as activations are, or in 8 bits: int8, or float8 (e4m3)
    cache: Format = "compute"  # what the cache keeps: activations as they are, bfloat16, int8, or 6 bits a number

    def __post_init__(self) -> None:
        for name in ("rows", "chunk"):
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(min(self.length, self.page, self.pages) >= 0, "length, page and pages must not be negative")
        check(self.chunk % 64 == 0, f"chunk must be a multiple of 64, not {self.chunk}")

    def most_rows(self, pages: int, model: Model, kernels: Kernels) -> int:
        """Rows whose page numbers, of `pages` each, the kernel has memory for; any number where no kernel runs."""
        return max_sequences(pages, self.chunk) if paged.has_kernel(model, kernels) else sys.maxsize

    def resolve(self, model: Model, kernels: Kernels) -> "Capacity":
        """With the zeros filled in. Raises ValueError if not even one sequence fits, or the kernel takes no such pages.

        kernels: what the engine runs on, of `layers.kernels`.
        """
        length = self.length or model.max_position_embeddings
        check(
            length <= model.max_position_embeddings,
            f"length ({length}) exceeds the model's {model.max_position_embeddings} positions",
        )
        kernel = paged.has_kernel(model, kernels)
        page = self.page or (256 if kernel else 64)
        check(not kernel or page % 128 == 0, f"page must be a multiple of 128 on a TPU, not {page}")
        each = -(-length // page)
        most = self.most_rows(each, model, kernels)
        check(
            self.rows <= most,
            f"the TPU's kernel has no memory for the page numbers of {self.rows} rows of {length} tokens in pages of "
            f"{page}: at most {most} rows fit; take fewer, a lower length or larger pages",
        )
        pages = self.pages or self.rows * each + 1
        check(pages > each, f"{pages} pages cannot hold one sequence of {length} tokens and the page for padding")
        return dataclasses.replace(self, length=length, page=page, pages=pages)


class Engine:
    """Generates and scores. Not safe for threads: one of them calls it.

    A request's tokens depend on the request alone, up to rounding: products of other shapes round differently, in
    float32 by about one part in a million, which greedy choices and draws do not see but in a tie.
    """

    def __init__(
        self,
        params: Any,
        model: Model,
        *,
        compute: Compute | None = None,
        capacity: Capacity | None = None,
        words: Tokenizer | None = None,
        mesh: jax.sharding.Mesh | None = None,
        routes: bool = False,
    ):
        """params: the tree of `parameters.tree`; on a mesh with axes data, fsdp, expert and tensor. None: `replace`
        brings them before the first request.

        words: needed for text and stop strings. routes: results tell `experts`. Processes that share the mesh call it
        alike and all get all answers. Raises ValueError for a capacity or mesh that the model does not fit.
        """
        check(model.head == "tokens", "a reward model scores answers and generates none")
        self.model, self.words = model, words
        compute = compute or Compute()
        how = kernels(compute)
        self.capacity = (capacity or Capacity()).resolve(model, how)
        c = self.capacity
        self.setup = programs.Setup(
            model=model, compute=compute, form=c.cache, weights=c.weights, devices=mesh, routes=routes
        )
        programs.check_mesh(self.setup.mesh)
        self._block = paged.block(model, how)
        self._lanes = [Scheduler(c.pages, c.page, c.rows, c.chunk, self._block) for _ in range(self.setup.lanes)]
        self._layers = programs.empty(self.setup, c.pages, c.page)
        self._routes = Routes(model, self.setup.lanes, c.pages, c.page) if routes else None
        self._prepared: Any = None if params is None else programs.prepare(params, self.setup)
        self._lane_of: dict[int, tuple[Scheduler, Running]] = {}
        self._ids = itertools.count()
        chunks = [64 * n for n in _powers(2, c.chunk // 64)]
        # Beside a chunk, rows that pad cost little; without one they are what a step costs.
        self._shapes = [*((n, 0) for n in _powers(2, c.rows)), *itertools.product(_powers(4, c.rows), chunks)]

    def replace(self, params: Any) -> None:
        """Goes on with other weights of the same shapes; what was computed with the old ones is not reused.

        The old ones are let go first: both are never held at once. Raises ValueError while requests run.
        """
        self.release()
        self._prepared = programs.prepare(params, self.setup)

    def release(self) -> None:
        """Lets go of the weights until `replace` brings others. Raises ValueError while requests run."""
        check(not self._lane_of, "weights cannot be replaced while requests run")
        for lane in self._lanes:
            lane.pages.forget()
        self._prepared = None

    def warm(self) -> None:
        """Compiles every program that a step can need: from here on nothing is compiled."""
        greedy = sampling.rows([], [], [], self.capacity.rows)
        for n, chunk in self._shapes:
            call, targets_ZC = self._blank(n, chunk)
            rows_ZND, chunk_ZCD = self._forward(call)
            if chunk:
                for targets in (targets_ZC, targets_ZC + 1):  # of few tokens, and of all
                    self._score(chunk_ZCD, targets)
            else:
                rows = sampling.Rows(*(np.stack([x[:n]] * len(self._lanes)) for x in greedy))
                self._sample(rows_ZND, rows, None)
                self._sample(rows_ZND, rows, self._adjust([[]] * len(self._lanes), n))

    @property
    def unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._lane_of)

    @property
    def lanes(self) -> Sequence[Scheduler]:
        """The bookkeeping of every group of devices, to be read."""
        return self._lanes

    def add(self, request: Request) -> int:
        """Queues a request; its id is in its events. Raises ValueError for one that cannot be served."""
        self.check(request)
        text = Text(self.words, request.stop) if self.words and (request.stop or request.text) else None
        sequence = Running(next(self._ids), request, text, list(request.prompt))
        lane = min(self._lanes, key=lambda lane: lane.load)
        lane.waiting.append(sequence)
        self._lane_of[sequence.id] = lane, sequence
        return sequence.id

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that cannot be served."""
        request.check(self.model, self.capacity.length)
        check(self.words is not None or not (request.stop or request.text), "stop strings and text need a tokenizer")

    def cancel(self, id: int) -> None:
        """Ends a request, if it has not ended; there is no event for it."""
        if id in self._lane_of:
            lane, sequence = self._lane_of.pop(id)
            lane.remove(sequence)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """The answers to these requests, in their order; other requests that were added go on beside them."""
        for request in requests:
            self.check(request)
        ids = [self.add(request) for request in requests]
        left, results = set(ids), {}
        while left:
            results |= {event.id: event.result for event in self.step() if event.result is not None}
            left -= results.keys()
        return [results[id] for id in ids]

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[Result]:
        """Log-probabilities (nats) of given tokens behind those before them: `scores` of the results.

        starts: the first token of each that is scored, at least 1; without it all but the first are.
        """
        starts = starts or [1] * len(sequences)
        return self.generate(
            [Request(prompt=tuple(s), max_new=0, score_from=i) for s, i in zip(sequences, starts, strict=True)]
        )

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Float32 [T, W] behind each of the tokens, computed as generation does, through the cache; nothing is reused.

        Raises ValueError while requests run, and for tokens that cannot be a prompt.
        """
        request = Request(prompt=tuple(tokens), max_new=0, score_from=1)
        self.check(request)
        check(not self._lane_of, "logits are only told while no requests run")
        sequence, (lane, *others) = Running(-1, request, None, [*tokens, 0]), self._lanes  # the 0 is never computed
        lane.waiting.append(sequence)
        parts = []
        while sequence.computed < len(tokens):
            plans = [lane.plan(), *([] for _ in others)]
            call, _ = self._call(plans)
            _, chunk_ZCD = self._forward(call)
            (part,) = plans[0]
            found_ZCW = programs.logits(self._prepared["head"], chunk_ZCD, setup=self.setup)
            parts.append(processes.everywhere(found_ZCW)[0, : part.stop - part.start])
            lane.done(part)
        lane.remove(sequence)
        return np.concatenate(parts)

    @property
    def cache_bytes(self) -> float:
        """Bytes that the cache takes for one token, of all layers, scales included."""
        slots = len(self._lanes) * self.capacity.pages * self.capacity.page
        return sum(array.nbytes for array in jax.tree.leaves(self._layers)) / slots

    @property
    def weight_bytes(self) -> int:
        """Bytes of the parameters as they are held, scales included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._prepared))

    def step(self) -> list[Event]:
        """Computes one step of all running requests. Events of new tokens and of ends; none if nothing is to do."""
        plans = [lane.plan() for lane in self._lanes]
        if not any(plans):
            return []
        call, targets_ZC = self._call(plans)
        rows_ZND, chunk_ZCD = self._forward(call)
        scores = self._score(chunk_ZCD, targets_ZC) if targets_ZC.any() else None
        drawn = self._draw(plans, rows_ZND)
        events = []
        for z, (lane, plan) in enumerate(zip(self._lanes, plans, strict=True)):
            at = 0
            for n, part in enumerate(plan):
                if part.chunk:
                    if scores is not None:
                        _take_scores(part, targets_ZC[z, at:], scores[0][z, at:], scores[1][z, at:])
                    at += -(-(part.stop - part.start) // self._block) * self._block
                lane.done(part)
                if part.stop == part.sequence.goal:
                    events.append(self._advance(part.sequence, drawn, z, n))
        return events

    def _forward(self, call: programs.Call) -> tuple[jax.Array, jax.Array]:
        """Computes a call: `programs.forward`'s hidden states. The cache and what is kept beside it take it in."""
        assert self._prepared is not None, "the engine has no weights: `replace` brings them"
        rows_ZND, chunk_ZCD, self._layers, experts_ZTLK = programs.forward(
            self._prepared, self._layers, call, setup=self.setup
        )
        if self._routes is not None:
            self._routes.write(call, processes.everywhere(experts_ZTLK))
        return rows_ZND, chunk_ZCD

    def _call(self, plans: list[list[Part]]) -> tuple[programs.Call, np.ndarray]:
        """The arrays of a step, and what tokens of the chunk are scored by: target + 1, or 0."""
        size = self._block
        lengths = [[-(-(p.stop - p.start) // size) * size for p in plan if p.chunk] for plan in plans]
        rows, tokens = max(map(len, plans)), max(map(sum, lengths))
        # The first that holds both: those without a chunk come first.
        n, chunk = next(s for s in self._shapes if s[0] >= rows and s[1] >= tokens)
        call, targets_ZC = self._blank(n, chunk)
        for z, plan in enumerate(plans):
            at = n
            for row, part in enumerate(plan):
                sequence, count = part.sequence, part.stop - part.start
                first = at if part.chunk else row
                here = slice(first, first + count)
                times = np.arange(part.start, part.stop)
                pages = np.asarray(sequence.pages, np.int32)
                call.tokens_ZT[z, here] = sequence.tokens[part.start : part.stop]
                call.real_ZT[z, here] = 1
                call.times_ZT[z, here] = times
                call.page_ZT[z, here] = pages[times // self.capacity.page]
                call.table_ZNP[z, row, : len(pages)] = pages
                call.last_ZN[z, row] = first + count - 1
                if part.chunk:
                    blocks = -(-count // size)
                    begin = (at - n) // size
                    call.blocks_ZM[z, begin : begin + blocks] = row
                    # A block is computed whole; what pads it comes behind its tokens and is seen by none of them.
                    targets_ZC[z, at - n : at - n + count] = _targets(part)
                    at += blocks * size
            call.used_Z[z] = (at - n) // size
        return call, targets_ZC

    def _blank(self, n: int, chunk: int) -> tuple[programs.Call, np.ndarray]:
        """The arrays of a step in which all is padding."""
        lanes, pages = len(self._lanes), -(-self.capacity.length // self.capacity.page)
        call = programs.blank(lanes, n, chunk, chunk // self._block, pages)
        return call, np.zeros((lanes, chunk), np.int32)

    def _draw(self, plans: list[list[Part]], rows_ZND: jax.Array) -> programs.Drawn | None:
        """New tokens of the sequences whose last token this step computed, if there are any."""
        n = rows_ZND.shape[1]
        complete = [[p.stop == p.sequence.goal and p.sequence.request.max_new > 0 for p in plan] for plan in plans]
        if not any(map(any, complete)):
            return None
        per_lane = []
        for plan in plans:
            requests = [p.sequence.request for p in plan]
            times = [p.stop for p in plan]
            per_lane.append(sampling.rows([r.sampling for r in requests], [r.seed for r in requests], times, n))
        rows = sampling.Rows(*map(np.stack, zip(*per_lane, strict=True)))
        full = any(p.sequence.request.sampling.adjusts or p.sequence.request.top for plan in plans for p in plan)
        return self._sample(rows_ZND, rows, self._adjust(plans, n) if full else None)

    def _score(self, chunk_ZCD: jax.Array, targets_ZC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log-probabilities, whether greedy) [Z, C] of the chunk's tokens with a target; `_call` tells targets."""
        places = [np.flatnonzero(targets_C) for targets_C in targets_ZC]
        size = targets_ZC.shape[1] if max(map(len, places)) > _FEW_SCORED else _FEW_SCORED
        at_ZS = np.stack([np.resize(np.append(own, 0), size) for own in places])  # repeated, which changes nothing
        targets_ZS = np.maximum(np.take_along_axis(targets_ZC, at_ZS, axis=1) - 1, 0)
        found = programs.score(self._prepared["head"], chunk_ZCD, at_ZS, targets_ZS, setup=self.setup)
        scores = np.zeros(targets_ZC.shape, np.float32), np.zeros(targets_ZC.shape, bool)
        for whole_ZC, found_ZS in zip(scores, processes.everywhere(found), strict=True):
            np.put_along_axis(whole_ZC, at_ZS, found_ZS, axis=1)
        return scores

    def _sample(self, rows_ZND: jax.Array, rows: sampling.Rows, adjust: Adjust | None) -> programs.Drawn:
        top = 0 if adjust is None else TOP  # one program for all that is rare
        drawn = programs.draw(self._prepared["head"], rows_ZND, rows, adjust, setup=self.setup, top=top)
        return processes.everywhere(drawn)

    def _adjust(self, plans: list[list[Part]], n: int) -> Adjust:
        shape = len(plans), n, self.model.vocab_size
        adjust = Adjust(np.zeros(shape, bool), np.zeros(shape, np.float32))
        for z, plan in enumerate(plans):
            for row, part in enumerate(plan):
                adjust.seen_NW[z, row, part.sequence.tokens] = True
                for token, bias in part.sequence.request.sampling.logit_bias:
                    adjust.bias_NW[z, row, token] = bias
        return adjust

    def _advance(self, sequence: Running, drawn: programs.Drawn | None, z: int, n: int) -> Event:
        """Takes in a new token, or the end of a request that was only scored."""
        request = sequence.request
        if request.max_new == 0 or drawn is None:
            return self._end(sequence, Event(id=sequence.id, reason="length"))
        token, logprob = int(drawn.token_ZN[z, n]), float(drawn.logprob_ZN[z, n])
        top = zip(drawn.top_ZNK[z, n].tolist(), drawn.top_logprob_ZNK[z, n].tolist(), strict=True)
        event = Event(id=sequence.id, token=token, logprob=logprob, top=tuple(top)[: request.top])
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.top.append(event.top)
        text = ""
        if sequence.text is not None and token not in request.stop_ids:
            text = sequence.text.feed(token)
        reason: Reason | None = None
        if token in request.stop_ids or (sequence.text is not None and sequence.text.stopped):
            reason = "stop"
        elif len(sequence.logprobs) == request.max_new:
            reason = "length"
        if reason and sequence.text is not None and not sequence.text.stopped:
            text += sequence.text.end()
        event = dataclasses.replace(event, text=text, reason=reason)
        return self._end(sequence, event) if reason else event

    def _end(self, sequence: Running, event: Event) -> Event:
        lane, _ = self._lane_of.pop(sequence.id)
        experts = None
        if self._routes is not None:
            experts = self._routes.read(self._lanes.index(lane), sequence.pages, sequence.computed)
        lane.remove(sequence)
        assert event.reason is not None
        return dataclasses.replace(event, result=_result(sequence, event.reason, experts))


def _targets(part: Part) -> np.ndarray:
    """Of each token of a chunk's part: one more than the token behind it, if that is to be scored; else 0."""
    request, start = part.sequence.request, part.sequence.request.score_from
    targets = np.zeros(part.stop - part.start, np.int32)
    if start is not None:
        behind = np.asarray(request.prompt[part.start + 1 : part.stop + 1], np.int32)
        scored = np.arange(part.start + 1, part.start + 1 + len(behind)) >= start + len(part.sequence.scores)
        targets[: len(behind)] = (behind + 1) * scored
    return targets


def _take_scores(part: Part, targets: np.ndarray, logprobs: np.ndarray, greedy: np.ndarray) -> None:
    for i in np.flatnonzero(targets[: part.stop - part.start]):
        part.sequence.scores.append((float(logprobs[i]), bool(greedy[i])))


def _result(sequence: Running, reason: Reason, experts: np.ndarray | None) -> Result:
    return Result(
        tokens=tuple(sequence.tokens[len(sequence.request.prompt) :]),
        logprobs=tuple(sequence.logprobs),
        top=tuple(sequence.top),
        text=sequence.text.text if sequence.text else "",
        reason=reason,
        scores=tuple(sequence.scores),
        reused=sequence.reused,
        experts=experts,
    )


def _powers(base: int, most: int) -> list[int]:
    """1, base, base squared and so on below `most`, and `most`."""
    below = itertools.takewhile(lambda p: p < most, (base**i for i in itertools.count()))
    return [*below, most]
