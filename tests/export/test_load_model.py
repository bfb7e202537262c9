"""MODEL as people write it: what can be loaded, and what is said of what cannot. Nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from export.models import load_model
from sparse_attention.errors import MissingError, ModelError, SparseAttentionError, UsageError
from tests.sparse_attention.attention_models import tiny


def refused(source: Path | str, kind: type[SparseAttentionError], message: str) -> None:
    with pytest.raises(kind, match=message) as raised:
        load_model(str(source))
    text = str(raised.value)
    assert str(source) in text and "fix:" in text


def copied(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_directory(dtype: str, llama_directory: Path) -> None:
    loaded = load_model(str(llama_directory), dtype=dtype)
    assert type(loaded.model).__name__ == "LlamaForCausalLM" and not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.name == "llama" and loaded.tokenizer is None
    assert loaded.clip(10_000) == 256 and loaded.clip(10) == 10
    expected = tiny("llama").to(getattr(torch, dtype)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())


def test_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model_of_tests.py").write_text(
        "import torch\n"
        "def plain(): return torch.nn.Linear(2, 3)\n"
        "def with_examples(): return torch.nn.Linear(2, 3), {'input': torch.zeros(1, 2)}, {'input': {0: 'batch'}}\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_model("my_model_of_tests:plain").examples is None
    loaded = load_model("my_model_of_tests:with_examples", dtype="float16")
    assert loaded.examples is not None and loaded.examples["input"].dtype == torch.float16
    assert loaded.dynamic == {"input": {0: "batch"}} and loaded.name == "with_examples"
    refused("my_model_of_tests:wrong", ModelError, r"did not return a model[\s\S]*int")
    refused("my_model_of_tests:none", MissingError, "cannot import the model")
    refused("no_such_module_of_tests:none", MissingError, "cannot import the model")


def test_what_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", MissingError, "no such model")
    refused("./none", MissingError, "no such model")
    refused("no-owner", MissingError, "no such model")
    refused(tmp_path / "none.gguf", MissingError, "no such file")
    refused(tmp_path, MissingError, r"without a model[\s\S]*no config\.json")
    (tmp_path / "x.onnx").write_bytes(b"")
    refused(tmp_path / "x.onnx", UsageError, "not a PyTorch model")
    (tmp_path / "x.txt").write_text("")
    refused(tmp_path / "x.txt", UsageError, r"not a model[\s\S]*\.txt")
    with pytest.raises(UsageError, match=r"unknown dtype[\s\S]*int8[\s\S]*float32, float16, bfloat16"):
        load_model(str(tmp_path), dtype="int8")


def test_directory_without_weights(llama_directory: Path, tmp_path: Path) -> None:
    directory = copied(llama_directory, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    refused(directory, MissingError, r"without weights[\s\S]*no \.safetensors")
    (directory / "small.gguf").write_bytes(b"GGUF")
    refused(directory, MissingError, r"without weights[\s\S]*small\.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_never_opened(name: str, llama_directory: Path, tmp_path: Path) -> None:
    directory = copied(llama_directory, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (ran,)

    torch.save({"weight": Runs()}, directory / name)
    refused(directory, ModelError, rf"unpickled[\s\S]*{name}[\s\S]*save_pretrained")
    assert not ran.exists()
    torch.load(directory / name, weights_only=False)
    assert ran.exists()  # it would have


def test_damaged_files(llama_directory: Path, tmp_path: Path) -> None:
    directory = copied(llama_directory, tmp_path / "cut")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    refused(directory, ModelError, "cannot be loaded")
    directory = copied(llama_directory, tmp_path / "syntax")
    (directory / "config.json").write_text("{")
    refused(directory, ModelError, "cannot be loaded")
    directory = copied(llama_directory, tmp_path / "kind")
    (directory / "config.json").write_text(json.dumps({"model_type": "no_such_kind"}))
    refused(directory, ModelError, r"cannot be loaded[\s\S]*no_such_kind")


@pytest.mark.parametrize(("contents", "message"), [(b"PK\3\4" * 99, "not a GGUF file"), (b"", "not a GGUF file"),
                                                   (b"GGUF", "cannot be loaded"),
                                                   (b"GGUF\3\0\0\0" + b"\xff" * 200, "cannot be loaded"),
                                                   (b"GGUF\3\0\0\0" + b"\0" * 200, "cannot be loaded")])  # fmt: skip
def test_damaged_gguf(contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(contents)
    refused(path, ModelError, message)
