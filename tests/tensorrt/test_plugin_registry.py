"""TensorRT-RTX's plugin registry loads our library, finds the creator and creates the plugin."""

from __future__ import annotations

import json
from pathlib import Path

from tensorrt_support import Run

CREATE = r"""
import json, sys
import numpy as np
import tensorrt_rtx as trt
from export import op

builder = trt.Builder(trt.Logger(trt.Logger.INFO))
registry = trt.get_plugin_registry()
assert registry.get_creator(op.OP_TYPE, str(op.VERSION), op.DOMAIN) is None
registry.load_library(sys.argv[1])
creator = registry.get_creator(op.OP_TYPE, str(op.VERSION), op.DOMAIN)
assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (op.OP_TYPE, str(op.VERSION), op.DOMAIN)

def field(name, value):
    types = trt.PluginFieldType
    if isinstance(value, str):
        return trt.PluginField(name, value.encode(), types.CHAR)
    is_int = isinstance(value, int)
    data = np.array([value], np.int32 if is_int else np.float32)
    return trt.PluginField(name, data, types.INT32 if is_int else types.FLOAT32)

def create(**given):
    attributes = op.attributes(**given)
    fields = [field(*item) for item in attributes.items() if item[1] is not None]
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)

plugin = create(inputs="q,k,v,bias", br=64, scale=0.125, prefill_threshold=0.1)
core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
assert create(unit="row") is None
print(json.dumps({
    "fields": [f.name for f in creator.field_names],
    "core": [core.plugin_name, core.plugin_version, core.plugin_namespace],
    "outputs": build.num_outputs,
    "cache": build.timing_cache_id,
}))
"""


def test_registry_creates_the_plugin(run_rtx: Run, plugin_library: Path) -> None:
    result = run_rtx(CREATE, plugin_library)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["core"] == ["BlockSkipSoftmaxAttention", "1", "blockskip"]
    assert "prefill_threshold" in found["fields"]
    assert found["outputs"] == 2  # a node that does not say what it uses gets both
    assert "inputs=q,k,v,bias;br=64;" in found["cache"]
    # the refused plugin says why; outside of a build TensorRT-RTX offers no logger, so on standard error
    assert 'node "node": field "unit": found "row", expected "head" or "group"' in result.stderr
