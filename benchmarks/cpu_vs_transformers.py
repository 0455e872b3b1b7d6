"""Compares this project with transformers' DeepseekV2ForCausalLM on CPU: training, prefill and decode.

    python benchmarks/cpu_vs_transformers.py [--threads N] [--rounds 5] [--cases train prefill ...] [--json FILE]

Each side runs in its own process with the same threads. Sides alternate: while one runs, the others wait. Each round
runs twice, and the second run is timed. This project trains with its training step and generates with its engine.
transformers runs eagerly and under torch.compile; the better of the two counts. Rates are medians over the rounds. The
share of the peak is the model's FLOP/s over those of a large matrix product, measured between the rounds.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import rich.console
import rich.table

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))  # Python searches the script's own folder only

from dsv2_jax import cli, parameters  # noqa: E402
from dsv2_jax.config import Attention, Batch, Compute, Config, Model, Moe, Rope, check  # noqa: E402

Case = Literal["train", "train_bf16", "prefill", "decode_b1", "decode_b16"]
SIDES = ("dsv2_jax", "eager", "compiled")
BATCH, LENGTH = 8, 512  # of training
PROMPT = 2048  # tokens of prefill
CONTEXT, NEW = 512, 32  # tokens of decode: before the first round, and of a round

SMALL = Model(  # 111.2M parameters
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=8,
    intermediate_size=1408,
    initializer_range=0.02,
    attention=Attention(
        num_attention_heads=8, q_lora_rank=0, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    ),
    rope=Rope(),
    moe=Moe(
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=2,
        moe_intermediate_size=256,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        expert_balance=0.0,  # transformers has no balance losses
        device_balance=0.0,
        communication_balance=0.0,
        capacity_factor=0.0,
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuBenchmark:
    """Compare tokens per second of this project and of transformers on CPU."""

    threads: int = 0  # of each side; 0 for all cores
    rounds: int = 5  # timed rounds of each side
    cases: tuple[Case, ...] = ("train", "train_bf16", "prefill", "decode_b1", "decode_b16")
    json: Path | None = None  # write the figures to this file

    def __post_init__(self) -> None:
        cores = len(os.sched_getaffinity(0))
        check(0 <= self.threads <= cores, f"--threads must be 0 to {cores} here, not {self.threads}")
        check(self.rounds > 0, f"--rounds must be positive, not {self.rounds}")


def rows(case: str) -> int:
    """Sequences of a decode case."""
    return int(case.removeprefix("decode_b"))


def work(case: str) -> tuple[int, float]:
    """(tokens, FLOPs) of a round: of the matrix products, with half of the scores for causal attention."""
    heads, width = SMALL.attention.num_attention_heads, SMALL.attention.qk_head_dim + SMALL.attention.v_head_dim
    per_key = 2 * SMALL.num_hidden_layers * heads * width
    per_token = 2 * parameters.count_activated(SMALL)
    if case.startswith("train"):
        return BATCH * LENGTH, 3 * BATCH * LENGTH * (per_token + per_key * LENGTH / 2)
    if case == "prefill":
        head = 2 * SMALL.vocab_size * SMALL.hidden_size  # for the last token only
        return PROMPT, PROMPT * (per_token - head + per_key * PROMPT / 2) + head
    # FLOPs of the expanded form with keys and values given. Absorbed decode has wider keys and needs more.
    return rows(case) * NEW, rows(case) * NEW * (per_token + per_key * CONTEXT)


def run_ours(case: str, rounds: int) -> Callable[[], float]:
    """This project's side, compiled: a function that runs a round and returns its seconds."""
    import jax
    import jax.numpy as jnp

    from dsv2_jax.inference.engine import Capacity, Engine
    from dsv2_jax.inference.request import Request
    from dsv2_jax.model import transformer
    from dsv2_jax.training.step import create, train_step

    dtype = "bfloat16" if case == "train_bf16" else "float32"
    compute = Compute(dtype=dtype, remat="none", loss_chunk=512)
    params = transformer.init(SMALL, jax.random.key(0))
    if case.startswith("train"):
        cli.keep_freed_memory()  # as train.py does
        batch = {"micro_size": 0, "size": BATCH, "length": LENGTH}
        config = Config(workdir=Path(), model=SMALL, batch=Batch(**batch), compute=compute)
        tokens_BT = jax.random.randint(jax.random.key(1), (1, BATCH, LENGTH), 0, SMALL.vocab_size)
        ones_BT = jnp.ones_like(tokens_BT)
        inputs = {
            "tokens_BT": tokens_BT,
            "targets_BT": jnp.roll(tokens_BT, -1, axis=-1),
            "positions_BT": jnp.broadcast_to(jnp.arange(LENGTH), tokens_BT.shape),
            "segments_BT": ones_BT,
            "weights_BT": ones_BT.astype(jnp.float32),
            "bytes_BT": ones_BT,
        }
        state = create(params, config)

        def step() -> None:
            nonlocal state
            state, _ = train_step(state, inputs, 1e-4, config=config)
            jax.block_until_ready(state)

        return _timed(step)

    size, length, new = (1, PROMPT, 1) if case == "prefill" else (rows(case), CONTEXT, NEW * (2 * rounds + 1) + 32)
    engine = Engine(params, SMALL, compute=compute, capacity=Capacity(rows=size, length=length + new))
    draws = np.random.default_rng(1)

    def prompt() -> Request:
        """A new prompt each time, since the engine reuses pages of a known prompt."""
        return Request(prompt=tuple(draws.integers(0, SMALL.vocab_size, length).tolist()), max_new=new)

    if case == "prefill":
        return _timed(lambda: engine.generate([prompt()]))
    waiting = {engine.add(prompt()) for _ in range(size)}
    while waiting:  # until the cache holds every context
        waiting -= {event.id for event in engine.step()}

    def decode() -> None:
        for _ in range(NEW):
            assert len(engine.step()) == size

    return _timed(decode)


def run_transformers(case: str, rounds: int, compiled: bool) -> Callable[[], float]:
    """transformers' side, compiled: a function that runs a round and returns its seconds."""
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache, StaticCache

    from dsv2_jax.hf.configuration import to_hf_config

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    model: Any = DeepseekV2ForCausalLM(DeepseekV2Config.from_dict(to_hf_config(SMALL)))
    forward = torch.compile(model) if compiled else model
    if case.startswith("train"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(0, SMALL.vocab_size, (BATCH, LENGTH))

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "train_bf16"):
                loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return _timed(step)

    model.eval()
    if case == "prefill":
        tokens = torch.randint(0, SMALL.vocab_size, (1, PROMPT))

        @torch.no_grad()
        def fill() -> None:
            forward(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)

        return _timed(fill)

    slots = CONTEXT + NEW * (2 * rounds + 1)
    store = StaticCache(config=model.config, max_cache_len=slots) if compiled else DynamicCache(config=model.config)
    last, at = torch.randint(0, SMALL.vocab_size, (rows(case), CONTEXT)), 0

    @torch.no_grad()
    def decode(steps: int, call: Any) -> None:
        nonlocal last, at
        for _ in range(steps):
            positions = torch.arange(at, at + last.shape[1]).expand(last.shape)
            out = call(input_ids=last, position_ids=positions, past_key_values=store, use_cache=True, logits_to_keep=1)
            at, last = at + last.shape[1], out.logits[:, -1:].argmax(-1)

    decode(1, model)  # the context
    return _timed(lambda: decode(NEW, forward))


def _timed(work: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    seconds()  # compiles
    return seconds


def matmul_peak(dtype: str) -> float:
    """The best FLOP/s of a large matrix product in this process, to compare the model's with."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.ones((4096, 512), dtype), jnp.ones((512, 1408), dtype)
    product = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    run = _timed(lambda: product(a, b).block_until_ready())
    return 2 * math.prod(a.shape) * b.shape[1] / min(run() for _ in range(10))


def worker(side: str, case: str, rounds: int, out: IO[str]) -> None:
    """One side's process.

    Writes a JSON line when it is ready or fails. Then runs a round for every line that it reads, and writes a JSON line
    with its time.
    """

    def send(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    begin = time.perf_counter()
    if side == "dsv2_jax":
        run = run_ours(case, rounds)
    else:
        try:
            run = run_transformers(case, rounds, compiled=side == "compiled")
        except Exception as error:  # any failure of inductor; the parent prints it
            if side != "compiled":
                raise
            send(error=f"{type(error).__name__}: {error}".splitlines()[0])
            return
    send(ready=time.perf_counter() - begin)
    for _ in sys.stdin:
        peak = matmul_peak("bfloat16" if case == "train_bf16" else "float32") if side == "dsv2_jax" else None
        run()  # warms up the memory, which was idle while the other side ran
        send(seconds=run(), peak=peak)


class Side:
    """A worker's process, seen from its parent."""

    def __init__(self, side: str, case: str, options: CpuBenchmark):
        cores = sorted(os.sched_getaffinity(0))
        self.cores = cores[: options.threads or len(cores)]
        # Huge pages save both sides page faults in large temporaries.
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(len(self.cores)),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, __file__, "worker", side, case, str(options.rounds), ",".join(map(str, self.cores))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.rates: list[float] = []
        self.peaks: list[float] = []
        self.case, self.error = case, self._read().get("error")

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended with exit code {self.process.wait()}; see its error above")
        return json.loads(line)

    def round(self) -> None:
        """Runs one round and records its rate."""
        if self.error:
            return
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        message = self._read()
        self.rates.append(work(self.case)[0] / message["seconds"])
        self.peaks += [message["peak"]] if message["peak"] else []

    def rate(self) -> float:
        """Median tokens per second; 0 if this side cannot run."""
        return statistics.median(self.rates) if self.rates else 0.0

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(case: Case, options: CpuBenchmark, console: rich.console.Console) -> dict[str, Any]:
    """All sides on one case, in alternating rounds."""
    sides = {}
    for name in SIDES:  # one after another, since compilation uses all threads
        with console.status(f"{case}: starting {name}"):
            sides[name] = Side(name, case, options)
    with console.status(f"{case}: measuring"):
        for _ in range(options.rounds):
            for side in sides.values():
                side.round()
    for side in sides.values():
        side.close()
    ours, eager, compiled = (sides[name].rate() for name in SIDES)
    peak, per_token = statistics.median(sides["dsv2_jax"].peaks), work(case)[1] / work(case)[0]
    return {
        "ratio": ours / max(eager, compiled),
        "tokens_per_second": ours,
        "transformers_eager": eager,
        "transformers_compiled": compiled or None,
        "transformers_compiled_error": sides["compiled"].error,
        "matmul_peak_gflops": peak / 1e9,
        "share_of_peak": ours * per_token / peak,
        "transformers_share_of_peak": max(eager, compiled) * per_token / peak,
    }


def main() -> int:
    """Runs every case and prints the table."""
    options = cli.parse(CpuBenchmark(), prog="cpu_vs_transformers.py")
    console = rich.console.Console()
    threads = options.threads or len(os.sched_getaffinity(0))
    table = rich.table.Table(
        "tokens/s", "dsv2_jax", "eager", "compiled", "ratio", "GFLOP/s peak", "share", "theirs",
        title=f"{parameters.count(SMALL) / 1e6:.1f}M parameters, {threads} threads, median of {options.rounds} rounds",
    )  # fmt: skip
    figures: dict[Case, dict[str, Any]] = {}
    for case in options.cases:
        f = figures[case] = compare(case, options, console)
        compiled = f"{f['transformers_compiled']:.0f}" if f["transformers_compiled"] else "fails"
        if f["transformers_compiled_error"]:
            console.print(f"{case}: torch.compile fails here: {f['transformers_compiled_error']}")
        cells = f"{f['tokens_per_second']:.0f}", f"{f['transformers_eager']:.0f}", compiled, f"{f['ratio']:.2f}"
        shares = f"{f['share_of_peak']:.0%}", f"{f['transformers_share_of_peak']:.0%}"
        table.add_row(case, *cells, f"{f['matmul_peak_gflops']:.0f}", *shares)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        _, _, side_, case_, rounds_, cores_ = sys.argv
        os.sched_setaffinity(0, {int(core) for core in cores_.split(",")})  # sets the size of XLA's thread pool
        channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # libraries may print, but stdout carries the messages to the parent
        worker(side_, case_, int(rounds_), channel)
    else:
        cli.main(main)
