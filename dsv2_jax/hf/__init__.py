"""Hugging Face folders in and out: one table of names (names.py), their config.json, safetensors, and whole folders."""

from dsv2_jax.hf.configuration import from_hf_config, to_hf_config
from dsv2_jax.hf.convert import Progress, export, import_, is_hf, load_params, read_model, reader

__all__ = [
    "Progress",
    "export",
    "from_hf_config",
    "import_",
    "is_hf",
    "load_params",
    "read_model",
    "reader",
    "to_hf_config",
]
