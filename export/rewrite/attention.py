"""Find every attention of an ONNX graph and make it the op: pattern, check, rewrite, report."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from export import op
from export.rewrite import attention_op, decomposed
from export.rewrite.check import Plan, check
from export.rewrite.emit import Written, remove_unused, replace
from export.rewrite.index_calculus import IndexCalculus
from export.rewrite.match import AttentionMatch
from export.rewrite.report import AttentionSite, Left, RefusalError, RewriteReport, Rewritten, Settings, site_of
from export.rewrite.shapes import Shapes
from sparse_attention.errors import ConfigError, ModelError
from sparse_attention.patterns import ResolvedAttention

OLDEST_OPSET = 18
"""The function body reduces over axes that are inputs."""


def find_attention(model: ir.Model) -> tuple[AttentionSite, ...]:
    """Every attention of the graph, rewritable or not: what patterns of a configuration can be matched against."""
    return tuple(site_of(node) for node in _candidates(model.graph))


def rewrite_attention(
    model: ir.Model, settings: Settings, *, unit: str = "head", dry_run: bool = False
) -> RewriteReport:
    """Replace the attentions of a model by `BlockSkipSoftmaxAttention`, in place.

    An attention is a Softmax that feeds a product, or an ONNX `Attention` operator. K and V expanded for grouped-query
    attention are un-expanded, a mask that is proven causal becomes `is_causal` (see `index_calculus`), any other mask
    stays an input. The op's node carries all attributes of the contract and the metadata of what it replaces; nodes and
    initializers that only the old attention used are removed, nothing else is touched. The function body, and equal
    inputs for nodes that differ, come afterwards from `export.finish`.

    Args:
        model: any ONNX model, changed in place.
        settings: the configuration of each attention found; None leaves it as it is.
        unit: "head" or "group", the op's attribute.
        dry_run: only report what would be done.

    Returns:
        What was rewritten, and what was left for which reason.

    Raises:
        ConfigError: where a configuration says `is_causal` explicitly and the graph proves otherwise.
        ModelError: where the graph's opset is below 18, in which the function body cannot be written.
    """
    graph = model.graph
    if not dry_run:
        _check_opset(model)
    if any(node.outputs[0].shape is None for node in _candidates(graph)):
        ShapeInferencePass()(model)  # a file without shapes, as older exporters write it
    shapes = Shapes()
    calculus = IndexCalculus(shapes)
    opset = graph.opset_imports.get("", 1)
    plans: list[tuple[AttentionSite, Plan, ResolvedAttention]] = []
    left: list[Left] = []
    for node in _candidates(graph):
        site = site_of(node)
        resolved = settings(site)
        if resolved is None or not resolved.enable:
            left.append(Left(site, "the configuration leaves it dense"))
            continue
        try:
            if node.graph is not graph:
                raise RefusalError("it is inside the branch of a control-flow operator")
            plan = check(_match(node, shapes, opset), shapes, calculus)
        except RefusalError as refusal:
            left.append(Left(site, str(refusal)))
            continue
        _check_causality(site, resolved, plan)
        plans.append((site, plan, resolved))
    left += _in_functions(model)
    rewritten = tuple(_entry(site, plan) for site, plan, _ in plans)
    if plans and not dry_run:
        _apply(model, plans, shapes, unit)
    return RewriteReport(rewritten, tuple(left))


def _check_opset(model: ir.Model) -> None:
    found = model.graph.opset_imports.get("", 1)
    if found < OLDEST_OPSET:
        raise ModelError(
            f"the function body of the op needs opset {OLDEST_OPSET}",
            where=model.graph.name or "",
            found=f"opset {found}",
            fix=f"export with opset_version={OLDEST_OPSET}, or onnx.version_converter.convert_version(model, 18)",
        )


def _apply(
    model: ir.Model, plans: list[tuple[AttentionSite, Plan, ResolvedAttention]], shapes: Shapes, unit: str
) -> None:
    # Every plan was made on the graph as it came; one after the other they only add nodes until the last is written.
    written = Written()
    old = []
    for site, plan, resolved in plans:
        producer = plan.match.output.producer()
        assert producer is not None
        old.append(producer)
        replace(plan, resolved, shapes, written, unit=unit, name=site.node_name or site.module)
    remove_unused(old)
    model.graph.opset_imports[op.DOMAIN] = op.VERSION


def _candidates(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph.all_nodes():
        if node.domain == "" and (
            node.op_type == "Attention" or (node.op_type == "Softmax" and decomposed.is_attention(node))
        ):
            yield node


def _match(node: ir.Node, shapes: Shapes, opset: int) -> AttentionMatch:
    return attention_op.match(node, shapes) if node.op_type == "Attention" else decomposed.match(node, shapes, opset)


def _in_functions(model: ir.Model) -> list[Left]:
    return [
        Left(site_of(node), f"it is inside the model-local function {function.name}; inline the functions first")
        for function in model.functions.values()
        if function.domain != op.DOMAIN
        for node in function.all_nodes()
        if node.domain == ""
        and (node.op_type == "Attention" or (node.op_type == "Softmax" and decomposed.is_attention(node)))
    ]


def _check_causality(site: AttentionSite, resolved: ResolvedAttention, plan: Plan) -> None:
    """`is_causal` set explicitly must agree with the graph; as a default it gives way to it."""
    if resolved.is_causal_explicit and resolved.is_causal != plan.is_causal:
        unproven = plan.masks.kept
        kept = " (its mask could not be proven causal and stays an input)" if unproven else ""
        raise ConfigError(
            "the configuration contradicts the model about causality",
            where=site.module,
            found=f"is_causal: {str(resolved.is_causal).lower()} in the configuration, "
            f"{'causal' if plan.is_causal else 'not causal'} in the graph{kept}",
            fix="leave is_causal out: it is read from the model",
        )


def _entry(site: AttentionSite, plan: Plan) -> Rewritten:
    inputs = ["q", "k", "v"]
    if plan.masks.kept:
        inputs.append("bias")
    if plan.match.kv_lengths is not None:
        inputs.append("kv_lengths")
    if plan.q_start is not None or (plan.match.kv_lengths is not None and plan.match.is_causal):
        inputs.append("q_start")
    return Rewritten(site, plan.match.family, tuple(inputs), plan.is_causal, plan.masks.window, plan.group, plan.notes)
