from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from emulation import Emulation


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """The C library over an emulated driver and SM."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    torch.set_num_threads(1)
    return Emulation(Path(tmp_path_factory.mktemp("emulation")))
