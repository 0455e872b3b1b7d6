"""Loops of XLA operations: exact on any device, and fast on CPUs.

A device without Pallas kernels runs the same loops. `switch.on_cpu` guards the steps that only a CPU needs.
"""
