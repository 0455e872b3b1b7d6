"""Shared behaviour of all commands: flags from dataclasses, one-line error messages, exit codes.

Exit codes: 0 success, 1 failure with a traceback, 2 a user's mistake, 130 keyboard interrupt.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import io
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import tyro

T = TypeVar("T")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_OURS = {"dsv2_jax", "pallas_kernels", "configs", "__main__"}


def main(function: Callable[[], int | None]) -> NoReturn:
    """Runs a command and exits with its exit code (None: 0).

    A missing file, or a ValueError that this project raised, is a user's mistake: it prints one line on stderr and
    exits with 2. A ValueError of a library is a failure like any other and keeps its traceback.
    """
    import jax

    jax.config.update("jax_traceback_filtering", "off")  # otherwise errors inside JAX look like ours
    try:
        code = function()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ValueError, FileNotFoundError) as error:
        message = mistake(error)
        if message is None:
            raise
        fail(message)
    sys.exit(code or 0)


def mistake(error: BaseException) -> str | None:
    """The message for an error that is a user's mistake, as defined by `main`; None for other errors."""
    if isinstance(error, FileNotFoundError) or (isinstance(error, ValueError) and _is_ours(error)):
        return _sentence(error)
    return None


def fail(message: str) -> NoReturn:
    """Prints a user's mistake in one line on stderr and exits with 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def parse(default: type[T] | T, argv: Sequence[str] | None = None, prog: str | None = None) -> T:
    """Reads flags `--section.field VALUE` (or `--section.field=VALUE`) into a frozen dataclass.

    `default` is a dataclass, or an instance that gives the defaults. Underscores and hyphens in a flag are equivalent.
    `--help` prints every flag with its comment and exits with 0. A mistake, or a config that fails its own checks, is
    printed in one line on stderr, with exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    kind = typing.cast(type[T], default if isinstance(default, type) else type(default))
    options: dict[str, Any] = {} if isinstance(default, type) else {"default": default}
    if {"-h", "--help"} & set(argv):
        return tyro.cli(kind, args=argv, prog=prog, **options)
    value, unknown = _read(kind, argv, prog, options)
    if unknown:
        fail(_unknown(unknown[0], list(flags(kind))))
    return value


def known(default: T, argv: Sequence[str], prog: str | None = None) -> T:
    """As `parse`, but ignores flags that are not of this dataclass."""
    return _read(type(default), argv, prog, {"default": default})[0]


def read_ids(path: Path) -> np.ndarray:
    """Token ids int [B, T] from a .npy file. Raises FileNotFoundError, or ValueError for other contents."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        ids_BT = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers") from error
    if ids_BT.ndim != 2 or not np.issubdtype(ids_BT.dtype, np.integer) or not ids_BT.size:
        raise ValueError(f"{path} must contain integers [B, T], not {ids_BT.dtype} {list(ids_BT.shape)}")
    return ids_BT


def called(otherwise: str) -> str:
    """The name of this command in its usage: that of the console script, else `otherwise`."""
    name = Path(sys.argv[0]).name
    return name if name.startswith("dsv2-") else otherwise


def keep_compiled_programs() -> None:
    """Caches compiled programs on disk, so that later runs of a command start faster. Results do not change.

    The folder is JAX_COMPILATION_CACHE_DIR, by default ~/.cache/dsv2_jax.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "dsv2_jax"))


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory, for programs on CPU that run many times. Does nothing without glibc.

    XLA allocates all temporaries of a program at every call, gigabytes in training. By default glibc maps and unmaps
    them, and the kernel clears every page again, which takes a tenth of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in (
            (_M_MMAP_MAX, 0),
            (_M_TRIM_THRESHOLD, -1),
        ):  # allocate from the heap only, and never trim it
            mallopt(option, value)


def flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """All flags of a dataclass and its sections, such as `--batch.micro_size`."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}"
            if hints[field.name] is bool:
                yield f"--{prefix}no_{field.name}"


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean X?` with the most similar of the names, or an empty string if none is similar."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _read(kind: type[T], argv: Sequence[str], prog: str | None, options: dict[str, Any]) -> tuple[T, list[str]]:
    """The value of the flags, and the unknown arguments. Exits with 2 after a mistake."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), _unwrapped(), _plain_messages():
            return tyro.cli(kind, args=argv, prog=prog, return_unknown_args=True, **options)
    except SystemExit:
        fail(_first_statement(stderr.getvalue()))


def _unknown(token: str, names: list[str]) -> str:
    if not token.startswith("--"):
        return f"unexpected argument '{token}'; flags have the form --section.field VALUE, and --help lists them all"
    name = token.split("=")[0].replace("-", "_").replace("__", "--", 1)
    sections = [n for n in names if n.rsplit(".", 1)[-1] == name.lstrip("-")]
    hint = f"; did you mean {sections[0]}?" if sections else nearest(name, names)
    return f"unknown flag {token.split('=')[0]}{hint or '; --help lists them all'}"


def _is_ours(error: BaseException) -> bool:
    """Whether our code raised it, by module name, because an installed copy is in the folder of the libraries."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in _OURS


def _sentence(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file or folder: {error.filename}"
    return str(error)


def _first_statement(box: str) -> str:
    """The text of a tyro message box above its first rule, without the frame."""
    rows = [re.sub(r"\x1b\[[0-9;]*m", "", row).strip("│| ") for row in box.splitlines()]
    rows = [row for row in rows if row and row[0] not in "╭╰"]
    rows = rows if "╭" in box else rows[2:]  # without UTF-8 the title and a rule replace the frame
    rule = next((i for i, row in enumerate(rows) if set(row) <= {"─", "-"}), len(rows))
    text = " ".join(rows[:rule])
    checked = re.match(r"Error parsing (?!-)\S+: (.*)", text)  # a check of the dataclass: its message is complete
    if checked:
        return checked[1]
    bad_value = re.match(r"Error parsing (\S+): (.*?)(?: Got errors.*)?$", text)
    if bad_value and len(rows) > rule + 2:  # the next row is "Argument helptext:", then the flag and its type
        return f"{bad_value[1]} takes {rows[rule + 2].removeprefix(bad_value[1]).strip()}: {bad_value[2]}"
    return text


@contextlib.contextmanager
def _unwrapped() -> Iterator[None]:
    """Makes tyro assume a very wide terminal, so that it does not wrap messages."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _plain_messages() -> tyro.constructors.ConstructorRegistry:
    """Constructors of numbers with plain error messages in place of Python's."""
    registry = tyro.constructors.ConstructorRegistry()

    def number(kind: type, description: str) -> None:
        def read(texts: list[str]) -> Any:
            try:
                value = kind(texts[0])
            except ValueError:
                raise ValueError(f"'{texts[0]}' is not {description}") from None
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"'{texts[0]}' is not finite")
            return value

        @registry.primitive_rule
        def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
            if info.type is not kind:
                return None
            return tyro.constructors.PrimitiveConstructorSpec(
                nargs=1,
                metavar=kind.__name__.upper(),
                instance_from_str=read,
                is_instance=lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool),
                str_from_instance=lambda value: [str(value)],
            )

    number(int, "an integer")
    number(float, "a number")
    return registry
