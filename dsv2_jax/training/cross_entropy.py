"""Cross-entropy of a large vocabulary without its logits: made for a chunk of tokens at a time, gradients included."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.model.matmul import dot, weight_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(h_ND: Array, w_head_DW: Array, targets_N: Array, weights_N: Array, chunk: int) -> Array:
    """Sum over n of weights[n] * -log softmax(h[n] @ w_head)[targets[n]], a float32 scalar.

    h and w_head in the compute dtype, targets int32, weights float32 (not differentiated). Logits are float32 and
    exist for `chunk` tokens at a time. Differentiated, one pass makes the loss and both gradients: the logits are
    never computed twice.
    """

    def add(nll: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, targets, weights = part
        logits, lse = _logits(h, w_head_DW)
        return nll + _nll(logits, lse, targets, weights), None

    return lax.scan(add, jnp.float32(0), _chunks(h_ND, targets_N, weights_N, chunk))[0]


def _chunks(h_ND: Array, targets_N: Array, weights_N: Array, chunk: int) -> tuple[Array, Array, Array]:
    size = min(chunk, h_ND.shape[0])
    pad = -h_ND.shape[0] % size  # padding weighs nothing
    return (
        jnp.pad(h_ND, ((0, pad), (0, 0))).reshape(-1, size, h_ND.shape[1]),
        jnp.pad(targets_N, (0, pad)).reshape(-1, size),
        jnp.pad(weights_N, (0, pad)).reshape(-1, size),
    )


def _logits(h_ND: Array, w_DW: Array) -> tuple[Array, Array]:
    logits_NW = dot(h_ND, w_DW)
    return logits_NW, jax.nn.logsumexp(logits_NW, axis=-1)


def _nll(logits_NW: Array, lse_N: Array, targets_N: Array, weights_N: Array) -> Array:
    return jnp.sum(weights_N * (lse_N - jnp.take_along_axis(logits_NW, targets_N[:, None], axis=1)[:, 0]))


def _fwd(
    h_ND: Array, w_DW: Array, targets_N: Array, weights_N: Array, chunk: int
) -> tuple[Array, tuple[Array, Array, Array]]:
    def add(carry: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        nll, dw_DW = carry
        h, targets, weights = part
        logits, lse = _logits(h, w_DW)
        hit = targets[:, None] == jnp.arange(w_DW.shape[1], dtype=targets.dtype)
        g = (weights[:, None] * (jnp.exp(logits - lse[:, None]) - hit)).astype(h.dtype)
        nll = nll + _nll(logits, lse, targets, weights)
        return (nll, dw_DW + weight_gradient(h, g)), dot(g, w_DW, (1, 1)).astype(h.dtype)

    start = (jnp.float32(0), jnp.zeros(w_DW.shape, jnp.float32))
    (nll, dw_DW), dh = lax.scan(add, start, _chunks(h_ND, targets_N, weights_N, chunk))
    dh_ND = dh.reshape(-1, h_ND.shape[1])[: h_ND.shape[0]]
    return nll, (dh_ND, dw_DW.astype(w_DW.dtype), weights_N)


def _bwd(_: int, kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None, Array]:
    dh_ND, dw_DW, weights_N = kept
    return (dh_ND * g).astype(dh_ND.dtype), (dw_DW * g).astype(dw_DW.dtype), None, jnp.zeros_like(weights_N)


cross_entropy.defvjp(_fwd, _bwd)
