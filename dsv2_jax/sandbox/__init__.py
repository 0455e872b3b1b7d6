"""Sandboxed processes: untrusted programs (supervisor.py), and library calls on untrusted text (worker.py)."""

from dsv2_jax.sandbox.supervisor import RunResult, judge, run

__all__ = ["RunResult", "judge", "run"]
