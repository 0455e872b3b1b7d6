"""TPU kernels of DeepSeek-V2's operations, and estimates of their cost."""
