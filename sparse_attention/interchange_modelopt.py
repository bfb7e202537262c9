"""ModelOpt `attention_sparsity` configurations, in the spellings of 0.41 to 0.47, to and from this project's.

Spellings: `threshold` (0.41, 0.42) and `thresholds` with lists (since 0.43); calibration as a key of a pattern (0.41)
or beside the patterns (since 0.42); the methods `flash_skip_softmax` and `triton_skip_softmax`, whose λ is called
`skip_softmax_threshold`. Other methods are other algorithms and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from sparse_attention import callables
from sparse_attention.config import SparseAttentionConfig
from sparse_attention.config_base import suggest
from sparse_attention.config_io import load_config
from sparse_attention.errors import ConfigError
from sparse_attention.interchange import Exported, Imported
from sparse_attention.threshold import PHASES

_METHODS = ("flash_skip_softmax", "triton_skip_softmax")
_OWN = ("method", "enable", "threshold", "br", "bc", "backend", "is_causal", "calibration")
_CALIBRATION = ("target_sparse_ratio", "samples", "max_seqlen")
_WITHOUT_MEANING = {
    "collect_stats": "tiles are always counted here",
    "chunk_size": "calibration needs no chunks here",
    "num_decode_tokens": "decode is calibrated from the last rows of the prefill here",
    "num_length_bins": "lengths come from the texts here",
    "threshold_trials": "every threshold is known from one pass here",
    "fit_logspace": "scale factors are always fitted in log space here",
    "cache_dir": "texts are not generated here",
    "data_dir": "texts are not generated here",
}
_NM = ("sparsity_n", "sparsity_m", "dense_sink_tokens", "dense_recent_tokens", "export_sparse_softmax")


def _preset(pattern: str = "*attn*", calibration: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {} if calibration is None else {"calibration": calibration}
    return {"sparse_cfg": {**tree, pattern: {**fields, "enable": True}, "default": {"enable": False}}}


_FLASH: dict[str, Any] = {
    "method": "flash_skip_softmax", "br": 128, "bc": 128, "backend": "pytorch", "collect_stats": True
}  # fmt: skip
_TRITON: dict[str, Any] = {"method": "triton_skip_softmax", "backend": "triton"}
_HALF = {"target_sparse_ratio": {"prefill": 0.5, "decode": 0.5}, "samples": 64, "max_seqlen": 16384}
MODELOPT_PRESETS: dict[str, dict[str, Any]] = {
    "SKIP_SOFTMAX_DEFAULT": _preset(thresholds={"prefill": [1e-3], "decode": [1e-4]}, **_FLASH),
    "SKIP_SOFTMAX_CALIB": _preset(calibration={**_HALF, "chunk_size": 4096}, **_FLASH),
    "SKIP_SOFTMAX_TRITON_DEFAULT": _preset(skip_softmax_threshold=0.1, **_TRITON),
    "SKIP_SOFTMAX_TRITON_CALIB": _preset(calibration={**_HALF, "chunk_size": -1}, **_TRITON),
}
"""ModelOpt's presets as they stand in 0.47; SKIP_SOFTMAX_CALIB asked for 0.9 at up to 65536 tokens before 0.43."""


def from_modelopt(given: Mapping[str, Any] | str) -> Imported:
    """The configuration that a ModelOpt configuration, or the name of one of its presets, means.

    Raises:
        ConfigError: where it is another algorithm (N:M sparse softmax, VSA), or not valid.
    """
    if isinstance(given, str):
        if given.upper() not in MODELOPT_PRESETS:
            raise ConfigError(
                "not a skip-softmax preset of ModelOpt", where=given, fix=suggest(given.upper(), MODELOPT_PRESETS)
            )
        given = MODELOPT_PRESETS[given.upper()]
    notes: list[str] = []
    tree: dict[Any, Any] = deepcopy(dict(given))
    patterns = tree.get("sparse_cfg")
    if not isinstance(patterns, dict):
        raise ConfigError(
            "a ModelOpt configuration has sparse_cfg", where="sparse_cfg", found=repr(patterns)[:80],
            fix="pass the dict that mtsa.sparsify takes",
        )  # fmt: skip
    shared = patterns.pop("calibration", None)
    tree["sparse_cfg"] = {key: _pattern(key, fields, notes) for key, fields in patterns.items()}
    if shared is not None:
        candidates = [
            key for key, fields in tree["sparse_cfg"].items() if key != "default" and fields.get("enable", True)
        ]
        if not candidates:
            raise ConfigError("calibration without a pattern", where="sparse_cfg", fix="name the modules to calibrate")
        if len(candidates) > 1:
            listed = ", ".join(map(callables.label, candidates[1:]))
            notes.append(f"calibration belongs to one pattern here: {listed} are not calibrated")
        tree["sparse_cfg"][candidates[0]]["calibration"] = _calibration(shared, notes)
    return Imported(load_config(tree), tuple(dict.fromkeys(notes)))


def to_modelopt(config: SparseAttentionConfig, version: str = "0.47") -> Exported:
    """The dict that `mtsa.sparsify` of ModelOpt `version` ("0.41" to "0.47") takes.

    ModelOpt keeps calibrated curves in a model's state and in `config.json` (`to_checkpoint_record`), not in its
    configuration: there a calibrated phase becomes a request for the same target.
    """
    minor = int(version.split(".")[1])
    notes: list[str] = []
    result: dict[str, Any] = {}
    for key, given in config.sparse_cfg.items():
        fields: dict[str, Any] = {name: given[name] for name in _OWN if name in given and name != "calibration"}
        if fields.get("backend") == "cuda":
            fields["backend"] = "pytorch"
            notes.append("backend cuda is written as pytorch: ModelOpt has other kernels")
        if "threshold" in fields and minor >= 43:
            value = fields.pop("threshold")
            per_phase = value if isinstance(value, Mapping) else dict.fromkeys(PHASES, value)
            fields["thresholds"] = {phase: [number] for phase, number in per_phase.items() if number > 0}
            dense = [phase for phase, number in per_phase.items() if number == 0]
            if dense:
                notes.append(f"{' and '.join(dense)}: λ = 0 is left out; ModelOpt's thresholds are above 0")
        result[callables.spell(key)] = fields
        if not isinstance(key, str):
            notes.append(f"{callables.label(key)}: put the callable itself in the place of its name")
    if config.calibration is not None:
        key, calibration = config.calibration
        if calibration.found:
            notes.append("calibrated curves are left out: they go to config.json, see to_checkpoint_record")
        if calibration.strategy not in (None, "length"):
            notes.append(f"strategy {calibration.strategy} is left out: ModelOpt fits one curve over the length")
        ratios = {phase: part.target for phase in PHASES if (part := getattr(calibration, phase)) is not None}
        request: dict[str, Any] = {"target_sparse_ratio": {phase: ratios.get(phase, 0.0) for phase in PHASES}}
        request.update({n: v for n in ("samples", "max_seqlen") if (v := getattr(calibration, n)) is not None})
        if minor >= 42:
            result = {"calibration": request, **result}
        else:
            result[callables.spell(key)]["calibration"] = request
    record: dict[str, Any] = {"sparse_cfg": result}
    if config.export_format is not None:
        record["export_format"] = config.export_format
    return Exported(record, tuple(dict.fromkeys(notes)))


def _pattern(key: Any, fields: Any, notes: list[str]) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise ConfigError("a pattern's settings are a dict", where=f"sparse_cfg[{key!r}]", found=repr(fields)[:80],
                          fix="give at least enable: true")  # fmt: skip
    fields = dict(fields)
    method = fields.get("method", "flash_skip_softmax")
    if method not in _METHODS:
        raise ConfigError(
            "another algorithm than skip-softmax", where=f"sparse_cfg[{key!r}].method", found=repr(method),
            fix=f"only {' and '.join(_METHODS)} mean what this op computes",
        )  # fmt: skip
    if "method" in fields:
        fields["method"] = "flash_skip_softmax"
    if fields.get("backend") == "triton":
        fields["backend"] = "cuda"
        notes.append("backend triton is read as cuda: this project's own kernels")
    if "skip_softmax_threshold" in fields:
        value = fields.pop("skip_softmax_threshold")
        if method == "triton_skip_softmax" and "threshold" not in fields and "calibration" not in fields:
            fields["threshold"] = value
    for name in [name for name in fields if name in _WITHOUT_MEANING]:
        notes.append(f"{name} is left out: {_WITHOUT_MEANING[name]}")
        fields.pop(name)
    nm = {name: fields.pop(name) for name in _NM if name in fields}
    if nm.get("export_sparse_softmax"):
        notes.append("N:M sparse softmax is left out: this op only skips tiles")
    if fields.pop("initial_disabled_steps", 0):
        notes.append("initial_disabled_steps is left out: a diffusion loop switches layers itself (disable, enable)")
    if "thresholds" in fields:
        fields["threshold"] = _thresholds(key, fields.pop("thresholds"), notes)
    if isinstance(fields.get("threshold"), Mapping) and "default" in fields["threshold"]:
        per_phase = dict(fields["threshold"])
        rest = per_phase.pop("default")
        fields["threshold"] = {phase: per_phase.get(phase, rest) for phase in PHASES}
    if fields.get("calibration") is not None:
        fields["calibration"] = _calibration(fields["calibration"], notes)
    if method == "flash_skip_softmax" and "calibration" in fields:
        fields.pop("threshold", None)
    return fields


def _thresholds(key: Any, value: Any, notes: list[str]) -> Any:
    if not isinstance(value, Mapping):
        return value
    lists = {phase: given if isinstance(given, list) else [given] for phase, given in value.items()}
    if any(len(given) > 1 for given in lists.values()):
        notes.append(f"{key}: of several thresholds the first is applied, as in ModelOpt")
    return {phase: given[0] for phase, given in lists.items() if given}


def _calibration(given: Any, notes: list[str]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError("calibration is a dict", where="calibration", found=repr(given)[:80],
                          fix="give target_sparse_ratio")  # fmt: skip
    for name in given:
        if name in _WITHOUT_MEANING:
            notes.append(f"calibration.{name} is left out: {_WITHOUT_MEANING[name]}")
    return {name: value for name, value in given.items() if name in _CALIBRATION or name not in _WITHOUT_MEANING}
