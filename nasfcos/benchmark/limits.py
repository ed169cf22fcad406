"""The measured limits of the machine: rates of matrix products and of copying."""

from __future__ import annotations

import torch

from .detectors import has_bfloat16
from .measure import Case, Skip, Variant
from .setting import Setting

MULTIPLY_ADDS, GIGABYTES = "G multiply-adds", "GB"
COPY = "limit: copy"


def matmul_name(dtype: torch.dtype) -> str:
    """Name of the variant that measures the rate of multiply-adds in a dtype."""
    return f"limit: {str(dtype)[6:]} matmul"


def matmul_limit(dtype: torch.dtype, setting: Setting) -> Variant:
    """A product of square matrices.

    On CUDA, float32 products use TensorFloat-32 if convolutions do (PyTorch's default), since
    convolutions are what is compared with the limit.

    Raises:
        Skip: the processor has no instructions for `dtype`.
    """
    device = setting.device
    if dtype == torch.bfloat16 and not has_bfloat16(device):
        raise Skip(f"this {device.type} has no bfloat16 instructions")
    side = 8192 if setting.cuda else 1024 if setting.quick else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    like_convolutions = "high" if setting.cuda and torch.backends.cudnn.allow_tf32 else "highest"

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(like_convolutions)
        try:
            torch.mm(a, b, out=product)
        finally:
            torch.set_float32_matmul_precision(before)

    name = matmul_name(dtype)
    return Variant(name, run, theirs=True, amount=side**3 / 1e9, unit=MULTIPLY_ADDS, memory=False)


def copy_limit(setting: Setting) -> Variant:
    """A copy of a tensor larger than the caches; bytes read and bytes written both count."""
    size = 2**30 if setting.cuda else 2**26 if setting.quick else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    copy = torch.empty_like(source)
    return Variant(
        COPY,
        lambda: copy.copy_(source),
        theirs=True,
        amount=2 * size / 1e9,
        unit=GIGABYTES,
        memory=False,
    )


def limits(setting: Setting) -> Case:
    """Matrix products by dtype, and copying."""
    case = Case("what this machine can do at most, measured", [])
    for dtype in (torch.float32, torch.bfloat16):
        case.add(matmul_name(dtype), lambda d=dtype: matmul_limit(d, setting))
    case.variants.append(copy_limit(setting))
    return case
