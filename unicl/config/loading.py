"""Strict loading of recipes: defaults < recipe < overrides; every mistake names its key."""

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

from unicl.config.plugins import recipe_class, warn_once, working_plugins
from unicl.config.schema import PRETRAINING, Recipe
from unicl.errors import UsageError

Section = TypeVar("Section")


def recipe_names() -> list[str]:
    """List the recipes that ship with the package and its plug-ins."""
    return sorted(_shipped())


def _shipped() -> dict[str, Traversable]:
    """Find the recipes by name; a name that is taken stays whose it is, the package's first."""
    shipped = _recipes_in(resources.files("unicl.config") / "recipes")
    for plugin in working_plugins():
        try:
            own = _recipes_in(plugin.recipes)
        except OSError as error:
            warn_once(f"left out: the recipes of plug-in {plugin.name} cannot be read: {error}")
            continue
        for name in sorted(own.keys() & shipped):
            warn_once(
                f"left out: the recipe {name} of plug-in {plugin.name}; there is {shipped[name]}"
            )
        shipped = {**own, **shipped}
    return shipped


def _recipes_in(folder: Traversable) -> dict[str, Traversable]:
    files = (file for file in folder.iterdir() if file.name.endswith(".toml"))
    return {file.name.removesuffix(".toml"): file for file in files}


def load_recipe(recipe: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Load a shipped recipe by name, or a TOML file by path.

    Args:
        recipe: a name out of `recipe_names()`, or the path of a TOML file.
        overrides: dotted keys and their values as text, such as {"trainer.steps": "100"}.

    Raises:
        UsageError: an unknown recipe or key, a wrong type, or unreadable TOML.
    """
    return parse_recipe(_read(recipe), overrides, source=str(recipe))


def parse_recipe(
    text: str, overrides: Mapping[str, str] | None = None, *, source: str = "recipe"
) -> Recipe:
    """Build a recipe from TOML text and overrides.

    Raises:
        UsageError: an unknown key, a wrong type, or text that is not TOML.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source} is not valid TOML: {error}") from error
    for key, value in (overrides or {}).items():
        _insert(table, key, value)
    task = table.get("task", PRETRAINING)
    if not isinstance(task, str):
        raise UsageError(f"task must be a text, got {task!r}")
    cls = recipe_class(str(task))
    recipe: Recipe = _build(cls, table, prefix="", keys=_all_keys(cls))
    return recipe


def override_section(config: Section, overrides: Mapping[str, str], *, prefix: str) -> Section:
    """Return one section with some of its keys set: `{"video.num_frames": "8"}`.

    Raises:
        UsageError: an unknown key, or a wrong type.
    """
    table: dict[str, Any] = {}
    for key, value in overrides.items():
        _insert(table, key, value)
    keys = _all_keys(type(config), f"{prefix}.")
    if unknown := sorted(table.keys() - {prefix}):
        name = next(key for key in overrides if key.partition(".")[0] == unknown[0])
        raise UsageError(f"unknown key {name}{_nearest(name, keys)}")
    given = table.get(prefix, {})
    if not isinstance(given, dict):
        raise UsageError(f"{prefix} is a section; set one of its keys, such as {keys[0]}")
    own = {item.name: getattr(config, item.name) for item in fields(config)}  # type: ignore[arg-type]
    changed: Section = _build(type(config), {**own, **given}, prefix=f"{prefix}.", keys=keys)
    return changed


def recipe_to_toml(recipe: Recipe) -> str:
    """Write every field of a recipe, defaults included; `parse_recipe` reads it back unchanged."""
    lines: list[str] = []
    sections = []
    for item in fields(recipe):
        value = getattr(recipe, item.name)
        if is_dataclass(value):
            sections.append((item.name, value))
        else:
            lines.append(f"{item.name} = {_toml(value)}")
    for name, section in sections:
        lines += ["", f"[{name}]"]
        lines += [f"{item.name} = {_toml(getattr(section, item.name))}" for item in fields(section)]
    return "\n".join(lines) + "\n"


def _read(recipe: str | Path) -> str:
    path = Path(recipe)
    if path.suffix != ".toml":
        shipped = _shipped().get(str(recipe))
        if shipped is None:
            known = recipe_names()
            raise UsageError(
                f"there is no recipe {str(recipe)!r}{_nearest(str(recipe), known)}; "
                f"shipped are {', '.join(known)}; a file of yours must end in .toml"
            )
        return shipped.read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {path} is not UTF-8 text") from error


def _insert(table: dict[str, Any], key: str, value: str) -> None:
    *path, last = key.split(".")
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"{key}: {part} is a value, not a section")
    table[last] = _Override(value)


class _Override(str):
    """A value from the command line: text that is still to be read by its field's type."""


def _build(cls: type, table: Mapping[str, Any], prefix: str, keys: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in table.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise UsageError(f"unknown key {key}{_nearest(key, keys)}")
        hint = hints[name]
        if is_dataclass(hint):
            if not isinstance(value, dict):
                raise UsageError(
                    f"{key} is a section; set one of its keys, such as {key}.{fields(hint)[0].name}"
                )
            values[name] = _build(typing.cast(type, hint), value, f"{key}.", keys)
        else:
            values[name] = _convert(value, hint, key)
    return cls(**values)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Turn a TOML value or a command-line text into the field's type, or say what is wrong."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        (inner,) = (a for a in args if a is not type(None))
        return None if value == "none" else _convert(value, inner, key)
    if origin is Literal:
        # Types count: True equals 1, but is no choice among numbers.
        text = isinstance(value, _Override)
        chosen = [
            a for a in args if (text and value == str(a)) or (type(value), value) == (type(a), a)
        ]
        if not chosen:
            options = ", ".join(map(str, args))
            raise UsageError(f"{key} must be one of {options}; got {value!r}")
        return chosen[0]
    if origin is tuple:
        parts = _split(value) if isinstance(value, _Override) else value
        if args[-1] is Ellipsis and isinstance(parts, list | tuple):
            args = args[:1] * len(parts)
        if not isinstance(parts, list | tuple) or len(parts) != len(args):
            raise UsageError(f"{key} must be {len(args)} values, such as 0.5,1.0; got {value!r}")
        marked = [_Override(p.strip()) if isinstance(value, _Override) else p for p in parts]
        return tuple(_convert(p, a, key) for p, a in zip(marked, args, strict=True))
    if isinstance(value, _Override):
        return _from_text(value, hint, key)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{key} must be {_article(hint)}, got {value!r}")
    return value


def _split(text: str) -> list[str]:
    """Part `2,4` or `[2, 4]` into texts; nothing between the brackets is no value."""
    inner = text.strip("[]() ")
    return inner.split(",") if inner else []


def _from_text(text: str, hint: type, key: str) -> Any:
    if hint is str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{key} must be UTF-8 text, got {str(text)!r}") from None
        return str(text)
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"{key} must be true or false, got {str(text)!r}")
    try:
        return hint(text.replace("_", "") if hint is int else text)
    except ValueError:
        raise UsageError(f"{key} must be {_article(hint)}, got {str(text)!r}") from None


def _article(hint: type) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[hint]


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            keys += _all_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _nearest(name: str, known: list[str]) -> str:
    """Suggest the known name that looks most alike, by whole key or by its last part."""
    close = difflib.get_close_matches(name, known, n=1)
    if not close:
        last = {k.rsplit(".", 1)[-1]: k for k in known}
        close = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1)]
    return f" (did you mean {close[0]}?)" if close else ""


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's strings are TOML's, but for one control character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
