"""The cost of kernels whose work is known by hand, and the command line."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, cost

M, N, K = 1024, 2048, 4096
BF16, F32 = 2, 4


def _matmul(a: jax.Array, b: jax.Array, limit: jax.Array, *, m: int, n: int, k: int) -> jax.Array:
    """a @ b in blocks, of which only the first limit[0] row blocks are computed."""

    def kernel(limit, a, b, o, sum_):
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            sum_[...] = jnp.zeros_like(sum_)

        @pl.when(pl.program_id(0) < limit[0])
        def _() -> None:
            sum_[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _() -> None:
            o[...] = sum_[...].astype(o.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(M // m, N // n, K // k),
            in_specs=[
                pl.BlockSpec((m, k), lambda i, _j, s, _: (i, s)),
                pl.BlockSpec((k, n), lambda _i, j, s, _: (s, j)),
            ],
            out_specs=pl.BlockSpec((m, n), lambda i, j, _s, _: (i, j)),
            scratch_shapes=[pltpu.VMEM((m, n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=32 * 2**20
        ),
        name="matmul",
    )(limit, a, b)


def _cost(chip: str, m: int, n: int, k: int, limit: int) -> cost.Cost:
    shapes = (jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((K, N), jnp.bfloat16))
    flops, moved = 2 * M * N * K, BF16 * (M * K + K * N + M * N)
    fn = functools.partial(_matmul, m=m, n=n, k=k)
    return cost.cost(fn, (*shapes, np.array([limit], np.int32)), chip, flops=flops, bytes=moved)


@pytest.mark.tpu
@pytest.mark.parametrize("blocks", [(256, 256, 512), (512, 1024, 1024), (512, 256, 4096)], ids=str)
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_matmul(chip: str, blocks: tuple[int, int, int]) -> None:
    """Trips, copies, matmuls and VMEM of a blocked matmul, computed by hand."""
    (m, n, k), facts = blocks, chips.CHIPS[chip]
    result = _cost(chip, *blocks, limit=M // m)
    (kernel,) = result.kernels
    rows, columns, sums = M // m // facts.cores, N // n, K // k  # steps of one core
    steps = rows * columns * sums
    a_blocks = rows if sums == 1 else steps  # the same block as in the step before is not copied again
    assert kernel.copied["hbm_to_vmem"] == BF16 * (a_blocks * m * k + steps * k * n)
    assert kernel.copied["vmem_to_hbm"] == BF16 * rows * columns * m * n
    width = facts.mxu_width
    matmuls = steps * (m // 16) * (k // width) * (n // width)  # 16 rows an instruction, a width x width tile of b
    assert kernel.matmuls == matmuls
    assert kernel.mxu * kernel.us * facts.clock == pytest.approx(matmuls * facts.matmul_cycles / facts.mxus * 1e6)
    assert max(run["trips"] for run in kernel.hottest if run["matmuls"]) <= steps
    assert kernel.vmem >= BF16 * 2 * (m * k + k * n + m * n) + F32 * m * n
    assert kernel.us >= kernel.hbm_us
    assert kernel.doubts == ()
    assert result.roofline_us == pytest.approx(2 * M * N * K / facts.peak / facts.cores * 1e6)
    assert 0.1 < result.efficiency < 1


@pytest.mark.tpu
def test_skipped_blocks() -> None:
    """Blocks that a prefetched number skips cost their copies, but no matmul."""
    whole, half = (_cost("v5e", 256, 512, 4096, limit) for limit in (4, 2))
    assert half.kernels[0].matmuls * 2 == whole.kernels[0].matmuls
    assert half.kernels[0].copied == whole.kernels[0].copied
    assert half.us < whole.us


def test_peaks() -> None:
    """The MXUs at their clock give the published TFLOP/s of a chip (of one of a tpu7x's two devices)."""
    published = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "tpu7x": 2307 / 2}
    for name, chip in chips.PLANNED.items():
        assert chip.peak * chip.cores == pytest.approx(published[name] * 1e12, rel=2e-3), name


@pytest.mark.tpu
def test_no_kernel() -> None:
    with pytest.raises(ValueError, match="no Pallas kernel"):
        cost.cost(lambda x: x + 1, (jax.ShapeDtypeStruct((8, 128), jnp.float32),), "v5e", flops=1, bytes=1)


def test_unknown_chip() -> None:
    with pytest.raises(ValueError, match="unknown chip 'v5x'; did you mean v5"):
        cost.cost(lambda x: x, (), "v5x", flops=1, bytes=1)


def _run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pallas_kernels.cost", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["latent_decod", "--chip", "v5e", "--shape", "v2"], "unknown op 'latent_decod'; did you mean latent_decode?"),
        (["latent_decode", "--chip", "v4", "--shape", "v2"], "unknown chip 'v4'"),
        (["latent_decode", "--chip", "v5e", "--shape", "v2_light"], "unknown shape 'v2_light'; did you mean v2_lite?"),
        (["latent_decode", "--shape", "v2"], "--chip"),
        (["latent_decode", "--chip", "v5e", "--shape", "v2", "--tunes"], "did you mean --tune?"),
    ],
)
def test_mistakes(words: list[str], told: str) -> None:
    """One line and exit code 2."""
    done = _run(*words)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert told in done.stderr


@pytest.mark.tpu
def test_command(tmp_path: Path) -> None:
    """The table says what the JSON says."""
    file = tmp_path / "cost.json"
    done = _run("latent_decode", "--chip", "v5e", "--shape", "nano", "--json", str(file))
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert set(figures) == {field.name for field in dataclasses.fields(cost.Cost)}
    assert f"efficiency {figures['efficiency']:.3f}" in done.stdout
