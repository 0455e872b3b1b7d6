"""The host arrays of a step: the tokens that the engine computes, and each row's sampling settings."""

import itertools

import numpy as np

from dsv2_jax.inference import programs, sampling
from dsv2_jax.inference.programs import StepInputs
from dsv2_jax.inference.sampling import Adjust, RowSettings
from dsv2_jax.inference.scheduler import Part

Plans = list[list[Part]]  # of each replica, the parts of a step


class InputBuilder:
    """Builds arrays of a few shapes, so that few programs are compiled. `shapes` lists them as (rows, chunk)."""

    def __init__(self, replicas: int, capacity: tuple[int, int], pages: tuple[int, int], block: int, vocab_size: int):
        """capacity: rows and chunk tokens. pages: of one row, and tokens of a page. block: tokens of a chunk block."""
        rows, chunk = capacity
        self._replicas, self._block, self._vocab_size = replicas, block, vocab_size
        self._row_pages, self._page = pages
        chunks = [64 * n for n in _powers(2, chunk // 64)]
        # With a chunk, padding rows are a small part of a step. Without one they are most of it, so the sizes without a
        # chunk are finer.
        self.shapes = [*((n, 0) for n in _powers(2, rows)), *itertools.product(_powers(4, rows), chunks)]

    def padding(self, rows: int, chunk: int) -> tuple[StepInputs, np.ndarray]:
        """The arrays that `build` would return for a step of nothing but padding."""
        inputs = programs.blank(self._replicas, rows, chunk, chunk // self._block, self._row_pages)
        return inputs, np.zeros((self._replicas, chunk), np.int32)

    def build(self, plans: Plans) -> tuple[StepInputs, np.ndarray]:
        """The arrays of a step, and the targets int32 [Z, C] of its chunk.

        A target is 1 plus the token to score after that position, or 0 for none.
        """
        size = self._block
        lengths = [[-(-(p.stop - p.start) // size) * size for p in plan if p.chunk] for plan in plans]
        rows, tokens = max(map(len, plans)), max(map(sum, lengths))
        # The first shape that is large enough for both. Shapes without a chunk come first.
        n, chunk = next(s for s in self.shapes if s[0] >= rows and s[1] >= tokens)
        inputs, targets_ZC = self.padding(n, chunk)
        for z, plan in enumerate(plans):
            at = n
            for row, part in enumerate(plan):
                sequence, count = part.sequence, part.stop - part.start
                first = at if part.chunk else row
                here = slice(first, first + count)
                times = np.arange(part.start, part.stop)
                pages = np.asarray(sequence.pages, np.int32)
                inputs.tokens_ZT[z, here] = sequence.tokens[part.start : part.stop]
                inputs.real_ZT[z, here] = 1
                inputs.times_ZT[z, here] = times
                inputs.page_ZT[z, here] = pages[times // self._page]
                inputs.table_ZNP[z, row, : len(pages)] = pages
                inputs.last_ZN[z, row] = first + count - 1
                if part.chunk:
                    blocks = -(-count // size)
                    begin = (at - n) // size
                    inputs.blocks_ZM[z, begin : begin + blocks] = row
                    # Blocks are computed in full. The padding of a block follows its tokens, so none attends to it.
                    targets_ZC[z, at - n : at - n + count] = _targets(part)
                    at += blocks * size
            inputs.used_Z[z] = (at - n) // size
        return inputs, targets_ZC

    def row_settings(self, plans: Plans, n: int) -> RowSettings:
        """The sampling settings of all rows [Z, n]."""
        per_replica = []
        for plan in plans:
            requests = [p.sequence.request for p in plan]
            times = [p.stop for p in plan]
            per_replica.append(sampling.rows([r.sampling for r in requests], [r.seed for r in requests], times, n))
        return RowSettings(*map(np.stack, zip(*per_replica, strict=True)))

    def adjust(self, plans: Plans, n: int) -> Adjust:
        """The tokens of all rows so far and their biases [Z, n, W]."""
        shape = len(plans), n, self._vocab_size
        adjust = Adjust(np.zeros(shape, bool), np.zeros(shape, np.float32))
        for z, plan in enumerate(plans):
            for row, part in enumerate(plan):
                adjust.seen_NW[z, row, part.sequence.tokens] = True
                for token, bias in part.sequence.request.sampling.logit_bias:
                    adjust.bias_NW[z, row, token] = bias
        return adjust


def _targets(part: Part) -> np.ndarray:
    """For each token of a chunk's part: 1 plus the next token if that token is scored, else 0."""
    request, start = part.sequence.request, part.sequence.request.score_from
    targets = np.zeros(part.stop - part.start, np.int32)
    if start is not None:
        following = np.asarray(request.prompt[part.start + 1 : part.stop + 1], np.int32)
        scored = np.arange(part.start + 1, part.start + 1 + len(following)) >= start + len(part.sequence.scores)
        targets[: len(following)] = (following + 1) * scored
    return targets


def _powers(base: int, limit: int) -> list[int]:
    """1, base, base squared and so on below `limit`, and `limit`."""
    below = itertools.takewhile(lambda p: p < limit, (base**i for i in itertools.count()))
    return [*below, limit]
