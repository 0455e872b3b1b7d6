"""Latent attention for training and prefill: checks the arguments and runs the kernels."""

from typing import Any

from jax import Array

from pallas_kernels import chips
from pallas_kernels.latent_attention import flash
from pallas_kernels.latent_attention.inputs import Keys, Queries, Segments


def latent_attention(
    queries: Queries,
    keys: Keys,
    v_BJSV: Array,
    segments: Segments,
    *,
    scale: float,
    offset: int | Array = 0,
) -> Array:
    """Causal softmax(scale (q_nope k_nope + q_rope k_rope)) v within segments, [B, H, T, V] (eq. 9 to 19).

    queries: (q_nope [B, H, T, N], q_rope [B, H, T, R]). keys: (k_nope [B, J, S, N], k_rope [B, S, R]); all heads share
    the rope key. Both rope parts are None for MHA, GQA and MQA. J divides H: each KV head serves H / J heads. All
    arrays have one dtype, bfloat16 or float32, and so has the result; sums and the softmax are in float32.

    segments: (of the queries [B, T], of the keys [B, S]), int32, 0 is padding. The query at t is at slot offset + t,
    with offset >= 0. It sees slot s if s <= offset + t and the segments are equal. A query that sees no slot gives
    finite values without meaning. Padding may have any values, even NaN, without effect on real tokens.

    Differentiable in queries, keys and values. The backward pass keeps the result and the logarithm of the softmax's
    sum, both under the checkpoint name "attention". Raises ValueError for shapes or dtypes that do not fit, and on a
    device other than the TPUs in `chips.CHIPS`.
    """
    _check(queries, keys, v_BJSV, segments)
    chips.require()
    return flash.attention(queries, keys, v_BJSV, segments, scale=scale, offset=offset)


def _check(queries: Queries, keys: Keys, v: Array, segments: Segments) -> None:
    (q_nope, q_rope), (k_nope, k_rope), (segments_BT, segments_BS) = queries, keys, segments
    (b, h, t, n), (_, j, s, _) = q_nope.shape, k_nope.shape
    expected = {"k_nope": (b, j, s, n), "v": (b, j, s, v.shape[-1]), "segments_BT": (b, t), "segments_BS": (b, s)}
    given: dict[str, Any] = {"k_nope": k_nope, "v": v, "segments_BT": segments_BT, "segments_BS": segments_BS}
    if (q_rope is None) != (k_rope is None):
        raise ValueError("only one of q_rope and k_rope is given: give both or neither")
    if q_rope is not None:
        r = q_rope.shape[-1]
        expected |= {"q_rope": (b, h, t, r), "k_rope": (b, s, r)}
        given |= {"q_rope": q_rope, "k_rope": k_rope}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}; q_nope {q_nope.shape} needs {shape}")
        dtype = "int32" if name.startswith("segments") else q_nope.dtype
        if given[name].dtype != dtype:
            raise ValueError(f"{name} is {given[name].dtype}; it must be {dtype}")
    if h % j:
        raise ValueError(f"{h} heads are not a multiple of {j} KV heads")
    if q_nope.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"attention in {q_nope.dtype}; bfloat16 and float32 are supported")
