"""The operations of the model's equations: attention, experts and products, with one implementation per platform.

`switch.py` picks the implementation. `cpu/` holds the XLA loops; the Pallas kernels are in `pallas_kernels`.
"""
