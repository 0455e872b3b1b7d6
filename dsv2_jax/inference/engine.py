"""The engine: continuous batching over a paged cache. Requests join and leave between steps.

engine = Engine(params, model)
results = engine.generate([Request(prompt=(1, 2, 3), max_new=8)])      # a batch
id = engine.add(request); events = engine.step(); engine.cancel(id)    # a server
engine.score([[1, 2, 3, 4]])                                           # log-probabilities of given tokens
engine.replace(params); engine.release()                               # other weights, same programs; no weights
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
from dsv2_jax.inference.inputs import InputBuilder, Plans
from dsv2_jax.inference.quantize import Weights
from dsv2_jax.inference.request import TOP, Reason, Request, RequestEvent, Result
from dsv2_jax.inference.routes import Routes
from dsv2_jax.inference.sampling import Adjust
from dsv2_jax.inference.scheduler import Part, Scheduler
from dsv2_jax.inference.scheduler import Sequence as Running
from dsv2_jax.inference.text import Text
from dsv2_jax.ops import pages as page_arrays
from dsv2_jax.ops import switch
from dsv2_jax.ops.formats import Format
from dsv2_jax.ops.switch import Implementation
from dsv2_jax.parallel import processes
from pallas_kernels.latent_attention import max_sequences

_FEW_SCORED = 64  # up to this number of scored tokens in a chunk, the head is computed for these alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Sizes of the batch and of the cache. On a mesh they hold for each replica."""

    rows: int = 16  # sequences that run at the same time
    length: int = 0  # maximum number of tokens of a sequence, prompt included; 0: the model's maximum
    chunk: int = 512  # prompt tokens that a step computes together with the new tokens
    page: int = 0  # tokens of a page; 0: 64, or 256 with the TPU kernel, which takes multiples of 128
    pages: int = 0  # pages of the cache; 0: enough for `rows` sequences of `length`
    weights: Weights = "compute"  # format of the matrices: as activations, or int8 or float8 (e4m3)
    cache: Format = "compute"  # format of the cache: as activations, bfloat16, int8 or int6

    def __post_init__(self) -> None:
        for name in ("rows", "chunk"):
            check(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        check(min(self.length, self.page, self.pages) >= 0, "length, page and pages must be at least 0")
        check(self.chunk % 64 == 0, f"chunk must be a multiple of 64, not {self.chunk}")

    def most_rows(self, pages: int, model: Model, implementation: Implementation) -> int:
        """Maximum number of rows of `pages` pages each whose page table fits in the kernel's memory.

        Unlimited without the kernel.
        """
        kernel = switch.of_pages(model, implementation) == "pallas"
        return max_sequences(pages, self.chunk) if kernel else sys.maxsize

    def resolve(self, model: Model, implementation: Implementation) -> "Capacity":
        """Replaces the zeros. Raises ValueError if no sequence fits, or if the kernel does not take these pages.

        implementation: that of the engine, of `switch.implementation`.
        """
        length = self.length or model.max_position_embeddings
        check(
            length <= model.max_position_embeddings,
            f"length ({length}) exceeds the model's {model.max_position_embeddings} positions",
        )
        kernel = switch.of_pages(model, implementation) == "pallas"
        page = self.page or (256 if kernel else 64)
        check(not kernel or page % 128 == 0, f"page must be a multiple of 128 on a TPU, not {page}")
        each = -(-length // page)
        most = self.most_rows(each, model, implementation)
        check(
            self.rows <= most,
            f"the page table of {self.rows} rows of {length} tokens in pages of {page} does not fit in the memory of "
            f"the TPU kernel: at most {most} rows fit; lower rows or length, or raise page",
        )
        pages = self.pages or self.rows * each + 1
        check(pages > each, f"{pages} pages cannot hold a sequence of {length} tokens and the page for padding")
        return dataclasses.replace(self, length=length, page=page, pages=pages)


class Engine:
    """Generates and scores. Not thread-safe.

    A request's tokens do not depend on the other requests, up to rounding. The shapes of a step's matmuls depend on the
    other requests, and matmuls of different shapes round differently, in float32 by about one part in a million. This
    changes a choice only in a tie.
    """

    def __init__(
        self,
        params: Any,
        model: Model,
        *,
        compute: Compute | None = None,
        capacity: Capacity | None = None,
        tokenizer: Tokenizer | None = None,
        mesh: jax.sharding.Mesh | None = None,
        routes: bool = False,
    ):
        """params: the tree of `parameters.tree`, or None if `replace` is called before the first request.

        mesh: with the axes data, fsdp, expert and tensor. All processes of the mesh make the same calls and get all
        results. tokenizer: required for text and stop strings. routes: whether results have `experts`. Raises
        ValueError for a capacity or mesh that the model does not fit.
        """
        check(model.head == "tokens", "a reward model cannot generate: its head gives a score")
        self.model, self.tokenizer = model, tokenizer
        compute = compute or Compute()
        implementation = switch.implementation(compute)
        self.capacity = (capacity or Capacity()).resolve(model, implementation)
        c = self.capacity
        self.setup = programs.Setup(
            model=model, compute=compute, form=c.cache, weights=c.weights, devices=mesh, routes=routes
        )
        programs.check_mesh(self.setup.mesh)
        self._block = page_arrays.chunk_block(switch.of_pages(model, implementation))
        self._replicas = [Scheduler(c.pages, c.page, c.rows, c.chunk, self._block) for _ in range(self.setup.replicas)]
        self._layers = programs.empty(self.setup, c.pages, c.page)
        self._routes = Routes(model, self.setup.replicas, c.pages, c.page) if routes else None
        self._prepared: Any = None if params is None else programs.prepare(params, self.setup)
        self._replica_of: dict[int, tuple[Scheduler, Running]] = {}
        self._ids = itertools.count()
        pages = -(-c.length // c.page), c.page
        self._inputs = InputBuilder(self.setup.replicas, (c.rows, c.chunk), pages, self._block, model.vocab_size)

    def replace(self, params: Any) -> None:
        """Replaces the weights by others of the same shapes, and clears the prefix cache.

        Frees the old weights first, so that memory never holds both. Raises ValueError while requests run.
        """
        self.release()
        self._prepared = programs.prepare(params, self.setup)

    def release(self) -> None:
        """Frees the weights until `replace` is called. Raises ValueError while requests run."""
        check(not self._replica_of, "weights cannot be replaced while requests run")
        for replica in self._replicas:
            replica.pages.forget()
        self._prepared = None

    def warm(self) -> None:
        """Compiles every program that a step can need, so that later steps compile nothing."""
        greedy = sampling.rows([], [], [], self.capacity.rows)
        for n, chunk in self._inputs.shapes:
            inputs, targets_ZC = self._inputs.padding(n, chunk)
            rows_ZND, chunk_ZCD = self._forward(inputs)
            if chunk:
                for targets in (targets_ZC, targets_ZC + 1):  # few tokens scored, and all of them
                    self._score(chunk_ZCD, targets)
            else:
                rows = sampling.RowSettings(*(np.stack([x[:n]] * len(self._replicas)) for x in greedy))
                self._sample(rows_ZND, rows, None)
                self._sample(rows_ZND, rows, self._inputs.adjust([[]] * len(self._replicas), n))

    @property
    def unfinished(self) -> int:
        """Number of requests that wait or run."""
        return len(self._replica_of)

    @property
    def replicas(self) -> Sequence[Scheduler]:
        """The scheduler of each replica, for reading only."""
        return self._replicas

    def add(self, request: Request) -> int:
        """Queues a request and returns its id, which its events have. Raises ValueError as `check` does."""
        self.check(request)
        text = Text(self.tokenizer, request.stop) if self.tokenizer and (request.stop or request.text) else None
        sequence = Running(next(self._ids), request, text, list(request.prompt))
        replica = min(self._replicas, key=lambda replica: replica.load)
        replica.waiting.append(sequence)
        self._replica_of[sequence.id] = replica, sequence
        return sequence.id

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that cannot be served."""
        request.check(self.model, self.capacity.length)
        needs_tokenizer = bool(request.stop or request.text)
        check(self.tokenizer is not None or not needs_tokenizer, "stop strings and text need a tokenizer")

    def cancel(self, id: int) -> None:
        """Ends a request without an event. Does nothing if it has ended already."""
        if id in self._replica_of:
            replica, sequence = self._replica_of.pop(id)
            replica.remove(sequence)

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """The results of these requests, in their order. Requests that were added before continue to run."""
        for request in requests:
            self.check(request)
        ids = [self.add(request) for request in requests]
        left, results = set(ids), {}
        while left:
            results |= {event.id: event.result for event in self.step() if event.result is not None}
            left -= results.keys()
        return [results[id] for id in ids]

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int] | None = None) -> list[Result]:
        """Log-probabilities (nats) of given tokens, each given the tokens before it: `scores` of the results.

        starts: the index of the first scored token of each sequence, at least 1 (the default).
        """
        starts = starts or [1] * len(sequences)
        return self.generate(
            [Request(prompt=tuple(s), max_new=0, score_from=i) for s, i in zip(sequences, starts, strict=True)]
        )

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits float32 [T, W] after each of the tokens, computed through the cache as in generation, without reuse.

        Raises ValueError while requests run, and for tokens that cannot be a prompt.
        """
        request = Request(prompt=tuple(tokens), max_new=0, score_from=1)
        self.check(request)
        check(not self._replica_of, "logits cannot be computed while requests run")
        sequence = Running(-1, request, None, [*tokens, 0])  # the last token, 0, is not computed
        replica, *others = self._replicas
        replica.waiting.append(sequence)
        parts = []
        while sequence.computed < len(tokens):
            plans = [replica.plan(), *([] for _ in others)]
            inputs, _ = self._inputs.build(plans)
            _, chunk_ZCD = self._forward(inputs)
            (part,) = plans[0]
            found_ZCW = programs.logits(self._prepared["head"], chunk_ZCD, setup=self.setup)
            parts.append(processes.everywhere(found_ZCW)[0, : part.stop - part.start])
            replica.done(part)
        replica.remove(sequence)
        return np.concatenate(parts)

    @property
    def cache_bytes(self) -> float:
        """Bytes of the cache for one token, all layers and scales included."""
        slots = len(self._replicas) * self.capacity.pages * self.capacity.page
        return sum(array.nbytes for array in jax.tree.leaves(self._layers)) / slots

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory, scales included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._prepared))

    def step(self) -> list[RequestEvent]:
        """Runs one step of all running requests. Returns an event for each new token and each end."""
        plans = [replica.plan() for replica in self._replicas]
        if not any(plans):
            return []
        inputs, targets_ZC = self._inputs.build(plans)
        rows_ZND, chunk_ZCD = self._forward(inputs)
        scores = self._score(chunk_ZCD, targets_ZC) if targets_ZC.any() else None
        drawn = self._draw(plans, rows_ZND)
        events = []
        for z, (replica, plan) in enumerate(zip(self._replicas, plans, strict=True)):
            at = 0
            for n, part in enumerate(plan):
                if part.chunk:
                    if scores is not None:
                        _take_scores(part, targets_ZC[z, at:], scores[0][z, at:], scores[1][z, at:])
                    at += -(-(part.stop - part.start) // self._block) * self._block
                replica.done(part)
                if part.stop == part.sequence.goal:
                    events.append(self._advance(part.sequence, drawn, z, n))
        return events

    def _forward(self, inputs: programs.StepInputs) -> tuple[jax.Array, jax.Array]:
        """Runs `programs.forward`, updates the cache and the routes, and returns the hidden states."""
        assert self._prepared is not None, "the engine has no weights: call `replace` first"
        rows_ZND, chunk_ZCD, self._layers, experts_ZTLK = programs.forward(
            self._prepared, self._layers, inputs, setup=self.setup
        )
        if self._routes is not None:
            self._routes.write(inputs, processes.everywhere(experts_ZTLK))
        return rows_ZND, chunk_ZCD

    def _draw(self, plans: Plans, rows_ZND: jax.Array) -> programs.Drawn | None:
        """Draws the next token of the sequences whose last token this step computed; None if there are none."""
        n = rows_ZND.shape[1]
        complete = [[p.stop == p.sequence.goal and p.sequence.request.max_new > 0 for p in plan] for plan in plans]
        if not any(map(any, complete)):
            return None
        rows = self._inputs.row_settings(plans, n)
        full = any(p.sequence.request.sampling.adjusts or p.sequence.request.top for plan in plans for p in plan)
        return self._sample(rows_ZND, rows, self._inputs.adjust(plans, n) if full else None)

    def _score(self, chunk_ZCD: jax.Array, targets_ZC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log-probability, whether greedy) [Z, C] of the chunk's tokens that have a target of `build`."""
        places = [np.flatnonzero(targets_C) for targets_C in targets_ZC]
        size = targets_ZC.shape[1] if max(map(len, places)) > _FEW_SCORED else _FEW_SCORED
        at_ZS = np.stack(
            [np.resize(np.append(own, 0), size) for own in places]
        )  # repeated indices fill the array; results are unaffected
        targets_ZS = np.maximum(np.take_along_axis(targets_ZC, at_ZS, axis=1) - 1, 0)
        found = programs.score(self._prepared["head"], chunk_ZCD, at_ZS, targets_ZS, setup=self.setup)
        scores = np.zeros(targets_ZC.shape, np.float32), np.zeros(targets_ZC.shape, bool)
        for all_ZC, found_ZS in zip(scores, processes.everywhere(found), strict=True):
            np.put_along_axis(all_ZC, at_ZS, found_ZS, axis=1)
        return scores

    def _sample(self, rows_ZND: jax.Array, rows: sampling.RowSettings, adjust: Adjust | None) -> programs.Drawn:
        top = 0 if adjust is None else TOP  # one program for all rare settings
        drawn = programs.draw(self._prepared["head"], rows_ZND, rows, adjust, setup=self.setup, top=top)
        return processes.everywhere(drawn)

    def _advance(self, sequence: Running, drawn: programs.Drawn | None, z: int, n: int) -> RequestEvent:
        """Appends the new token, or ends a request that is only scored."""
        request = sequence.request
        if request.max_new == 0 or drawn is None:
            return self._end(sequence, RequestEvent(id=sequence.id, reason="length"))
        token, logprob = int(drawn.token_ZN[z, n]), float(drawn.logprob_ZN[z, n])
        top = zip(drawn.top_ZNK[z, n].tolist(), drawn.top_logprob_ZNK[z, n].tolist(), strict=True)
        event = RequestEvent(id=sequence.id, token=token, logprob=logprob, top=tuple(top)[: request.top])
        sequence.tokens.append(token)
        sequence.logprobs.append(logprob)
        sequence.top.append(event.top)
        text = ""
        if sequence.text is not None and token not in request.stop_ids:
            text = sequence.text.add(token)
        reason: Reason | None = None
        if token in request.stop_ids or (sequence.text is not None and sequence.text.stopped):
            reason = "stop"
        elif len(sequence.logprobs) == request.max_new:
            reason = "length"
        if reason and sequence.text is not None and not sequence.text.stopped:
            text += sequence.text.end()
        event = dataclasses.replace(event, text=text, reason=reason)
        return self._end(sequence, event) if reason else event

    def _end(self, sequence: Running, event: RequestEvent) -> RequestEvent:
        replica, _ = self._replica_of.pop(sequence.id)
        experts = None
        if self._routes is not None:
            experts = self._routes.read(self._replicas.index(replica), sequence.pages, sequence.computed)
        replica.remove(sequence)
        assert event.reason is not None
        return dataclasses.replace(event, result=_result(sequence, event.reason, experts))


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
