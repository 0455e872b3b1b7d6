"""The kernels, under the same names as their twins in reference.py."""

from pallas_kernels.expert_dispatch.combine import combine
from pallas_kernels.expert_dispatch.grouped_matmul import gmm, gmm_sum
from pallas_kernels.expert_dispatch.swiglu import gate_up, hidden_gradient
from pallas_kernels.expert_dispatch.weight_gradient import tgmm, tgmm_each

__all__ = ["combine", "gate_up", "gmm", "gmm_sum", "hidden_gradient", "tgmm", "tgmm_each"]
