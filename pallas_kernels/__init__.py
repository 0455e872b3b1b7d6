"""TPU kernels of DeepSeek-V2's two operations: latent attention and expert dispatch."""
