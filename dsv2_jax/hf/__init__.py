"""Import and export of Hugging Face folders: table of names, config.json, safetensors, conversion of folders."""

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
