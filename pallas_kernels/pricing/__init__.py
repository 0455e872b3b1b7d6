"""What the kernels cost, estimated without a TPU from the compiler's final bundles."""
