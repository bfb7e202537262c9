from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulation import Emulation, build_emulation


@pytest.fixture(scope="session")
def emulation(of_the_run: Path, objects: Path) -> Emulation:
    """The C library over an emulated driver and SM."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    torch.set_num_threads(1)
    return Emulation(*build_emulation(of_the_run / "emulation", objects))


@pytest.fixture
def whole_device(emulation: Emulation) -> Iterator[Emulation]:
    """The same with as many multiprocessors as an H100, for launches that are not executed."""
    emulation.driver.emulated_multiprocessors(132)
    yield emulation
    emulation.driver.emulated_multiprocessors(3)


@pytest.fixture(scope="session")
def many_rows(emulation: Emulation, of_the_run: Path, objects: Path) -> Emulation:
    """The same without the kernels that calls with few rows run, so that the others run calls of any size."""
    return Emulation(*build_emulation(of_the_run / "many_rows", objects, without="_d(64|128)_skip_"))


@pytest.fixture(params=["hopper", "portable"])
def prefill(request: pytest.FixtureRequest, emulation: Emulation) -> Iterator[Emulation]:
    """The C library on a device for which it has Hopper's prefill kernels, and on one where the portable ones run."""
    emulation.driver.emulated_capability(90 if request.param == "hopper" else 80)
    yield emulation
    emulation.driver.emulated_capability(90)
    assert emulation.launched[0][0].startswith("sm90a" if request.param == "hopper" else "sm80")
