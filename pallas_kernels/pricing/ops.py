"""The ops whose cost is estimated and tuned: the shapes, the useful work and the call of each."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.chips import CHIPS
from pallas_kernels.expert_dispatch import combine, kernels
from pallas_kernels.expert_dispatch.tiles import Tiles
from pallas_kernels.latent_attention import CachePages, Sequences, decode_kernel, decode_tuning, flash, packing
from pallas_kernels.latent_attention.decode_jobs import DecodeBlocks
from pallas_kernels.pricing import shapes
from pallas_kernels.quantized import Quantized

_BF16 = 2  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """An op: `build(shape, chip, blocks)` gives a function and its arguments, for `cost.cost`."""

    shapes: Mapping[str, Any]
    build: Callable[[Any, str, Any], tuple[Callable, tuple]]
    flops: Callable[[Any], float]  # useful FLOPs, of all cores
    bytes: Callable[[Any], float]  # bytes that have to move between HBM and the chip, each counted once
    key: Callable[[Any], Any]  # the shape's key in the table of tuned blocks
    blocks: Callable[[str, Any], Any]  # tuned blocks of a chip and a shape
    candidates: Callable[[Any], Iterable[Any]]  # blocks to try, small ones first


def _latent_decode(shape: shapes.LatentDecode, chip: str, blocks: Any, dtype: Any) -> tuple[Callable, tuple]:
    """One token of each sequence, over a cache in `dtype`."""
    n, pages = shape.sequences, -(-shape.length // shape.page)
    packed = packing.is_packed(dtype)

    def run(q_c: jax.Array, q_r: jax.Array, *args: jax.Array) -> jax.Array:
        pages, sequences = CachePages(args[0], args[1], args[5] if packed else None), Sequences(*args[2:5])
        cores = CHIPS[chip].cores
        return decode_kernel.decode((q_c, q_r), pages, sequences, scale=1.0, blocks=blocks, cores=cores)

    args = (
        _bf16(n, shape.heads, shape.latent),
        _bf16(n, shape.heads, shape.rope),
        jax.ShapeDtypeStruct((n * pages, shape.page, packing.width(shape.latent, dtype)), dtype),
        jax.ShapeDtypeStruct((n * pages, packing.width(shape.rope, dtype), shape.page), dtype),
        np.random.default_rng(0).permutation(n * pages).astype(np.int32).reshape(n, pages),
        np.full(n, shape.length, np.int32),
        np.arange(n + 1, dtype=np.int32),
    )
    return run, (*args, jax.ShapeDtypeStruct((n * pages, 1, shape.page), jnp.uint32)) if packed else args


def _latent_decode_bytes(shape: shapes.LatentDecode, dtype: Any) -> float:
    scales = 4 if packing.is_packed(dtype) else 0
    cache = shape.length * ((shape.latent + shape.rope) * packing.bits(dtype) / 8 + scales)
    queries_and_results = _BF16 * shape.heads * (2 * shape.latent + shape.rope)
    return shape.sequences * (cache + queries_and_results)


def _latent_decode_candidates(shape: shapes.LatentDecode) -> Iterable[Any]:
    chunks = {min(shape.length, slots) // shape.page for slots in (1024, 2048, 4096)}
    for pages, streams in itertools.product(sorted(chunks), (1, 2)):
        yield DecodeBlocks(pages=pages, streams=streams, tokens=max(2, min(16, 512 // shape.heads)))


def _bf16(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def _latent_flash(shape: shapes.LatentAttention, chip: str, backward: bool) -> tuple[Callable, tuple]:
    """One sequence of one document: the forward pass, or forward and backward as in training."""
    h, j, t = shape.heads, shape.kv_heads, shape.tokens
    how = flash.tuning(t, t, j, shape.rope > 0, jnp.dtype(jnp.bfloat16), chip)
    queries = [_bf16(1, h, t, shape.nope), _bf16(1, h, t, shape.rope) if shape.rope else None]
    keys = [_bf16(1, j, t, shape.nope), _bf16(1, t, shape.rope) if shape.rope else None, _bf16(1, j, t, shape.value)]
    segments = np.ones((1, t), np.int32)

    def attend(*arrays: Any) -> jax.Array:
        return flash.attention(arrays[:2], arrays[2:4], arrays[4], arrays[5:7], scale=0.1, how=how)  # pyright: ignore

    def gradients(*arrays: Any) -> Any:
        o, pull = jax.vjp(lambda *xs: attend(*xs, *arrays[5:7]), *arrays[:5])
        return o, pull(arrays[7])

    args = (*queries, *keys, segments, segments)
    return (gradients, (*args, _bf16(1, h, t, shape.value))) if backward else (attend, args)


def _latent_products(shape: shapes.LatentAttention, keys: int, values: int) -> float:
    """FLOPs of `keys` products over the keys' width and `values` over the values', for causal scores."""
    width = keys * (shape.nope + shape.rope) + values * shape.value
    return 2 * shape.heads * shape.tokens**2 / 2 * width


def _latent_bytes(shape: shapes.LatentAttention, backward: bool) -> float:
    queries, key, value = shape.nope + shape.rope, shape.nope, shape.value
    operands = shape.heads * (queries + value) + shape.kv_heads * (key + value) + shape.rope
    return _BF16 * shape.tokens * operands * (3 if backward else 1)  # backward reads them again and writes gradients


def _sizes(shape: shapes.ExpertDispatch) -> np.ndarray:
    """Group sizes of a balanced router."""
    return np.random.default_rng(0).multinomial(shape.rows, np.full(shape.experts, 1 / shape.experts)).astype(np.int32)


def _experts(
    call: Callable[..., Any], rows: str, weights: int, transposed: bool = False, stored: Any = jnp.bfloat16
) -> Callable:
    """`build` of a grouped kernel: call(rows, weights, sizes, tiles).

    rows: a letter for each operand, D or F for its width, G for gates. stored: the weights' dtype; weights in 8 bits
    are quantized.
    """

    def build(s: shapes.ExpertDispatch, _: str, tiles: Any) -> tuple[Callable, tuple]:
        widths = {"D": (s.hidden,), "F": (s.width,), "G": ()}
        dims = (s.experts, s.width, s.hidden) if transposed else (s.experts, s.hidden, s.width)

        def run(*args: Any) -> Any:
            return call(args[: len(rows)], args[len(rows) : -1], args[-1], tiles)

        operands = [jax.ShapeDtypeStruct((s.rows, *widths[x]), jnp.float32 if x == "G" else jnp.bfloat16) for x in rows]
        weight: Any = jax.ShapeDtypeStruct(dims, stored)
        if jnp.dtype(stored).itemsize == 1:
            weight = Quantized(weight, jax.ShapeDtypeStruct((s.experts, 1, dims[2]), jnp.float32))  # pyright: ignore
        return run, (*operands, *[weight] * weights, _sizes(s))

    return build


def _combine(s: shapes.ExpertDispatch, _: str, __: Any) -> tuple[Callable, tuple]:
    """The sum of each token's rows, in token order, with uneven groups."""
    runs = -(-s.tokens // combine.RUN)
    sizes = np.random.default_rng(0).multinomial(s.rows, np.full(runs, 1 / runs)).astype(np.int32)
    return combine.add_up, (_bf16(s.rows, combine.RUN), _bf16(s.rows, s.hidden), sizes)


def _expert_op(
    build: Callable,
    products: int,
    hidden: int,
    width: int,
    stored: Any = jnp.bfloat16,
    sizes: Mapping[str, shapes.ExpertDispatch] = shapes.EXPERT_DISPATCH,
) -> Op:
    """An op of `products` grouped products, which moves that many weights.

    hidden, width: how many arrays of rows of these widths it moves. Scales do not count: they are below 1/200 of their
    weights.
    """
    weight = products * jnp.dtype(stored).itemsize
    return Op(
        shapes=sizes,
        build=build,
        flops=lambda s: 2 * products * s.rows * s.hidden * s.width,
        bytes=lambda s: (
            _BF16 * s.rows * (hidden * s.hidden + width * s.width) + weight * s.experts * s.hidden * s.width
        ),
        key=lambda s: (s.experts, s.hidden, s.width),
        blocks=lambda *_: None,  # the kernels compute their own
        candidates=_expert_candidates,
    )


def _expert_candidates(_: shapes.ExpertDispatch) -> Iterable[Any]:
    for rows, step, chunk, blocks in itertools.product((256, 512, 1024), (64, 128, 256), (128, 256, 512), (1, 2)):
        if step <= rows:
            yield Tiles(rows=rows, step=step, chunk=chunk, blocks=blocks)


def _generation_ops() -> dict[str, Op]:
    """The two kernels of a forward pass, for decode steps too, there also with weights in 8 bits."""
    found = {}
    for suffix, stored in {"": jnp.bfloat16, "_int8": jnp.int8, "_float8": jnp.float8_e4m3fn}.items():
        gate_up = _experts(
            lambda x, w, n, tiles: kernels.gate_up(x[0], w[0], w[1], x[1], n, tiles=tiles), "DG", 2, stored=stored
        )
        down = _experts(
            lambda x, w, n, tiles: kernels.gmm(x[0], w[0], n, tiles=tiles), "F", 1, transposed=True, stored=stored
        )
        sizes = shapes.EXPERT_DECODE if suffix else shapes.EXPERT_DISPATCH | shapes.EXPERT_DECODE
        for name, build, products in (("expert_gate_up", gate_up, 2), ("expert_down", down, 1)):
            found[name + suffix] = _expert_op(build, products, hidden=1, width=1, stored=stored, sizes=sizes)
    return found


_EXPERT_OPS = {
    "expert_up": _expert_op(
        _experts(lambda x, w, n, tiles: kernels.gmm(x[0], w[0], n, tiles=tiles), "D", 1), products=1, hidden=1, width=1
    ),
    "expert_up_input_gradient": _expert_op(
        _experts(lambda g, w, n, tiles: kernels.gmm(g[0], w[0], n, True, tiles=tiles), "F", 1),
        products=1,
        hidden=1,
        width=1,
    ),
    "expert_up_weight_gradient": _expert_op(
        _experts(lambda x, _, n, tiles: kernels.tgmm(x[0], x[1], n, tiles=tiles), "DF", 0),
        products=1,
        hidden=1,
        width=1,
    ),
    **_generation_ops(),
    "expert_hidden_gradient": _expert_op(
        _experts(
            lambda x, w, n, tiles: kernels.hidden_gradient(x[0], w[0], x[1], x[2], x[3], n, tiles=tiles),
            "DFFG",
            1,
            transposed=True,
        ),
        products=1,
        hidden=1,
        width=5,
    ),
    "expert_gate_up_input_gradient": _expert_op(
        _experts(lambda g, w, n, tiles: kernels.gmm_sum(g, w, n, True, tiles=tiles), "FF", 2),
        products=2,
        hidden=1,
        width=2,
    ),
    "expert_gate_up_weight_gradient": _expert_op(
        _experts(lambda x, _, n, tiles: kernels.tgmm_each(x[0], x[1:], n, tiles=tiles), "DFF", 0),
        products=2,
        hidden=1,
        width=2,
    ),
}

_EXPERT_OPS["expert_combine"] = Op(
    shapes=shapes.EXPERT_DISPATCH,
    build=_combine,
    flops=lambda s: 2 * s.rows * combine.RUN * s.hidden,  # nearly all with zeros; HBM is the bound
    bytes=lambda s: _BF16 * (s.rows * (combine.RUN + s.hidden) + s.tokens * s.hidden),
    key=lambda s: (s.tokens, s.hidden),
    blocks=lambda *_: None,
    candidates=lambda _: (),
)


def _flash_op(backward: bool) -> Op:
    return Op(
        shapes=shapes.LATENT_ATTENTION,
        build=lambda s, chip, _: _latent_flash(s, chip, backward),
        flops=lambda s: _latent_products(s, 1, 1) + (_latent_products(s, 3, 2) if backward else 0),
        bytes=lambda s: _latent_bytes(s, backward),
        key=lambda s: (s.heads, s.kv_heads, s.tokens),
        blocks=lambda *_: None,  # flash.tuning's
        candidates=lambda _: (),
    )


def _decode_op(dtype: Any) -> Op:
    bits = packing.bits(dtype)
    return Op(
        shapes=shapes.LATENT_DECODE,
        build=lambda s, chip, blocks: _latent_decode(s, chip, blocks, dtype),
        flops=lambda s: 2 * s.sequences * s.heads * s.length * (2 * s.latent + s.rope),
        bytes=lambda s: _latent_decode_bytes(s, dtype),
        key=lambda s: (s.heads, s.page, bits),
        blocks=lambda chip, s: decode_tuning.blocks(chip, s.heads, s.page, bits),
        candidates=_latent_decode_candidates,
    )


OPS: dict[str, Op] = {
    "latent_forward": _flash_op(backward=False),
    "latent_forward_backward": _flash_op(backward=True),
    "latent_decode": _decode_op(jnp.bfloat16),
    "latent_decode_int8": _decode_op(jnp.int8),
    "latent_decode_int6": _decode_op(jnp.uint8),
    **_EXPERT_OPS,
}
