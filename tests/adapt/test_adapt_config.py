"""``RLRRConfig``: validation, the pattern rule, and the round trip through JSON types."""

from __future__ import annotations

import json

import pytest
import torch

from rlrr_kernels import RLRRConfig
from rlrr_kernels.adapt.config import SCHEMA_VERSION, matches, pattern_of


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be from 1 to 64; got 0"),
        ({"rank": 65}, ValueError, "rank must be from 1 to 64; got 65"),
        ({"rank": 1.5}, TypeError, "rank must be an integer; got 1.5"),
        ({"rank": True}, TypeError, "rank must be an integer"),
        ({"groups": 0}, ValueError, "groups must be at least 1; got 0"),
        ({"groups": {"*.qkv": -3}}, ValueError, r"groups\['\*\.qkv'\] must be at least 1; got -3"),
        ({"groups": {3: 3}}, TypeError, "groups must map name patterns"),
        ({"groups": "3"}, TypeError, "groups must be an integer; got '3'"),
        ({"shift": 1}, TypeError, "shift must be True, False or 'with_bias'; got 1"),
        ({"init": "zeros"}, ValueError, "init must be one of paper, identity, normal; got 'zeros'"),
        ({"recipe": "papr"}, ValueError, "recipe must be one of paper; got 'papr'"),
        ({"scale_dtype": "int8"}, ValueError, "scale_dtype must be one of float32"),
        ({"scale_dtype": torch.int64}, ValueError, "scale_dtype must be one of float32"),
        ({"include": [3]}, TypeError, r"include must hold name patterns \(non-empty strings\); got 3"),
        ({"exclude": 3}, TypeError, "exclude must be a name pattern or a sequence of them; got 3"),
        ({"heads": [""]}, TypeError, "heads must hold name patterns"),
    ],
)
def test_names_the_argument_that_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        RLRRConfig(**arguments)


@pytest.mark.parametrize(
    "config",
    [
        RLRRConfig(),
        RLRRConfig(
            rank=4,
            groups={"*.qkv": 3, "proj": 2},
            shift=False,
            residual=False,
            init="identity",
            scale_dtype=torch.bfloat16,
            include=["*.qkv"],
            exclude="blocks.0.*",
            heads=(),
            recipe="paper",
        ),
    ],
)
def test_survives_json(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert data["schema_version"] == SCHEMA_VERSION
    assert RLRRConfig.from_dict(data) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "newer rlrr_kernels"),
        ({"schema_version": None}, "schema_version must be 1; got None"),
        ({"alpha": 1}, "entries this version does not know: alpha"),
        ({"rank": 0}, "rank must be from 1"),
    ],
)
def test_refuses_foreign_dictionaries(change, message):
    with pytest.raises(ValueError, match=message):
        RLRRConfig.from_dict({**RLRRConfig().to_dict(), **change})
    with pytest.raises(TypeError, match="must be a mapping; got list"):
        RLRRConfig.from_dict([])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*", True), ("qkv", True), ("attn.*", True), ("blocks.*.qkv", True), ("kv", False), ("blocks.0", False)],
)
def test_patterns_match_a_name_or_its_end(pattern, expected):
    assert matches("blocks.0.attn.qkv", [pattern]) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.10.attn.qkv", "blocks.*.attn.qkv"),
        ("layers.encoder_layer_3.mlp.0", "layers.encoder_layer_*.mlp.0"),
        ("stages.1.fc1", "stages.*.fc1"),
        ("head", "head"),
    ],
)
def test_the_pattern_of_a_name_covers_its_like_in_other_blocks(name, expected):
    assert pattern_of(name) == expected
    assert matches(name, [expected])
