"""Weights in 8 bits: the model keeps them for generation, the kernels read them."""

from typing import NamedTuple

from jax import Array


class Quantized(NamedTuple):
    """A quantized weight, values times scale.

    values: int8 or float8_e4m3fn. scale: float32, of size 1 along the dimensions that share it.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape


Weight = Array | Quantized
