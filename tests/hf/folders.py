"""Reads Hugging Face folders without the project's own reader."""

from pathlib import Path

import torch
from safetensors.torch import load_file


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
