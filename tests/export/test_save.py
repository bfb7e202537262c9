"""Results are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from export.finish import finish
from export.report import write_json
from export.save import check_output, save_onnx, staged
from sparse_attention.errors import ModelError, UsageError
from tests.attention_calls import peaky_call
from tests.onnx_graphs import graph_of


def graph() -> ir.Model:
    return finish(graph_of([peaky_call(3, 5)]))


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


class Describes:
    """Something with a file of its own, such as a tokenizer."""

    def __init__(self, contents: str, fails: BaseException | None = None) -> None:
        self.contents, self.fails = contents, fails

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "described.json").write_text(self.contents)
        if self.fails is not None:
            raise self.fails


def test_everything_arrives(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "x.onnx"
    save_onnx(graph(), path, [Describes("1")])
    assert {"x.onnx", "described.json"} <= set(names(path.parent))
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_stays_after_a_failure(failure: BaseException, tmp_path: Path) -> None:
    kind = UsageError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(kind) as raised:
        save_onnx(graph(), tmp_path / "x.onnx", [Describes("1", failure)])
    assert names(tmp_path) == []
    if isinstance(failure, OSError):
        assert "No space left on device" in str(raised.value) and "fix:" in str(raised.value)


def test_an_invalid_graph_is_not_written(tmp_path: Path) -> None:
    model = graph()
    node = ir.node("Add", [model.graph.inputs[0], model.graph.inputs[0]])
    node.op_type = "NoSuchOperator"
    node.outputs[0].name = "extra"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])
    with pytest.raises(ModelError, match="not valid ONNX"):
        save_onnx(model, tmp_path / "x.onnx")
    assert names(tmp_path) == []


def test_existing_files_are_kept_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"exists already[\s\S]*--force"):
        save_onnx(graph(), path)
    assert path.read_text() == "mine"
    save_onnx(graph(), path, force=True)
    onnx.checker.check_model(path)


def test_the_files_of_another_model_are_kept(tmp_path: Path) -> None:
    (tmp_path / "described.json").write_text("another")
    with pytest.raises(UsageError, match=r"another model[\s\S]*described\.json"):
        save_onnx(graph(), tmp_path / "x.onnx", [Describes("mine")])
    assert names(tmp_path) == ["described.json"] and (tmp_path / "described.json").read_text() == "another"
    save_onnx(graph(), tmp_path / "x.onnx", [Describes("another")])  # the same is no conflict
    save_onnx(graph(), tmp_path / "y.onnx", [Describes("mine")], force=True)
    assert (tmp_path / "described.json").read_text() == "mine"


def test_weights_of_another_file_are_kept(tmp_path: Path) -> None:
    """`x.onnx` was moved away and its weights were not: they still belong to it."""
    (tmp_path / "x.onnx.data").write_bytes(b"weights of another model")
    model = graph()
    weight = ir.Value(name="w", const_value=ir.tensor(torch.randn(64, 64).numpy(), name="w"))
    weight.type, weight.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([64, 64])
    model.graph.initializers["w"] = weight
    identity = ir.node("Identity", [weight])
    identity.outputs[0].name = "used"
    identity.outputs[0].type, identity.outputs[0].shape = weight.type, weight.shape
    model.graph.append(identity)
    model.graph.outputs.append(identity.outputs[0])
    with pytest.raises(UsageError, match=r"another model[\s\S]*x\.onnx\.data"):
        save_onnx(model, tmp_path / "x.onnx")
    assert names(tmp_path) == ["x.onnx.data"]


@pytest.mark.parametrize(
    ("where", "words"),
    [("", "output is a directory"), ("file/x.onnx", "file is no directory"), ("file/a/x.onnx", "file is no directory"),
     ("/proc/x.onnx", "cannot be written"), ("n" * 300 + "/x.onnx", "cannot be written")],
)  # fmt: skip
def test_outputs_that_cannot_be_written(where: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / where
    with pytest.raises(UsageError, match=words) as raised:
        check_output(path)
    assert str(path) in str(raised.value) and "fix:" in str(raised.value)
    assert names(tmp_path) == ["file"]


def test_folders_are_made_when_something_is_written(tmp_path: Path) -> None:
    """A run that ends before it has a result leaves no folder."""
    path = tmp_path / "a" / "b" / "x.onnx"
    check_output(path)
    assert names(tmp_path) == []
    with staged(path) as stage:
        (stage / "x.onnx").write_text("x")
    assert names(path.parent) == ["x.onnx"]


def test_the_named_file_arrives_last(tmp_path: Path) -> None:
    """Whoever waits for it finds everything else."""
    order = []
    replace = Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", noted)
        with staged(tmp_path / "a.onnx") as stage:
            for name in ("z.json", "a.onnx", "a.onnx.data"):
                (stage / name).write_text(name)
    assert order[-1] == "a.onnx" and sorted(order) == names(tmp_path)


def test_reports_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"λ": 1})
    with pytest.raises(TypeError):
        write_json(path, {"λ": object()})
    assert path.read_text(encoding="utf-8") == '{\n  "λ": 1\n}\n' and names(tmp_path) == ["report.json"]
