"""YAML to dataclasses, strictly: every wrong key or value is one sentence."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from granvit.errors import MissingDependencyError, UserError

try:
    import yaml
except ImportError as error:
    raise MissingDependencyError("recipes need PyYAML: pip install pyyaml, or granvit[train]") from error

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "keys and values"}


class RecipeError(UserError):
    """A recipe that cannot be run.

    Args:
        key: dotted, of what is wrong; empty for the whole.
        message: what is wrong.
        file: that it was read from.
    """

    def __init__(self, key: str, message: str, file: str = "") -> None:
        self.key, self.message, self.file = key, message, file
        super().__init__(": ".join(part for part in (file, key, message) if part))

    def under(self, prefix: str) -> RecipeError:
        """The same, of a section of a larger one."""
        return RecipeError(".".join(part for part in (prefix, self.key) if part), self.message, self.file)

    def within(self, file: str) -> RecipeError:
        """The same, with its file."""
        return RecipeError(self.key, self.message, self.file or file)


class _Loader(yaml.SafeLoader):
    """SafeLoader with two repairs: ``1e-5`` is a number, as in YAML 1.2, and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.value != "<<"]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            line = node.start_mark.line + 1
            raise RecipeError("", f"the section that begins in line {line} has {', '.join(sorted(twice))} twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse(text: str, key: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise RecipeError(key, f"not YAML{where}: {getattr(error, 'problem', None) or error}") from None


def dump_yaml(tree: Any) -> str:
    """Plain values as YAML, keys in their order."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The tree in a file.

    Raises:
        RecipeError: no such file, or it holds no YAML mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError("", f"cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError("", "cannot read the recipe: it is not UTF-8") from None
    tree = _parse(text, "")
    if not isinstance(tree, dict):
        raise RecipeError("", "expected keys and values")
    return tree


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree after each ``key=value``; the tree itself is changed.

    Raises:
        RecipeError: no key, or one that leads through a value.
    """
    for override in overrides:
        key, equals, value = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise RecipeError("", f"expected an override as key=value, got {override!r}")
        place: Any = tree
        for i, step in enumerate(path[:-1]):
            index = _enter(place, step, path[:i])
            if isinstance(place, dict) and place.get(index) is None:
                place[index] = {}
            place = place[index]
        place[_enter(place, path[-1], path[:-1])] = _parse(value, key)
    return tree


def _enter(place: Any, step: str, before: Sequence[str]) -> Any:
    """The key or position that a step of a dotted key means."""
    key = ".".join([*before, step])
    if isinstance(place, dict):
        return step
    if not isinstance(place, list):
        raise RecipeError(key, f"{'.'.join(before)} is a value and has no keys")
    if step.isdigit() and int(step) < len(place):
        return int(step)
    names = [str(entry.get("name")) if isinstance(entry, dict) else "" for entry in place]
    if step not in names:
        known = ", ".join(name for name in names if name and name != "None")
        raise RecipeError(key, f"expected 0 to {len(place) - 1}{' or one of ' + known if known else ''}")
    return names.index(step)


def convert(value: Any, kind: Any, key: str) -> Any:
    """A value of the tree as what a field is annotated with.

    Args:
        value: from YAML.
        kind: a dataclass, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]``, a Literal, a plain type or Any.
        key: dotted, of the value.

    Raises:
        RecipeError: it is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        rest = [x for x in arguments if x is not type(None)]
        return None if value is None else convert(value, rest[0], key)
    if is_dataclass(kind):
        return _section(value, kind, key)
    if origin is Literal:
        # `is`: 1 and True are equal
        if not any(value is x or (isinstance(value, str) and value == x) for x in arguments):
            raise RecipeError(key, f"expected one of {', '.join(map(str, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(key, f"expected a list, got {value!r}")
        return tuple(convert(x, arguments[0], f"{key}.{i}") for i, x in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise RecipeError(key, f"expected keys and values, got {value!r}")
        return {name: convert(x, arguments[1], f"{key}.{name}") for name, x in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise RecipeError(key, f"expected {_NAMES[kind]}, got {value!r}")
    return value


def _section(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise RecipeError(key, f"expected keys and values, got {value!r}")
    prefix = f"{key}." if key else ""
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1)
            known = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(hints)}"
            raise RecipeError(f"{prefix}{name}", f"unknown key; {known}")
    given = {name: convert(x, hints[name], f"{prefix}{name}") for name, x in value.items()}
    for entry in fields(kind):
        if entry.name not in given and entry.default is MISSING and entry.default_factory is MISSING:
            raise RecipeError(f"{prefix}{entry.name}", "missing")
    try:
        return kind(**given)
    except RecipeError as error:
        raise error.under(key) from None


def at_least(section: object, low: float, *keys: str) -> None:
    """Refuses values of a section that are not finite or below `low`; None is left alone."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and not low <= value < float("inf"):
            raise RecipeError(key, f"expected a finite number of at least {low:g}, got {value}")


def above(section: object, low: float, *keys: str) -> None:
    """Refuses values of a section that are not finite, or `low` or below; None is left alone."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and not low < value < float("inf"):
            raise RecipeError(key, f"expected a finite number above {low:g}, got {value}")
