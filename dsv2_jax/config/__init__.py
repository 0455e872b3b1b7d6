"""All settings of the project, as frozen dataclasses that check themselves when they are built.

Newer code reads the config files of older runs, and a field that is missing there takes its default. So the default of
a new field is the behaviour before that field, and no default ever changes. A new recommendation goes into the presets;
a new behaviour gets a new field or a new value.
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
