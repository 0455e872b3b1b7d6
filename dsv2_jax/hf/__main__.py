"""python -m dsv2_jax.hf export --checkpoint DIR --out HF_DIR [--dtype bfloat16], and import --hf HF_DIR --out DIR."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import rich.console
import rich.progress

from dsv2_jax import cli, hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Converts the newest checkpoint of a run to a Hugging Face folder."""

    checkpoint: Path  # folder of a run
    out: Path  # folder to create
    dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Converts a Hugging Face folder to the folder of a run."""

    hf: Path  # folder with config.json and safetensors
    out: Path  # folder to create


def main() -> None:
    """The command line."""
    called = cli.called("python -m dsv2_jax.hf")
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb == "export":
        export = cli.parse(Export, rest, f"{called} export")
        with _bar("exporting") as progress:
            hf.export(export.checkpoint, export.out, export.dtype, progress=progress)
        print(f"exported {export.checkpoint} to {export.out}")
    elif verb == "import":
        import_ = cli.parse(Import, rest, f"{called} import")
        with _bar("importing") as progress:
            hf.import_(import_.hf, import_.out, progress=progress)
        print(f"imported {import_.hf} into {import_.out}")
    elif verb in ("-h", "--help"):
        print(f"usage: {called} export --checkpoint DIR --out HF_DIR [--dtype bfloat16]")
        print(f"       {called} import --hf HF_DIR --out DIR")
    else:
        cli.fail(f"unknown command {verb}{cli.nearest(verb, ('export', 'import'))}; the commands are export and import")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[hf.Progress]:
    """Progress on stderr: a bar on a terminal, elsewhere a line for every 10%."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    bar = rich.progress.Progress(*columns, console=console)
    task = bar.add_task(title, total=None)

    def update(done: int, total: int) -> None:
        bar.start()  # after the checks, so that an error message is the only output
        bar.update(task, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def _lines(title: str) -> hf.Progress:
    printed = 0

    def update(done: int, total: int) -> None:
        nonlocal printed
        tenths = 10 * done // total
        if tenths > printed:
            printed = tenths
            print(f"{title}  {10 * tenths}%  {done / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

    return update


command = functools.partial(cli.main, main)

if __name__ == "__main__":
    command()
