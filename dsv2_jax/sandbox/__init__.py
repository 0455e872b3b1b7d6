"""Runs what nobody vouches for in locked-up processes: programs (supervisor.py) and libraries' answers (worker.py)."""

from dsv2_jax.sandbox.supervisor import RunResult, judge, run

__all__ = ["RunResult", "judge", "run"]
