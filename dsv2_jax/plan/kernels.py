"""Time of the Pallas kernel calls of a program, which the compiler does not estimate, from `pallas_kernels.cost`.

Each kernel is estimated once, alone, at the model's sizes: attention at up to 4096 tokens, decoding at sequences of the
config's length. This gives an efficiency, useful FLOPs over the MXU's peak, which is applied to all calls of the
kernel. Expert kernels are assumed to process as many rows as a balanced router sends, which is fewer than their buffers
hold.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator

from dsv2_jax.config import Config
from dsv2_jax.parallel.mesh import EXPERT, TENSOR
from dsv2_jax.plan import hlo, timeline
from dsv2_jax.plan.compile import cache_folder, sources
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.common import LANES
from pallas_kernels.pricing import cost, shapes
from pallas_kernels.pricing.ops import OPS

Shape = shapes.LatentAttention | shapes.LatentDecode | shapes.ExpertDispatch

_ATTENTION, _DECODE, _COMBINE = "latent_forward_backward", "latent_decode", "expert_combine"
_SEQUENCES = 32  # number of sequences at which a decode step is estimated
_PAGE = 256
_TOKENS = 4096  # maximum length at which attention is estimated; a longer backward pass loops over such blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCalls:
    """All calls of one kernel in a program, on one device."""

    name: str
    count: int
    seconds: float  # of all calls
    flops: float  # useful FLOPs of one call
    at_peak: float  # seconds of all calls at the MXU's peak

    @property
    def efficiency(self) -> float:
        """Useful FLOPs over the FLOPs that the MXUs could do in the same time."""
        return self.at_peak / self.seconds if self.seconds else 0.0


class KernelTimes:
    """Seconds of a program's kernel calls on a chip.

    say: logs progress. tokens: of one device, in a micro-batch or a decode step.
    """

    def __init__(self, config: Config, chip: str, say: Callable[[str], None], tokens: int) -> None:
        self._config, self._name, self._say, self._tokens = config, chip, say, tokens
        # (computation, instruction) -> (kernel, useful FLOPs, seconds)
        self._calls: dict[tuple[str, str], tuple[str, float, float]] = {}

    @property
    def _chip(self) -> Chip:
        return CHIPS[self._name]

    @property
    def _peak(self) -> float:
        return self._chip.peak * self._chip.cores

    def seconds(self, instruction: hlo.HloInstruction, where: hlo.Computation) -> float:
        """Seconds of one call.

        A kernel that is not in `OPS` takes its declared FLOPs at the peak or its declared bytes at the HBM's bandwidth,
        whichever is longer.
        """
        key = where.name, instruction.name
        if key not in self._calls:
            self._calls[key] = self._estimated(instruction, where)
        return self._calls[key][2]

    def _estimated(self, instruction: hlo.HloInstruction, where: hlo.Computation) -> tuple[str, float, float]:
        flops, moved = declared(instruction)
        arrays = [array for name in instruction.operands for array in hlo.arrays(where.by_name[name].shape)]
        operands = [dims for dtype, dims in arrays if dtype in ("bf16", "f32")]  # integers are indices and sizes
        kernel = kernel_name(instruction, operands, {dtype for dtype, _ in arrays})
        if kernel is None:
            seconds = max(flops / self._peak, moved / (self._chip.hbm * self._chip.cores))
            return instruction.name.split(".")[0], flops, seconds
        if kernel.startswith("expert"):
            flops *= self._filled(operands)
        shape = self._shape(_ATTENTION if kernel in ("latent_forward", "latent_backward") else kernel)
        if isinstance(shape, shapes.LatentDecode):
            flops = OPS[kernel].flops(shape) * self._tokens / shape.sequences
        if kernel == _COMBINE:  # writes all tokens, even those without rows
            shape = dataclasses.replace(shape, tokens=math.prod(hlo.arrays(instruction.shape)[0][1][:2]))
        return kernel, flops, flops / (self._peak * self._efficiency(kernel, shape))

    def _filled(self, operands: list[tuple[int, ...]]) -> float:
        """The fraction of a buffer's rows that a balanced router fills."""
        rows = next(dims[0] for dims in operands if len(dims) == 2)
        return min(1.0, self._rows / rows)

    @property
    def _rows(self) -> int:
        """(token, expert) pairs of a device and layer under a balanced router."""
        return self._tokens * self._config.model.moe.num_experts_per_tok

    def _efficiency(self, kernel: str, shape: Shape) -> float:
        """Fraction of the peak. Cached with the compiled programs, by shape, chip and source of the kernels."""
        op = _ATTENTION if kernel in ("latent_forward", "latent_backward") else kernel
        digest = hashlib.sha256(repr((op, self._name, shape)).encode())
        for path in sources("pallas_kernels"):
            digest.update(path.read_bytes())
        cached = cache_folder() / f"{op}-{digest.hexdigest()[:24]}.json"
        if not cached.exists():
            self._say(f"estimating {op} for {self._name}")
            cached.parent.mkdir(parents=True, exist_ok=True)
            fn, args = OPS[op].build(shape, self._name, OPS[op].blocks(self._name, shape))
            estimated = cost.cost(fn, args, self._name, flops=OPS[op].flops(shape), bytes=OPS[op].bytes(shape))
            cached.write_text(json.dumps({k.name: k.us for k in estimated.kernels}))
        us = json.loads(cached.read_text())
        if op != _ATTENTION:
            return OPS[op].flops(shape) / sum(us.values()) * 1e6 / self._peak
        forward = OPS["latent_forward"].flops(shape)
        flops = forward if kernel.endswith("forward") else OPS[op].flops(shape) - forward
        (kernel_us,) = (time for name, time in us.items() if kernel.rpartition("_")[2] in name)
        return flops / kernel_us * 1e6 / self._peak

    def _shape(self, op: str) -> Shape:
        """The shape at which an op is estimated: decoded sequences, one training sequence or one device's experts."""
        config, a, moe = self._config, self._config.model.attention, self._config.model.moe
        if op.startswith(_DECODE):
            return shapes.LatentDecode(
                heads=a.num_attention_heads // config.mesh.size(*TENSOR),
                latent=a.kv_lora_rank,
                rope=a.qk_rope_head_dim,
                sequences=_SEQUENCES,
                length=config.batch.length,
                page=_PAGE,
            )
        if op == _ATTENTION:
            heads, mla = a.num_attention_heads // config.mesh.size(*TENSOR), a.kind == "mla"
            return shapes.LatentAttention(
                heads=heads,
                kv_heads=heads if mla else a.num_key_value_heads // config.mesh.size(*TENSOR),
                nope=a.qk_nope_head_dim if mla else a.qk_rope_head_dim,
                rope=a.qk_rope_head_dim if mla else 0,
                value=a.v_head_dim,
                tokens=min(config.batch.length, _TOKENS),
            )
        return shapes.ExpertDispatch(
            tokens=self._rows // moe.num_experts_per_tok,
            active=moe.num_experts_per_tok,
            rows=self._rows,
            experts=moe.n_routed_experts // config.mesh.size(*EXPERT),
            hidden=_padded(config.model.hidden_size),
            width=_padded(moe.moe_intermediate_size // config.mesh.size(*TENSOR)),
        )

    def at_peak(self, simulated: timeline.Timeline) -> float:
        """Seconds of all calls of a program at the MXU's peak."""
        return sum(call.at_peak for call in self.calls(simulated))

    def calls(self, simulated: timeline.Timeline) -> Iterator[KernelCalls]:
        """The kernels of a program, one entry for each."""
        uses: dict[str, list[tuple[int, float, float]]] = {}
        for key, (kernel, flops, seconds) in self._calls.items():
            uses.setdefault(kernel, []).append((simulated.uses[key].count, flops, seconds))
        for kernel, calls in uses.items():
            count = sum(n for n, _, _ in calls)
            flops = sum(n * flops for n, flops, _ in calls)
            seconds = sum(n * seconds for n, _, seconds in calls)
            yield KernelCalls(
                name=kernel, count=count, seconds=seconds, flops=flops / count, at_peak=flops / self._peak
            )


def _padded(width: int) -> int:
    """The width to which the op pads rows and weights for its kernels."""
    return -(-width // LANES) * LANES


def declared(instruction: hlo.HloInstruction) -> tuple[float, float]:
    """(FLOPs, bytes) of a call, as its `pl.CostEstimate` declares them."""
    found = [
        re.search(rf'cost_estimate\\?":\s*\{{[^}}]*?{name}\\?":\s*\\?"?(\d+)', instruction.attributes)
        for name in ("flops", "bytes_accessed")
    ]
    flops, moved = (float(number[1]) if number else 0.0 for number in found)
    return flops, moved


def kernel_name(instruction: hlo.HloInstruction, operands: list[tuple[int, ...]], dtypes: set[str]) -> str | None:
    """The name of the called op in `OPS`, `latent_forward` or `latent_backward`; None if unknown."""
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
