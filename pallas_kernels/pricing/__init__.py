"""The cost of the kernels, estimated without a TPU from the compiler's final bundles."""
