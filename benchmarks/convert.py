"""Measures memory and time of importing and exporting a Hugging Face checkpoint, against a copy of the same files.

    python benchmarks/convert.py [--gigabytes 8] [--folder DIR] [--json FILE]

The checkpoint has DeepSeek-V2-Lite's shapes, in bfloat16, with as many layers as --gigabytes holds. --folder needs
four times its size. Peak memory is the operating system's figure for each command's process, less that of a process
that only imports the same modules. Times include writing to disk. Exit code 0 if the export equals the checkpoint byte
for byte and memory stays below 2 GB, else 1.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from configs import models  # noqa: E402
from dsv2_jax import cli, hf, parameters  # noqa: E402
from dsv2_jax.config import Model, check  # noqa: E402
from dsv2_jax.hf import files  # noqa: E402
from dsv2_jax.hf.names import tensors  # noqa: E402

BOUND = 2 * 10**9  # bytes above those of the interpreter
_NOTHING = ["-c", "import dsv2_jax.hf.__main__"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertBenchmark:
    """Measure memory and time of importing and exporting a Hugging Face checkpoint."""

    gigabytes: float = 8.0  # maximal size of the checkpoint; it has one layer of experts at least
    folder: Path = Path(tempfile.gettempdir())  # for temporary files
    json: Path | None = None  # write the figures to this file

    def __post_init__(self) -> None:
        check(self.gigabytes > 0, f"--gigabytes must be positive, not {self.gigabytes}")


def lite(size: float) -> Model:
    """V2-Lite with as many layers as `size` bytes of bfloat16 hold, at least two."""
    layers = 2
    while 2 * parameters.count(shallow(layers + 1)) <= size:
        layers += 1
    return shallow(layers)


def shallow(layers: int) -> Model:
    """V2-Lite with `layers` layers."""
    return dataclasses.replace(models.v2_lite(), num_hidden_layers=layers)


def make(folder: Path, model: Model) -> int:
    """Writes a checkpoint of the model, with different tensors of a trained model's size. Returns its bytes."""
    folder.mkdir()
    settings = hf.to_hf_config(model, "bfloat16", None, None)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(2**24, np.float32)).astype(jnp.bfloat16)
    stored = files.create(folder, {t.hf: t.shape for t in tensors(model)}, np.dtype(jnp.bfloat16), 5 * 10**9)
    for tensor in stored.values():
        values = np.resize(np.roll(pool, int(rng.integers(len(pool)))), tensor.shape)
        files.write(tensor, values)
    return sum(tensor.size for tensor in stored.values())


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, byte for byte."""
    ours, theirs = files.open_folder(a), files.open_folder(b)
    return set(ours) == set(theirs) and all(
        np.array_equal(files.read(ours[name]).view(np.uint16), files.read(theirs[name]).view(np.uint16))
        for name in ours
    )


def run(*arguments: str | Path) -> tuple[float, int]:
    """Runs Python with these arguments. Returns the seconds until all is on disk, and its peak memory in bytes.

    Raises CalledProcessError if it fails.
    """
    command = [sys.executable, *map(str, arguments)]
    os.sync()
    begin, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL) as process:
        # Not from rusage, where a child's figure starts at its parent's.
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
            time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    os.sync()
    return time.monotonic() - begin, peak


def copy(source: Path, target: Path) -> float:
    """Copies a folder and deletes the copy. Returns the seconds of the copy until all is on disk."""
    os.sync()
    begin = time.monotonic()
    shutil.copytree(source, target)
    os.sync()
    seconds = time.monotonic() - begin
    shutil.rmtree(target)
    return seconds


def main() -> int:
    """Writes a checkpoint, copies, imports and exports it, and compares."""
    options = cli.parse(ConvertBenchmark(), prog="convert.py")
    model = lite(options.gigabytes * 1e9)
    size = 2 * parameters.count(model)
    free = shutil.disk_usage(options.folder).free
    check(free > 4 * size, f"{options.folder} has {free / 1e9:.1f} GB free; this needs {4 * size / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(prefix="convert_", dir=options.folder) as temporary:
        folder = Path(temporary)
        given, imported, exported = folder / "hf", folder / "run", folder / "exported"
        size = make(given, model)
        print(f"{size / 1e9:.2f} GB in {model.num_hidden_layers} layers", flush=True)
        _, interpreter = run(*_NOTHING)
        command = ["-m", "dsv2_jax.hf"]
        times, peaks = {"copy": copy(given, folder / "copy")}, {}
        times["import"], peaks["import"] = run(*command, "import", "--hf", given, "--out", imported)
        times["export"], peaks["export"] = run(
            *command, "export", "--checkpoint", imported, "--out", exported, "--dtype", "bfloat16"
        )
        identical = same(given, exported)

    max_tensor = max(2 * int(np.prod(t.shape)) for t in tensors(model))
    above = {name: peak - interpreter for name, peak in peaks.items()}
    table = rich.table.Table("", "seconds", "MB/s", "times the copy", "peak MB above the interpreter")
    for name, seconds in times.items():
        memory = f"{above[name] / 1e6:,.0f}" if name in above else ""
        row = f"{seconds:.1f}", f"{size / seconds / 1e6:,.0f}", f"{seconds / times['copy']:.2f}", memory
        table.add_row(name, *row)
    rich.console.Console().print(table)
    print(
        f"the interpreter with the same imports: {interpreter / 1e6:,.0f} MB; largest tensor {max_tensor / 1e6:,.0f} MB"
    )
    print(f"the export {'equals the checkpoint byte for byte' if identical else 'DIFFERS from the checkpoint'}")
    figures = {
        "bytes": size,
        "layers": model.num_hidden_layers,
        "largest_tensor_bytes": max_tensor,
        "interpreter_bytes": interpreter,
        "peak_bytes_above_interpreter": above,
        "seconds": times,
        "identical": identical,
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if identical and max(above.values()) < BOUND else 1


if __name__ == "__main__":
    cli.main(main)
