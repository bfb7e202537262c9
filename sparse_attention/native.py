"""Find, load and call the compiled kernels: the C ABI of `plugins/include/block_skip_attention.h` through ctypes.

Knows nothing of the op's registration; `sparse_attention.cuda` does. Loading needs no GPU and no CUDA installation.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention.errors import MissingError, SparseAttentionError, UsageError

__all__ = ["BUILD_COMMAND", "LIBRARY_VARIABLE", "Call", "Library", "find_library", "load_library"]

LIBRARY_VARIABLE = "BLOCK_SKIP_ATTENTION_LIBRARY"
LIBRARY_NAME = "libblock_skip_attention.so"
BUILD_COMMAND = "cmake -S plugins -B build && cmake --build build"

ABI_VERSION = 2

_DTYPES = {torch.float16: 0, torch.bfloat16: 1}
_UNITS = {"head": 0, "group": 1}

# struct bsa_params: two words, 13 pointers and the workspace's size, 16 ints, 16 strides (4 times 3, bias 4), 4 floats
_PARAMS = struct.Struct("=2I14Q16i16q4f")
_WORKSPACE = struct.Struct("=2Q")
_WORKSPACE_OFFSET = 2 * 4 + 12 * 8


class KernelError(SparseAttentionError):
    """The compiled kernels refused a call or failed in it."""


class Call(NamedTuple):
    """One launch, packed as the library reads it, and the tensors it points to.

    `tensors` keeps them alive until the launch is enqueued.
    """

    packed: bytes
    tensors: tuple[Tensor | None, ...]

    def with_workspace(self, workspace: Tensor) -> Call:
        """The same call with its scratch memory: at least `Library.workspace_size` bytes of the device."""
        packed = bytearray(self.packed)
        _WORKSPACE.pack_into(packed, _WORKSPACE_OFFSET, workspace.data_ptr(), workspace.nbytes)
        return Call(bytes(packed), (*self.tensors, workspace))


def pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    *,
    counts: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    q_start: Tensor | None = None,
    q_lengths: Tensor | None = None,
    threshold_scale: Tensor | None = None,
    br: int = 128,
    bc: int = 128,
    is_causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    scale: float = 1.0,
    unit: str = "head",
    threshold: float = 0.0,
    threshold_factor: float = 0.0,
    kv_splits: int = 0,
) -> Call:
    """Packs the parameters of a launch.

    q `[B, Hq, Sq, D]`, k `[B, Hk, Sk, D]`, v `[B, Hk, Sk, Dv]`, o `[B, Hq, Sq, Dv]`, float16 or bfloat16 of one kind,
    of any strides that are multiples of 8 elements with a last stride of 1. `bias` is expanded to `[B, Hq, Sq, Sk]`
    (stride 0 where it broadcasts), of q's dtype or bool. λ is `threshold`, or `threshold_factor / L` where that is > 0.
    `kv_splits`: programs that share the keys of a head when decoding, 0 chosen by size; the result is the same.
    """
    batch, heads, rows, size = q.shape
    bias_kind = 0 if bias is None else 2 if bias.dtype == torch.bool else 1
    bias_stride = (0, 0, 0, 0) if bias is None else bias.stride()
    tensors = (q, k, v, bias, sinks, kv_lengths, q_start, q_lengths, threshold_scale, o, counts, lse)
    packed = _PARAMS.pack(
        _PARAMS.size, ABI_VERSION, *[0 if t is None else t.data_ptr() for t in tensors], 0, 0,
        batch, heads, k.shape[1], rows, k.shape[2], size, v.shape[3], _DTYPES.get(q.dtype, -1), bias_kind, is_causal,
        window, br, bc, _UNITS[unit], kv_splits, 0,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3], *bias_stride,
        scale, softcap, threshold, threshold_factor,
    )  # fmt: skip
    return Call(packed, tensors)


class Library:
    """The loaded kernel library.

    Args:
        path: the shared library.

    Raises:
        MissingError: it is not there.
        KernelError: it cannot be loaded, or speaks another version of the C ABI.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise MissingError("the kernel library is not there", where=str(path), fix=BUILD_COMMAND)
        try:
            self._c = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(
                "the kernel library cannot be loaded", where=str(path), found=str(error), fix=BUILD_COMMAND
            ) from error
        self.path = path
        self._c.bsa_version.restype = ctypes.c_char_p
        self._c.bsa_last_error.restype = ctypes.c_char_p
        self._c.bsa_status_string.restype = ctypes.c_char_p
        self._c.bsa_workspace_size.restype = ctypes.c_size_t
        self._c.bsa_supported.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
        self._c.bsa_launch.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        self._c.bsa_prepare.argtypes = (ctypes.c_char_p,)
        self._c.bsa_workspace_size.argtypes = (ctypes.c_char_p,)
        self.version: dict[str, object] = json.loads(self._c.bsa_version())
        if self.version["abi"] != ABI_VERSION:
            raise KernelError(
                "the kernel library is of another version", where=str(path), found=str(self.version),
                fix=f"build it again: {BUILD_COMMAND}",
            )  # fmt: skip

    def refusal(self, call: Call) -> str:
        """Why no kernel runs this call on the current device; "" where one does."""
        reason = ctypes.create_string_buffer(512)
        return "" if self._c.bsa_supported(call.packed, reason, len(reason)) else reason.value.decode()

    def workspace_size(self, call: Call) -> int:
        """Bytes of scratch memory the call needs: see `Call.with_workspace`."""
        return int(self._c.bsa_workspace_size(call.packed))

    def launch(self, call: Call, stream: int) -> None:
        """Enqueues the call on a CUDA stream (its handle) of the current device; does not wait.

        Raises:
            KernelError: the call is not supported, or the driver refused it.
        """
        status = self._c.bsa_launch(call.packed, stream)
        if status:
            self._fail(status)

    def prepare(self, call: Call) -> None:
        """Loads the kernels of the call without running them, for example before a CUDA graph is captured."""
        status = self._c.bsa_prepare(call.packed)
        if status:
            self._fail(status)

    def _fail(self, status: int) -> None:
        raise KernelError(
            f"the kernel library failed: {self._c.bsa_status_string(status).decode()}", where=str(self.path),
            found=self._c.bsa_last_error().decode(),
        )  # fmt: skip


def find_library() -> Path | None:
    """The kernel library: the file named by BLOCK_SKIP_ATTENTION_LIBRARY, else a build folder of this source tree.

    Raises:
        UsageError: the variable names a file that does not exist.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UsageError(
                "the kernel library is not where the environment says", where=LIBRARY_VARIABLE, found=named,
                fix=f"unset it, or build the library: {BUILD_COMMAND}",
            )  # fmt: skip
        return Path(named)
    root = Path(__file__).resolve().parent.parent
    for folder in (root / "build", root / "plugins" / "build", Path(__file__).resolve().parent / "lib"):
        if (folder / LIBRARY_NAME).is_file():
            return folder / LIBRARY_NAME
    return None


@functools.cache
def load_library() -> Library:
    """The library, loaded once per process.

    Raises:
        MissingError: none was found.
        KernelError: it cannot be loaded.
    """
    path = find_library()
    if path is None:
        raise MissingError(
            "the compiled kernels were not found", where=LIBRARY_NAME,
            found=f"neither {LIBRARY_VARIABLE} nor a build folder", fix=BUILD_COMMAND,
        )  # fmt: skip
    return Library(path)
