"""The one table between our parameters and the tensors of a released checkpoint, read in both directions.

For the letters at the end of our names see dsv2_jax/parameters.py. On disk a weight is `[out, in]`, heads lie
side by side, and in each head the part without position comes before the one that RoPE turns, the key before the value.
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
    """How slices of our parameters lie in one tensor on disk, and the way back.

    Several slices are joined along their last axis: first, per head, what comes first on disk.
    """

    inputs: int  # leading axes that the weight multiplies and sums over; 0: the slice is stored as it is
    halves: bool = False  # Llama turns pairs (i, i + R/2) where we turn (2i, 2i + 1)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """The shape on disk of slices of these shapes."""
        if not self.inputs:
            return shapes[0]
        outputs = sum(math.prod(shape[self.inputs :]) for shape in shapes)
        return outputs, math.prod(shapes[0][: self.inputs])

    def to_hf(self, slices: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor on disk, of the slices' dtype."""
        if not self.inputs:
            return slices[0]
        joined = np.concatenate(slices, axis=-1) if len(slices) > 1 else slices[0]
        if self.halves:
            joined = np.concatenate([joined[..., 0::2], joined[..., 1::2]], axis=-1)
        return joined.reshape(math.prod(joined.shape[: self.inputs]), -1).T

    def from_hf(self, tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        """The slices, of the given shapes, that `to_hf` made the tensor of."""
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
TURNED = TensorLayout(1, halves=True)

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
    (_ATTENTION + "q_proj.weight", ("w_q_DHR",), TURNED),
    (_ATTENTION + "k_proj.weight", ("w_k_DJR",), TURNED),
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
    """One tensor on disk and the slices of our parameters that it is made of: `params[part][name][index]`."""

    hf: str
    part: str
    names: tuple[str, ...]
    index: tuple[int, ...]  # (), (layer of its kind,) or (layer of its kind, expert)
    slices: tuple[Shape, ...]
    layout: TensorLayout

    @property
    def shape(self) -> Shape:
        """The shape on disk."""
        return self.layout.shape(self.slices)


def tensors(model: Model) -> Iterator[Tensor]:
    """Every tensor of the model's checkpoint, in the order of the parameter tree: all layers of one entry together."""
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
