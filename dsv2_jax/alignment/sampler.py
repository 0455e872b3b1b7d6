"""Sampling in GRPO: the engine draws responses with the policy's weights, and rewards score them."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv2_jax.alignment import verifiers
from dsv2_jax.alignment.judge import Judge
from dsv2_jax.alignment.pool import RewardPool
from dsv2_jax.alignment.samples import Prompts, Question, Sample, mixed
from dsv2_jax.alignment.verifiers import Item
from dsv2_jax.config import Config
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request, Result
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.ops import switch
from dsv2_jax.ops.switch import Implementation
from dsv2_jax.parallel.mesh import BATCH

_MAX_ROWS = 64  # responses that a replica samples at a time


def capacity(config: Config, implementation: Implementation) -> Capacity:
    """The engine's capacity: all responses of an iteration at once, at most 64 per replica.

    implementation: of `switch.implementation`. The responses of a group share the full pages of their prompt, so pages
    are as small as the implementation allows.
    """
    rows = -(-config.grpo.prompts * config.grpo.group // config.mesh.size(*BATCH))
    return Capacity(
        rows=min(_MAX_ROWS, rows), length=config.batch.length, page=128 if implementation == "pallas" else 16
    )


class Sampler:
    """Samples and rewards responses, equal in every process. It holds the policy's weights only during a call."""

    def __init__(self, config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh | None, rewards: RewardPool):
        """rewards: computes the verifiers. Raises ValueError for a reward model that does not fit the policy."""
        g = config.grpo
        self._config, self._tokenizer = config, tokenizer
        self._engine = Engine(
            None,
            config.model,
            compute=config.compute,
            capacity=capacity(config, switch.implementation(config.compute)),
            tokenizer=tokenizer,
            mesh=mesh,
            routes=config.model.moe_layers > 0,
        )
        self._rewards = rewards
        folders = (name for name in g.rewards if name not in verifiers.REWARDS)
        self._judges = {name: Judge(Path(name), config, tokenizer, mesh) for name in folders}

    def __call__(self, prompts: Prompts, params: Any, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The responses to the next prompts, group by group, and figures of speed and time."""
        begin = time.perf_counter()
        g = self._config.grpo
        questions = [question for question in [next(prompts) for _ in range(g.prompts)] for _ in range(g.group)]
        seeds = np.random.default_rng([self._config.seed, step]).integers(0, 2**31, len(questions))
        answers = self._sample(params, questions, 1.0, seeds)
        sampled = time.perf_counter()
        samples = rewarded(questions, answers, self._tokenizer, self._rewards, self._judges, self._config.grpo.rewards)
        tokens = sum(len(s.answer) for s in samples)
        return samples, {
            "sampled_tokens_per_second": tokens / (sampled - begin),
            "seconds_sampling": sampled - begin,
            "seconds_rewarding": time.perf_counter() - sampled,
        }

    def evaluate(self, prompts: Prompts, params: Any) -> tuple[list[Sample], dict[str, float]]:
        """Greedy answers to held-out prompts, and their figures.

        `held_out_reward` is the mean combined reward. If the first reward is a verifier, `held_out_solved` is the share
        of answers that get 1 from it, with `held_out_solved_<task>` for each of several tasks.
        """
        questions = prompts.held_out(self._config.grpo.evaluate_prompts)
        answers = self._sample(params, questions, 0.0, np.zeros(len(questions), int))
        samples = rewarded(questions, answers, self._tokenizer, self._rewards, self._judges, self._config.grpo.rewards)
        first = self._config.grpo.rewards[0]
        figures = {"held_out_reward": float(np.mean([mixed(s, self._config.grpo) for s in samples]))}
        if first in self._judges:
            return samples, figures
        figures["held_out_solved"] = _solved(samples, first)
        tasks = sorted({s.item["task"] for s in samples if "task" in s.item})
        if len(tasks) > 1:
            for task in tasks:
                figures[f"held_out_solved_{task}"] = _solved([s for s in samples if s.item.get("task") == task], first)
        return samples, figures

    def _sample(
        self, params: Any, questions: Sequence[Question], temperature: float, seeds: np.ndarray
    ) -> list[Result]:
        self._engine.replace(params)
        answers = self._engine.generate(
            [
                Request(
                    prompt=ids,
                    max_new=self._config.grpo.max_new,
                    sampling=Sampling(temperature=temperature),
                    seed=int(seed),
                    stop_ids=(self._tokenizer.eos_id,),
                )
                for (_, ids), seed in zip(questions, seeds, strict=True)
            ]
        )
        self._engine.release()  # frees the memory for the update
        return answers


Judged = Callable[[Sequence[tuple[int, ...]]], np.ndarray]  # sequences of ids -> a reward model's scores


def rewarded(
    questions: Sequence[Question],
    answers: Sequence[Result],
    tokenizer: Tokenizer,
    verify: Callable[[list[Item], list[str]], dict[str, np.ndarray]],
    judges: Mapping[str, Judged],
    names: Sequence[str],
) -> list[Sample]:
    """The responses with their rewards, in the order of `names`.

    verify: Rewards of verifiers, such as a `RewardPool`, from items and texts. judges: Reward models, which score ids.
    A reward model scores at an end of sequence. In an unfinished response it replaces the last token, so that the
    length does not change.
    """
    eos = tokenizer.eos_id
    texts = [tokenizer.decode(t for t in answer.tokens if t != eos) for answer in answers]
    rewards = verify([item for item, _ in questions], texts)
    ended = [answer.tokens if answer.reason == "stop" else (*answer.tokens[:-1], eos) for answer in answers]
    judged = [(*ids, *answer) for (_, ids), answer in zip(questions, ended, strict=True)]
    rewards |= {name: judge(judged) for name, judge in judges.items()}
    return [
        Sample(
            item=item,
            prompt=ids,
            answer=answer.tokens,
            logprobs=answer.logprobs,
            text=text,
            rewards={name: float(rewards[name][row]) for name in names},
            finished=answer.reason == "stop",
            experts=answer.experts,
        )
        for row, ((item, ids), answer, text) in enumerate(zip(questions, answers, texts, strict=True))
    ]


def _solved(samples: Sequence[Sample], reward: str) -> float:
    return float(np.mean([s.rewards[reward] >= 1 for s in samples]))
