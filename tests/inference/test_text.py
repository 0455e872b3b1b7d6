"""Streamed text: no split characters, nothing of a stop string, equal to decoding all tokens at once."""

import random

import pytest

from dsv2_jax.inference.text import Text


class Bytes:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids) -> str:
        return bytes(ids).decode(errors="replace")


def parts(text: str, stop=()) -> tuple[list[str], Text]:
    running, found = Text(Bytes(), stop), []  # pyright: ignore[reportArgumentType]
    for byte in text.encode():
        found.append(running.add(byte))
        if running.stopped:
            return found, running
    return [*found, running.end()], running


def test_characters_are_never_split():
    found, running = parts("aé海🙂z")
    assert found == ["a", "", "é", "", "", "海", "", "", "", "🙂", "z", ""]
    assert running.text == "aé海🙂z"


def test_bytes_that_are_no_text_do_not_block():
    running = Text(Bytes())  # pyright: ignore[reportArgumentType]
    told = [running.add(byte) for byte in [0xE6, 0xE6, 0xE6, 0xE6, 0xE6, 65]]
    assert "".join(told) + running.end() == bytes([0xE6] * 5).decode(errors="replace") + "A"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", (". ",), "one"),
        ("aaab", ("aab",), "a"),
        ("x\n\nUser: y", ("\n\nUser:", "zzz"), "x"),
        ("no such thing", ("thingy",), "no such thing"),
        ("abcabd", ("abd",), "abc"),
        ("first second", ("second", "first s"), ""),
    ],
)
def test_stop_strings(text, stop, expected):
    found, running = parts(text, stop)
    assert running.text == expected == "".join(found)
    assert running.stopped == (expected != text)


def test_against_cutting_the_whole_text():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(12))
        stop = tuple("".join(rng.choice("ab") for _ in range(rng.randrange(2, 5))) for _ in range(2))
        ends = [text.find(s) + len(s) for s in stop if s in text]
        expected = text
        if ends:  # the stop string that is complete first; of several, the longest
            expected = min(text[: min(ends)][: -len(s)] for s in stop if text[: min(ends)].endswith(s))
        assert parts(text, stop)[1].text == expected
