"""Documents to learn looking things up from: texts of a corpus with facts in them, and questions about them behind.

They are worded as the needles of `evaluation/needle.py` are, so a model that has read them has practised that test; its
numbers and haystacks it has not seen.
"""

import random
from collections.abc import Iterator, Sequence

from dsv2_jax.evaluation.needle import LANGUAGES

_SEED = 2
_MOST_FACTS = 4


def documents(texts: Sequence[str], count: int, characters: int) -> Iterator[tuple[str, str]]:
    """(name, text) of so many documents, each of about so many characters of the texts; always the same ones."""
    draw = random.Random(_SEED)
    names = sorted(LANGUAGES)
    for number in range(count):
        phrases = LANGUAGES[names[number % len(names)]]
        places = draw.sample(phrases.places, draw.randint(1, _MOST_FACTS))
        facts = [(place, "".join(draw.choices("0123456789", k=4))) for place in places]
        hay = ""
        while len(hay) < characters:
            hay += draw.choice(texts)[: characters - len(hay)]
        places_in_hay = sorted((draw.randrange(len(hay) + 1) for _ in facts), reverse=True)
        for at, (place, secret) in zip(places_in_hay, facts, strict=True):  # from behind: none falls into another
            hay = hay[:at] + phrases.needle.format(place=place, number=secret) + hay[at:]
        draw.shuffle(facts)
        asked = "".join(f"{phrases.question.format(place=place)} {secret}\n" for place, secret in facts)
        yield f"retrieval/{number}", hay + asked
