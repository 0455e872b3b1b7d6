"""Latent attention: `latent_attention` for training and prefill."""

from pallas_kernels.latent_attention.op import latent_attention

__all__ = ["latent_attention"]
