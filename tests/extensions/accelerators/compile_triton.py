"""Compiles the Triton kernels for a GPU that need not be there, in all dtypes; prints what uses tensor cores."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraweave.extensions.accelerators import triton_products as products

KERNELS = {
    "shrink_each": {"BLOCK_R": 8, "BLOCK_I": 256},
    "expand_each": {"ADD": True, "BLOCK_R": 8, "BLOCK_O": 128},
    "shrink_group": {"AS_FP32": False, "BLOCK_N": 32, "BLOCK_R": 16, "BLOCK_I": 64},
    "expand_group": {"ADD": True, "AS_FP32": False, "BLOCK_N": 32, "BLOCK_R": 16, "BLOCK_O": 64},
}

for dtype in ("fp32", "bf16", "fp16"):
    types = {"x": f"*{dtype}", "table": f"*{dtype}", "y": f"*{dtype}", "hidden": "*fp32", "weight": "*fp32"}
    types |= dict.fromkeys(("index", "count", "member", "first"), "*i32")
    for name, constants in KERNELS.items():
        kernel = getattr(products, name)
        signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in kernel.arg_names}
        places = {(kernel.arg_names.index(each),): value for each, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 80, 32))
        print(dtype, name, "mma" if "mma" in compiled.asm["ptx"] else "-", len(compiled.asm["cubin"]) > 0)
