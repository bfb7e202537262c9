"""λ from the configuration to a call, and the errors' one message."""

import math
import pickle

import pytest

from sparse_attention.errors import CheckError, ConfigError, MissingError, ModelError, SparseAttentionError, UsageError
from sparse_attention.threshold import PhaseThreshold, Thresholds, threshold_attributes


@pytest.mark.parametrize(
    ("threshold", "length", "scale", "expected"),
    [
        (PhaseThreshold(0.1), 1, 1.0, 0.1),
        (PhaseThreshold(0.1), 10**6, 0.5, 0.05),
        (PhaseThreshold(a=20.0, b=4.0, target=0.5), 2048, 1.0, 20.0 * math.exp(2.0) / 2048),
        (PhaseThreshold(threshold=0.9, a=20.0, b=4.0, target=0.5), 2048, 1.0, 20.0 * math.exp(2.0) / 2048),
        (PhaseThreshold(a=20.0, b=4.0, target=0.5), 147, 1.0, 0.0),  # reaches 1: dense
        (PhaseThreshold(1.0), 1, 1.0, 0.0),
        (PhaseThreshold(-0.1), 1, 1.0, 0.0),
        (PhaseThreshold(math.nan), 1, 1.0, 0.0),
        (PhaseThreshold(0.5), 1, 2.0, 0.0),
        (PhaseThreshold(0.5), 1, math.nan, 0.0),
        (PhaseThreshold(0.5), 1, 0.0, 0.0),
        (PhaseThreshold(a=1.0, b=1e6, target=0.5), 8, 1.0, 0.0),  # exp overflows
        (PhaseThreshold(a=1.0, b=1.0, target=0.5), 0, 1.0, 0.0),
    ],
)
def test_value(threshold, length, scale, expected):
    assert threshold.value(length, scale) == expected


def test_lambda_falls_with_the_length():
    curve = PhaseThreshold(a=20.0, b=4.0, target=0.5)
    assert curve.value(8192) == pytest.approx(curve.value(2048) / 4)


@pytest.mark.parametrize(
    ("given", "prefill", "decode"),
    [
        (0.1, PhaseThreshold(0.1), PhaseThreshold(0.1)),
        (0, PhaseThreshold(), PhaseThreshold()),
        ({"prefill": 0.1}, PhaseThreshold(0.1), PhaseThreshold()),
        ({"decode": {"a": 1.0, "b": 2.0, "target": 0.5}}, PhaseThreshold(), PhaseThreshold(a=1.0, b=2.0, target=0.5)),
        (PhaseThreshold(a=3.0), PhaseThreshold(a=3.0), PhaseThreshold(a=3.0)),
    ],
)
def test_of(given, prefill, decode):
    thresholds = Thresholds.of(given)
    assert thresholds == Thresholds(prefill=prefill, decode=decode)
    assert Thresholds.of(thresholds) is thresholds


@pytest.mark.parametrize("given", [{"prefil": 0.1}, "0.1", True, {"prefill": {"c": 1.0}}, {"prefill": None}])
def test_of_refuses(given):
    with pytest.raises(ConfigError):
        Thresholds.of(given)


def test_decode_is_one_row():
    thresholds = Thresholds.of({"prefill": 0.1, "decode": 0.2})
    assert [thresholds.phase(rows).threshold for rows in (1, 2, 128)] == [0.2, 0.1, 0.1]


def test_is_dense():
    assert Thresholds.of(0.0).is_dense
    assert Thresholds.of(1.0).is_dense
    assert not Thresholds.of({"decode": 0.1}).is_dense
    assert not Thresholds.of(PhaseThreshold(a=1.0)).is_dense


def test_errors_say_everything_in_one_message():
    error = MissingError("no such file", where="a.yaml", fix="check the path")
    assert str(error) == "no such file\n  where: a.yaml\n  fix: check the path"
    assert str(ConfigError("wrong")) == "wrong"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is MissingError and str(copy) == str(error)
    codes = {ConfigError: 2, UsageError: 2, MissingError: 3, ModelError: 2, CheckError: 1}
    assert {kind: kind("x").exit_code for kind in codes} == codes
    assert all(issubclass(kind, SparseAttentionError) for kind in codes)


@pytest.mark.parametrize("value", [0, 0.25, {"decode": 0.1}, {"prefill": {"a": 3.0, "b": 2.0, "target": 0.5}}])
def test_attributes_of_a_number_are_those_of_the_classes(value: object) -> None:
    assert threshold_attributes(value) == Thresholds.of(value).attributes()
