"""Configuration: building dataclasses, and errors for wrong keys and values."""

import dataclasses
import json
from typing import Literal

import pytest
from ml_collections import ConfigDict

from leon_jax.config import ConfigError, UserError, build, to_dict


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int
    rate: float = 0.5

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    sizes: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"
    name: str | None = None
    flag: bool = False
    several: tuple[Inner, ...] = ()


def test_a_config_dict_becomes_nested_dataclasses_and_back():
    values = {"inner": {"width": 3, "rate": 1}, "sizes": [4, 5], "name": "x"}
    built = build(Outer, ConfigDict(values))
    assert built == Outer(Inner(3, 1.0), (4, 5), "a", "x", False)
    assert isinstance(built.inner.rate, float)
    assert build(Outer, to_dict(built)) == built


def test_a_list_of_groups_becomes_a_tuple_of_dataclasses_and_back():
    values = {"inner": {"width": 3}, "several": ({"width": 1}, {"width": 2, "rate": 0.25})}
    built = build(Outer, ConfigDict(values))
    assert built.several == (Inner(1), Inner(2, 0.25))
    assert build(Outer, json.loads(json.dumps(to_dict(built)))) == built


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inner": {"widht": 3}}, r"unknown key config\.inner\.widht; did you mean .*width"),
        ({"inner": {"width": 3}, "zzz": 1}, r"unknown key config\.zzz; known: inner, sizes"),
        ({"inner": {}}, r"config\.inner\.width is missing; it must be int"),
        ({"inner": {"width": "3"}}, r"config\.inner\.width is '3'; it must be int"),
        ({"inner": {"width": True}}, r"config\.inner\.width is True; it must be int"),
        ({"inner": {"width": 1.5}}, r"config\.inner\.width is 1\.5"),
        ({"inner": 3}, r"config\.inner must be a group of keys"),
        ({"inner": {"width": 1}, "sizes": 3}, r"config\.sizes is 3; it must be a list"),
        ({"inner": {"width": 1}, "sizes": [1, "a"]}, r"config\.sizes\[1\] is 'a'"),
        ({"inner": {"width": "a\\b'c"}}, r"config\.inner\.width is 'a\\b'c'; it must be int"),
        ({"inner": {"width": 1}, "kind": "c"}, r"config\.kind is 'c'; it must be one of"),
        (
            {"inner": {"width": 1}, "several": [{"width": 1}, {"wdth": 2}]},
            r"unknown key config\.several\[1\]\.wdth; did you mean config\.several\[1\]\.width",
        ),
        ({"inner": {"width": 0}}, r"config\.inner: width is 0; it must be at least 1"),
    ],
)
def test_an_error_names_the_path_and_the_expected_value(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values)


def test_configuration_errors_are_user_errors():
    assert issubclass(ConfigError, UserError)
