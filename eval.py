"""Evaluates a checkpoint: python eval.py --checkpoint RUN_OR_HF_FOLDER. The program is dsv2_jax/eval.py."""

from dsv2_jax.eval import command

if __name__ == "__main__":
    command()
