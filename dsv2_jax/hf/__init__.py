"""Hugging Face folders in and out: one table of names (names.py), their config.json, safetensors, and whole folders."""

from dsv2_jax.hf.configuration import from_hf_config, to_hf_config
from dsv2_jax.hf.convert import Progress, export, import_, is_hf, load_params, load_quantized, read_model

__all__ = [
    "Progress",
    "export",
    "from_hf_config",
    "import_",
    "is_hf",
    "load_params",
    "load_quantized",
    "read_model",
    "to_hf_config",
]
