"""Builds frozen configuration dataclasses from mappings, such as a ConfigDict.

`build` checks every key and type. Its errors name the full path of the key and the expected value.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin


class UserError(ValueError):
    """An error that the user can fix. The message is one clear sentence."""


class ConfigError(UserError):
    """A configuration key is unknown or missing, or its value has the wrong type."""


def build[T](cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from a mapping, and checks keys and types recursively.

    Files of older versions have keys that are constants now. If `cls` has a class variable
    `FORMER_KEYS`, `build` ignores such a key if its value is the one in `FORMER_KEYS`.

    Args:
      cls: a dataclass. Its fields may be numbers, strings, booleans, tuples, Literals, optional
        values or other dataclasses.
      values: values by field name. Missing keys take the field's default.
      path: name of the mapping in error messages, for example `config.model`.

    Raises:
      ConfigError: a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(values, Mapping):
        # ConfigDict is not a Mapping, but it has to_dict.
        to_dict = getattr(values, "to_dict", None)
        if to_dict is None:
            raise ConfigError(f"{path} must be a group of keys, not {values!r}")
        values = to_dict()
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    former = getattr(cls, "FORMER_KEYS", {})
    for key, value in values.items():
        if key in former:
            if value != former[key]:
                raise ConfigError(f"{path}.{key} is {value!r}; it can only be {former[key]!r} now")
        elif key not in fields:
            matches = difflib.get_close_matches(key, fields, n=1)
            known = f"known: {', '.join(fields)}"
            hint = f"did you mean {path}.{matches[0]}?" if matches else known
            raise ConfigError(f"unknown key {path}.{key}; {hint}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(values[name], hints[name], f"{path}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            expected = _type_name(hints[name])
            raise ConfigError(f"{path}.{name} is missing; it must be {expected}")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration to nested plain values for JSON. Tuples become lists.

    Fields that the class variable `OMITTED_DEFAULTS` names are left out if they have their default.
    So a file does not change when its class gets new keys.
    """
    omitted = getattr(config, "OMITTED_DEFAULTS", ())
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in omitted or getattr(config, field.name) != field.default
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return list(map(_plain, value)) if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
        return _convert(value, hint, path)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(
                f"{path} is {_format(value)}; it must be one of {list(get_args(hint))}"
            )
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} is {_format(value)}; it must be a list")
        element = get_args(hint)[0]
        return tuple(_convert(item, element, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} is {_format(value)}; it must be {_type_name(hint)}")
    return value


def _format(value: Any) -> str:
    """Formats a value for an error message, without doubled backslashes in strings."""
    return f"'{value}'" if isinstance(value, str) else repr(value)


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
