"""Compares tokens per second of the engine and of transformers' generate on CPU, with one model and equal requests.

    python benchmarks/engine.py [--rounds 3] [--cases batch_1 ... long_16] [--dtype float32] [--json FILE]

Each side runs in its own process with all cores, one after another, with compiled programs. The engine runs on one
device with all cores, and on one device per core over the tensor axis; the better counts. transformers runs eagerly and
under torch.compile with a static cache. It runs one batch, padded to its longest prompt, until its longest answer ends,
and for mixed requests also batches of 16 sorted by length; its best variant counts. On both sides rates count requested
tokens only, and times include the prompts.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import rich.console
import rich.table

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from benchmarks.cpu_vs_transformers import SMALL  # noqa: E402
from dsv2_jax import cli, parameters  # noqa: E402
from dsv2_jax.config import check  # noqa: E402

Case = Literal["batch_1", "batch_16", "mixed_64", "long_1", "long_16"]
Dtype = Literal["float32", "bfloat16"]
Side = Literal["one_device", "tensor", "eager", "compiled"]
OURS = ("one_device", "tensor")
_SHORT, _LONG = (128, 64), (1024, 256)  # tokens of a prompt and of its answer
ONE_LENGTH = {"batch_1": _SHORT, "batch_16": _SHORT, "long_1": _LONG, "long_16": _LONG}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineBenchmark:
    """Compare generated tokens per second of the engine and of transformers' generate on CPU."""

    rounds: int = 3  # timed rounds of each side; the median counts
    cases: tuple[Case, ...] = ("batch_1", "batch_16", "mixed_64", "long_1", "long_16")
    sides: tuple[Side, ...] = ("one_device", "tensor", "eager", "compiled")
    dtype: Dtype = "float32"  # of both sides' weights and activations
    limit: int = 900  # seconds before a side is stopped
    json: Path | None = None  # write the figures to this file

    def __post_init__(self) -> None:
        for name in ("rounds", "limit"):
            check(getattr(self, name) > 0, f"--{name} must be positive, not {getattr(self, name)}")


def requests(case: str, number: int) -> list[tuple[list[int], int]]:
    """(prompt, new tokens) of each request. Every round has its own prompts, so that no cache holds them."""
    rng = np.random.default_rng((len(case), number))
    count = int(case.rsplit("_", 1)[1])
    if case in ONE_LENGTH:
        lengths, new = ([n] * count for n in ONE_LENGTH[case])
    else:  # all rounds have the same lengths
        sizes = np.random.default_rng(0)
        lengths, new = sizes.integers(16, 257, count).tolist(), sizes.integers(16, 129, count).tolist()
    return [(rng.integers(0, SMALL.vocab_size, n).tolist(), k) for n, k in zip(lengths, new, strict=True)]


def run_ours(case: str, rounds: int, dtype: Dtype, tensor: int) -> dict[str, Any]:
    """Rates of the engine on `tensor` devices, and the number of compilations after warm-up."""
    import jax

    jax.config.update("jax_num_cpu_devices", tensor)
    from dsv2_jax.config import Compute, Mesh
    from dsv2_jax.inference.engine import Capacity, Engine
    from dsv2_jax.inference.request import Request
    from dsv2_jax.model import transformer
    from dsv2_jax.parallel import mesh

    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **_: compiled.append(event) if "backend_compile" in event else None  # noqa: ARG005
    )
    cli.keep_compiled_programs()
    cli.keep_freed_memory()
    params = transformer.init(SMALL, jax.random.key(0))
    rows = int(case.rsplit("_", 1)[1])
    capacity = Capacity(rows=rows, length=max(len(prompt) + new for prompt, new in requests(case, 0)))
    devices = mesh.make(Mesh(fsdp=1, tensor=tensor))
    engine = Engine(params, SMALL, compute=Compute(dtype=dtype, remat="none"), capacity=capacity, mesh=devices)
    engine.warm()
    before, rates = len(compiled), []
    for number in range(rounds + 1):
        wanted = [Request(prompt=tuple(prompt), max_new=new) for prompt, new in requests(case, number)]
        begin = time.perf_counter()
        results = engine.generate(wanted)
        rates.append(sum(len(result.tokens) for result in results) / (time.perf_counter() - begin))
    return {"rates": rates[1:], "compiled_after_warm_up": len(compiled) - before}


def run_transformers(case: str, rounds: int, dtype: Dtype, compiled: bool) -> dict[str, Any]:
    """Rates of transformers with each round's best batching."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    from dsv2_jax.hf.configuration import to_hf_config

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model: Any = DeepseekV2ForCausalLM(DeepseekV2Config.from_dict(to_hf_config(SMALL))).to(getattr(torch, dtype)).eval()
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        model.forward = torch.compile(model.forward)
        settings["cache_implementation"] = "static"

    def generate(batch: list[tuple[list[int], int]]) -> None:
        width = max(len(prompt) for prompt, _ in batch)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
        model.generate(ids, attention_mask=mask, max_new_tokens=max(new for _, new in batch), **settings)

    def rate(batches: list[list[tuple[list[int], int]]]) -> float:
        begin = time.perf_counter()
        for batch in batches:
            generate(batch)
        return sum(new for batch in batches for _, new in batch) / (time.perf_counter() - begin)

    rates = []
    for number in range(rounds + 1):
        wanted = requests(case, number)
        batchings = [[wanted]]
        if case not in ONE_LENGTH:
            by_length = sorted(wanted, key=lambda request: request[1])
            batchings.append([by_length[i : i + 16] for i in range(0, len(by_length), 16)])
        rates.append(max(map(rate, batchings)))
    return {"rates": rates[1:]}


def measure(side: str, case: str, options: EngineBenchmark) -> dict[str, Any]:
    """A side's figures, measured in its own process."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "worker", side, case, str(options.rounds), options.dtype]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, check=False, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {options.limit} seconds (--limit)"}
    if done.returncode:
        return {"error": f"ended with exit code {done.returncode}; see its error above"}
    found = json.loads(done.stdout.splitlines()[-1])
    return found | ({"tokens_per_second": statistics.median(found["rates"])} if "rates" in found else {})


def worker(side: str, case: str, rounds: int, dtype: Dtype) -> dict[str, Any]:
    """The figures of one side, in its process."""
    if side in OURS:
        cores = len(os.sched_getaffinity(0))
        tensor = math.gcd(cores, SMALL.attention.num_attention_heads) if side == "tensor" else 1
        return run_ours(case, rounds, dtype, tensor)
    try:
        return run_transformers(case, rounds, dtype, compiled=side == "compiled")
    except Exception as error:  # any failure of inductor; the parent prints it
        if side != "compiled":
            raise
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> int:
    """Runs every case and prints the table."""
    options = cli.parse(EngineBenchmark(), prog="engine.py")
    console = rich.console.Console()
    table = rich.table.Table(
        "tokens/s", *options.sides, "ratio", "compiled after warm-up",
        title=f"{parameters.count(SMALL) / 1e6:.1f}M parameters, {options.dtype}, median of {options.rounds} rounds",
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for case in options.cases:
        found: dict[str, Any] = {side: measure(side, case, options) for side in options.sides}
        rates = {side: f.get("tokens_per_second", 0.0) for side, f in found.items()}
        ours = max((rate for side, rate in rates.items() if side in OURS), default=0.0)
        theirs = max((rate for side, rate in rates.items() if side not in OURS), default=0.0)
        ratio = ours / theirs if theirs else float("nan")
        figures[case] = found | {"ratio": ratio}
        for side, f in found.items():
            if "error" in f:
                console.print(f"{case}, {side}: {f['error']}")
        compiled = [str(f["compiled_after_warm_up"]) for f in found.values() if "compiled_after_warm_up" in f]
        table.add_row(case, *(f"{rates[side]:.1f}" for side in options.sides), f"{ratio:.2f}", ", ".join(compiled))
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _, _, side_, case_, rounds_, dtype_ = sys.argv
        print(json.dumps(worker(side_, case_, int(rounds_), cast(Dtype, dtype_))))
    else:
        cli.main(main)
