"""Frozen dataclasses from TOML's tables: fields are the keys, annotations the types, and every mistake is one sentence."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from fl.errors import ConfigError

T = TypeVar("T")


def table(value: Any, where: str) -> Mapping[str, Any]:
    """The value, which must be a table. where: named in errors."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a table, got {value!r}")
    return value


def check_keys(content: Mapping[str, Any], allowed: list[str], needed: list[str], where: str) -> None:
    """Raise ConfigError for a key that is not allowed or one that is missing."""
    for key in content:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown key {key!r}, allowed are {', '.join(allowed)}")
    for key in needed:
        if key not in content:
            raise ConfigError(f"{where}: needs the key {key!r}")


def read(kind: type[T], value: Any, where: str) -> T:
    """A frozen dataclass from a table: its fields are the keys, its annotations the types, its own checks the rest."""
    content = table(value, where)
    known = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]  # any dataclass: fields' protocol is private
    needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    check_keys(content, list(known), needed, where)
    hints = typing.get_type_hints(kind)
    values = {}
    for key, entry in content.items():
        try:
            values[key] = _convert(entry, hints[key])
        except TypeError:
            raise ConfigError(f"{where}: {key} must be {_words(hints[key])}, got {entry!r}") from None
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _convert(value: Any, hint: Any) -> Any:
    """TOML's value as the annotation has it: lists become tuples, integers may stand for floats. Raises TypeError."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option)
            except TypeError:
                continue
    elif typing.get_origin(hint) is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_convert(item, arguments[0]) for item in value)
        if len(arguments) == len(value):
            return tuple(_convert(item, option) for item, option in zip(value, arguments, strict=True))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _words(hint: Any) -> str:
    """An annotation in words, for a sentence."""
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in arguments if option is not type(None))
    if typing.get_origin(hint) is tuple:
        plural = {int: "integers", float: "numbers", str: "strings"}[arguments[0]]
        return f"a list of {plural}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)} {plural}"
    return names.get(hint, str(hint))
