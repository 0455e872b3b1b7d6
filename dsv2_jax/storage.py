"""Atomic folders: a folder gets its name when it is complete, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsv2_jax.config import check


@contextlib.contextmanager
def published(folder: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder, which is renamed to `folder` at the end.

    Every call has its own temporary folder next to `folder`; a killed process leaves it as `.incoming-NAME-...`.
    `folder` may exist if it is empty. Raises ValueError if another process fills it in the meantime. With `first_wins`,
    for processes that write the same contents, the folder of the first is kept instead.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".incoming-{folder.name}-", dir=folder.parent))
    scratch.chmod(0o755)  # mkdtemp makes folders that only this user can read
    try:
        yield scratch
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.exists():
                raise
            check(first_wins, f"{folder} was written by another process in the meantime; it is left as it is")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
