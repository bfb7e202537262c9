"""What the builder asks the kernels before it builds: on every device, in both phases; and how much scratch memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from emulation import Emulation
from onnx import TensorProto
from tensorrt_models import attention_model
from tensorrt_support import enqueue_emulated, load_write_plan, run_process

from export import op
from export.engine.kernel_check import require_kernels, why_not
from export.engine.model import read_model
from export.engine.plugin import PluginLibrary, find_plugin
from export.engine.shapes import make_profiles, parse_shapes
from sparse_attention import native
from sparse_attention.errors import UsageError

HEADS, KV_HEADS, SIZE = 9, 3, 64
GROUPED = {
    "q": ("batch", HEADS, "sequence", SIZE),
    "k": ("batch", KV_HEADS, "past + sequence", SIZE),
    "v": ("batch", KV_HEADS, "past + sequence", SIZE),
}
HAVE = (80, 86, 87, 89, 90, 100, 103, 120, 121)
HAVE_NOT = (75, 110)


@pytest.fixture
def plugin(emulation: Emulation, plugin_build: Path) -> Iterator[PluginLibrary]:
    """The plugin over the emulated driver, on a device of any capability."""
    yield find_plugin(plugin_build / "libblockskip_tensorrt.so")
    emulation.driver.emulated_capability(90)


def reason(plugin: PluginLibrary, rows: int, keys: int, **attributes: int | float | str) -> str:
    given = op.attributes(inputs="q,k,v", is_causal=1, scale=0.125, prefill_threshold=0.1, decode_threshold=0.1)
    shapes = [(2, HEADS, rows, SIZE), (2, KV_HEADS, keys, SIZE), (2, KV_HEADS, keys, SIZE)]
    return why_not(plugin, {**given, **attributes}, [TensorProto.FLOAT16] * 3, shapes)


@pytest.mark.parametrize("capability", [*HAVE, *HAVE_NOT])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_the_answer_is_that_of_the_device(
    plugin: PluginLibrary, emulation: Emulation, capability: int, rows: int
) -> None:
    emulation.driver.emulated_capability(capability)
    found = reason(plugin, rows, 400)
    if capability in HAVE:
        assert found == ""
    else:
        assert f"compute capability {capability // 10}.{capability % 10}" in found
        assert "sm_80" in found


@pytest.mark.parametrize("capability", HAVE)
def test_a_group_decides_together_in_decode_only(plugin: PluginLibrary, emulation: Emulation, capability: int) -> None:
    emulation.driver.emulated_capability(capability)
    assert [reason(plugin, rows, 400, unit="group") for rows in (1, 2, 16)] == ["", "", ""]
    assert 'use unit "head"' in reason(plugin, 17, 400, unit="group")


@pytest.mark.parametrize("capability", HAVE)
def test_tiles_the_kernels_do_not_have(plugin: PluginLibrary, emulation: Emulation, capability: int) -> None:
    emulation.driver.emulated_capability(capability)
    assert "77 x 128" in reason(plugin, 300, 400, br=77)
    assert "1 x 64" in reason(plugin, 1, 400, bc=64)
    assert reason(plugin, 1, 400, br=77) == "", "a decode step is a row block of its own"


def refused(plugin: PluginLibrary, model: Path, *shapes: str) -> UsageError:
    read = read_model(model)
    with pytest.raises(UsageError) as error:
        require_kernels(read, make_profiles(read.inputs, parse_shapes(shapes)), plugin)
    return error.value


def test_the_builder_names_node_profile_and_what_to_do(
    plugin: PluginLibrary, emulation: Emulation, tmp_path: Path
) -> None:
    group = attention_model(tmp_path / "group.onnx", shapes=GROUPED, unit="group")
    read = read_model(group)
    small = make_profiles(read.inputs, parse_shapes(["sequence:1,8,16"]))
    assert require_kernels(read, small, plugin) == 6, "few rows are decoded, also where they are no decode step"
    error = refused(plugin, group, "sequence:1,8,64")
    assert error.where == "node layer0, profile prefill"
    assert 'unit "group"' in error.found
    assert "--shapes" in error.fix
    emulation.driver.emulated_capability(75)
    error = refused(plugin, attention_model(tmp_path / "head.onnx", shapes=GROUPED))
    assert "compute capability 7.5" in error.found
    assert error.fix.startswith("Build the engine on a GPU of an architecture")
    assert error.exit_code == 2


def workspaces(host: Path, library: Path, folder: Path, profiles: Sequence[str]) -> list[int]:
    """What the plugin asks for at each profile, in the host's process."""
    model = attention_model(folder / "model.onnx", shapes=GROUPED)
    _, plan, _ = load_write_plan().plan_for(model, folder, profiles, inputs={}, data=False)
    result = run_process([host, library, plan])
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line)["workspace"] for line in result.stdout.splitlines()]


def needed(emulation: Emulation, batch: int, rows: int, keys: int, threshold: float) -> int:
    q = torch.zeros(batch, HEADS, rows, SIZE, dtype=torch.float16)
    k = torch.zeros(batch, KV_HEADS, keys, SIZE, dtype=torch.float16)
    call = native.pack(q, k, k, torch.zeros_like(q), threshold=threshold, is_causal=True, br=1 if rows == 1 else 128)
    return emulation.library.workspace_size(call)


def test_scratch_memory_is_the_most_that_the_profile_can_need(
    host: Path, plugin_build: Path, emulation: Emulation, tmp_path: Path
) -> None:
    """That of decode grows with the keys, but not always with the rows: nine heads fill the lanes as they divide."""
    profiles = (
        "few:batch=1/1/2,past=100/300/600,sequence=1/4/9",
        "decode:batch=1/2/3,past=1/130/2000,sequence=1",
        "short:batch=1,past=0,sequence=17/64/128",
        "chunk:batch=1,past=3000,sequence=17/64/128",
        "any:batch=1,past=0/0/1100,sequence=1/100/200",
    )
    found = workspaces(host, plugin_build / "libblockskip_tensorrt.so", tmp_path, profiles)
    few, decode, short, chunk, either = found
    by_rows = {rows: needed(emulation, 2, rows, 609, 0.01 if rows == 1 else 0.1) for rows in range(1, 10)}
    assert max(by_rows, key=by_rows.__getitem__) == 8, "a test of the ends of the range would miss it"
    assert few == by_rows[8]
    assert decode == needed(emulation, 3, 1, 2001, 0.01) > needed(emulation, 3, 1, 131, 0.01)
    assert short == chunk == 256, "a prefill does not grow with its keys"
    assert either == needed(emulation, 1, 16, 1300, 0.1)


def test_an_engine_for_several_gpus_has_enough_on_each(
    plugin: PluginLibrary, plugin_build: Path, emulation: Emulation, tmp_path: Path
) -> None:
    """Built where the portable kernels need none, run where Hopper's count their work there."""
    model = attention_model(tmp_path / "model.onnx", shapes=GROUPED)
    profile = "prefill:batch=1,past=0,sequence=128"
    _, plan, _ = load_write_plan().plan_for(model, tmp_path, [profile], inputs={}, data=False)
    emulation.driver.emulated_capability(80)
    assert needed(emulation, 1, 128, 128, 0.1) == 0
    tensors = [torch.zeros(1, heads, 128, SIZE, dtype=torch.float16) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]

    def enqueue(workspace: int) -> None:
        enqueue_emulated(
            emulation, plugin_build, plan, "layer0", "prefill", tensors[:3], tensors[3:], workspace_bytes=workspace
        )

    with pytest.raises(AssertionError, match="smaller than the plugin asks for"):
        enqueue(255)
    enqueue(256)
    assert emulation.launched[0][0].startswith("sm80")
