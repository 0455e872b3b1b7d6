"""Latent attention: `latent_attention` for training and prefill, `latent_decode` over a paged cache."""

from pallas_kernels.latent_attention.decode import latent_decode
from pallas_kernels.latent_attention.decode_jobs import max_sequences
from pallas_kernels.latent_attention.op import latent_attention
from pallas_kernels.latent_attention.pages import CachePages, Sequences

__all__ = ["CachePages", "Sequences", "latent_attention", "latent_decode", "max_sequences"]
