"""Optimisation profiles from dimension names: defaults, overrides, and every way to get them wrong."""

from __future__ import annotations

import pytest
from onnx import TensorProto

from export.engine.model import TensorInfo
from export.engine.shapes import Range, evaluate, make_profiles, parse_shapes
from sparse_attention.errors import UsageError

IDS = TensorInfo("input_ids", TensorProto.INT64, ("batch", "sequence"))
CACHE = TensorInfo("past_key", TensorProto.FLOAT16, ("batch", 3, "past", 64))
MASK = TensorInfo("attention_mask", TensorProto.INT64, ("batch", "past + sequence"))
TUNABLE = TensorInfo("threshold_scale", TensorProto.FLOAT, (1,))


def test_without_a_cache_there_is_only_prefill() -> None:
    (profile,) = make_profiles([IDS, TUNABLE], {}, max_length=1024)
    assert profile.name == "prefill"
    assert profile.inputs == {"input_ids": ((1, 1), (1, 256), (1, 1024)), "threshold_scale": ((1,), (1,), (1,))}


def test_with_a_cache_prefill_and_decode_differ() -> None:
    prefill, decode = make_profiles([IDS, CACHE, MASK], {}, max_length=1024)
    assert prefill.inputs["past_key"] == ((1, 3, 0, 64), (1, 3, 0, 64), (1, 3, 0, 64))
    assert prefill.inputs["attention_mask"] == ((1, 1), (1, 256), (1, 1024))
    assert decode.inputs["input_ids"] == ((1, 1), (1, 1), (1, 1))
    # the sum of past and sequence stays within the longest sequence
    assert decode.inputs["attention_mask"] == ((1, 2), (1, 257), (1, 1024))


def test_all_keys_are_the_cached_and_the_new_ones() -> None:
    mask = TensorInfo("attention_mask", TensorProto.INT64, ("batch", "total"))
    prefill, decode = make_profiles([IDS, CACHE, mask], {}, max_length=1024)
    assert prefill.inputs["attention_mask"] == ((1, 1), (1, 256), (1, 1024))
    assert decode.inputs["attention_mask"] == ((1, 2), (1, 257), (1, 1024))
    _, given = make_profiles([IDS, CACHE, mask], parse_shapes(["decode.past:1,100,500"]))
    assert given.inputs["attention_mask"] == ((1, 2), (1, 101), (1, 501))


def test_a_cache_of_fixed_size_has_a_decode_profile_too() -> None:
    cache = TensorInfo("past_key_values.0.key", TensorProto.FLOAT16, ("batch", 3, 4096, 64))
    prefill, decode = make_profiles([IDS, cache], {}, max_length=1024)
    assert prefill.inputs["input_ids"][2] == (1, 1024)
    assert decode.inputs["input_ids"] == ((1, 1), (1, 1), (1, 1))
    assert decode.inputs["past_key_values.0.key"][0] == (1, 3, 4096, 64)


def test_given_ranges_win_and_a_decode_step_stays_one_token() -> None:
    given = parse_shapes(["sequence:1,512,4096", "batch:1,4,8", "decode.past:1,1024,8191"])
    prefill, decode = make_profiles([IDS, CACHE, MASK], given)
    assert prefill.inputs["input_ids"] == ((1, 1), (4, 512), (8, 4096))
    assert decode.inputs["input_ids"] == ((1, 1), (4, 1), (8, 1))
    assert decode.inputs["past_key"][2] == (8, 3, 8191, 64)


def test_a_single_number_is_a_fixed_size() -> None:
    assert parse_shapes(["batch:3"]) == {"batch": Range(3, 3, 3)}


@pytest.mark.parametrize(
    "text", ["sequence", "sequence:", ":1,2,3", "sequence:1,2", "sequence:1,x,3", "sequence:-1,2,3"]
)
def test_unreadable_shapes(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be read") as error:
        parse_shapes([text])
    assert "name:min,opt,max" in str(error.value)


@pytest.mark.parametrize("text", ["sequence:3,2,1", "sequence:1,5,4"])
def test_ranges_ascend(text: str) -> None:
    with pytest.raises(UsageError, match="ascending"):
        parse_shapes([text])


def test_a_shape_given_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_shapes(["batch:1", "batch:2"])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        make_profiles([IDS], parse_shapes(["sequnce:1,2,3"]))
    assert "sequnce" in str(error.value)
    assert "batch, sequence" in str(error.value)


def test_a_dimension_nobody_knows_asks_for_its_range() -> None:
    image = TensorInfo("pixel_values", TensorProto.FLOAT16, ("batch", 3, "height", 224))
    with pytest.raises(UsageError) as error:
        make_profiles([image], {})
    assert "--shapes height:MIN,OPT,MAX" in str(error.value)
    (profile,) = make_profiles([image], parse_shapes(["height:224"]))
    assert profile.inputs["pixel_values"][1] == (1, 3, 224, 224)


def test_a_dimension_without_a_name() -> None:
    with pytest.raises(UsageError, match="without a name"):
        make_profiles([TensorInfo("x", TensorProto.FLOAT, (1, ""))], {})


@pytest.mark.parametrize(("text", "size"), [("past + sequence", 7), ("2*past", 6), ("(past + 2*sequence)//2 - 1", 4)])
def test_expressions(text: str, size: int) -> None:
    assert evaluate(text, {"past": 3, "sequence": 4}) == size


def test_expressions_run_nothing() -> None:
    with pytest.raises(UsageError, match="neither a name nor a sum"):
        evaluate("__import__('os').getpid()", {})
