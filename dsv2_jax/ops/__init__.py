"""What the model's equations call: attention, experts and products, each run by the implementation that fits the chip.

`switch.py` picks the implementation. `cpu/` holds the XLA loops; the Pallas kernels are in `pallas_kernels`.
"""
