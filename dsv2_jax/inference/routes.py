"""The expert choices of the tokens in the cache, stored on the host by page."""

from collections.abc import Sequence

import numpy as np

from dsv2_jax.config import Model
from dsv2_jax.inference.programs import StepInputs


class Routes:
    """The experts of every cached token. Letters as in `programs`; L MoE layers, K experts per token."""

    def __init__(self, model: Model, replicas: int, pages: int, slots: int):
        layers, experts = model.moe_layers, model.moe.num_experts_per_tok
        self._slots = slots
        self._kept = np.zeros((replicas, pages, slots, layers, experts), np.int16)

    def write(self, inputs: StepInputs, experts_ZTLK: np.ndarray) -> None:
        """Stores the experts of a step. Padding goes to page 0, which no sequence uses."""
        replicas = np.arange(len(inputs.page_ZT))[:, None]
        self._kept[replicas, inputs.page_ZT, inputs.times_ZT % self._slots] = experts_ZTLK

    def read(self, replica: int, pages: Sequence[int], tokens: int) -> np.ndarray:
        """The experts int16 [tokens, L, K] of the sequence on these pages."""
        kept = self._kept[replica, list(pages)]
        return kept.reshape(-1, *kept.shape[2:])[:tokens].copy()
