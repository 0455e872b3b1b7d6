"""Latent attention for training and prefill as one differentiable function over the two Pallas kernels.

Letters: B batch, T queries, S keys, H heads, J KV heads, N nope, R rope, V value.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.latent_attention import backward as backward_kernel
from pallas_kernels.latent_attention.forward import forward
from pallas_kernels.latent_attention.visibility import LANES, Blocks, bounds


class Tuning(NamedTuple):
    """How the kernels cut their work. parts: see `backward`."""

    forward: Blocks
    backward: Blocks
    parts: int


def tuning(queries: int, keys: int, kv_heads: int, shared_key: bool, dtype: jnp.dtype, chip: str | None) -> Tuning:
    """Block sizes for so many queries and keys of a sequence; chip as in `CHIPS`, None for any other.

    Large blocks win on all chips: what a block costs besides its matmuls is a constant. Beyond that the 256-wide MXUs
    of v6e and tpu7x want larger masked parts, and have rows to spare for the sum of the weights; v5's have none.
    """
    wide = chip not in ("v5e", "v5p")
    step, span = _block(queries), _block(keys)
    longest = 4096 if dtype.itemsize == 2 else 2048  # what VMEM holds of keys, values and their gradients
    chunks = -(-keys // longest)
    chunk = _round(-(-keys // chunks), span)
    part = min(512 if wide else 256, step, span)
    by_core = 2 if chip == "v5p" and kv_heads % 2 == 0 else 1  # the two cores of a v5p share the heads
    return Tuning(
        Blocks(step, chunk * (2 if chunks % 2 == 0 else 1), span, part, ones=wide),
        Blocks(step, chunk, span, min(part, 256), ones=False),
        by_core if shared_key else kv_heads,
    )


def _round(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _block(n: int) -> int:
    """The smallest block that holds n, of 128, 256, 512 and 1024; the last for more."""
    return next((size for size in (128, 256, 512) if n <= size), 1024)


def chip() -> str | None:
    """The TPU that code traced now is for: the mesh's in use, else the default device's. None where there is none."""
    return str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else None


def attention(
    q_nope_BHTN: Array,
    q_rope_BHTR: Array | None,
    k_nope_BJSN: Array,
    k_rope_BSR: Array | None,
    v_BJSV: Array,
    *,
    scale: float,
    segments_BT: Array,
    segments_BS: Array,
    offset: int | Array = 0,
    how: Tuning | None = None,
    interpret: bool = False,
) -> Array:
    """As `latent_attention` of op.py. how: `tuning`'s unless given. interpret: run the kernels step by step, slowly."""
    (_, _, t, _), (_, j, s, _) = q_nope_BHTN.shape, k_nope_BJSN.shape
    how = how or tuning(t, s, j, k_rope_BSR is not None, v_BJSV.dtype, chip())
    long_t, long_s = _round(t, how.forward.queries), _round(s, how.forward.chunk)
    o_BHTV: Any = _attention(
        _pad(q_nope_BHTN, 2, long_t),
        None if q_rope_BHTR is None else _pad(q_rope_BHTR, 2, long_t),
        _pad(k_nope_BJSN, 2, long_s),
        None if k_rope_BSR is None else _pad(k_rope_BSR, 1, long_s),
        _pad(v_BJSV, 2, long_s),
        _pad(segments_BT, 1, long_t),
        _pad(segments_BS, 1, long_s),
        jnp.asarray(offset, jnp.int32),
        scale,
        how,
        interpret,
    )
    return o_BHTV[:, :, :t]


def _pad(x: Array, axis: int, size: int) -> Array:
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10))
def _attention(q_nope, q_rope, k_nope, k_rope, v, segments_BT, segments_BS, offset, scale, how, interpret):
    args = (q_nope, q_rope, k_nope, k_rope, v, segments_BT, segments_BS, offset)
    return _attention_forward(*args, scale, how, interpret)[0]


def _attention_forward(q_nope, q_rope, k_nope, k_rope, v, segments_BT, segments_BS, offset, scale, how, interpret):
    args = (q_nope, q_rope, k_nope, k_rope, v, segments_BT, segments_BS, offset)
    blocks = how.forward
    queries, keys = bounds(segments_BT, blocks.queries), bounds(segments_BS, blocks.part)
    o, lse = forward(*args, queries, keys, scale=scale, blocks=blocks, interpret=interpret)
    # Named, so that a remat policy that keeps them need not run the forward pass again.
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (*args, o, lse)


def _attention_backward(scale, how, interpret, kept, g):
    q_nope, q_rope, k_nope, k_rope, v, segments_BT, segments_BS, offset, o, lse = kept
    blocks = how.backward
    # Fused into the product that makes g, on TPU this sum takes three times as long as that product.
    g = jax.lax.optimization_barrier(g)
    mean = jnp.sum(g.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)[:, :, None]
    operands = backward_kernel.Operands(
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        v,
        g,
        lse,
        mean,
        segments_BT[:, None],
        jnp.broadcast_to(segments_BS[:, :, None], (*segments_BS.shape, LANES)),
        segments_BS[:, None],
    )
    queries, keys = bounds(segments_BT, blocks.queries), bounds(segments_BS, blocks.part)
    grad = backward_kernel.backward(
        operands, offset, queries, keys, scale=scale, blocks=blocks, parts=how.parts, interpret=interpret
    )
    return (*grad, None, None, None)


_attention.defvjp(_attention_forward, _attention_backward)
