"""GRPO's other half: responses drawn from the engine with the policy's weights, and rewarded."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv2_jax.alignment import verifiers
from dsv2_jax.alignment.judge import Judge
from dsv2_jax.alignment.pool import RewardPool
from dsv2_jax.alignment.samples import Prompts, Question, Sample, mixed
from dsv2_jax.config import Config
from dsv2_jax.data.tokenizer import Tokenizer
from dsv2_jax.inference.engine import Capacity, Engine
from dsv2_jax.inference.request import Request, Result
from dsv2_jax.inference.sampling import Sampling
from dsv2_jax.ops import switch
from dsv2_jax.ops.switch import Implementation
from dsv2_jax.parallel.mesh import BATCH

_MOST_ROWS = 64  # responses that are drawn at a time, of each group of devices


def capacity(config: Config, implementation: Implementation) -> Capacity:
    """The engine's capacity: all responses of an iteration at once, up to 64 for each group of devices.

    implementation: of `switch.implementation`. The engine computes a prompt once for its group, in full pages. Pages
    are small where no kernel needs large ones.
    """
    each = -(-config.grpo.prompts * config.grpo.group // config.mesh.size(*BATCH))
    return Capacity(
        rows=min(_MOST_ROWS, each), length=config.batch.length, page=128 if implementation == "pallas" else 16
    )


class Sampler:
    """Draws and rewards responses, the same in every process. Between calls it holds no weights of the policy."""

    def __init__(self, config: Config, words: Tokenizer, mesh: jax.sharding.Mesh | None, rewards: RewardPool):
        """rewards: those that are no reward models. Raises ValueError for a reward model that does not fit."""
        g = config.grpo
        self._config, self._words = config, words
        self._engine = Engine(
            None,
            config.model,
            compute=config.compute,
            capacity=capacity(config, switch.implementation(config.compute)),
            tokenizer=words,
            mesh=mesh,
            routes=config.model.moe_layers > 0,
        )
        self._rewards = rewards
        others = (name for name in g.rewards if name not in verifiers.REWARDS)
        self._judges = {name: Judge(Path(name), config, words, mesh) for name in others}

    def __call__(self, prompts: Prompts, params: Any, step: int) -> tuple[list[Sample], dict[str, float]]:
        """The groups of the next prompts, and the seconds that each phase took."""
        begin = time.perf_counter()
        g = self._config.grpo
        asked = [question for question in [next(prompts) for _ in range(g.prompts)] for _ in range(g.group)]
        seeds = np.random.default_rng([self._config.seed, step]).integers(0, 2**31, len(asked))
        answers = self._ask(params, asked, 1.0, seeds)
        sampled = time.perf_counter()
        samples = self._rewarded(asked, answers)
        tokens = sum(len(s.answer) for s in samples)
        return samples, {
            "sampled_tokens_per_second": tokens / (sampled - begin),
            "seconds_sampling": sampled - begin,
            "seconds_rewarding": time.perf_counter() - sampled,
        }

    def evaluate(self, prompts: Prompts, params: Any) -> tuple[list[Sample], dict[str, float]]:
        """Greedy answers to held-out prompts, and their figures.

        `held_out_reward`, the mean combined reward. If the first of the rewards is a verifier, `held_out_solved`, the
        share of answers to which it gives 1; and of several tasks that share for each.
        """
        asked = prompts.held_out(self._config.grpo.evaluate_prompts)
        samples = self._rewarded(asked, self._ask(params, asked, 0.0, np.zeros(len(asked), int)))
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

    def _ask(self, params: Any, asked: Sequence[Question], temperature: float, seeds: np.ndarray) -> list[Result]:
        self._engine.replace(params)
        answers = self._engine.generate(
            [
                Request(
                    prompt=ids,
                    max_new=self._config.grpo.max_new,
                    sampling=Sampling(temperature=temperature),
                    seed=int(seed),
                    stop_ids=(self._words.eos_id,),
                )
                for (_, ids), seed in zip(asked, seeds, strict=True)
            ]
        )
        self._engine.release()  # their memory is the update's
        return answers

    def _rewarded(self, asked: Sequence[Question], answers: Sequence[Result]) -> list[Sample]:
        texts = [self._words.decode(t for t in answer.tokens if t != self._words.eos_id) for answer in answers]
        rewards = self._rewards([item for item, _ in asked], texts)
        judged = [(*ids, *self._ended(answer)) for (_, ids), answer in zip(asked, answers, strict=True)]
        rewards |= {name: judge(judged) for name, judge in self._judges.items()}
        return [
            Sample(
                item=item,
                prompt=ids,
                answer=answer.tokens,
                logprobs=answer.logprobs,
                text=text,
                rewards={name: float(rewards[name][row]) for name in self._config.grpo.rewards},
                finished=answer.reason == "stop",
                experts=answer.experts,
            )
            for row, ((item, ids), answer, text) in enumerate(zip(asked, answers, texts, strict=True))
        ]

    def _ended(self, answer: Result) -> tuple[int, ...]:
        """The answer as a reward model reads it, at an end of sequence: that of an unfinished one takes the place of
        its last token, so that it is no longer than the answer."""
        return answer.tokens if answer.reason == "stop" else (*answer.tokens[:-1], self._words.eos_id)


def _solved(samples: Sequence[Sample], reward: str) -> float:
    return float(np.mean([s.rewards[reward] >= 1 for s in samples]))
