"""Routed experts: grouped matrix products over uneven groups of rows, and the SwiGLU made of them."""

from pallas_kernels.expert_dispatch.op import grouped_swiglu

__all__ = ["grouped_swiglu"]
