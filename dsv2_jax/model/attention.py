"""Multi-head latent attention in its two forms (section 2.1, App. C), and grouped-query attention (App. D.1).

Expanded (training, evaluation): keys and values of every head are computed from the latent, then plain attention.
Absorbed (generation): W^UK is multiplied into the query and W^UV is applied after the weighted sum. All heads then
share one 576-wide key, which is the cache's row, and no key or value of a head is computed. Both forms are the same
function.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dsv2_jax.config import Model
from dsv2_jax.model import rope
from dsv2_jax.model.layers import rms_norm
from dsv2_jax.ops import attention as ops
from dsv2_jax.ops import rotary, switch
from dsv2_jax.ops.attention import PackedTokens, PagedTokens
from dsv2_jax.ops.matmul import dequantize, project
from dsv2_jax.ops.pages import LayerPages
from dsv2_jax.ops.switch import Execution
from dsv2_jax.parallel import collectives, context
from dsv2_jax.parallel.mesh import TENSOR
from pallas_kernels.common import MASKED

LATENT_EPSILON = 1e-6  # epsilon of the norms after both compressions; the released models ignore rms_norm_eps here
_BY_HEAD = {"w_uk_CHN": ("w_uk_HCN", (1, 0, 2)), "w_uv_CHV": ("w_uv_HVC", (1, 2, 0))}

Params = dict[str, Any]  # arrays, or `Quantized` in generation
Tokens = PackedTokens | PagedTokens


def attention(
    p: Params, x_BTD: Array, tokens: Tokens, layer: LayerPages | None, model: Model, run: Execution
) -> tuple[Array, LayerPages | None]:
    """Attention of the config's kind: (the result [B, T, D], the layer's cache with these tokens written, or None)."""
    of_kind = latent_attention if model.attention.kind == "mla" else grouped_query_attention
    o_BTHV, layer = of_kind(p, x_BTD, tokens, layer, model, run)
    with jax.named_scope("output"):
        u_BTD = project(o_BTHV, p["w_o_HVD"], axes=2)  # eq. 19
        return collectives.add(u_BTD, TENSOR, run.mesh), layer


def latent_attention(
    p: Params, h_BTD: Array, tokens: Tokens, layer: LayerPages | None, model: Model, run: Execution
) -> tuple[Array, LayerPages | None]:
    """MLA before W^O, [B, T, H, V]: absorbed over the pages of a cache, expanded without one (eq. 9 to 18)."""
    if "w_dq_DQ" in p:
        with jax.named_scope("q_compress"):
            c_q_BTQ = rms_norm(project(h_BTD, p["w_dq_DQ"]), p["norm_q_Q"], LATENT_EPSILON)  # eq. 12
        w_uq, w_qr = p["w_uq_QHN"], p["w_qr_QHR"]
    else:  # V2-Lite does not compress queries (App. B)
        c_q_BTQ, w_uq, w_qr = h_BTD, p["w_uq_DHN"], p["w_qr_DHR"]
    with jax.named_scope("q_project"):
        q_nope_BTHN = project(c_q_BTQ, w_uq)  # eq. 13
    with jax.named_scope("rope"):
        q_rope_BTHR = rotary.project_and_rotate(c_q_BTQ, w_qr, tokens.phases_BTR)  # eq. 14
    with jax.named_scope("kv_compress"):
        latent_BTC = rms_norm(project(h_BTD, p["w_dkv_DC"]), p["norm_kv_C"], LATENT_EPSILON)  # eq. 9
    with jax.named_scope("rope"):
        k_rope_BTR = rotary.rotate(project(h_BTD, p["w_kr_DR"]), tokens.phases_BTR)  # eq. 15

    q = q_nope_BTHN, q_rope_BTHR
    with jax.named_scope("attend"):
        if isinstance(tokens, PagedTokens):
            assert layer is not None
            return absorbed_over_pages(p, q, latent_BTC, k_rope_BTR, tokens, layer, model, run)
        latent_BSC, k_rope_BSR = context.gather(latent_BTC, run.mesh), context.gather(k_rope_BTR, run.mesh)
        return expanded(p, q, latent_BSC, k_rope_BSR, tokens, model, run), None


def expanded(
    p: Params,
    q: tuple[Array, Array],
    latent_BSC: Array,
    k_rope_BSR: Array,
    tokens: PackedTokens,
    model: Model,
    run: Execution,
) -> Array:
    """o_i = softmax(q_i k_i / sqrt(d_h + d_h^R)) v_i over q_i = [q^C_i ; q^R_i] and k_i = [k^C_i ; k^R] (eq. 16 to 18).

    q: [B, T, H, N] and [B, T, H, R]. Returns [B, T, H, V].
    """
    k_nope_BSHN = project(latent_BSC, p["w_uk_CHN"])  # eq. 10
    v_BSHV = project(latent_BSC, p["w_uv_CHV"])  # eq. 11
    return ops.full(q, (k_nope_BSHN, k_rope_BSR), v_BSHV, tokens, scale=rope.softmax_scale(model), run=run)


def absorbed(
    p: Params, q: tuple[Array, Array], latent_BSC: Array, k_rope_BSR: Array, tokens: PackedTokens, model: Model
) -> Array:
    """`expanded` in the absorbed form: multi-query attention on latents, without blocks or pages (App. C)."""
    q_nope_BTHN, q_rope_BTHR = q
    q_BTHC = jnp.einsum("bthn,chn->bthc", q_nope_BTHN, p["w_uk_CHN"])
    scores_BHTS = jnp.einsum("bthc,bsc->bhts", q_BTHC, latent_BSC)
    scores_BHTS += jnp.einsum("bthr,bsr->bhts", q_rope_BTHR, k_rope_BSR)
    causal_TS = jnp.tri(q_BTHC.shape[1], latent_BSC.shape[1], dtype=bool)
    sees_BTS = causal_TS & (tokens.segments_BT[:, :, None] == tokens.segments_BS[:, None])
    scores_BHTS = jnp.where(sees_BTS[:, None], scores_BHTS * rope.softmax_scale(model), MASKED)
    o_BTHC = jnp.einsum("bhts,bsc->bthc", jax.nn.softmax(scores_BHTS, axis=-1), latent_BSC)
    return jnp.einsum("bthc,chv->bthv", o_BTHC, p["w_uv_CHV"])


def absorbed_over_pages(
    p: Params,
    q: tuple[Array, Array],
    latent_BTC: Array,
    k_rope_BTR: Array,
    tokens: PagedTokens,
    layer: LayerPages,
    model: Model,
    run: Execution,
) -> tuple[Array, LayerPages]:
    """`absorbed` over a paged cache, [1, T, H, V], and the layer's cache with these tokens written (App. C).

    p holds W^UK and W^UV as `by_head` arranges them.
    """
    dtype = q[0].dtype
    wide = {"preferred_element_type": jnp.float32}
    q_THC = jnp.einsum("thn,hcn->thc", q[0][0], dequantize(p["w_uk_HCN"], dtype), **wide).astype(dtype)
    how = {"scale": rope.softmax_scale(model), "implementation": switch.of_pages(model, run.implementation)}
    o_BTHC, layer = ops.paged_latent((q_THC[None], q[1]), latent_BTC, k_rope_BTR, tokens, layer, **how)
    o_THV = jnp.einsum("thc,hvc->thv", o_BTHC[0], dequantize(p["w_uv_HVC"], dtype), **wide).astype(dtype)
    return o_THV[None], layer


def by_head(unstacked: Any) -> Any:
    """A tree of `transformer.unstack` with heads as the first dimension of W^UK and W^UV: no step transposes them."""

    def leaf(name: str, w: Any) -> tuple[str, Any]:
        if name not in _BY_HEAD:
            return name, w
        new, order = _BY_HEAD[name]
        return new, jax.tree.map(lambda x: x.transpose(order), w)

    return {part: dict(leaf(*named) for named in p.items()) for part, p in unstacked.items()}


def grouped_query_attention(
    p: Params, h_BTD: Array, tokens: Tokens, layer: LayerPages | None, model: Model, run: Execution
) -> tuple[Array, LayerPages | None]:
    """GQA before W^O, [B, T, H, V]. With a KV head for each head it is MHA, with a single KV head MQA (App. D.1)."""
    with jax.named_scope("q_project"):
        q_BTHR = rotary.project_and_rotate(h_BTD, p["w_q_DHR"], tokens.phases_BTR)
    with jax.named_scope("kv_project"):
        k_BTJR = rotary.project_and_rotate(h_BTD, p["w_k_DJR"], tokens.phases_BTR)
        v_BTJV = project(h_BTD, p["w_v_DJV"])
    scale = rope.softmax_scale(model)
    with jax.named_scope("attend"):
        if isinstance(tokens, PagedTokens):
            assert layer is not None
            return ops.paged_grouped(q_BTHR, k_BTJR, v_BTJV, tokens, layer, scale=scale)
        k_BSJR, v_BSJV = context.gather(k_BTJR, run.mesh), context.gather(v_BTJV, run.mesh)
        return ops.full((q_BTHR, None), (k_BSJR, None), v_BSJV, tokens, scale=scale, run=run), None
