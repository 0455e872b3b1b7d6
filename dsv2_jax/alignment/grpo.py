"""GRPO (section 4.2) in one job: sample groups of responses from the policy, reward them, update on them, repeat.

An iteration samples a group of responses to each prompt from the engine, scores them, and takes optimizer steps on them
with the `train_step` of pretraining. Between training and sampling only the weights are moved, from the training layout
to the sampler's. Samples depend only on the parameters, the seed and the step, so a killed run continues bit for bit.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv2_jax import loading
from dsv2_jax.alignment import policy, verifiers
from dsv2_jax.alignment.pool import RewardPool
from dsv2_jax.alignment.sampler import Sampler
from dsv2_jax.alignment.samples import Prompts, Sample, Samples, arrays
from dsv2_jax.config import Config, check
from dsv2_jax.data.packing import Batch
from dsv2_jax.model import transformer
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import processes, sharding
from dsv2_jax.parallel.batches import BatchPlacement
from dsv2_jax.parallel.processes import Stop
from dsv2_jax.training import loop, metrics, optimizer, plots, run_folder
from dsv2_jax.training.checkpoint import Checkpoints, Progress
from dsv2_jax.training.lease import leased
from dsv2_jax.training.stage import Ended
from dsv2_jax.training.step import State, create, state_specs, train_step

HEADLINE = "reward"  # the held-out figure that the log and the last line show


@leased
def train(config: Config) -> Ended:
    """Trains the policy in `config.init` until `config.grpo.steps` steps or SIGTERM.

    Resumes and logs as `loop.train` does. Also writes samples.jsonl, one line per response with its rewards, and
    held_out.jsonl, the same for evaluations. Raises ValueError as `loop.train` does, and for settings that GRPO does
    not support.
    """
    config = _checked(config)
    mesh = device_mesh.make(config.mesh)
    config = run_folder.open_run(config)
    with processes.first_before_others("data"):
        corpus, tokenizer = loading.open_data(config)
    prompts = Prompts(config, corpus, tokenizer)
    reference = loading.start_params(config, mesh)
    shardings = sharding.on(mesh, state_specs(config))
    host = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings.optimizer)
    steps = config.grpo.passes * config.grpo.prompts * config.grpo.group // config.batch.size  # per iteration

    def initial_state() -> State:
        return create(transformer.init(config.model, jax.random.key(config.seed)), config)

    def moved(state: State, where: Any) -> State:
        if not config.grpo.offload:
            return state
        return state._replace(optimizer=jax.device_put(state.optimizer, where))

    with Checkpoints(config.workdir, config.cadence.keep) as checkpoints, Stop() as stop:
        start = functools.partial(loading.start_params, config, mesh)
        state, progress = checkpoints.restore(initial_state, prompts, shardings, start)
        with (
            RewardPool([name for name in config.grpo.rewards if name in verifiers.REWARDS]) as rewards,
            metrics.Log(config, progress, "GRPO", HEADLINE, throughput=False) as log,
            Samples(config.workdir / "samples.jsonl", progress.step) as drawn,
            Samples(config.workdir / "held_out.jsonl", progress.step + 1) as greedy,
        ):
            sampler = Sampler(config, tokenizer, mesh, rewards)

            def evaluate(state: State) -> State:
                state = moved(state, host)
                samples, figures = sampler.evaluate(prompts, state.params)
                greedy.add(progress.step, samples)
                log.figures(progress, figures)
                return moved(state, shardings.optimizer)

            if not progress.step:
                state = evaluate(state)
            while progress.step < config.grpo.steps and not stop.asked():
                state = moved(state, host)
                samples, took = sampler(prompts, state.params, progress.step)
                state = moved(state, shardings.optimizer)
                drawn.add(progress.step, samples)
                state, progress = update(config, mesh, state, reference, samples, progress, took, log)
                last = progress.step >= config.grpo.steps
                if progress.step % config.cadence.evaluate < steps or last:
                    state = evaluate(state)
                if progress.step % config.cadence.save < steps or last:
                    log.flush()
                    checkpoints.save(state, prompts, progress)
            checkpoints.save(state, prompts, progress)
    return _ended(config, progress)


def _checked(config: Config) -> Config:
    """The config with its tokens and its mesh resolved. Raises ValueError for settings that GRPO does not support."""
    check(
        config.init is not None,
        "GRPO starts from a trained model: give --init the folder of a run or a Hugging Face folder",
    )
    check(config.data.form == "prompts", f"GRPO reads prompts: data.form must be prompts, not {config.data.form}")
    for name in config.grpo.rewards:
        known = ", ".join(verifiers.REWARDS)
        check(
            name in verifiers.REWARDS or Path(name).is_dir(),
            f"grpo.rewards: {name!r} is neither a reward ({known}) nor the folder of a reward model",
        )
    config = dataclasses.replace(config, tokens=config.grpo.steps * config.batch.size * config.batch.length)
    config = loop.resolve(config)
    device_mesh.check_axes(config.mesh, device_mesh.BATCH, "GRPO")
    return config


def _ended(config: Config, progress: Progress) -> Ended:
    finished, held_out = progress.step >= config.grpo.steps, {}
    if finished:
        if processes.is_first():
            plots.draw(config.workdir)
        evaluations = [line for line in metrics.read(config.workdir) if "held_out_reward" in line]
        held_out = {name: x for line in evaluations[-1:] for name, x in line.items() if name.startswith("held_out")}
    return Ended(
        run=config.workdir,
        progress=progress,
        finished=finished,
        held_out=held_out,
        headline=HEADLINE,
        files=("samples.jsonl",),
    )


def update(
    config: Config,
    mesh: jax.sharding.Mesh | None,
    state: State,
    reference: Any,
    samples: list[Sample],
    progress: Progress,
    took: dict[str, float],
    log: metrics.Log,
) -> tuple[State, Progress]:
    """Takes all optimizer steps on these samples, which each epoch over them reshuffles."""
    begin = time.perf_counter()
    g = config.grpo
    rows, figures = arrays(samples, config)
    micro = config.batch.micro_size or config.batch.size
    place = BatchPlacement(mesh, config.mesh, micro)

    def batches(order: np.ndarray) -> list[Batch]:
        parts = order.reshape(-1, config.batch.size // micro, micro)
        parts = parts if place.mine is None else parts[:, :, place.mine]
        return [{name: leaf[part] for name, leaf in rows.items()} for part in parts]

    def scored(params: Any) -> tuple[np.ndarray, Any]:
        found = [
            processes.everywhere(policy.log_probabilities(params, place(b), config=config, mesh=mesh))
            for b in batches(np.arange(len(samples)))
        ]
        return jax.tree.map(lambda *parts: np.concatenate(parts).reshape(-1, *parts[0].shape[2:]), *found)

    old_BT, experts_BTLK = scored(state.params)
    rows["reference_BT"], _ = scored(reference)
    rows["old_BT"] = old_BT
    figures |= took | disagreement(rows, samples, experts_BTLK, g.truncate)
    for epoch in range(g.passes):
        order = np.random.default_rng([config.seed, progress.step, epoch]).permutation(len(samples))
        for batch in batches(order):
            lr = optimizer.learning_rate(config, progress.step, progress.tokens)
            state, on_device = train_step(state, place(batch), lr, config=config, loss=policy.loss, mesh=mesh)
            step = config.batch.size * config.batch.length
            progress = Progress(step=progress.step + 1, tokens=progress.tokens + step)
            log.record(progress, lr, on_device | figures)
    jax.block_until_ready(state)
    log.flush()
    log.figures(progress, {"seconds_updating": time.perf_counter() - begin})
    return state, progress


def disagreement(rows: Batch, samples: list[Sample], experts_BTLK: Any, truncate: float) -> dict[str, float]:
    """Differences between the trainer's forward pass and the sampler's, over the responses' tokens.

    `sampler_gap` and `sampler_gap_max`: mean and maximum absolute difference of log-probabilities.
    `router_disagreement`: the share of (token, layer) pairs with different sets of experts, prompts included. With a
    truncation, `importance`: the mean weight of a token's term, and `truncated`: the share of weights at the limit.
    """
    ahead = (rows["old_BT"] - rows["sampler_BT"])[rows["weights_BT"] > 0]
    figures = {"sampler_gap": float(np.abs(ahead).mean()), "sampler_gap_max": float(np.abs(ahead).max())}
    if samples[0].experts is not None and experts_BTLK is not None:
        differs = [
            (np.sort(theirs[: len(s.experts)], -1) != np.sort(s.experts, -1)).any(-1)
            for s, theirs in zip(samples, experts_BTLK, strict=True)
            if s.experts is not None
        ]
        figures["router_disagreement"] = float(np.concatenate(differs).mean())
    if truncate:
        ratio = np.exp(ahead)
        figures |= {
            "importance": float(np.minimum(ratio, truncate).mean()),
            "truncated": float((ratio > truncate).mean()),
        }
    return figures
