"""Runs untrusted code in restricted processes: programs (supervisor.py, answers.py) and library calls (worker.py)."""

from dsv2_jax.sandbox.answers import program_in, solves
from dsv2_jax.sandbox.supervisor import RunResult, judge, run

__all__ = ["RunResult", "judge", "program_in", "run", "solves"]
