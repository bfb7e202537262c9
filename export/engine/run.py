"""Runs a loaded engine on PyTorch's CUDA tensors, and times it with CUDA events."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from export.engine.load import LoadedEngine
from export.engine.tensorrt_api import explain
from sparse_attention.errors import UsageError


class EngineRunner:
    """One execution context on one stream; `profile` names the optimisation profile ("prefill", "decode")."""

    def __init__(self, loaded: LoadedEngine, profile: str) -> None:
        profiles = list(loaded.sidecar.profiles)
        if profile not in profiles:
            raise UsageError(
                "The engine has no such profile.", where="profile", found=profile, fix=f"Use one of {profiles}."
            )
        self._loaded = loaded
        self._stream = torch.cuda.Stream()
        self._nowhere = torch.empty(256, dtype=torch.uint8, device="cuda")
        self._context = loaded.engine.create_execution_context()
        if self._context is None:
            raise explain(loaded.logger.errors, "TensorRT could not make an execution context.", profile)
        self._context.set_optimization_profile_async(profiles.index(profile), self._stream.cuda_stream)
        self._types = {
            getattr(loaded.tensorrt.DataType, name): dtype
            for name, dtype in (
                ("FLOAT", torch.float32), ("HALF", torch.float16), ("BF16", torch.bfloat16), ("INT32", torch.int32),
                ("INT64", torch.int64), ("BOOL", torch.bool), ("INT8", torch.int8),
            )
        }  # fmt: skip

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs, CUDA tensors, for inputs by name. Raises UsageError for a shape outside the profile."""
        # Kept until the next call: TensorRT only has the addresses.
        self._held = held = {name: tensor.cuda().contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise UsageError(
                    "An input's shape lies outside the engine's profile.", where=f"input {name}",
                    found=str(list(tensor.shape)), fix="Build the engine with wider --shapes.",
                )  # fmt: skip
            self._set_address(name, tensor)
        outputs = self._allocate_outputs()
        self._stream.wait_stream(torch.cuda.current_stream())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise explain(self._loaded.logger.errors, "TensorRT could not run the engine.", "execute_async_v3")
        self._stream.synchronize()
        return outputs

    def milliseconds(self, inputs: Mapping[str, Tensor], repeats: int = 20) -> float:
        """Median time of a run on the GPU, after one run that is not counted."""
        kept = self(inputs)  # the runs below write there
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(self._stream)
            self._context.execute_async_v3(self._stream.cuda_stream)
            end.record(self._stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
        del kept
        return sorted(times)[len(times) // 2]

    def _allocate_outputs(self) -> dict[str, Tensor]:
        engine, mode = self._loaded.engine, self._loaded.tensorrt.TensorIOMode
        outputs = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if engine.get_tensor_mode(name) == mode.OUTPUT:
                shape = tuple(self._context.get_tensor_shape(name))
                outputs[name] = torch.empty(shape, dtype=self._types[engine.get_tensor_dtype(name)], device="cuda")
                self._set_address(name, outputs[name])
        return outputs

    def _set_address(self, name: str, tensor: Tensor) -> None:
        # TensorRT wants an address for an empty tensor (a cache of no keys), where PyTorch has none.
        self._context.set_tensor_address(name, tensor.data_ptr() or self._nowhere.data_ptr())
