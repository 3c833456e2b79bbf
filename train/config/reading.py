"""Read a configuration: a YAML file, the files it is based on, overrides from the command line; and write it back.

Every error is a ValueError of one line that names the key, the value and what is allowed.
"""

import dataclasses
import importlib
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from kl_autoencoder.files import clipped, one_line

from ..parts.registry import SORTS, Parts
from ..settings import Section
from .errors import first_error
from .run import Config
from .tasks import config_class


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `dotted.key=value` overrides; returns the `Config` of its task.

    If there is no such file, a recipe of this name that was installed with the package is read, such as
    `configs/kl_f8.yaml`. `base: other.yaml` in the file, a path relative to it, includes the keys of that file;
    the file's own keys replace them. Raises ValueError or FileNotFoundError, one line.
    """
    values = _read_file(_found(Path(path)))
    for override in overrides:
        _apply(values, override)
    return build(Config, values)


def build(cls: type[Section], values: Any) -> Section:
    """Build a section from a mapping of its keys; with `cls` Config, the key `task` chooses the subclass.

    For a `Config`, the modules that `plugins` names are imported first. Raises ValueError, one line, for unknown
    keys and wrong values.
    """
    values, kind = _tuples(values), cast(type, cls)
    if issubclass(cls, Config) and isinstance(values, dict):
        _import_plugins(values.get("plugins") or ())
        values = _with_parts(values)
        kind = config_class(values) if cls is Config else cls
    return _validated(kind, values)


def _validated(cls: type[Section], values: Any, prefix: str = "") -> Section:
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError(first_error(error, cls, prefix)) from None


def _with_parts(values: dict) -> dict:
    """Return the same values with each part that `kind:` chooses replaced by its section, built and checked."""
    values = dict(values)
    for parts in SORTS.values():
        room, name = parts.key.split(".")
        held = values.get(room)
        if not isinstance(held, dict) or held.get(name) is None:
            continue
        given = held[name]
        if parts.several:
            if not isinstance(given, tuple):
                raise ValueError(f"{parts.key}: {_shortened(repr(given), 60)}; allowed: a list")
            built = tuple(_part(parts, entry, f"{parts.key}[{i}]") for i, entry in enumerate(given))
        else:
            built = _part(parts, given, parts.key)
        values[room] = {**held, name: built}
    return values


def _part(parts: Parts, values: Any, key: str) -> Any:
    return _validated(parts.section(values, key), values, key + ".")


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: {"a": {"b": 1}} -> {"a.b": 1}, in the order of `values`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        found |= dotted(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return found


def to_yaml(config: Config) -> str:
    """Write the whole resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(_lists(dataclasses.asdict(config)), sort_keys=False)


# -------------------------------------------------------------------- files


class GivenTwice(ValueError):
    """A key is given twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 1e-4 is a number, and a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if name in seen:
                where = f"line {key_node.start_mark.line + 1}"
                raise GivenTwice(f"{name}: given twice ({where}); allowed: once")
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _found(path: Path) -> Path:
    """`path` or, if there is no such file, the recipe of this name that was installed with the package."""
    installed = Path(sysconfig.get_path("data"), "share", "kl-autoencoder", path)
    return installed if not path.exists() and installed.is_file() else path


def _read_file(path: Path, reading: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a YAML file and the files it is based on; `reading`: the files that are based on this one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    if path.resolve() in reading:
        raise ValueError(f"base: {path} is based on itself; allowed: a file that is not")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except GivenTwice as error:
        raise ValueError(f"{path}: {_shortened(error)}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date or number that Python refuses, too
        raise ValueError(f"{path}: not a YAML file ({_yaml_problem(error)})") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}; allowed: keys and values")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"base: {base!r}; allowed: the path of a YAML file")
    return _merged(_read_file(path.parent / base, (*reading, path.resolve())), values)


def _yaml_problem(error: Exception) -> str:
    """Line, column and cause of an error of PyYAML's, without the lines of the file that it shows."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return _shortened(error)
    return (
        f"line {mark.line + 1}, column {mark.column + 1}: {_shortened(getattr(error, 'problem', error), 100)}"
    )


def _merged(below: dict, above: dict) -> dict:
    """Merge two nested mappings; for a key that both have, the value of `above` is taken."""
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        merged[name] = _merged(below[name], value) if both else value
    return merged


def _apply(values: dict, override: str) -> None:
    """Set a key of the nested `values`, in place; `override` is `dotted.key=YAML value`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"{override[:80]}: not an override; allowed: key=value, as in train.steps=200")
    *parents, leaf = key.split(".")
    for depth, parent in enumerate(parents):
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"{key}: {'.'.join(parents[: depth + 1])} has no keys of its own")
    try:
        values[leaf] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(
            f"{key}: {_shortened(repr(text), 80)} is not a YAML value; allowed: such as 3, true, null, [8, 16]"
        ) from None


def _import_plugins(names: Any) -> None:
    for name in names if isinstance(names, (list, tuple)) else ():
        try:
            importlib.import_module(str(name))
        except ImportError as error:
            raise ValueError(f"plugins: {name!r} cannot be imported ({_shortened(error)})") from None


# -------------------------------------------------------------------- between YAML and sections


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _tuples(entry) for name, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _lists(entry) for name, entry in value.items()}
    return list(map(_lists, value)) if isinstance(value, (list, tuple)) else value


def _shortened(said: object, most: int = 200) -> str:
    return clipped(one_line(said), most)
