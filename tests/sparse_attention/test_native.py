"""Finding and loading the kernel library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparse_attention import native
from sparse_attention.errors import MissingError, UsageError


def test_the_environment_names_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "gone.so"))
    with pytest.raises(UsageError, match=native.LIBRARY_VARIABLE) as caught:
        native.find_library()
    assert native.BUILD_COMMAND in caught.value.fix
    (tmp_path / "here.so").touch()
    monkeypatch.setenv(native.LIBRARY_VARIABLE, str(tmp_path / "here.so"))
    assert native.find_library() == tmp_path / "here.so"


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "here.so").write_text("nothing")
    with pytest.raises(native.KernelError, match="cannot be loaded"):
        native.Library(tmp_path / "here.so")
    with pytest.raises(MissingError) as caught:
        native.Library(tmp_path / "gone.so")
    assert caught.value.fix == native.BUILD_COMMAND


def test_packing_keeps_tensors_and_strides() -> None:
    q = torch.zeros(2, 8, 16, 64, dtype=torch.bfloat16)
    swapped = q.transpose(1, 2).contiguous().transpose(1, 2)
    call = native.pack(swapped, q, q, q)
    assert any(t is swapped for t in call.tensors)
    assert len(call.packed) == 328
    assert call.packed != native.pack(q, q, q, q).packed
