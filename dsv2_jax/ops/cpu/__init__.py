"""Loops of XLA operations: exact on any device, and fast on CPUs.

A device without Pallas kernels runs the same loops. Steps that only a CPU needs ask `switch.on_cpu`.
"""
