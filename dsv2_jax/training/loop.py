"""The training loop: next batch, step, log, evaluate, save.

A restarted run continues from its newest checkpoint, bit for bit as if it had never stopped: the checkpoint holds the
parameters, the optimizer state and the input pipeline's state, and every random number comes from the seed and the
step.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dsv2_jax.config import Config
from dsv2_jax.model import transformer
from dsv2_jax.ops import switch
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.batches import BatchPlacement
from dsv2_jax.parallel.processes import Stop
from dsv2_jax.training import metrics, optimizer, plots, run_folder
from dsv2_jax.training.checkpoint import Checkpoints, Progress
from dsv2_jax.training.lease import leased
from dsv2_jax.training.stage import Ended, Stage
from dsv2_jax.training.step import State, create, state_specs, train_step

STOPPED = 75  # exit code after SIGTERM: saved; the same command continues the run (EX_TEMPFAIL)


@leased
def train(config: Config, stage: Stage) -> Ended:
    """Trains the model of the config in this stage until `config.tokens` tokens or SIGTERM, in `config.workdir`.

    Runs on all devices of all processes, laid out by `config.mesh`. Raises ValueError for a mesh that does not fit, a
    folder whose run has other settings or that another run holds, and for data that the stage refuses.
    """
    run, config = config.workdir, resolve(config)
    mesh = device_mesh.make(config.mesh)
    config = run_folder.open_run(config)
    micro_rows = config.batch.micro_size or config.batch.size
    place = BatchPlacement(mesh, config.mesh, micro_rows)
    with processes.first_before_others("data"):
        data = stage.data(config, place.mine)
    if config.epochs:
        tokens = max(config.epochs * data.epoch_tokens, config.batch.size * config.batch.length)
        config = dataclasses.replace(config, tokens=tokens)

    def evaluate(limit: int | None) -> dict[str, Any]:
        return stage.evaluate(state.params, data.held_out(limit), config=config, place=place, mesh=mesh)

    def initial_state() -> State:
        return create(transformer.init(config.model, jax.random.key(config.seed)), config)

    shardings = sharding.on(mesh, state_specs(config))
    parameters = functools.partial(stage.parameters, config, mesh) if config.init else None
    with Checkpoints(run, config.cadence.keep) as checkpoints, Stop() as stop:
        state, progress = checkpoints.restore(initial_state, data.train, shardings, parameters)
        with metrics.Log(config, progress, stage.name, stage.headline) as log:
            for note in data.notes:
                log.say(note)
            if progress.step:
                log.say(f"continuing from step {progress.step:,} in {run}")
            while progress.tokens < config.tokens and not stop.asked():
                rows = optimizer.batch_size(config, progress.tokens)
                lr = optimizer.learning_rate(config, progress.step, progress.tokens)
                batch = place(step_batch(data.train, rows // micro_rows))
                state, figures = train_step(state, batch, lr, config=config, loss=stage.loss, mesh=mesh)
                progress = Progress(step=progress.step + 1, tokens=progress.tokens + rows * config.batch.length)
                log.record(progress, lr, figures)
                if progress.tokens >= config.tokens:
                    break
                if progress.step % config.cadence.evaluate == 0:
                    log.held_out(progress, evaluate(config.cadence.evaluate_batches), full=False)
                if progress.step % config.cadence.save == 0:
                    log.flush()
                    checkpoints.save(state, data.train, progress)

            log.flush()
            finished = progress.tokens >= config.tokens
            if finished and not processes.agreed(bool(final_line(config, progress))):
                log.held_out(progress, evaluate(None), full=True)
            checkpoints.save(state, data.train, progress)
    if finished and processes.is_first():
        plots.draw(run)
    held_out = final_line(config, progress) if finished else {}
    return Ended(run=run, progress=progress, finished=finished, held_out=held_out, headline=stage.headline)


def resolve(config: Config) -> Config:
    """The config with its mesh sized for the available devices.

    Raises ValueError for a model or batch that does not fit the mesh, and for a kernel that cannot run here.
    """
    switch.implementation(config.compute)  # for its checks
    mesh = config.mesh.resolve(jax.device_count())
    sharding.check_model(config.model, mesh)
    sharding.check_batch(config.batch.micro_size or config.batch.size, config.batch.length, config.model, mesh)
    return dataclasses.replace(config, mesh=mesh)


def step_batch(batches: Iterator[dict[str, np.ndarray]], micro_batches: int) -> dict[str, np.ndarray]:
    """The batch of one step: leaves [A, B, T], A micro-batches."""
    micro = [next(batches) for _ in range(micro_batches)]
    return {name: np.stack([m[name] for m in micro]) for name in micro[0]}


def final_line(config: Config, progress: Progress) -> dict[str, Any]:
    """The metrics line of the full held-out split at this step; {} before it is written."""
    lines = [m for m in metrics.read(config.workdir) if m["step"] == progress.step and m.get("held_out_whole")]
    return lines[-1] if lines else {}
