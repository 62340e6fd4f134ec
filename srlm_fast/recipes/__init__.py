"""Recipes: YAML files that a `Config` is made from, with dotted overrides.

A recipe has the nesting of `Config`; its `scales` holds overlays that `sandbox.scale` selects.
Precedence: the dataclass defaults, the recipe, its scale overlay, the overrides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from srlm_fast.config import Config
from srlm_fast.errors import UserError

# Beside its own errors PyYAML lets through those of the numbers and dates that it builds.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a group: YAML would silently take the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"{key.value} is there twice, remove one"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("srlm_fast") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def load_config(recipe: str, overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration of a recipe (name or YAML file) with dotted overrides applied.

    Raises UserError on an unknown recipe, an unknown key (with the nearest name) or a wrong value.
    """
    tree = _read_recipe(recipe)
    scales = _group(tree, "scales")
    tree.pop("scales", None)
    changes = overrides or {}
    scale = changes.get("sandbox.scale") or _group(tree, "sandbox").get("scale", "full")
    _merge(tree, _group(scales, str(scale), "scales."))
    for key, value in changes.items():
        _set(tree, key.split("."), value)
    config: Config = _build(Config, tree, "")
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration as a recipe file that gives it back."""
    return yaml.safe_dump(_lists(dataclasses.asdict(config)), sort_keys=False)


def _read_recipe(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if recipe in recipe_names() and not path.is_file():
        text = (resources.files("srlm_fast") / "recipes" / f"{recipe}.yaml").read_text("utf-8")
    elif path.suffix in {".yaml", ".yml"} or path.exists():
        text = _read_file(path)
    else:
        raise UserError(f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}")
    try:
        tree = yaml.load(text, _Loader) or {}
    except _YAML_ERRORS as error:
        raise UserError(f"recipe {recipe} is not valid YAML: {_reason(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {recipe} must be a mapping of keys to values")
    return tree


def _read_file(path: Path) -> str:
    cure = f"give a YAML file in UTF-8, or one of {', '.join(recipe_names())}"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"recipe file {path} does not exist; {cure}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the recipe {path}: {why}; {cure}") from error


def _reason(error: Exception) -> str:
    """What a YAML error says, on one line and without the text around it."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    text = " ".join(str(problem or error or type(error).__name__).split())
    return f"{text} (line {mark.line + 1})" if mark else text


def _group(tree: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    """The settings below `key`; none where it is missing, or has nothing behind its colon."""
    group = tree.get(key)
    if group is not None and not isinstance(group, Mapping):
        raise UserError(f"{prefix}{key} must be a group of settings, not {group!r}")
    return group or {}


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _set(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        tree = tree[key]
        if not isinstance(tree, dict):
            raise UserError(f"--{'.'.join(path)}: {key} is a value, not a group of settings")
    tree[path[-1]] = value


def _build(cls: type[Any], tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise UserError(
            f"{prefix.rstrip('.') or 'the recipe'} must be a group of settings, not {tree!r}"
        )
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            hint = _deeper(str(key), hints) or _nearest(str(key), list(hints))
            raise UserError(f"unknown setting {prefix}{key}{hint}")
    values = {key: _value(hints[key], value, prefix + key) for key, value in tree.items()}
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the field's type. Words of the command line come as text, and are read as YAML
    where the field is not text itself: a file may well be called `a #1` or `2024-01-01`."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), {} if value is None else value, name + ".")
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return value
    if hint is str:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise UserError(f"{name} must be text, not {value!r}")
        return str(value)
    if isinstance(value, str) and hint not in (int, float):
        with contextlib.suppress(*_YAML_ERRORS):
            value = yaml.safe_load(value)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(typing.get_args(hint)[0], item, name) for item in items)
    return _scalar(hint, value, name)


def _scalar(hint: type[Any], value: Any, name: str) -> Any:
    """A bool, int or float; YAML reads 1e-4 as text."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        if hint is not bool and not isinstance(value, bool):
            number = float(value)
            if hint is float and math.isfinite(number):
                return number
            if hint is int and number == int(number):
                return int(number)
    if type(value) is not hint or hint is float:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise UserError(f"{name} must be {kind}, not {value!r}")
    return value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, tuple | list) else value


def _deeper(name: str, hints: Mapping[str, Any]) -> str:
    """For names that TRL has in one flat group: where they are here."""
    if name == "output_dir":
        return "; the folder of a run is --out"
    groups = [g for g, kind in hints.items() if dataclasses.is_dataclass(kind)]
    found = [f"{g}.{name}" for g in groups if name in typing.get_type_hints(hints[g])]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
