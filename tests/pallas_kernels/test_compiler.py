"""The scalar operands of a kernel that follow from the values of some arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import compiler, cost

X = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def _kernel(numbers: jax.Array, x: jax.Array, name: str | None = None) -> jax.Array:
    """x times the prefetched number of its block."""

    def kernel(numbers, x, o):
        o[...] = x[...] * numbers[pl.program_id(0)]

    block = pl.BlockSpec((8, 128), lambda i, _: (0, i))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(x.shape[1] // 128,), in_specs=[block], out_specs=block
    )
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name=name)(
        numbers, x
    )


def _known(fn, *args) -> list[tuple[str, dict[int, list[int]]]]:
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    jaxpr = jax.make_jaxpr(fn)(*shapes)
    calls = compiler._calls(jaxpr.jaxpr, jaxpr.consts, args)
    return [(name, {n: x.tolist() for n, x in operands.items()}) for name, operands in calls]


def test_known_operands() -> None:
    """What follows from values alone is known, through jit, loops and custom gradients; the rest is not."""

    @jax.custom_vjp
    def op(sizes, x):
        ends = jax.lax.fori_loop(0, 2, lambda i, ends: ends.at[i].add(i), jnp.cumsum(sizes))
        return _kernel(ends, x, "scaled")

    op.defvjp(lambda sizes, x: (op(sizes, x), None), lambda _, g: (None, g))
    sizes = np.array([3, 4], np.int32)
    assert _known(jax.jit(op), sizes, X) == [("scaled", {0: [3, 8]})]
    assert _known(jax.jit(op), jax.ShapeDtypeStruct((2,), jnp.int32), X) == [("scaled", {})]
    assert _known(lambda x: _kernel(jnp.int32(x[0, :1]), x), X) == [("", {})]


@pytest.mark.tpu
def test_each_call_has_its_own_operands() -> None:
    """Each call of a kernel gets its own values, whether it has a name or not."""

    def fn(a, b, x):
        x = _kernel(a, _kernel(b, x, "scaled"), "scaled")
        return _kernel(b, x)

    numbers = [np.array([n], np.int32) for n in (5, 6)]
    (one, two, three) = compiler.compile_kernels(fn, (*numbers, X), cost.CHIPS["v5e"])
    assert [kernel.operands[0].tolist() for kernel in (one, two, three)] == [[6], [5], [6]]
