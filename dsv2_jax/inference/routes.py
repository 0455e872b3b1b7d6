"""Which experts the tokens in the cache went to: on the host, page for page as the cache itself."""

from collections.abc import Sequence

import numpy as np

from dsv2_jax.config import Model
from dsv2_jax.inference.programs import Call


class Routes:
    """Experts of every token that a page holds. Letters as in `programs`, and L MoE layers, K experts of a token."""

    def __init__(self, model: Model, lanes: int, pages: int, slots: int):
        layers, experts = model.moe_layers, model.moe.num_experts_per_tok
        self._slots = slots
        self._kept = np.zeros((lanes, pages, slots, layers, experts), np.int16)

    def write(self, call: Call, experts_ZTLK: np.ndarray) -> None:
        """Takes in what a call computed; its padding goes to page 0, which is nobody's."""
        lanes = np.arange(len(call.page_ZT))[:, None]
        self._kept[lanes, call.page_ZT, call.times_ZT % self._slots] = experts_ZTLK

    def read(self, lane: int, pages: Sequence[int], tokens: int) -> np.ndarray:
        """int16 [tokens, L, K] of a sequence on these pages."""
        kept = self._kept[lane, list(pages)]
        return kept.reshape(-1, *kept.shape[2:])[:tokens].copy()
