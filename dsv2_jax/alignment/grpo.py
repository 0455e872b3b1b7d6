"""GRPO (section 4.2): sample groups from the policy, reward them, update on them, again, in one job.

An iteration asks the engine for a group of responses to each prompt, scores them, and takes some optimizer steps on
them with pretraining's own step. The weights go from the training layout to the sampler's and nowhere else. What is
sampled follows from the parameters, the seed and the step, so a run that was killed goes on bit for bit.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import loading
from dsv2_jax.alignment import objective, verifiers
from dsv2_jax.alignment.samples import Prompts, Sample, Samples, arrays
from dsv2_jax.config import Config, check
from dsv2_jax.data import corpora
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.model import transformer
from dsv2_jax.model.layers import cast, compute_dtype
from dsv2_jax.parallel import mesh as device_mesh
from dsv2_jax.parallel import sharding
from dsv2_jax.parallel.feed import Feed
from dsv2_jax.parallel.processes import Stop
from dsv2_jax.training import checkpoint, loop, metrics, optimizer
from dsv2_jax.training.checkpoint import Checkpoints, Progress
from dsv2_jax.training.cross_entropy import token_log_probabilities
from dsv2_jax.training.loss import BALANCES
from dsv2_jax.training.step import State, create, state_specs, train_step

Batch = dict[str, Any]


def train(config: Config) -> loop.Outcome:
    """Trains the policy that `config.init` holds until `config.grpo.steps` steps or SIGTERM; `loop.train`'s manners.

    Writes, beside what every run writes, samples.jsonl: a line for every response with its rewards. Raises ValueError
    for what does not fit, as `loop.train` does.
    """
    check(config.init is not None, "GRPO starts from a trained model: give --init a run's or Hugging Face folder")
    check(config.data.form == "prompts", f"GRPO reads prompts: data.form must be prompts, not {config.data.form}")
    for name in config.grpo.rewards:
        known = ", ".join(verifiers.REWARDS)
        check(name in verifiers.REWARDS, f"grpo.rewards: no reward {name!r}; there are {known}")
    config = dataclasses.replace(config, tokens=config.grpo.steps * config.batch.size * config.batch.length)
    config = loop.resolve(config)
    check(
        config.mesh.size("pipeline", "context", "tensor") == 1,
        "GRPO runs on the axes data, fsdp and expert; mesh.pipeline, mesh.context and mesh.tensor must be 1",
    )
    check(jax.process_count() == 1, "GRPO runs in one process yet")
    mesh = device_mesh.make(config.mesh)
    checkpoint.open_run(config)
    corpus = corpora.prepare(config.data)
    words = loading.tokenizer_for(config, corpus)
    checkpoint.keep_tokenizer(config.workdir, words.save)
    prompts = Prompts(config, corpus, words)
    reference = loading.params_for(config, mesh)
    shardings = sharding.on(mesh, state_specs(config))
    steps = config.grpo.passes * config.grpo.prompts * config.grpo.group // config.batch.size  # of an iteration

    def initial_state() -> State:
        return create(transformer.init(config.model, jax.random.key(config.seed)), config)

    with Checkpoints(config.workdir, config.cadence.keep) as checkpoints, Stop() as stop:
        start = functools.partial(loading.params_for, config, mesh)
        state, progress = checkpoints.restore(initial_state, prompts, shardings, start)
        sampler = Sampler(config, state.params, words, mesh)
        with metrics.Log(config, progress) as log, Samples(config.workdir, progress.step) as written:
            if not progress.step:
                log.figures(progress, {"held_out_reward": sampler.evaluate(prompts, state.params)})
            while progress.step < config.grpo.steps and not stop.asked(progress.step):
                samples, took = sampler(prompts, state.params, progress.step)
                written.add(progress.step, samples)
                state, progress = update(config, mesh, state, reference, samples, progress, took, log)
                last = progress.step >= config.grpo.steps
                if progress.step % config.cadence.evaluate < steps or last:
                    log.figures(progress, {"held_out_reward": sampler.evaluate(prompts, state.params)})
                if progress.step % config.cadence.save < steps or last or stop.asked(progress.step):
                    log.flush()
                    checkpoints.save(state, prompts, progress)
    finished = progress.step >= config.grpo.steps
    rewards = [line["held_out_reward"] for line in metrics.read(config.workdir) if "held_out_reward" in line]
    return loop.Outcome(
        progress=progress, finished=finished, held_out={"held_out_reward": rewards[-1]} if finished else {}
    )


class Sampler:
    """Draws and rewards responses."""

    def __init__(self, config: Config, params: Any, words: Any, mesh: jax.sharding.Mesh | None):
        g = config.grpo
        self._config, self._words = config, words
        capacity = Capacity(rows=min(64, g.prompts * g.group), length=config.batch.length + 1)
        self._engine = Engine(params, config.model, compute=config.compute, capacity=capacity, words=words, mesh=mesh)
        self._rewards = {name: verifiers.REWARDS[name] for name in g.rewards}

    def __call__(self, prompts: Prompts, params: Any, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The groups of the next prompts, and the seconds that each phase took."""
        begin = time.perf_counter()
        g = self._config.grpo
        items = [next(prompts) for _ in range(g.prompts)]
        asked = [(item, ids, i) for item, ids in items for i in range(g.group)]
        seeds = np.random.default_rng([self._config.seed, step]).integers(0, 2**31, len(asked))
        answers = self._ask(params, [ids for _, ids, _ in asked], 1.0, seeds)
        sampled = time.perf_counter()
        samples = [
            Sample(item=item, prompt=ids, answer=answer.tokens, logprobs=answer.logprobs, text=text, rewards=rewards)
            for (item, ids, _), answer in zip(asked, answers, strict=True)
            for text in [self._text(answer.tokens)]
            for rewards in [{name: reward(item, text) for name, reward in self._rewards.items()}]
        ]
        tokens = sum(len(s.answer) for s in samples)
        return samples, {
            "sampled_tokens_per_second": tokens / (sampled - begin),
            "seconds_sampling": sampled - begin,
            "seconds_rewarding": time.perf_counter() - sampled,
        }

    def evaluate(self, prompts: Prompts, params: Any) -> float:
        """The mean combined reward of greedy answers to held-out prompts."""
        held_out = prompts.held_out(self._config.grpo.evaluate_prompts)
        answers = self._ask(params, [ids for _, ids in held_out], 0.0, np.zeros(len(held_out), int))
        combined = verifiers.combine(list(self._rewards.values()), self._config.grpo.weights)
        scores = [combined(i, self._text(a.tokens)) for (i, _), a in zip(held_out, answers, strict=True)]
        return float(np.mean(scores))

    def _ask(self, params: Any, prompts: Sequence[Sequence[int]], temperature: float, seeds: Any) -> list[Any]:
        self._engine.replace(params)
        stop, sampling = (self._words.eos_id,), Sampling(temperature=temperature)
        return self._engine.generate(
            [
                Request(
                    prompt=tuple(ids),
                    max_new=self._config.grpo.max_new,
                    sampling=sampling,
                    seed=int(seed),
                    stop_ids=stop,
                )
                for ids, seed in zip(prompts, seeds, strict=True)
            ]
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return self._words.decode(t for t in tokens if t != self._words.eos_id)


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
    """All optimizer steps on these samples, in an order drawn for each pass."""
    begin = time.perf_counter()
    g = config.grpo
    rows, figures = arrays(samples, config)
    micro = config.batch.micro_size or config.batch.size
    feed = Feed(mesh, config.mesh, micro)

    def batches(order: np.ndarray) -> list[Batch]:
        parts = order.reshape(-1, config.batch.size // micro, micro)
        return [{name: leaf[part] for name, leaf in rows.items()} for part in parts]

    everything = np.arange(len(samples))
    for name, params in (("old_BT", state.params), ("reference_BT", reference)):
        found = [_log_probabilities(params, feed(b), config=config, mesh=mesh) for b in batches(everything)]
        rows[name] = np.concatenate([np.asarray(f).reshape(-1, config.batch.length) for f in found])
    gap = np.abs(rows["old_BT"] - rows["sampler_BT"])[rows["weights_BT"] > 0]
    figures |= took | {"sampler_gap": float(gap.mean()), "sampler_gap_max": float(gap.max())}
    for turn in range(g.passes):
        order = np.random.default_rng([config.seed, progress.step, turn]).permutation(len(samples))
        for batch in batches(order):
            lr = optimizer.learning_rate(config, progress.step, progress.tokens)
            state, on_device = train_step(state, feed(batch), lr, config=config, loss=loss, mesh=mesh)
            step = config.batch.size * config.batch.length
            progress = Progress(step=progress.step + 1, tokens=progress.tokens + step)
            log.record(progress, lr, on_device | figures)
    jax.block_until_ready(state)
    log.flush()
    log.figures(progress, {"seconds_updating": time.perf_counter() - begin})
    return state, progress


def loss(
    params: Any,
    batch: dict[str, jax.Array],
    *,
    config: Config,
    exempt_B: jax.Array | None,
    total_weight: jax.Array | float,
    share: jax.Array | float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """GRPO's loss and the balance losses of one micro-batch, under `training.loss.loss`'s convention.

    A row is a response behind its prompt. weights_BT: one over the response's tokens at each of them, so that
    total_weight counts responses. Nothing is dropped: the policy would not be the one that sampled.
    """
    del exempt_B
    g = config.grpo
    policy_BT, entropy_BT, statistics = _policy(params, batch, config)
    mask_BT = (batch["weights_BT"] > 0).astype(jnp.float32)
    correction_BT = objective.truncated_ratio(batch["old_BT"], batch["sampler_BT"], g.truncate) if g.truncate else None
    value, figures = objective.objective(
        policy_BT, batch["old_BT"], batch["reference_BT"], batch["advantages_BT"][:, 0], mask_BT,
        clip=g.clip, beta=g.beta, level=g.level, correction_NT=correction_BT,
    )  # fmt: skip
    figures["entropy"] = (entropy_BT * batch["weights_BT"]).sum()
    figures = {name: x / total_weight for name, x in figures.items()}
    total = figures["objective"] = value / total_weight
    if not statistics:
        return total, figures
    figures |= {name: statistics[name].sum() * share for name in BALANCES}
    total = total + sum(figures[name] for name in BALANCES)
    return total, figures | {"load_LE": statistics["load_E"] * share}


def _policy(params: Any, batch: dict[str, jax.Array], config: Config) -> tuple[jax.Array, jax.Array, dict]:
    model, mesh = config.model, config.mesh
    operands = cast(transformer.arrange(params, model, mesh), compute_dtype(config.compute))
    out = transformer.forward(operands, batch, model=model, compute=config.compute, mesh=mesh)
    head = sharding.gather({"w_head_DW": operands["head"]["w_head_DW"]}, model, mesh)
    hidden_ND, targets_N = out.hidden_BTD.reshape(-1, model.hidden_size), batch["targets_BT"].reshape(-1)
    chunk, shape = config.compute.loss_chunk, batch["targets_BT"].shape
    found = token_log_probabilities(hidden_ND, head["w_head_DW"], targets_N, chunk)
    logp_BT, entropy_BT = (x.reshape(shape) for x in found)
    return logp_BT, entropy_BT, out.statistics


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _log_probabilities(
    params: Any, batch: dict[str, jax.Array], *, config: Config, mesh: jax.sharding.Mesh | None
) -> jax.Array:
    """Of every target of a batch [A, B, T], float32."""

    def run(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.map(lambda one: _policy(params, one, config)[0], batch)

    if mesh is None:
        return run(params, batch)
    specs = sharding.param_specs(config.model, config.mesh), {name: sharding.batch_spec(name) for name in batch}
    out = sharding.batch_spec("logp_BT")
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(params, batch)
