"""The table that maps our parameters to the tensors of released checkpoints, used in both directions.

For the letters at the end of our names see dsv2_jax/parameters.py. On disk a weight is `[out, in]` and its heads are
concatenated. Within a head, the part without RoPE comes before the part with RoPE, and the key before the value.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from dsv2_jax import parameters
from dsv2_jax.config import Model

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """How slices of our parameters are stored in one tensor on disk.

    Several slices are concatenated along their last axis (within each head), in the order of the tensor on disk.
    """

    inputs: int  # number of leading axes that the matmul contracts; 0: the slice is stored unchanged
    halves: bool = False  # Llama rotates pairs (i, i + R/2); we rotate (2i, 2i + 1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape on disk for slices of these shapes."""
        if not self.inputs:
            return shapes[0]
        outputs = sum(math.prod(shape[self.inputs :]) for shape in shapes)
        return outputs, math.prod(shapes[0][: self.inputs])

    def to_hf(self, slices: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor on disk, in the dtype of the slices."""
        if not self.inputs:
            return slices[0]
        joined = np.concatenate(slices, axis=-1) if len(slices) > 1 else slices[0]
        if self.halves:
            joined = np.concatenate([joined[..., 0::2], joined[..., 1::2]], axis=-1)
        return joined.reshape(math.prod(joined.shape[: self.inputs]), -1).T

    def from_hf(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """The slices, of the given shapes, of a tensor on disk: the inverse of `to_hf`."""
        if not self.inputs:
            return [tensor]
        widths = [shape[-1] for shape in shapes]
        joined = tensor.T.reshape(*shapes[0][:-1], sum(widths))
        if self.halves:
            pairs = np.stack(np.split(joined, 2, axis=-1), axis=-1)
            joined = pairs.reshape(joined.shape)
        return np.split(joined, np.cumsum(widths)[:-1], axis=-1)


SAME = TensorLayout(0)
LINEAR = TensorLayout(1)
FROM_HEADS = TensorLayout(2)
ROTATED_HALVES = TensorLayout(1, halves=True)

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."

TABLE: tuple[tuple[str, tuple[str, ...], TensorLayout], ...] = (
    ("model.embed_tokens.weight", ("w_embed_WD",), SAME),
    ("model.layers.{layer}.input_layernorm.weight", ("norm_attention_D",), SAME),
    (_ATTENTION + "q_proj.weight", ("w_uq_DHN", "w_qr_DHR"), LINEAR),
    (_ATTENTION + "q_a_proj.weight", ("w_dq_DQ",), LINEAR),
    (_ATTENTION + "q_a_layernorm.weight", ("norm_q_Q",), SAME),
    (_ATTENTION + "q_b_proj.weight", ("w_uq_QHN", "w_qr_QHR"), LINEAR),
    (_ATTENTION + "kv_a_proj_with_mqa.weight", ("w_dkv_DC", "w_kr_DR"), LINEAR),
    (_ATTENTION + "kv_a_layernorm.weight", ("norm_kv_C",), SAME),
    (_ATTENTION + "kv_b_proj.weight", ("w_uk_CHN", "w_uv_CHV"), LINEAR),
    (_ATTENTION + "q_proj.weight", ("w_q_DHR",), ROTATED_HALVES),
    (_ATTENTION + "k_proj.weight", ("w_k_DJR",), ROTATED_HALVES),
    (_ATTENTION + "v_proj.weight", ("w_v_DJV",), LINEAR),
    (_ATTENTION + "o_proj.weight", ("w_o_HVD",), FROM_HEADS),
    ("model.layers.{layer}.post_attention_layernorm.weight", ("norm_ffn_D",), SAME),
    (_MLP + "gate_proj.weight", ("w_gate_DI",), LINEAR),
    (_MLP + "up_proj.weight", ("w_up_DI",), LINEAR),
    (_MLP + "down_proj.weight", ("w_down_ID",), LINEAR),
    (_MLP + "gate.weight", ("w_router_DE",), LINEAR),
    (_MLP + "experts.{expert}.gate_proj.weight", ("w_gate_EDF",), LINEAR),
    (_MLP + "experts.{expert}.up_proj.weight", ("w_up_EDF",), LINEAR),
    (_MLP + "experts.{expert}.down_proj.weight", ("w_down_EFD",), LINEAR),
    (_MLP + "shared_experts.gate_proj.weight", ("w_gate_DX",), LINEAR),
    (_MLP + "shared_experts.up_proj.weight", ("w_up_DX",), LINEAR),
    (_MLP + "shared_experts.down_proj.weight", ("w_down_XD",), LINEAR),
    ("model.norm.weight", ("norm_D",), SAME),
    ("lm_head.weight", ("w_head_DW",), LINEAR),
    ("score.weight", ("w_score_D",), LINEAR),
)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor on disk and the slices of our parameters that it contains: `params[part][name][index]`."""

    hf: str
    part: str
    names: tuple[str, ...]
    index: tuple[int, ...]  # (), (layer,) or (layer, expert); layers of a kind count from 0
    slices: tuple[Shape, ...]
    layout: TensorLayout

    @property
    def shape(self) -> Shape:
        """The shape on disk."""
        return self.layout.shape(self.slices)


def tensors(model: Model) -> Iterator[Tensor]:
    """All tensors of a checkpoint of the model, in the order of our parameter tree, so grouped by parameter."""
    first = {"dense": 0, "moe": model.dense_layers}
    for part, shapes in parameters.tree(model).items():
        for template, names, layout in TABLE:
            if not all(name in shapes for name in names):
                continue
            layers = shapes[names[0]][0] if "{layer}" in template else 0
            experts = shapes[names[0]][1] if "{expert}" in template else 0
            for layer in range(layers or 1):
                for expert in range(experts or 1):
                    index = (layer,) * bool(layers) + (expert,) * bool(experts)
                    name = template.format(layer=first.get(part, 0) + layer, expert=expert)
                    slices = tuple(shapes[n][len(index) :] for n in names)
                    yield Tensor(name, part, names, index, slices, layout)
