"""The pretraining stage: next-token prediction on text (section 3.1), evaluated by bits per byte of held-out text.

Fine-tuning and reward modelling are stages in `alignment/`; they share `data` and start from `config.init`.
"""

from collections.abc import Sequence

import numpy as np

from dsv2_jax import loading
from dsv2_jax.config import Config
from dsv2_jax.data import pipeline
from dsv2_jax.evaluation import perplexity
from dsv2_jax.training.loss import loss
from dsv2_jax.training.stage import Batches, Stage, StageData


def data(config: Config, mine: Sequence[int] | np.ndarray | None) -> StageData:
    """Opens the config's corpus and tokenizer, and packs both splits. Raises ValueError as these do."""
    corpus, tokenizer = loading.open_data(config)
    batches = pipeline.train_batches(config, corpus, tokenizer, mine=mine)
    pipeline.packed_rows(config, corpus, "held_out", tokenizer, config.batch.length)  # tokenises it before step 1
    rows = config.batch.micro_size or config.batch.size

    def held_out(limit: int | None) -> Batches:
        return pipeline.held_out_batches(config, corpus, tokenizer, rows=rows, limit=limit, mine=mine)

    notes = ()
    if batches.left_out:
        fate = "cut" if config.data.too_long == "cut" else "dropped"
        notes = (f"{batches.left_out:,} {config.data.form} longer than a row: {fate}",)
    return StageData(train=batches, held_out=held_out, epoch_tokens=batches.epoch_tokens, notes=notes)


STAGE = Stage(
    name="pretraining",
    loss=loss,
    evaluate=perplexity.evaluate,
    data=data,
    parameters=loading.start_params,
    headline="bits_per_byte",
)
