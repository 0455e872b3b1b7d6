"""The paper's benchmarks (section 3.2.1, Tables 2 to 6): shots, metric, scores, and the task that measures them here.

A benchmark maps to a task of lm-eval, which loads its data from the network; some also map to a task of `tasks/`, which
does not. For a benchmark without a task, `missing` gives the reason.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row of the paper's tables. Scores are percentages, bits per byte or judges' marks; None if not given."""

    name: str
    metric: str  # the paper's name of the metric
    shots: int
    task: str = ""  # lm-eval's
    key: str = ""  # lm-eval's metric with its filter: `exact_match,strict-match`
    offline: str = ""  # a task of tasks/
    missing: str = ""  # why there is no task
    dense_67b: float | None = None
    v2: float | None = None
    lite: float | None = None
    sft: float | None = None  # this and the next two: chat models
    rl: float | None = None
    lite_chat: float | None = None


def _base(name: str, metric: str, shots: int, scores: tuple[float | None, ...], **more: Any) -> Benchmark:
    dense, v2, lite = scores
    return Benchmark(name=name, metric=metric, shots=shots, dense_67b=dense, v2=v2, lite=lite, **more)


def _chat(name: str, metric: str, shots: int, scores: tuple[float | None, ...], **more: Any) -> Benchmark:
    sft, rl, lite = scores
    return Benchmark(name=name, metric=metric, shots=shots, sft=sft, rl=rl, lite_chat=lite, **more)


_NO_TASK = "lm-eval has no such task, and no package has its data"
_JUDGE = "another model judges the answers, and this project does not run one"

GROUPS: dict[str, tuple[Benchmark, ...]] = {
    "deepseek_v2_base": (
        _base("Pile-test", "BPB", 0, (0.642, 0.606, None), task="pile_10k", key="bits_per_byte,none"),
        _base("BBH", "EM", 3, (68.7, 78.9, 44.1), task="bbh_cot_fewshot", key="exact_match,get-answer"),
        _base("MMLU", "acc", 5, (71.3, 78.5, 58.3), task="mmlu", key="acc,none", offline="offline_mmlu"),
        _base("DROP", "F1", 3, (69.7, 80.1, None), task="drop", key="f1,none"),
        _base("ARC-Easy", "acc", 25, (95.3, 97.6, 70.9), task="arc_easy", key="acc,none"),
        _base("ARC-Challenge", "acc", 25, (86.4, 92.4, 51.2), task="arc_challenge", key="acc_norm,none"),
        _base(
            "HellaSwag",
            "acc",
            10,
            (86.3, 84.2, None),
            task="hellaswag",
            key="acc_norm,none",
            offline="offline_hellaswag_100",
        ),
        _base("PIQA", "acc", 0, (83.6, 83.7, None), task="piqa", key="acc_norm,none", offline="offline_piqa"),
        _base("WinoGrande", "acc", 5, (84.9, 84.9, None), task="winogrande", key="acc,none"),
        _base("RACE-Middle", "acc", 5, (69.9, 73.1, None), missing="lm-eval's race is the high-school part only"),
        _base("RACE-High", "acc", 5, (50.7, 52.7, None), task="race", key="acc,none"),
        _base("TriviaQA", "EM", 5, (78.9, 79.9, 64.2), task="triviaqa", key="exact_match,remove_whitespace"),
        _base("NaturalQuestions", "EM", 5, (36.6, 38.7, 26.0), task="nq_open", key="exact_match,remove_whitespace"),
        _base("AGIEval", "acc", 0, (41.3, 51.2, 33.2), task="agieval", key="acc,none"),
        _base(
            "HumanEval",
            "pass@1",
            0,
            (45.1, 48.8, 29.9),
            missing="lm-eval's own runs programs outside a sandbox",
            key="pass_at_1,none",
            offline="offline_human_eval",
        ),
        _base("MBPP", "pass@1", 3, (57.4, 66.6, 43.2), missing="lm-eval's own runs programs outside a sandbox"),
        _base("CRUXEval-I", "acc", 2, (42.5, 52.8, None), missing="lm-eval's own runs programs outside a sandbox"),
        _base("CRUXEval-O", "acc", 2, (41.0, 49.8, None), missing="lm-eval's own runs programs outside a sandbox"),
        _base(
            "GSM8K",
            "EM",
            8,
            (63.4, 79.2, 41.1),
            task="gsm8k",
            key="exact_match,flexible-extract",
            offline="offline_gsm8k_100",
        ),
        _base("MATH", "EM", 4, (18.7, 43.6, 17.1), task="minerva_math", key="exact_match,none"),
        _base("CMath", "EM", 3, (63.0, 78.7, 58.4), missing=_NO_TASK),
        _base("CLUEWSC", "EM", 5, (81.0, 82.2, 74.3), missing=_NO_TASK),
        _base("C-Eval", "acc", 5, (66.1, 81.7, 60.3), task="ceval-valid", key="acc,none"),
        _base("CMMLU", "acc", 5, (70.8, 84.0, 64.3), task="cmmlu", key="acc,none"),
        _base("CMRC", "EM", 1, (73.4, 77.5, None), missing=_NO_TASK),
        _base("C3", "acc", 0, (75.3, 77.4, None), missing=_NO_TASK),
        _base("CHID", "acc", 0, (92.1, 92.7, None), missing=_NO_TASK),
        _base("CCPM", "acc", 0, (88.5, 93.1, None), missing=_NO_TASK),
    ),
    "deepseek_v2_chat": (
        _chat("MMLU", "acc", 5, (78.4, 77.8, 55.7), task="mmlu", key="acc,none", offline="offline_mmlu"),
        _chat(
            "GSM8K",
            "EM",
            8,
            (90.8, 92.2, 72.0),
            task="gsm8k",
            key="exact_match,flexible-extract",
            offline="offline_gsm8k_100",
        ),
        _chat("MATH", "EM", 4, (52.7, 53.9, 27.9), task="minerva_math", key="exact_match,none"),
        _chat(
            "HumanEval",
            "pass@1",
            0,
            (76.8, 81.1, 57.3),
            missing="lm-eval's own runs programs outside a sandbox",
            key="pass_at_1,none",
            offline="offline_human_eval",
        ),
        _chat("MBPP", "pass@1", 3, (70.4, 72.0, None), missing="lm-eval's own runs programs outside a sandbox"),
        _chat("IFEval", "prompt, loose", 0, (64.1, 63.8, None), task="ifeval", key="prompt_level_loose_acc,none"),
        _chat("BBH", "EM", 3, (81.3, 79.7, None), task="bbh_cot_fewshot", key="exact_match,get-answer"),
        _chat("C-Eval", "acc", 5, (None, None, 60.1), task="ceval-valid", key="acc,none"),
        _chat("LiveCodeBench", "pass@1", 0, (None, None, None), missing=_NO_TASK),
        _chat("MT-Bench", "1 to 10", 0, (8.62, 8.97, None), missing=_JUDGE),
        _chat("AlpacaEval 2.0", "win rate", 0, (30.0, 38.9, None), missing=_JUDGE),
        _chat("AlignBench", "1 to 10", 0, (7.74, 7.91, None), missing=_JUDGE),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One task to run. shots: None for the task's number. benchmark: the paper's, if it is one of them."""

    task: str
    shots: int | None = None
    key: str = ""
    benchmark: Benchmark | None = None
    missing: str = ""


def rows(names: str, *, offline: bool, shots: int | None) -> list[Row]:
    """The tasks of comma-separated names: groups of the paper, or any name that lm-eval knows.

    offline: of the paper's groups, only tasks that need no network. shots: overrides the paper's and the tasks' number.
    """
    listed: list[Row] = []
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in GROUPS:
            listed.append(Row(task=name, shots=shots))
            continue
        for b in GROUPS[name]:
            task = b.offline if b.offline and (offline or not b.task) else b.task
            missing = "" if task else b.missing
            if offline and not b.offline:
                missing = b.missing or "its data come from the network, and --offline is set"
            key = "" if task == b.offline else b.key
            wanted = b.shots if shots is None else shots
            listed.append(Row(task=task, shots=wanted, key=key, benchmark=b, missing=missing))
    return listed
