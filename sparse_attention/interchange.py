"""Calibrated thresholds to and from the records of other tools that skip softmax tiles.

All of them compute λ = S / length with a scale factor S, and derive it as `a * exp(b * target_sparsity)` where it is
calibrated, so curves cross over exactly. What a format cannot say (a λ of its own per layer, a λ that does not follow
the length, another tile) comes back as a note in plain words beside the result; nothing is dropped silently.

Sources: ModelOpt's `export_sparse_attention_config` (both layouts of the record), TensorRT-LLM's
`SkipSoftmaxAttentionConfig`, TensorRT Edge-LLM's `skip_softmax_scale_factor`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_attention import callables
from sparse_attention.config import CalibrationConfig, SparseAttentionConfig
from sparse_attention.config_io import load_config
from sparse_attention.errors import ConfigError
from sparse_attention.threshold import PHASES, Phase, PhaseThreshold, Thresholds

FORMULA = "a * exp(b * target_sparsity)"
_UNTOLD_TARGET = 0.5
"""The target of a curve whose scale factor came without one; it has no effect while b is 0."""


@dataclass(frozen=True)
class Imported:
    """A configuration read from another tool's record, and what could not be taken over."""

    config: SparseAttentionConfig
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A record for another tool, and what it cannot say."""

    record: dict[str, Any]
    notes: tuple[str, ...] = ()


def to_checkpoint_record(config: SparseAttentionConfig, targets: Sequence[str] = ("Attention",)) -> Exported:
    """`sparse_attention_config` for a checkpoint's `config.json`, as TensorRT-LLM, vLLM and ModelOpt read it.

    Written in both layouts at once: inside the config group (current ModelOpt and vLLM), and at the top (older
    ModelOpt and TensorRT-LLM).

    Args:
        config: calibrated by "length", or holding such a curve.
        targets: class names of the attention modules.

    Raises:
        ConfigError: where no phase has a curve.
    """
    found, notes = _curves(config)
    notes += _tile_notes(config)
    factor: dict[str, Any] = {"formula": FORMULA, **{phase: {"a": t.a, "b": t.b} for phase, t in found.items()}}
    sparsity = {phase: t.target for phase, t in found.items()}
    group: dict[str, Any] = {
        "algorithm": "skip_softmax", "sparse_algo": "softmax_skip", "targets": list(targets),
        "threshold_scale_factor": factor, "target_sparsity": sparsity,
    }  # fmt: skip
    ignored = [key for key, given in config.sparse_cfg.items() if key != "default" and given.get("enable") is False]
    if ignored:
        group["ignore"] = [callables.spell(key).strip("*") for key in ignored]
    record = {
        "config_groups": {"group_0": group}, "threshold_scale_factor": factor, "target_sparse_ratio": sparsity,
        "producer": {"name": "block-skip-attention"},
    }  # fmt: skip
    return Exported(record, tuple(notes))


def from_checkpoint_record(record: Mapping[str, Any], pattern: str = "*attn*") -> Imported:
    """The configuration that a checkpoint's `sparse_attention_config` describes, in either layout.

    Args:
        record: the value of `sparse_attention_config`, or a whole `config.json`.
        pattern: which modules it applies to; class names in `targets` are used where they are given.

    Raises:
        ConfigError: where it describes no skip-softmax curve that this op can compute.
    """
    record = record.get("sparse_attention_config", record)
    groups = list(_mapping(record.get("config_groups", {}), "config_groups").values())
    ours = [g for g in groups if (g.get("algorithm") or g.get("sparse_algo")) in ("skip_softmax", "softmax_skip")]
    notes = [
        f"config group {g.get('algorithm') or g.get('sparse_algo')!r} is left out: only skip-softmax is computed here"
        for g in groups
        if g not in ours
    ]
    if "sparse_softmax" in record:
        notes.append("sparse_softmax (N:M sparsity) is left out: only skip-softmax is computed here")
    group = ours[0] if ours else {}
    if len(ours) > 1:
        notes.append(f"{len(ours)} skip-softmax groups: only the first is taken")
    if group.get("initial_disabled_steps"):
        notes.append("initial_disabled_steps is left out: a diffusion loop switches layers itself (disable, enable)")
    factor = group.get("threshold_scale_factor", record.get("threshold_scale_factor"))
    wanted = group.get("target_sparsity", record.get("target_sparse_ratio", record.get("target_sparsity")))
    phases = _phases(factor, wanted, notes)
    names = [name for name in group.get("targets", ()) if name != "Attention"] or [pattern]
    if len(names) > 1:
        notes.append(f"targets {', '.join(names)}: matched by the pattern {pattern!r}, because one pattern calibrates")
        names = [pattern]
    ignored = {f"*{name}*": {"enable": False} for name in group.get("ignore", ())}
    return Imported(
        load_config({"sparse_cfg": {names[0]: {"calibration": phases}, **ignored, "default": {"enable": False}}}),
        tuple(notes),
    )


def to_tensorrt_llm(config: SparseAttentionConfig, *, resolved: bool = True, length: int | None = None) -> Exported:
    """Keyword arguments of TensorRT-LLM's `SkipSoftmaxAttentionConfig`.

    Args:
        resolved: True gives `threshold_scale_factor` (works with any checkpoint); False gives `target_sparsity`, for a
            checkpoint that carries the record of `to_checkpoint_record`.
        length: at which a λ that does not follow the length is converted to a scale factor.

    Raises:
        ConfigError: where no phase can be expressed.
    """
    found, notes = _curves(config, length)
    notes += _tile_notes(config)
    if resolved:
        values = {phase: t.a * math.exp(t.b * t.target) for phase, t in found.items()}
        return Exported({"algorithm": "skip_softmax", "threshold_scale_factor": values}, tuple(notes))
    targets = {phase: t.target for phase, t in found.items()}
    return Exported({"algorithm": "skip_softmax", "target_sparsity": targets}, tuple(notes))


def from_tensorrt_llm(
    given: Mapping[str, Any], record: Mapping[str, Any] | None = None, pattern: str = "*attn*"
) -> Imported:
    """The configuration that a `SkipSoftmaxAttentionConfig` means.

    Args:
        given: its fields; `threshold_scale_factor` wins over `target_sparsity`, as there.
        record: the checkpoint's `sparse_attention_config`, which `target_sparsity` alone needs.

    Raises:
        ConfigError: where it is another algorithm, or lacks what it needs.
    """
    if given.get("algorithm", "skip_softmax") != "skip_softmax":
        raise ConfigError(
            "only skip-softmax attention can be taken over", where="algorithm", found=repr(given["algorithm"]),
            fix="use a SkipSoftmaxAttentionConfig",
        )  # fmt: skip
    factor, notes = given.get("threshold_scale_factor"), []
    if factor is not None:
        if given.get("target_sparsity") is not None:
            notes.append("target_sparsity is left out: threshold_scale_factor wins, as in TensorRT-LLM")
        phases: Mapping[str, Any] = _phases(factor, None, notes)
        return Imported(_one_pattern(pattern, phases), tuple(notes))
    wanted = given.get("target_sparsity")
    if wanted is None or record is None:
        raise ConfigError(
            "target_sparsity needs the curve in the checkpoint's config.json",
            where="sparse_attention_config",
            found="no threshold_scale_factor" if wanted is None else "no record",
            fix="pass the checkpoint's sparse_attention_config, or give threshold_scale_factor",
        )
    found = from_checkpoint_record(record, pattern)
    carrier = found.config.calibration
    assert carrier is not None
    ratios = wanted if isinstance(wanted, Mapping) else dict.fromkeys(PHASES, wanted)
    moved = carrier[1].model_dump(exclude_unset=True)
    for phase in PHASES:
        if phase in moved and ratios.get(phase):
            moved[phase]["target"] = float(ratios[phase])
        elif phase in moved:
            moved.pop(phase)
    return Imported(found.config.calibrated(CalibrationConfig.model_validate(moved)), found.notes)


def to_edge_llm(config: SparseAttentionConfig, *, length: int | None = None) -> Exported:
    """TensorRT Edge-LLM's `skip_softmax_scale_factor`: one S for prefill, λ = S / context length.

    Raises:
        ConfigError: where prefill has no curve, and no `length` to convert its λ at.
    """
    found, notes = _curves(config, length)
    if "prefill" not in found:
        raise ConfigError(
            "Edge-LLM skips in prefill only, and prefill has no curve here", where="calibration",
            found=", ".join(found), fix="calibrate prefill with the strategy length",
        )  # fmt: skip
    if "decode" in found:
        notes.append("decode is left out: Edge-LLM skips in prefill only")
    curve = found["prefill"]
    return Exported(
        {"skip_softmax_scale_factor": curve.a * math.exp(curve.b * curve.target)}, tuple(notes + _tile_notes(config))
    )


def from_edge_llm(given: Mapping[str, Any], pattern: str = "*attn*") -> Imported:
    """The configuration that Edge-LLM's `skip_softmax_scale_factor` means: prefill sparse, decode dense."""
    notes: list[str] = []
    phases = _phases({"prefill": given.get("skip_softmax_scale_factor")}, None, notes)
    return Imported(_one_pattern(pattern, phases), tuple(notes))


def _one_pattern(pattern: str, phases: Mapping[str, Any]) -> SparseAttentionConfig:
    return load_config({"sparse_cfg": {pattern: {"calibration": dict(phases)}, "default": {"enable": False}}})


def _curves(config: SparseAttentionConfig, length: int | None = None) -> tuple[dict[Phase, PhaseThreshold], list[str]]:
    """The one curve of each phase that these formats can carry, and notes about what they cannot."""
    notes: list[str] = []
    found: dict[Phase, PhaseThreshold] = {}
    if config.calibration is not None:
        found.update(config.calibration[1].fitted)
        if config.calibration[1].layers:
            notes.append(
                f"thresholds of {len(config.calibration[1].layers)} single layers (strategy balanced) are left out: "
                "the format has one curve for all, so the middle of them is written; calibrate with the strategy length"
            )
    for key, given in config.sparse_cfg.items():
        if key == "default" or "threshold" not in given or given.get("enable") is False:
            continue
        thresholds = Thresholds.of(given["threshold"])
        for phase in PHASES if not isinstance(given["threshold"], Mapping) else given["threshold"]:
            found.setdefault(phase, getattr(thresholds, phase))
    result: dict[Phase, PhaseThreshold] = {}
    for phase, threshold in found.items():
        if threshold.a > 0:
            result[phase] = threshold
        elif threshold.threshold > 0 and length is not None:
            result[phase] = PhaseThreshold(a=threshold.threshold * length, target=_UNTOLD_TARGET)
            notes.append(f"{phase}: λ = {threshold.threshold:g} is right at {length} tokens only; here λ = S / length")
        elif threshold.threshold > 0:
            notes.append(
                f"{phase}: λ = {threshold.threshold:g} is left out: the format has no λ that ignores the length; "
                "calibrate with the strategy length, or name the length to convert it at"
            )
    if not result:
        raise ConfigError(
            "this configuration has no threshold that the format can express",
            where="sparse_cfg",
            found="; ".join(notes) or "no calibrated phase",
            fix="calibrate with the strategy length first",
        )
    return result, notes


def _tile_notes(config: SparseAttentionConfig) -> list[str]:
    """These runtimes decide by the tile of their kernel, whatever was calibrated."""
    tiles = {
        (given.get("br", 128), given.get("bc", 128)) for key, given in config.sparse_cfg.items() if key != "default"
    }
    named = ", ".join(f"{br} x {bc}" for br, bc in sorted(tiles))
    return [f"tiles of {named} are not part of the format: its kernels decide by their own tile (64 x 128 on Hopper)"]


def _phases(factor: Any, wanted: Any, notes: list[str]) -> dict[str, Any]:
    """The content of `calibration` for a `threshold_scale_factor`: numbers, or a and b, per phase."""
    if factor is None:
        raise ConfigError(
            "the record holds no threshold_scale_factor", where="sparse_attention_config",
            fix="calibrate the checkpoint, or give the scale factors",
        )  # fmt: skip
    values = factor if isinstance(factor, Mapping) else dict.fromkeys(PHASES, factor)
    formula = values.get("formula", FORMULA)
    if "".join(str(formula).split()) != "".join(FORMULA.split()):
        raise ConfigError(
            "unknown formula of the scale factor", where="threshold_scale_factor.formula", found=repr(formula),
            fix=f"this op computes {FORMULA}",
        )  # fmt: skip
    targets = wanted if isinstance(wanted, Mapping) else dict.fromkeys(PHASES, wanted)
    phases: dict[str, Any] = {}
    for phase in PHASES:
        value, target = values.get(phase), targets.get(phase)
        if isinstance(value, Mapping):
            if target is None:
                notes.append(f"{phase}: no target sparsity is given; 0.5 is assumed, as ModelOpt does")
            curve = {"target": float(_UNTOLD_TARGET if target is None else target), "a": float(value["a"])}
            phases[phase] = {**curve, "b": float(value["b"])}
        elif isinstance(value, (int, float)) and value > 0:
            phases[phase] = {"target": _UNTOLD_TARGET, "a": float(value), "b": 0.0}
    if not phases:
        raise ConfigError(
            "no phase has a scale factor above 0", where="threshold_scale_factor", found=repr(factor),
            fix="give prefill, decode or both",
        )  # fmt: skip
    return phases


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(item, Mapping) for item in value.values()):
        raise ConfigError("this part of the record must hold mappings", where=where, found=repr(value)[:80],
                          fix="compare it with ModelOpt's export")  # fmt: skip
    return value
