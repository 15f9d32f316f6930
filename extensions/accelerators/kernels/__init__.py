"""The kernels that accelerators bring: by Triton on a GPU, and with the same bits in any batch."""
