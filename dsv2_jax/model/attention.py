"""Multi-head latent attention in its two forms (section 2.1, App. C), and grouped-query attention beside it.

Expanded (training, evaluation): keys and values of every head are computed from the latent, then plain attention.
Absorbed (generation): W^UK is multiplied into the query and W^UV is applied after the sum, so all heads share one
576-wide key, the cache's own rows, and no key or value is ever computed. Both are the same function. `absorbed` is
the second form in its readable shape; generation runs it over pages, in `paged.latent`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import SINGLE, Mesh, Model
from dsv2_jax.model import paged, rope
from dsv2_jax.model.blockwise import attention as blockwise_attention
from dsv2_jax.model.layers import Kernels, rms_norm
from dsv2_jax.model.matmul import project
from dsv2_jax.parallel import collectives, context
from pallas_kernels.latent_attention import latent_attention as kernel_attention

LATENT_EPSILON = 1e-6  # of the norms behind both compressions: fixed in the released models, whatever rms_norm_eps is
_MASKED = -1e30

Params = dict[str, Array]


class Where(NamedTuple):
    """Where the tokens of a call stand.

    phases_BTR: RoPE's cos and sin. segments_BT, segments_BS int32: a query attends the keys of its own segment.
    """

    phases_BTR: tuple[Array, Array]
    segments_BT: Array
    segments_BS: Array


def attend(
    p: Params,
    x_BTD: Array,
    where: Where | paged.Where,
    cache: paged.Layer | None,
    model: Model,
    mesh: Mesh = SINGLE,
    kernels: Kernels = "xla",
) -> tuple[Array, paged.Layer | None]:
    """Attention of the config's kind: (result [B, T, D], the layer's cache with these tokens written, or None)."""
    form = latent_attention if model.attention.kind == "mla" else grouped_query_attention
    o_BTHV, cache = form(p, x_BTD, where, cache, model, mesh, kernels)
    return collectives.add(project(o_BTHV, p["w_o_HVD"], axes=2), ("tensor",), mesh), cache


def latent_attention(
    p: Params,
    x_BTD: Array,
    where: Where | paged.Where,
    cache: paged.Layer | None,
    model: Model,
    mesh: Mesh = SINGLE,
    kernels: Kernels = "xla",
) -> tuple[Array, paged.Layer | None]:
    """MLA before W^O, [B, T, H, V]: absorbed over the pages of a cache, expanded without one."""
    if "w_dq_DQ" in p:
        c_q_BTQ = rms_norm(project(x_BTD, p["w_dq_DQ"]), p["norm_q_Q"], LATENT_EPSILON)
        q_nope_BTHN = project(c_q_BTQ, p["w_uq_QHN"])
        q_rope_BTHR = rope.rotated(c_q_BTQ, p["w_qr_QHR"], where.phases_BTR)
    else:
        q_nope_BTHN = project(x_BTD, p["w_uq_DHN"])
        q_rope_BTHR = rope.rotated(x_BTD, p["w_qr_DHR"], where.phases_BTR)
    latent_BSC = rms_norm(project(x_BTD, p["w_dkv_DC"]), p["norm_kv_C"], LATENT_EPSILON)
    k_rope_BSR = rope.rotate(project(x_BTD, p["w_kr_DR"]), where.phases_BTR)

    if isinstance(where, paged.Where):
        assert cache is not None
        return paged.latent(p, q_nope_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, where, cache, model)
    latent_BSC, k_rope_BSR = context.whole(latent_BSC, mesh), context.whole(k_rope_BSR, mesh)
    return expanded(p, q_nope_BTHN, q_rope_BTHR, latent_BSC, k_rope_BSR, where, model, mesh, kernels), None


def expanded(
    p: Params,
    q_nope_BTHN: Array,
    q_rope_BTHR: Array,
    latent_BSC: Array,
    k_rope_BSR: Array,
    where: Where,
    model: Model,
    mesh: Mesh,
    kernels: Kernels,
) -> Array:
    """o_i = softmax(q_i k_i / sqrt(d_h + d_h^R)) v_i with k_i = [W^UK_i c ; k^R] and v_i = W^UV_i c (eq. 9 to 19)."""
    k_nope_BSHN, v_BSHV = project(latent_BSC, p["w_uk_CHN"]), project(latent_BSC, p["w_uv_CHV"])
    if kernels == "pallas":
        queries = q_nope_BTHN, q_rope_BTHR
        return _causal(_flash(k_nope_BSHN, k_rope_BSR, v_BSHV, where, model), queries, where, mesh)
    k_rope_BSHR = jnp.broadcast_to(k_rope_BSR[:, :, None], (*k_nope_BSHN.shape[:3], k_rope_BSR.shape[-1]))
    q_BTHK = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
    k_BSHK = jnp.concatenate([k_nope_BSHN, k_rope_BSHR], axis=-1)
    return _causal(_blockwise(k_BSHK, v_BSHV, where, model), (q_BTHK,), where, mesh)


def absorbed(
    p: Params, q_nope_BTHN: Array, q_rope_BTHR: Array, latent_BSC: Array, k_rope_BSR: Array, where: Where, model: Model
) -> Array:
    """The same function with W^UK in the query and W^UV after the sum: multi-query attention on latents (App. C)."""
    q_BTHC = jnp.einsum("bthn,chn->bthc", q_nope_BTHN, p["w_uk_CHN"])
    scores_BHTS = jnp.einsum("bthc,bsc->bhts", q_BTHC, latent_BSC) + jnp.einsum(
        "bthr,bsr->bhts", q_rope_BTHR, k_rope_BSR
    )
    causal_TS = jnp.tri(q_BTHC.shape[1], latent_BSC.shape[1], dtype=bool)
    sees_BTS = causal_TS & (where.segments_BT[:, :, None] == where.segments_BS[:, None])
    scores_BHTS = jnp.where(sees_BTS[:, None], scores_BHTS * rope.softmax_scale(model), _MASKED)
    o_BTHC = jnp.einsum("bhts,bsc->bthc", jax.nn.softmax(scores_BHTS, axis=-1), latent_BSC)
    return jnp.einsum("bthc,chv->bthv", o_BTHC, p["w_uv_CHV"])


def grouped_query_attention(
    p: Params,
    x_BTD: Array,
    where: Where | paged.Where,
    cache: paged.Layer | None,
    model: Model,
    mesh: Mesh = SINGLE,
    kernels: Kernels = "xla",
) -> tuple[Array, paged.Layer | None]:
    """GQA before W^O, [B, T, H, V]; MHA with as many KV heads as heads, MQA with one (App. D.1)."""
    q_BTHR = rope.rotated(x_BTD, p["w_q_DHR"], where.phases_BTR)
    k_BSJR, v_BSJV = rope.rotated(x_BTD, p["w_k_DJR"], where.phases_BTR), project(x_BTD, p["w_v_DJV"])
    if isinstance(where, paged.Where):
        assert cache is not None
        return paged.grouped_queries(q_BTHR, k_BSJR, v_BSJV, where, cache, model)
    k_BSJR, v_BSJV = context.whole(k_BSJR, mesh), context.whole(v_BSJV, mesh)
    if kernels == "pallas":
        return _causal(_flash(k_BSJR, None, v_BSJV, where, model), (q_BTHR, None), where, mesh), None
    return _causal(_blockwise(k_BSJR, v_BSJV, where, model), (q_BTHR,), where, mesh), None


# (this device's queries, or a run of them, [B, T, H, *] in the parts that a form takes, their segments, the slot of the
# first) -> [B, T, H, V]
Attention = Callable[[tuple[Array | None, ...], Array, Array | int], Array]


def _causal(attention: Attention, queries: tuple[Array | None, ...], where: Where, mesh: Mesh) -> Array:
    """Attention of this device's queries: with context parallelism they are two chunks, far from each other."""
    if mesh.context == 1:
        return attention(queries, where.segments_BT, 0)
    halves = zip(*(jnp.split(q, 2, axis=1) if q is not None else (None, None) for q in queries), strict=True)
    segments, length = jnp.split(where.segments_BT, 2, axis=1), where.segments_BT.shape[1] // 2
    parts = zip(halves, segments, context.places(mesh), strict=True)
    return jnp.concatenate([attention(q, segments_BT, at * length) for q, segments_BT, at in parts], axis=1)


def _blockwise(k_BSJK: Array, v_BSJV: Array, where: Where, model: Model) -> Attention:
    scale = rope.softmax_scale(model)

    def run(queries: tuple[Array | None, ...], segments_BT: Array, offset: Array | int) -> Array:
        (q_BTHK,) = queries
        assert q_BTHK is not None
        segments = {"segments_BT": segments_BT, "segments_BS": where.segments_BS}
        return blockwise_attention(q_BTHK, k_BSJK, v_BSJV, scale=scale, offset=offset, **segments)

    return run


def _flash(k_BSJN: Array, k_rope_BSR: Array | None, v_BSJV: Array, where: Where, model: Model) -> Attention:
    """By the kernels, which want heads before tokens and the shared rope key once."""
    scale = rope.softmax_scale(model)
    k_BJSN, v_BJSV = k_BSJN.swapaxes(1, 2), v_BSJV.swapaxes(1, 2)

    def run(queries: tuple[Array | None, ...], segments_BT: Array, offset: Array | int) -> Array:
        q_BHTN, q_BHTR = (None if q is None else q.swapaxes(1, 2) for q in queries)
        assert q_BHTN is not None
        keys, segments = (k_BJSN, k_rope_BSR), (segments_BT, where.segments_BS)
        o_BHTV = kernel_attention((q_BHTN, q_BHTR), keys, v_BJSV, segments, scale=scale, offset=offset)
        return o_BHTV.swapaxes(1, 2)

    return run
