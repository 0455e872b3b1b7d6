"""Paths on disk: folders that appear under their name when everything is in them, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dsv2_jax.config import check


@contextlib.contextmanager
def published(folder: Path, *, first_wins: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `folder` to write into, which gets that name at the end.

    Its own name is new, so of two processes neither touches the other's; a killed one leaves `.incoming-NAME-...`.
    `folder` may exist if it is empty. If another process has filled it meanwhile, raises ValueError, or, where
    `first_wins` because both write the same, lets that one stand.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".incoming-{folder.name}-", dir=folder.parent))
    scratch.chmod(0o755)  # mkdtemp's own mode would shut others out
    try:
        yield scratch
        try:
            os.rename(scratch, folder)
        except OSError:
            if not folder.exists():
                raise
            check(first_wins, f"{folder} was written by another process meanwhile; nothing of it was changed")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
