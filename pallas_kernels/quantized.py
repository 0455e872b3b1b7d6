"""Weights in 8 bits, as the model keeps them for generation and the kernels read them."""

from typing import NamedTuple

from jax import Array


class Quantized(NamedTuple):
    """A weight in fewer bits: values (int8 or float8_e4m3fn) times scale, float32, which is 1 wide where values share
    it."""

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.values.shape


Weight = Array | Quantized
