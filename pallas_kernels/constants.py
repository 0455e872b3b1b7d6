"""Constants that several kernels share."""

LANES = 128  # columns of a vector register: widths and tile sizes are multiples of it
MASKED = -1e30  # score of a key that a query may not see: finite, since the softmax of a row of -inf is NaN
