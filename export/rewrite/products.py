"""Products spelled as MatMul, Gemm or Einsum, and what they mean."""

from __future__ import annotations

import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm", "Einsum")


def equation(node: ir.Node) -> str:
    return node.attributes["equation"].as_string().replace(" ", "")


def is_equation(node: ir.Node, last: tuple[str, str, str]) -> bool:
    """Whether an Einsum is a batched product whose operands end in the given letters, up to renaming."""
    operands, _, result = equation(node).partition("->")
    left, _, right = operands.partition(",")
    terms = (left, right, result)
    batch = left[:-2]
    if any(len(term) < 2 or "." in term or term[:-2] != batch for term in terms):
        return False
    names: dict[str, str] = {}
    for term, expected in zip(terms, last, strict=True):
        for letter, name in zip(term[-2:], expected, strict=True):
            if names.setdefault(name, letter) != letter:
                return False
    return len(set(names.values())) == len(names) and not set(batch) & set(names.values())


def is_plain(node: ir.Node, with_factor: bool = False) -> bool:
    """A Gemm without bias and transposed left operand, and (unless allowed) without factor."""
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    factor = node.attributes.get_float("alpha", 1.0)
    return not has_bias and not node.attributes.get_int("transA", 0) and (with_factor or factor == 1.0)
