"""Latent attention, the op: checks what it is given and runs the implementation that is named."""

from typing import Literal

from jax import Array

from pallas_kernels import chips
from pallas_kernels.latent_attention import flash, reference


def latent_attention(
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
    implementation: Literal["pallas", "xla"],
) -> Array:
    """softmax(scale (q_nope k_nope + q_rope k_rope)) v over the keys a query sees (section 2.1): [B, H, T, V].

    q_rope, k_rope: the rotated parts of MLA, the key's one for all heads; both None for MHA, GQA and MQA, whose heads
    are all "nope". J divides H: each KV head serves H / J heads. bfloat16 or float32, one dtype for all; sums and
    softmax are in float32, the result in the dtype of the queries. segments: int32, 0 is padding.
    The query at t sits at slot offset + t, offset >= 0, and sees slot s iff s <= offset + t and their segments are
    equal. One that sees nothing gives finite values without meaning; what padding holds, even NaN, meets no real token.
    Differentiable in queries, keys and values; keeps the result and the softmax's logarithm, named "attention".
    Raises ValueError for shapes, dtypes or an implementation that cannot be.
    """
    _check(q_nope_BHTN, q_rope_BHTR, k_nope_BJSN, k_rope_BSR, v_BJSV, segments_BT, segments_BS)
    arrays = (q_nope_BHTN, q_rope_BHTR, k_nope_BJSN, k_rope_BSR, v_BJSV)
    rest = {"scale": scale, "segments_BT": segments_BT, "segments_BS": segments_BS, "offset": offset}
    match implementation:
        case "xla":
            return reference.attention(*arrays, **rest)
        case "pallas":
            chips.needed()
            return flash.attention(*arrays, **rest)
        case _:
            raise ValueError(f'no implementation {implementation!r}: there are "pallas" and "xla"')


def _check(q_nope, q_rope, k_nope, k_rope, v, segments_BT, segments_BS) -> None:
    (b, h, t, n), (_, j, s, _) = q_nope.shape, k_nope.shape
    expected = {"k_nope": (b, j, s, n), "v": (b, j, s, v.shape[-1]), "segments_BT": (b, t), "segments_BS": (b, s)}
    given = {"k_nope": k_nope, "v": v, "segments_BT": segments_BT, "segments_BS": segments_BS}
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope and k_rope come together or not at all")
    if q_rope is not None:
        r = q_rope.shape[-1]
        expected |= {"q_rope": (b, h, t, r), "k_rope": (b, s, r)}
        given |= {"q_rope": q_rope, "k_rope": k_rope}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} is {given[name].shape}, not {shape} as q_nope {q_nope.shape} asks")
        dtype = "int32" if name.startswith("segments") else q_nope.dtype
        if given[name].dtype != dtype:
            raise ValueError(f"{name} is {given[name].dtype}, not {dtype}")
    if h % j:
        raise ValueError(f"{h} heads are no multiple of {j} KV heads")
    if q_nope.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"attention in {q_nope.dtype}: bfloat16 or float32 it is")
