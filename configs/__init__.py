"""Presets by name. A preset is a function that returns a complete config."""

from dsv2_jax.presets import align, extend, pretrain
from dsv2_jax.start import ModelField

PRESETS = {
    preset.__name__: preset
    for preset in (
        *(pretrain.nano, pretrain.v2_lite, pretrain.v2, pretrain.dense_67b, pretrain.tiny),
        *(extend.nano_long, extend.v2_lite_long, extend.v2_long),
        *(align.nano_sft, align.nano_reward, align.nano_grpo),
        *(align.v2_sft, align.v2_grpo_reasoning, align.v2_grpo_preference),
    )
}

# The model fields that a preset sets even if --init gives the model.
SETS: dict[str, tuple[ModelField, ...]] = {
    **{preset.__name__: extend.SETS for preset in (extend.nano_long, extend.v2_lite_long, extend.v2_long)},
    align.nano_reward.__name__: ("head",),
}
