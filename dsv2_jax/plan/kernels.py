"""What the Pallas kernels of a program cost: the compiler estimates none of them, `pallas_kernels.cost` does.

A kernel is priced once, alone, at the sizes of the model, attention at 4096 tokens at most, decoding at sequences of
the config's length: its share of the MXU's peak there is taken for all its calls. Routed experts, and what adds up
their results, work on as many rows as a balanced router sends, however large the buffers are.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv2_jax.config import Config
from dsv2_jax.plan import hlo, timeline
from dsv2_jax.plan.compile import sources
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.common import LANES
from pallas_kernels.pricing import cost, shapes
from pallas_kernels.pricing.ops import OPS

Shape = shapes.LatentAttention | shapes.LatentDecode | shapes.ExpertDispatch

_ATTENTION, _DECODE, _COMBINE = "latent_forward_backward", "latent_decode", "expert_combine"
_SEQUENCES = 32  # that a decode step is priced at
_PAGE = 256
_TOKENS = 4096  # that attention is priced at, at most: longer backward passes run in a loop, priced as one turn of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """All calls of one kernel in a step, on one device."""

    name: str
    count: int
    seconds: float  # of all calls
    flops: float  # useful ones of one call
    at_peak: float  # seconds of all calls at the MXU's peak

    @property
    def efficiency(self) -> float:
        """Useful FLOPs over what the MXUs could do meanwhile."""
        return self.at_peak / self.seconds if self.seconds else 0.0


class Prices:
    """Seconds of a program's kernel calls on a chip. say: is told what is priced. tokens: of a device at a time."""

    def __init__(self, config: Config, chip: str, say: Callable[[str], None], tokens: int) -> None:
        self._config, self._name, self._say, self._tokens = config, chip, say, tokens
        self._calls: dict[tuple[str, str], tuple[str, float, float]] = {}  # kernel, its useful FLOPs and seconds

    @property
    def _chip(self) -> Chip:
        return CHIPS[self._name]

    @property
    def _peak(self) -> float:
        return self._chip.peak * self._chip.cores

    def seconds(self, instruction: hlo.Instruction, where: hlo.Computation) -> float:
        """Of one call; of an unknown kernel its declared FLOPs at the peak, or its bytes if they take longer."""
        key = where.name, instruction.name
        if key not in self._calls:
            self._calls[key] = self._priced(instruction, where)
        return self._calls[key][2]

    def _priced(self, instruction: hlo.Instruction, where: hlo.Computation) -> tuple[str, float, float]:
        flops, moved = declared(instruction)
        arrays = [array for name in instruction.operands for array in hlo.arrays(where.by_name[name].shape)]
        operands = [dims for dtype, dims in arrays if dtype in ("bf16", "f32")]  # integers steer
        kernel = _kernel(instruction, operands, {dtype for dtype, _ in arrays})
        if kernel is None:
            seconds = max(flops / self._peak, moved / (self._chip.hbm * self._chip.cores))
            return instruction.name.split(".")[0], flops, seconds
        if kernel.startswith("expert"):
            flops *= self._share(operands)
        shape = self._shape(_ATTENTION if kernel in ("latent_forward", "latent_backward") else kernel)
        if isinstance(shape, shapes.LatentDecode):
            flops = OPS[kernel].flops(shape) * self._tokens / shape.sequences
        if kernel == _COMBINE:  # writes its tokens, however few rows they have
            shape = dataclasses.replace(shape, tokens=math.prod(hlo.arrays(instruction.shape)[0][1][:2]))
        return kernel, flops, flops / (self._peak * self._efficiency(kernel, shape))

    def _share(self, operands: list[tuple[int, ...]]) -> float:
        """Of a buffer's rows those that a balanced router fills."""
        rows = next(dims[0] for dims in operands if len(dims) == 2)
        return min(1.0, self._rows / rows)

    @property
    def _rows(self) -> int:
        """(token, expert) pairs of a device and layer if all experts are chosen alike."""
        return self._tokens * self._config.model.moe.num_experts_per_tok

    def _efficiency(self, kernel: str, shape: Shape) -> float:
        """Share of the peak, priced once for a shape and this code and kept with the compiled programs."""
        op = _ATTENTION if kernel in ("latent_forward", "latent_backward") else kernel
        digest = hashlib.sha256(repr((op, self._name, shape)).encode())
        for path in sources("pallas_kernels"):
            digest.update(path.read_bytes())
        kept = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or Path.home() / ".cache" / "dsv2_jax")
        kept = kept / "plan" / f"{op}-{digest.hexdigest()[:24]}.json"
        if not kept.exists():
            self._say(f"pricing {op} for {self._name}")
            kept.parent.mkdir(parents=True, exist_ok=True)
            fn, args = OPS[op].build(shape, self._name, OPS[op].blocks(self._name, shape))
            priced = cost.cost(fn, args, self._name, flops=OPS[op].flops(shape), bytes=OPS[op].bytes(shape))
            kept.write_text(json.dumps({k.name: k.us for k in priced.kernels}))
        us = json.loads(kept.read_text())
        if op != _ATTENTION:
            return OPS[op].flops(shape) / sum(us.values()) * 1e6 / self._peak
        forward = OPS["latent_forward"].flops(shape)
        flops = forward if kernel.endswith("forward") else OPS[op].flops(shape) - forward
        (own,) = (time for name, time in us.items() if kernel.rpartition("_")[2] in name)
        return flops / own * 1e6 / self._peak

    def _shape(self, op: str) -> Shape:
        """The sizes of the config's model, of one sequence, some that are decoded, or one device's experts."""
        config, a, moe = self._config, self._config.model.attention, self._config.model.moe
        if op.startswith(_DECODE):
            return shapes.LatentDecode(
                heads=a.num_attention_heads // config.mesh.tensor,
                latent=a.kv_lora_rank,
                rope=a.qk_rope_head_dim,
                sequences=_SEQUENCES,
                length=config.batch.length,
                page=_PAGE,
            )
        if op == _ATTENTION:
            heads, mla = a.num_attention_heads // config.mesh.tensor, a.kind == "mla"
            return shapes.LatentAttention(
                heads=heads,
                kv_heads=heads if mla else a.num_key_value_heads // config.mesh.tensor,
                nope=a.qk_nope_head_dim if mla else a.qk_rope_head_dim,
                rope=a.qk_rope_head_dim if mla else 0,
                value=a.v_head_dim,
                tokens=min(config.batch.length, _TOKENS),
            )
        return shapes.ExpertDispatch(
            tokens=self._rows // moe.num_experts_per_tok,
            active=moe.num_experts_per_tok,
            rows=self._rows,
            experts=moe.n_routed_experts // config.mesh.expert,
            hidden=_padded(config.model.hidden_size),
            width=_padded(moe.moe_intermediate_size // config.mesh.tensor),
        )

    def at_peak(self, played: timeline.Timeline) -> float:
        """Seconds of all calls of a program if the MXUs never paused."""
        return sum(call.at_peak for call in self.calls(played))

    def calls(self, played: timeline.Timeline) -> Iterator[Call]:
        """The kernels of a program, one line for each."""
        uses: dict[str, list[tuple[int, float, float]]] = {}
        for key, (kernel, flops, seconds) in self._calls.items():
            uses.setdefault(kernel, []).append((played.uses[key].count, flops, seconds))
        for kernel, calls in uses.items():
            count = sum(n for n, _, _ in calls)
            flops = sum(n * flops for n, flops, _ in calls)
            seconds = sum(n * seconds for n, _, seconds in calls)
            yield Call(name=kernel, count=count, seconds=seconds, flops=flops / count, at_peak=flops / self._peak)


def _padded(width: int) -> int:
    """As the op pads rows and weights for its kernels."""
    return -(-width // LANES) * LANES


def declared(instruction: hlo.Instruction) -> tuple[float, float]:
    """(FLOPs, bytes) that a kernel's author says a call takes."""
    found = [
        re.search(rf'cost_estimate\\?":\s*\{{[^}}]*?{name}\\?":\s*\\?"?(\d+)', instruction.attributes)
        for name in ("flops", "bytes_accessed")
    ]
    flops, moved = (float(number[1]) if number else 0.0 for number in found)
    return flops, moved


def _kernel(instruction: hlo.Instruction, operands: list[tuple[int, ...]], dtypes: set[str]) -> str | None:
    """The op of `pallas_kernels.pricing.ops` that a call is one of, `latent_forward` or `latent_backward`, or None."""
    name = instruction.name
    if _DECODE in name:
        return _DECODE + next((bits for dtype, bits in {"s8": "_int8", "u8": "_int6"}.items() if dtype in dtypes), "")
    for kernel in ("forward", "backward"):
        if f"latent_attention_{kernel}" in name:
            return f"latent_{kernel}"
    if "combine" in name:
        return _COMBINE
    if "tgmm" in name:
        results = sum(len(dims) == 3 for _, dims in hlo.arrays(instruction.shape))
        return "expert_gate_up_weight_gradient" if results > 1 else "expert_up_weight_gradient"
    bits = next((bits for dtype, bits in {"s8": "_int8", "f8e4m3fn": "_float8"}.items() if dtype in dtypes), "")
    if "gmm" in name and bits:
        return f"expert_down{bits}"
    if "gmm" in name:
        weights = sum(len(dims) == 3 for dims in operands)
        return "expert_gate_up_input_gradient" if weights > 1 else "expert_up"
    return next((f"expert_{kernel}{bits}" for kernel in ("gate_up", "hidden_gradient") if kernel in name), None)
