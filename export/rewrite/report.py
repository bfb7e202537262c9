"""What the rewriting found: every attention, rewritten or left with the reason."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from export.adapter import ADAPTED
from sparse_attention.patterns import ResolvedAttention

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"


@dataclass(frozen=True)
class AttentionSite:
    """Where an attention was found.

    `scopes` and `class_names` are the PyTorch modules around it, outermost first, and their classes; both are empty in
    a file that did not come from `torch.onnx.export(dynamo=True)`, and then only `node_name` can be matched.
    """

    node_name: str
    op_type: str
    scopes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Dotted name of the innermost module, or the node's name where no module is known."""
        return self.scopes[-1] if self.scopes else self.node_name

    @property
    def class_name(self) -> str:
        """Class of the innermost module without its package, "" where it is not known."""
        return self.class_names[-1].rpartition(".")[2] if self.class_names else ""


Settings: TypeAlias = Callable[[AttentionSite], ResolvedAttention | None]
"""Which configuration an attention gets; None (or `enable=False`) leaves it as it is."""


class RefusalError(Exception):
    """An attention that cannot become the op; the text is the reason shown to the user."""


@dataclass(frozen=True)
class Rewritten:
    """One attention that became the op, and how it was spelled."""

    site: AttentionSite
    family: str
    inputs: tuple[str, ...]
    is_causal: bool
    window: int
    kv_groups: int
    """Query heads per K/V head that were un-expanded; 1 where nothing was expanded."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """One attention that stays as it was."""

    site: AttentionSite
    reason: str


@dataclass(frozen=True)
class RewriteReport:
    """Every attention of a graph: `rewritten` and `left` together are all that were found."""

    rewritten: tuple[Rewritten, ...]
    left: tuple[Left, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Attentions found, rewritten and left, and the rewritten ones by family."""
        families = [entry.family for entry in self.rewritten]
        return {
            "found": len(self.rewritten) + len(self.left),
            "rewritten": len(self.rewritten),
            "left": len(self.left),
            **{family: families.count(family) for family in sorted(set(families))},
        }

    def __str__(self) -> str:
        counts = self.counts
        lines = [f"{counts['rewritten']} of {counts['found']} attentions rewritten"]
        for entry in self.rewritten:
            how = [entry.family, *entry.notes]
            lines.append(f"  {entry.site.module}: rewritten ({', '.join(how)})")
        lines += [f"  {entry.site.module}: left as it is: {entry.reason}" for entry in self.left]
        return "\n".join(lines)


def site_of(node: ir.Node) -> AttentionSite:
    """The site of a node, from the metadata the PyTorch exporter leaves on it."""
    scopes, classes = (_list(node.metadata_props.get(key, "")) for key in (_SCOPES, _CLASSES))
    # the last entry names the operator itself, and the first, "", the whole model
    names = ("" if name == ADAPTED else name.removeprefix(f"{ADAPTED}.") for name in scopes[:-1])
    modules = [(name, class_name) for name, class_name in zip(names, classes[:-1], strict=False) if name]
    return AttentionSite(
        node_name=node.name or "",
        op_type=node.op_type,
        scopes=tuple(name for name, _ in modules),
        class_names=tuple(class_name for _, class_name in modules),
    )


def _list(text: str) -> list[str]:
    try:
        value = ast.literal_eval(text) if text else []
    except (SyntaxError, ValueError):
        return []
    return [str(entry) for entry in value] if isinstance(value, list) else []
