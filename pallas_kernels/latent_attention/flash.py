"""Latent attention for training and prefill as one differentiable function over the two Pallas kernels.

Letters: B batch, T queries, S keys, H heads, J KV heads, N nope, R rope, V value.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import chips
from pallas_kernels.common import LANES
from pallas_kernels.latent_attention import backward as backward_kernel
from pallas_kernels.latent_attention.forward import forward
from pallas_kernels.latent_attention.inputs import AttentionInputs, Keys, Queries, Segments
from pallas_kernels.latent_attention.visibility import FlashBlocks, Scalars, bounds


class FlashTuning(NamedTuple):
    """Block sizes of both kernels. parts: see `backward`."""

    forward: FlashBlocks
    backward: FlashBlocks
    parts: int


def tuning(queries: int, keys: int, kv_heads: int, shared_key: bool, dtype: jnp.dtype, chip: str | None) -> FlashTuning:
    """Block sizes for a sequence of `queries` queries and `keys` keys; chip as in `chips.CHIPS`, None for any other.

    Large blocks are faster on all chips, because a block has a constant cost besides its matmuls. The 256-wide MXUs of
    v6e and tpu7x need larger masked parts, and have spare rows for the sum of the weights; those of v5 have none.
    """
    wide = chip not in ("v5e", "v5p")
    step, span = _block(queries), _block(keys)
    max_keys = 4096 if dtype.itemsize == 2 else 2048  # keys, with their values and gradients, in VMEM
    chunks = -(-keys // max_keys)
    chunk = _round(-(-keys // chunks), span)
    part = min(512 if wide else 256, step, span)
    by_core = 2 if chip == "v5p" and kv_heads % 2 == 0 else 1  # the two cores of a v5p split the heads
    return FlashTuning(
        FlashBlocks(step, chunk * (2 if chunks % 2 == 0 else 1), span, part, ones=wide),
        FlashBlocks(step, chunk, span, min(part, 256), ones=False),
        by_core if shared_key else kv_heads,
    )


def _round(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _block(n: int) -> int:
    """The smallest of 128, 256 and 512 that holds n, or 1024."""
    return next((size for size in (128, 256, 512) if n <= size), 1024)


def attention(
    queries: Queries,
    keys: Keys,
    v_BJSV: Array,
    segments: Segments,
    *,
    scale: float,
    offset: int | Array = 0,
    how: FlashTuning | None = None,
    interpret: bool = False,
) -> Array:
    """As `latent_attention` of op.py. how: `tuning`'s by default. interpret: run the kernels in interpret mode."""
    (q_nope, q_rope), (k_nope, k_rope), (segments_BT, segments_BS) = queries, keys, segments
    t, (_, j, s, _) = q_nope.shape[2], k_nope.shape
    how = how or tuning(t, s, j, k_rope is not None, v_BJSV.dtype, chips.here())
    long_t, long_s = _round(t, how.forward.queries), _round(s, how.forward.chunk)
    inputs = AttentionInputs(
        _pad(q_nope, 2, long_t),
        None if q_rope is None else _pad(q_rope, 2, long_t),
        _pad(k_nope, 2, long_s),
        None if k_rope is None else _pad(k_rope, 1, long_s),
        _pad(v_BJSV, 2, long_s),
        _pad(segments_BT, 1, long_t),
        _pad(segments_BS, 1, long_s),
        jnp.asarray(offset, jnp.int32),
    )
    o_BHTV: Any = _attention(inputs, scale, how, interpret)
    return o_BHTV[:, :, :t]


def _pad(x: Array, axis: int, size: int) -> Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _attention(inputs: AttentionInputs, scale: float, how: FlashTuning, interpret: bool) -> Array:
    return _attention_forward(inputs, scale, how, interpret)[0]


def _attention_forward(inputs: AttentionInputs, scale: float, how: FlashTuning, interpret: bool) -> tuple[Array, tuple]:
    blocks = how.forward
    o, lse = forward(inputs, _scalars(inputs, blocks), scale=scale, blocks=blocks, interpret=interpret)
    # Named, so that a remat policy can keep them instead of running the forward pass again.
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (inputs, o, lse)


def _attention_backward(
    scale: float, how: FlashTuning, interpret: bool, kept: tuple[AttentionInputs, Array, Array], g: Array
) -> tuple[AttentionInputs]:
    inputs, o, lse = kept
    segments_BT, segments_BS = inputs.segments_BT, inputs.segments_BS
    blocks = how.backward
    # XLA would fuse this sum into the matmul that computes g. On TPU the fusion takes three times as long as that
    # matmul alone.
    g = jax.lax.optimization_barrier(g)
    mean = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None]
    operands = backward_kernel.Operands(
        *inputs[:5],
        g,
        lse,
        mean,
        segments_BT[:, None],
        jnp.broadcast_to(segments_BS[:, :, None], (*segments_BS.shape, LANES)),
        segments_BS[:, None],
    )
    scalars = _scalars(inputs, blocks)
    grad = backward_kernel.backward(operands, scalars, scale=scale, blocks=blocks, parts=how.parts, interpret=interpret)
    # JAX takes None for the cotangents of integers.
    return (inputs._replace(**grad._asdict(), segments_BT=None, segments_BS=None, offset=None),)  # pyright: ignore


def _scalars(inputs: AttentionInputs, blocks: FlashBlocks) -> Scalars:
    queries, keys = bounds(inputs.segments_BT, blocks.queries), bounds(inputs.segments_BS, blocks.part)
    return Scalars(inputs.offset.reshape(1), None, queries, keys)


_attention.defvjp(_attention_forward, _attention_backward)
