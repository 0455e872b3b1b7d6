"""TPU kernels of DeepSeek-V2's operations, and what they cost."""
