"""Every setting of the project: frozen dataclasses whose fields are checked against each other when built.

A run keeps its config, and newer code reads it: a field that did not exist yet takes its default. So the default of a
new field is what the code did before the field, and a default never changes afterwards. Another recommendation goes
into the presets; another behaviour gets another field or another value.
"""

from dsv2_jax.config.alignment import Grpo
from dsv2_jax.config.checks import check
from dsv2_jax.config.compute import Compute
from dsv2_jax.config.data import Data
from dsv2_jax.config.model import Attention, Model, Moe, Rope
from dsv2_jax.config.parallel import AXES, SINGLE, Mesh, Processes
from dsv2_jax.config.run import Config
from dsv2_jax.config.serialization import from_json, to_json
from dsv2_jax.config.training import Batch, Cadence, Optimizer

__all__ = [
    "AXES",
    "SINGLE",
    "Attention",
    "Batch",
    "Cadence",
    "Compute",
    "Config",
    "Data",
    "Grpo",
    "Mesh",
    "Model",
    "Moe",
    "Optimizer",
    "Processes",
    "Rope",
    "check",
    "from_json",
    "to_json",
]
