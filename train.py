"""Trains a preset: python train.py PRESET [--section.field VALUE ...]. The program is dsv2_jax/train.py."""

from dsv2_jax.train import command

if __name__ == "__main__":
    command()
