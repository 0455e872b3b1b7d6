"""The training loop: next batch, step, log, evaluate, save. Every helper knows its own part and nothing of the others.

A run goes on where its newest checkpoint stands, bit for bit as if it had never stopped: parameters, optimizer state
and the input pipeline's state are in the checkpoint, and every random number comes from the seed and the step.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dsv2_jax import loading
from dsv2_jax.alignment import reward
from dsv2_jax.config import Config, check
from dsv2_jax.data import corpora, pipeline
from dsv2_jax.evaluation import perplexity
from dsv2_jax.model import transformer
from dsv2_jax.ops import switch
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.feed import Feed
from dsv2_jax.parallel.processes import Stop
from dsv2_jax.training import checkpoint, metrics, optimizer, plots
from dsv2_jax.training.checkpoint import Checkpoints, Progress
from dsv2_jax.training.lease import leased
from dsv2_jax.training.loss import loss as pretraining_loss
from dsv2_jax.training.step import State, create, state_specs, train_step

STOPPED = 75  # exit code after SIGTERM: saved, start it again and it goes on (EX_TEMPFAIL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `train` ended."""

    progress: Progress
    finished: bool  # False: stopped by SIGTERM, and saved
    held_out: dict[str, Any]  # figures of the whole held-out split, `held_out_bits_per_byte` among them; {} if stopped


@leased
def train(config: Config) -> Outcome:
    """Trains the model of the config until `config.tokens` tokens, in the folder `config.workdir`, or until SIGTERM.

    Runs on all devices of all processes, laid out by `config.mesh`. Raises ValueError for a mesh that does not fit, a
    folder whose run had other settings or in which another run is at work, and whatever the data's checks raise.
    """
    scoring = config.model.head == "score"
    check(
        scoring == (config.data.form == "preferences"),
        "a reward model (model.head score) learns from preferences (data.form), and nothing else does",
    )
    run, config = config.workdir, resolve(config)
    mesh = device_mesh.make(config.mesh)
    loss, figures_of = (reward.loss, reward.evaluate) if scoring else (pretraining_loss, perplexity.evaluate)
    config = checkpoint.open_run(config)
    with processes.first_before_others("data"):
        corpus = corpora.prepare(config.data)
        words = loading.tokenizer_for(config, corpus)
        if processes.is_first():
            checkpoint.keep_tokenizer(run, words.save)
        micro_rows = config.batch.micro_size or config.batch.size
        feed = Feed(mesh, config.mesh, micro_rows)
        batches = pipeline.train_batches(config, corpus, words, mine=feed.mine)
        pipeline.packed_rows(config, corpus, "held_out", words, config.batch.length)
    if config.epochs:
        whole = max(config.epochs * batches.epoch_tokens, config.batch.size * config.batch.length)
        config = dataclasses.replace(config, tokens=whole)

    def evaluate(limit: int | None) -> dict[str, Any]:
        held_out = pipeline.held_out_batches(config, corpus, words, rows=micro_rows, limit=limit, mine=feed.mine)
        return figures_of(state.params, held_out, config=config, feed=feed, mesh=mesh)

    def initial_state() -> State:
        return create(transformer.init(config.model, jax.random.key(config.seed)), config)

    shardings = sharding.on(mesh, state_specs(config))
    with Checkpoints(run, config.cadence.keep) as checkpoints, Stop() as stop:
        state, progress = checkpoints.restore(
            initial_state,
            batches,
            shardings,
            functools.partial(loading.start_params, config, mesh) if config.init else None,
        )
        with metrics.Log(config, progress) as log:
            if batches.left_out:
                cut = config.data.form == "conversations" and config.data.too_long == "cut"
                log.say(f"{batches.left_out:,} {config.data.form} longer than a row: {'cut' if cut else 'dropped'}")
            if progress.step:
                log.say(f"going on from step {progress.step:,} in {run}")
            while progress.tokens < config.tokens and not stop.asked():
                rows = optimizer.batch_size(config, progress.tokens)
                lr = optimizer.learning_rate(config, progress.step, progress.tokens)
                batch = feed(step_batch(batches, rows // micro_rows))
                state, figures = train_step(state, batch, lr, config=config, loss=loss, mesh=mesh)
                progress = Progress(step=progress.step + 1, tokens=progress.tokens + rows * config.batch.length)
                log.record(progress, lr, figures)
                if progress.tokens >= config.tokens:
                    break
                if progress.step % config.cadence.evaluate == 0:
                    log.held_out(progress, evaluate(config.cadence.evaluate_batches), whole=False)
                if progress.step % config.cadence.save == 0:
                    log.flush()
                    checkpoints.save(state, batches, progress)

            log.flush()
            finished = progress.tokens >= config.tokens
            if finished and not processes.agreed(bool(final_line(config, progress))):
                log.held_out(progress, evaluate(None), whole=True)
            checkpoints.save(state, batches, progress)
    if not finished:
        return Outcome(progress=progress, finished=False, held_out={})
    if processes.is_first():
        plots.draw(run)
    return Outcome(progress=progress, finished=True, held_out=final_line(config, progress))


def resolve(config: Config) -> Config:
    """The config with the sizes of its mesh for the devices at hand. Raises ValueError if anything does not fit."""
    switch.implementation(config.compute)  # fails early where kernels cannot run, and warns of untested platforms
    mesh = config.mesh.resolve(jax.device_count())
    sharding.check_model(config.model, mesh)
    sharding.check_batch(config.batch.micro_size or config.batch.size, config.batch.length, config.model, mesh)
    return dataclasses.replace(config, mesh=mesh)


def step_batch(batches: Iterator[dict[str, np.ndarray]], micro_batches: int) -> dict[str, np.ndarray]:
    """The batch of one step: leaves [A, B, T], as many micro-batches B as asked for."""
    micro = [next(batches) for _ in range(micro_batches)]
    return {name: np.stack([m[name] for m in micro]) for name in micro[0]}


def final_line(config: Config, progress: Progress) -> dict[str, Any]:
    """The metrics line of the whole held-out split at this step, {} if it is not written yet."""
    lines = [m for m in metrics.read(config.workdir) if m["step"] == progress.step and m.get("held_out_whole")]
    return lines[-1] if lines else {}
