"""The kernels that accelerators add: Triton kernels for GPUs, kernels for CPUs, and one with the same bits in any batch."""
