"""Latent attention: `latent_attention` for training and prefill, `latent_decode` over a paged cache."""

from pallas_kernels.latent_attention.decode import decode as latent_decode
from pallas_kernels.latent_attention.op import latent_attention

__all__ = ["latent_attention", "latent_decode"]
