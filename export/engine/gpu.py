"""The GPU an engine is built on, through the CUDA driver: PyTorch may be there without CUDA."""

from __future__ import annotations

import ctypes

from sparse_attention.errors import MissingError

DRIVER = "libcuda.so.1"


def use_gpu() -> str:
    """Makes a context of the first GPU current in this thread, unless one is; why that cannot be, "" where it is.

    The plugin's kernels answer for the current GPU, and for all that they were compiled for where there is none.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError as error:
        return str(error)
    context, device = ctypes.c_void_p(), ctypes.c_int()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuCtxGetCurrent", (ctypes.byref(context),)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuCtxSetCurrent", (context,)),
    ):
        if code := getattr(driver, name)(*arguments):
            return f"{name} of the CUDA driver returned {code}"
        if name == "cuCtxGetCurrent" and context:
            return ""
    return ""


def require_gpu(reason: str) -> None:
    """Raises MissingError where `use_gpu` gave a reason."""
    if reason:
        raise MissingError(
            "TensorRT builds an engine on a GPU, and there is none.", where="the CUDA driver", found=reason,
            fix="Run this on a machine with an NVIDIA GPU, or build a portable engine with --runtime tensorrt-rtx.",
        )  # fmt: skip
