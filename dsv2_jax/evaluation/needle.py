"""Needles in a haystack (section 3.1.4, figure 4): can a model find a fact at any depth of a long text?

A haystack is held-out text. Needles are sentences that state the secret word of a place. Each prompt ends with a
question about one needle, and an answer is right if it is the word. Most tokenizers have a token for each of these
words, so the test measures retrieval, not a small model's spelling.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import rich.console
import rich.table

from dsv2_jax.config import check
from dsv2_jax.data.facts import LANGUAGES

if TYPE_CHECKING:
    from dsv2_jax.data.tokenizer import Tokenizer
    from dsv2_jax.inference.engine import Capacity
    from dsv2_jax.loading import Loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
    """Settings of the haystacks."""

    lengths: tuple[int, ...] = ()  # tokens per prompt, question included; empty: 1/8 to all of the model's positions
    depths: int = 5  # positions of the needle, evenly spaced from beginning to end
    needles: int = 1  # facts per haystack; the first is at the depth, the others at random positions
    languages: tuple[str, ...] = ("english", "chinese")
    repeats: int = 4  # haystacks per length, depth and language
    seed: int = 0
    picture: Path | None = None  # output file for the heat map, .png

    def __post_init__(self) -> None:
        check(self.depths > 1 and self.repeats > 0, "haystack.depths must be 2 or more, haystack.repeats 1 or more")
        check(0 < self.needles <= 10, f"haystack.needles must be in 1 to 10, not {self.needles}")
        unknown = [name for name in self.languages if name not in LANGUAGES]
        check(not unknown, f"haystack.languages can be {', '.join(LANGUAGES)}, not {', '.join(unknown)}")


class Haystack(NamedTuple):
    """A prompt as token ids, the right answer, and its cell of the heat map."""

    ids: tuple[int, ...]
    word: str
    length: int
    depth: float
    language: str


def haystacks(tokenizer: "Tokenizer", texts: Sequence[str], wanted: Needle) -> list[Haystack]:
    """All prompts; equal for equal seeds. Raises ValueError for a length too short for its needles."""
    draw = random.Random(wanted.seed)
    text_ids = [tokenizer.encode(text) for text in texts]
    check(any(text_ids), "there is no held-out text to hide a needle in")
    found = []
    for length in wanted.lengths:
        for depth in np.linspace(0, 1, wanted.depths).tolist():
            for language in wanted.languages:
                for _ in range(wanted.repeats):
                    found += _prompts(tokenizer, text_ids, wanted, (length, depth, language), draw)
    return found


def _prompts(
    tokenizer: "Tokenizer",
    texts: Sequence[list[int]],
    wanted: Needle,
    cell: tuple[int, float, str],
    draw: random.Random,
) -> list[Haystack]:
    """One haystack with its needles, as one prompt per question."""
    length, depth, language = cell
    phrases = LANGUAGES[language]
    places = draw.sample(phrases.places, wanted.needles)
    secrets = draw.sample(phrases.secrets, wanted.needles)
    needles = [tokenizer.encode(phrases.needle.format(place=p, word=w)) for p, w in zip(places, secrets, strict=True)]
    questions = [tokenizer.encode(phrases.question.format(place=place)) for place in places]
    size = length - 1 - sum(map(len, needles)) - max(map(len, questions))
    check(size > 0, f"haystack.lengths: {length} tokens are too few for the needles and their question")
    hay: list[int] = []
    order = draw.sample(range(len(texts)), len(texts))
    while len(hay) < size:  # a long haystack may repeat the held-out split
        for number in order:
            hay += texts[number][: size - len(hay)]
    at = [int(depth * size), *(draw.randrange(size + 1) for _ in needles[1:])]
    for place, needle in sorted(zip(at, needles, strict=True), reverse=True):
        hay[place:place] = needle
    prompts = [(tokenizer.bos_id, *hay, *question) for question in questions]
    return [Haystack(p, w, length, depth, language) for p, w in zip(prompts, secrets, strict=True)]


def evaluate(loaded: "Loaded", wanted: Needle, capacity: "Capacity", devices: Any) -> dict[str, Any]:
    """Shares of right answers: overall, by language, and by length and depth.

    Haystacks are made of the held-out split of the checkpoint's own data. The first process prints the table and draws
    the heat map. Raises ValueError for lengths that exceed the model's positions.
    """
    from dsv2_jax.data import corpora
    from dsv2_jax.inference.engine import Engine
    from dsv2_jax.inference.request import Request
    from dsv2_jax.parallel import processes

    tokenizer = loaded.need_tokenizer()
    secrets = [f" {word}\n" for phrases in LANGUAGES.values() for word in phrases.secrets]
    new = max(len(tokenizer.encode(secret)) for secret in secrets)
    most = loaded.model.max_position_embeddings - new
    wanted = wanted if wanted.lengths else dataclasses.replace(wanted, lengths=tuple(most // n for n in (8, 4, 2, 1)))
    longest = max(wanted.lengths) + new
    check(
        longest <= loaded.model.max_position_embeddings,
        f"haystack.lengths: {max(wanted.lengths)} tokens and the answer's {new} exceed the model's "
        f"{loaded.model.max_position_embeddings} positions",
    )
    with processes.first_before_others("needles"):
        held_out = corpora.prepare(
            dataclasses.replace(loaded.config.data, form="text", source=_source(loaded))
        ).held_out
    texts = [held_out[i]["text"].decode() for i in range(len(held_out))]
    prompts = haystacks(tokenizer, texts, wanted)
    engine = Engine(
        loaded.params,
        loaded.model,
        capacity=dataclasses.replace(capacity, length=capacity.length or longest),
        tokenizer=tokenizer,
        mesh=devices,
    )
    stop = (tokenizer.eos_id,)
    results = engine.generate([Request(prompt=h.ids, max_new=new, stop_ids=stop, text=True) for h in prompts])
    right = np.array([is_answered(result.text, h.word) for result, h in zip(results, prompts, strict=True)])
    figures = summary(prompts, right, wanted)
    if processes.is_first():
        show(figures)
        if wanted.picture is not None:
            draw_picture(figures, wanted.picture)
    return figures


def show(figures: dict[str, Any]) -> None:
    """Prints the grid as a table."""
    table = rich.table.Table("tokens", *[f"depth {100 * d:.0f}%" for d in figures["depths"]], title="needles found")
    for length, row in zip(figures["lengths"], figures["grid"], strict=True):
        table.add_row(f"{length:,}", *[f"{100 * share:.0f}%" for share in row])
    console = rich.console.Console()
    console.print(table)
    languages = ", ".join(f"{name} {100 * share:.1f}%" for name, share in figures["by_language"].items())
    console.print(f"all {100 * figures['exact_match']:.1f}%: {languages}", highlight=False)


def is_answered(text: str, word: str) -> bool:
    """Whether the answer starts with the word, followed by no letter or digit."""
    answer = text.strip()
    return answer.startswith(word) and not answer[len(word) : len(word) + 1].isalnum()


def summary(prompts: Sequence[Haystack], right: np.ndarray, wanted: Needle) -> dict[str, Any]:
    """Shares of right answers; the rows of `grid` are lengths, its columns depths."""
    lengths, depths = list(wanted.lengths), np.linspace(0, 1, wanted.depths).tolist()

    def share(chosen: list[bool]) -> float:
        return float(right[np.array(chosen)].mean())

    return {
        "exact_match": float(right.mean()),
        "by_length": {n: share([h.length == n for h in prompts]) for n in lengths},
        "by_language": {name: share([h.language == name for h in prompts]) for name in wanted.languages},
        "lengths": lengths,
        "depths": depths,
        "grid": [[share([(h.length, h.depth) == (n, d) for h in prompts]) for d in depths] for n in lengths],
        "needles": wanted.needles,
        "questions": len(prompts),
        "seed": wanted.seed,
    }


def draw_picture(figures: dict[str, Any], path: Path) -> None:
    """Draws the heat map in the style of figure 4: lengths to the right, depths downwards, green for found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grid = np.array(figures["grid"]).T
    figure, axes = pyplot.subplots(figsize=(1.5 + 0.9 * grid.shape[1], 1.5 + 0.5 * grid.shape[0]))
    image = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(grid.shape[1]), [f"{n:,}" for n in figures["lengths"]], rotation=45)
    axes.set_yticks(range(grid.shape[0]), [f"{100 * d:.0f}%" for d in figures["depths"]])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"needles found: {100 * figures['exact_match']:.1f}%")
    figure.colorbar(image, ax=axes, label="exact match")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _source(loaded: "Loaded") -> str:
    """The source of the haystacks' text: the run's own, or the built-in corpus if the run's data are not text."""
    return loaded.config.data.source if loaded.config.data.form == "text" else "builtin"
