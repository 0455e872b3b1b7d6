"""Cross-entropy and log-probabilities over a large vocabulary, with logits for one chunk of tokens at a time."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from dsv2_jax.config import SINGLE, Mesh
from dsv2_jax.ops.matmul import dot, project, weight_gradient
from dsv2_jax.parallel import collectives
from dsv2_jax.parallel.mesh import TENSOR


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    h_ND: Array, w_head_DW: Array, targets_N: Array, weights_N: Array, chunk: int, mesh: Mesh = SINGLE
) -> Array:
    """Sum over n of weights[n] * -log softmax(h[n] @ w_head)[targets[n]], a float32 scalar.

    h and w_head have the compute dtype; targets are int32; weights are float32 and not differentiated. Logits are
    float32, for `chunk` tokens at a time. Under differentiation one pass computes the loss and both gradients, so the
    logits are computed once. With tensor parallelism w_head is this device's part of the vocabulary, and the result is
    its part of the sum.
    """

    def add(nll: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        h, targets, weights = part
        logits, lse = _logits(h, w_head_DW, mesh)
        return nll + _nll(logits, lse, _own(targets, w_head_DW, mesh), weights, mesh), None

    return lax.scan(add, jnp.float32(0), _chunks(h_ND, targets_N, weights_N, chunk))[0]


def token_log_probabilities(h_ND: Array, w_head_DW: Array, targets_N: Array, chunk: int) -> tuple[Array, Array]:
    """(log softmax(h[n] @ w_head)[targets[n]], the entropy of that softmax), float32 [N] each, in nats.

    Logits exist for `chunk` tokens at a time; the backward pass recomputes them. The entropy has no gradient.
    """
    size, n = min(chunk, len(h_ND)), len(h_ND)

    @jax.checkpoint  # pyright: ignore[reportPrivateImportUsage]
    def some(h_ND: Array, targets_N: Array) -> tuple[Array, Array]:
        logp_NW = jax.nn.log_softmax(project(h_ND, w_head_DW).astype(jnp.float32), axis=-1)
        chosen_N = jnp.take_along_axis(logp_NW, targets_N[:, None], axis=1)[:, 0]
        fixed_NW = lax.stop_gradient(logp_NW)
        return chosen_N, -jnp.sum(jnp.exp(fixed_NW) * fixed_NW, axis=-1)

    h, targets, _ = _chunks(h_ND, targets_N, jnp.ones(n), size)
    logp, entropy = lax.map(lambda part: some(*part), (h, targets))
    return logp.reshape(-1)[:n], entropy.reshape(-1)[:n]


def _chunks(h_ND: Array, targets_N: Array, weights_N: Array, chunk: int) -> tuple[Array, Array, Array]:
    size = min(chunk, h_ND.shape[0])
    pad = -h_ND.shape[0] % size  # padding has weight 0
    return (
        jnp.pad(h_ND, ((0, pad), (0, 0))).reshape(-1, size, h_ND.shape[1]),
        jnp.pad(targets_N, (0, pad)).reshape(-1, size),
        jnp.pad(weights_N, (0, pad)).reshape(-1, size),
    )


def _logits(h_ND: Array, w_DW: Array, mesh: Mesh) -> tuple[Array, Array]:
    """(this device's logits, log-sum-exp over the full vocabulary)."""
    logits_NW = dot(h_ND, w_DW)
    lse_N = jax.nn.logsumexp(logits_NW, axis=-1)
    if mesh.size(*TENSOR) > 1:
        lse_N = jax.nn.logsumexp(collectives.gather(lse_N[None], TENSOR, 0, mesh), axis=0)
    return logits_NW, lse_N


def _own(targets_N: Array, w_DW: Array, mesh: Mesh) -> Array:
    """Targets as columns of this device's logits; out of range for targets of other devices."""
    return targets_N - collectives.index(TENSOR, mesh) * w_DW.shape[1]


def _nll(logits_NW: Array, lse_N: Array, targets_N: Array, weights_N: Array, mesh: Mesh) -> Array:
    hit_N = (targets_N >= 0) & (targets_N < logits_NW.shape[1])
    chosen_N = jnp.take_along_axis(logits_NW, targets_N[:, None], axis=1, mode="clip")[:, 0]
    return jnp.sum(weights_N * (lse_N / mesh.size(*TENSOR) - jnp.where(hit_N, chosen_N, 0)))


def _fwd(
    h_ND: Array, w_DW: Array, targets_N: Array, weights_N: Array, chunk: int, mesh: Mesh
) -> tuple[Array, tuple[Array, Array, Array]]:
    def add(carry: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        nll, dw_DW = carry
        h, targets, weights = part
        logits, lse = _logits(h, w_DW, mesh)
        targets = _own(targets, w_DW, mesh)
        hit = targets[:, None] == jnp.arange(w_DW.shape[1], dtype=targets.dtype)
        g = (weights[:, None] * (jnp.exp(logits - lse[:, None]) - hit)).astype(h.dtype)
        nll = nll + _nll(logits, lse, targets, weights, mesh)
        return (nll, dw_DW + weight_gradient(h, g)), dot(g, w_DW, (1, 1)).astype(h.dtype)

    start = (jnp.float32(0), jnp.zeros(w_DW.shape, jnp.float32))
    (nll, dw_DW), dh = lax.scan(add, start, _chunks(h_ND, targets_N, weights_N, chunk))
    dh_ND = dh.reshape(-1, h_ND.shape[1])[: h_ND.shape[0]]
    return nll, (dh_ND, dw_DW.astype(w_DW.dtype), weights_N)


def _bwd(_chunk: int, _mesh: Mesh, kept: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None, Array]:
    dh_ND, dw_DW, weights_N = kept
    return (dh_ND * g).astype(dh_ND.dtype), (dw_DW * g).astype(dw_DW.dtype), None, jnp.zeros_like(weights_N)


cross_entropy.defvjp(_fwd, _bwd)
