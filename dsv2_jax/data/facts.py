"""The facts of retrieval rows (training) and of needles in a haystack (evaluation).

Training and evaluation share the wording, but not the text around the facts.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


class Phrases(NamedTuple):
    """The wording of a needle and its question; {place} is one of places, {word} one of secrets."""

    needle: str
    question: str
    places: tuple[str, ...]
    secrets: Sequence[str]  # common words


_ENGLISH = re.findall(
    r"\w+",
    """fire gold earth heaven sun sword horse house crown hand heart night world death love blood
    queen king tongue soul brother father sea wind field letter dream truth honour grace hope sorrow""",
)

LANGUAGES = {
    "english": Phrases(
        "\nThe secret word of {place} is {word}.\n",
        "\nQuestion: What is the secret word of {place}?\nAnswer: The secret word of {place} is",
        ("Paris", "London", "Rome", "Venice", "Cairo", "Athens", "Vienna", "Lisbon", "Berlin", "Oslo"),
        _ENGLISH,
    ),
    "chinese": Phrases(
        "\n{place}的暗号是 {word}。\n",
        "\n问：{place}的暗号为何？\n答：{place}的暗号是",
        ("长安", "洛阳", "成都", "荆州", "许昌", "建业", "徐州", "汉中", "襄阳", "江陵"),
        "天地山水火木金石日月风雨龙虎马牛草城门车船刀弓酒书剑江河海春秋玉",
    ),
}
