"""Frozen dataclasses from strict JSON, and back.

A configuration is a frozen dataclass of values and of other such dataclasses, its sections. A key that it does not
have is an error, and so is a value of another type. If it has a `KIND`, configs/<KIND> holds the shipped files.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeGuard, TypeVar

from sparse_serve_jax.files import read_text

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


Kind = Literal["serving", "models", "training", "workloads"]  # the folders of configs


def find_config(kind: Kind, name_or_path: str | Path) -> Path:
  """The file of a configuration, in a checkout or in an installed package.

  Args:
    kind: the folder of configs.
    name_or_path: what ends in ".json" is a path; anything else is a name in configs/<kind>.

  Raises:
    ValueError: there is no such file or name; the nearest name is told.
  """
  if str(name_or_path).endswith(".json"):
    if not Path(name_or_path).is_file():
      raise ValueError(f"{name_or_path} is no file")
    return Path(name_or_path)
  files = shipped(kind)
  if str(name_or_path) not in files:
    near = difflib.get_close_matches(str(name_or_path), files, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"configs/{kind} has no {str(name_or_path)!r}; there are: {', '.join(files) or 'none'}{hint}")
  return files[str(name_or_path)]


def read_config(cls: type[Config], source: Path | Mapping[str, Any]) -> Config:
  """Reads a JSON file strictly, or the values that such a file would hold.

  Args:
    cls: what it is a configuration of.
    source: the file, or its values. "extends": "other" takes other.json as the base, to any depth: of the same folder,
      else of configs/<cls.KIND>.

  Raises:
    ValueError: no JSON, "extends" that names nothing or runs in a circle, or as of `from_dict`; names the file.
  """
  if isinstance(source, Mapping):
    base, data = _base(cls, source, None)
    return from_dict(cls, data if base is None else _merged(_read(cls, base, ()), data))
  data = _read(cls, Path(source).resolve(), ())
  try:
    return from_dict(cls, data)
  except ValueError as error:
    raise ValueError(f"{source}: {error}") from error


def from_dict(cls: type[Config], data: Mapping[str, Any], section: str = "") -> Config:
  """Builds a configuration dataclass from JSON values.

  Args:
    cls: the dataclass.
    data: its values. An integer will do for a float, and text such as "8GiB" for a field in bytes; nothing else is
      converted.
    section: what errors call it.

  Raises:
    ValueError: an unknown or missing key, a value of the wrong type, or one that the dataclass refuses.
  """
  hints = _hints(cls)
  _check_keys(cls, data, section)
  missing = [field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in data]
  if missing:
    raise ValueError(f"{_named(section)} lacks {', '.join(missing)}")
  return cls(**{key: _convert(hints[key], value, _dotted(section, key)) for key, value in data.items()})


def override(config: Config, changes: str | Iterable[str] | Mapping[str, Any]) -> Config:
  """`config` with changes applied together.

  Args:
    config: is not changed.
    changes: assignments such as "sparse.token_budget=4096" or "cache.hbm_bytes=8GiB", or a dict of the same:
      {"sparse.token_budget": 4096} or {"sparse": {"token_budget": 4096}}.

  Raises:
    ValueError: an unknown key (the nearest is told), what is no assignment, or a wrong value.
  """
  leaves = _leaves(type(config))
  values = _flat(leaves, changes) if isinstance(changes, Mapping) else _assigned(leaves, changes)
  data = dataclasses.asdict(config)
  for key, value in values.items():
    if key not in leaves:
      raise ValueError(f"unknown key {key!r}; the nearest is {_nearest(key, leaves)!r}")
    *sections, name = key.split(".")
    functools.reduce(lambda node, section: node[section], sections, data)[name] = value
  return from_dict(type(config), data)


def to_json(config: Any) -> str:
  """The JSON that `from_dict` reads back to a configuration equal to `config`."""
  return json.dumps(dataclasses.asdict(config), indent=2)


class Described(NamedTuple):
  """A value of a configuration, for a reader."""

  key: str  # dotted
  type: str
  default: Any  # None: it has none
  meaning: str  # sentences, with units


def describe(cls: type) -> list[Described]:
  """Every value of a configuration and its sections, in order. What each means is the text below its field."""
  rows, meanings = list[Described](), _meanings(cls)
  for field in dataclasses.fields(cls):
    hint = _hints(cls)[field.name]
    if _is_section(hint):
      rows += [row._replace(key=_dotted(field.name, row.key)) for row in describe(hint)]
      continue
    kind = _spelled(hint).replace("int or str", "size or auto") if field.name.endswith("_bytes") else _spelled(hint)
    made = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if made else field.default  # type: ignore[misc]
    rows.append(Described(field.name, kind, None if _required(field) else default, meanings.get(field.name, "")))
  return rows


def _spelled(hint: Any) -> str:
  """A type, for a reader."""
  if typing.get_origin(hint) is Literal:
    return ", ".join(typing.get_args(hint))
  if typing.get_origin(hint) is tuple:
    return f"list of {_spelled(typing.get_args(hint)[0])}"
  parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  return " or ".join(part.__name__ for part in parts)


@functools.cache
def _meanings(cls: type) -> dict[str, str]:
  """Field -> the text below it, from the source."""
  (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
  body = tree.body if isinstance(tree, ast.ClassDef) else []
  told = dict[str, str]()
  for field, text in itertools.pairwise(body):
    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
      told[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
  return told


_UNITS = {"B": 1} | {
  f"{prefix}{suffix}": base**power
  for power, prefix in enumerate("KMGT", start=1)
  for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(text: str) -> int:
  """Bytes in a `text` such as "8GiB" (1024s), "1.5GB" (1000s) or "4096B"; a fraction of a byte is dropped.

  Raises:
    ValueError: it is no number with such a unit.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
  if not match or match[2] not in _UNITS:
    raise ValueError(f"{text!r} is not a size: write a number of bytes, or a number with one of {', '.join(_UNITS)}")
  return int(Fraction(match[1]) * _UNITS[match[2]])


def check_fields(config: Any, positive: Iterable[str] = (), not_negative: Iterable[str] = ()) -> None:
  """Checks the type of every field, and the range of those named. Converts as `from_dict` does, in place.

  Args:
    config: a dataclass that is being made.
    positive: names of fields that must be above 0, and finite.
    not_negative: names of fields that must not be below 0, and finite.

  Raises:
    ValueError: a wrong type or range. It names keys as people set them: that of a section stands under its `SECTION`.
  """
  section = getattr(config, "SECTION", "")
  for key, hint in _hints(type(config)).items():
    object.__setattr__(config, key, _convert(hint, getattr(config, key), _dotted(section, key)))
  for key in positive:
    if not 0 < getattr(config, key) < math.inf:
      raise ValueError(f"{_dotted(section, key)}={getattr(config, key)} must be positive")
  for key in not_negative:
    if not 0 <= getattr(config, key) < math.inf:
      raise ValueError(f"{_dotted(section, key)}={getattr(config, key)} must not be negative")


def _convert(hint: Any, value: Any, where: str) -> Any:
  """`value` as the type `hint` of the field `where`, or ValueError."""
  if _is_section(hint):
    return value if isinstance(value, hint) else from_dict(hint, value, where)
  if typing.get_origin(hint) is tuple:  # of any number of one type
    if not isinstance(value, (list, tuple)):
      raise ValueError(f"{where}: expected a list, got {value!r} ({type(value).__name__})")
    return tuple(_convert(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
  if typing.get_origin(hint) is Literal:
    if value not in (choices := typing.get_args(hint)):
      raise ValueError(f"{where}: expected one of {', '.join(choices)}, got {value!r}")
    return value
  if where.endswith("_bytes") and isinstance(value, str):
    if hint == int | str and value == "auto":
      return value
    try:
      return parse_bytes(value)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
  if isinstance(hint, types.UnionType):  # of a number and text
    hint = next((kind for kind in typing.get_args(hint) if type(value) is kind), typing.get_args(hint)[0])
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise ValueError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
  return value


def _assigned(leaves: Mapping[str, Any], assignments: str | Iterable[str]) -> dict[str, Any]:
  """Dotted name -> value of every "key=value"."""
  values = {}
  listed = [assignments] if isinstance(assignments, str) or not isinstance(assignments, Iterable) else assignments
  for assignment in listed:
    if not isinstance(assignment, str):
      raise ValueError(
        f'overrides are assignments such as "tp=2", or a dict such as {{"tp": 2}}; got {assignment!r:.80}'
      )
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not equals:
      raise ValueError(f"{assignment!r} is not of the form key=value")
    values[key] = _from_text(leaves.get(key), text)
  return values


def _from_text(hint: Any, text: str) -> Any:
  """What a command line means by `text` for a field of type `hint`."""
  if hint not in (int, float, bool, int | str, float | str):
    return text
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text  # "8GiB", or wrong: `_convert` decides


def _flat(leaves: Mapping[str, Any], values: Mapping[str, Any], section: str = "") -> dict[str, Any]:
  """Dotted name -> value of everything in nested mappings; a leaf can be a mapping itself."""
  flat = {}
  for key, value in values.items():
    name = _dotted(section, str(key))
    nested = isinstance(value, Mapping) and name not in leaves
    flat |= _flat(leaves, value, name) if nested else {name: value}
  return flat


def shipped(kind: Kind) -> dict[str, Path]:
  """Name -> file of the configurations in configs/<kind>."""
  package = Path(__file__).resolve().parent.parent  # a wheel has configs/ in the package, a checkout beside it
  folder = next((d for d in (package / "configs" / kind, package.parent / "configs" / kind) if d.is_dir()), None)
  return {path.stem: path for path in sorted(folder.glob("*.json"))} if folder else {}


def _read(cls: type, path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
  """The values of a file, those of the files that it extends included. `chain`: the files that led here."""
  if path in chain:
    circle = " -> ".join(p.stem for p in (*chain, path))
    raise ValueError(f"{path}: 'extends' runs in a circle: {circle}")
  text = read_text(path)
  try:
    data = json.loads(text, object_pairs_hook=_no_duplicates)
    base, data = _base(cls, data, path)
  except json.JSONDecodeError as error:
    raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}, column {error.colno}") from None
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return data if base is None else _merged(_read(cls, base, (*chain, path)), data)


def _base(cls: type, data: Any, path: Path | None) -> tuple[Path | None, dict[str, Any]]:
  """The file that `data` extends, and `data` without that key. `path`: the file that holds `data`, if one does."""
  extends, rest = None, data
  if isinstance(data, Mapping):
    extends, rest = data.get("extends"), {key: value for key, value in data.items() if key != "extends"}
  _check_keys(cls, rest, "")
  if extends is None:
    return None, rest
  kind = getattr(cls, "KIND", None)
  ours = shipped(kind) if kind else {}
  beside = {p.stem: p for p in sorted(path.parent.glob("*.json"))} if path else {}
  if path and path.stem in ours:
    beside.pop(path.stem, None)  # a file of a shipped one's name may extend that one
  files = ours | beside
  if not isinstance(extends, str) or extends not in files:
    raise ValueError(f"'extends' names {extends!r}, which is none of: {', '.join(files)}")
  return files[extends], rest


def _merged(base: Mapping[str, Any], top: Any) -> Any:
  """`base` changed by `top`, section by section; a section that is not an object is taken as it is."""
  if not isinstance(top, Mapping):
    return top
  both = {key: _merged(base[key], top[key]) for key in base if key in top and isinstance(base[key], Mapping)}
  return {**base, **top, **both}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  keys = [key for key, _ in pairs]
  if twice := sorted({key for key in keys if keys.count(key) > 1}):
    raise ValueError(f"key given twice: {', '.join(twice)}")
  return dict(pairs)


def _check_keys(cls: type, data: Any, section: str) -> None:
  """Refuses keys that `cls`, or a section in it, does not have."""
  if not isinstance(data, Mapping):
    raise ValueError(f"{_named(section)}: expected an object, got {data!r} ({type(data).__name__})")
  hints = _hints(cls)
  for key, value in data.items():
    if key not in hints:
      raise ValueError(f"unknown key {key!r} in {_named(section)}; the nearest is {_nearest(str(key), hints)!r}")
    if _is_section(hints[key]) and not isinstance(value, hints[key]):
      _check_keys(hints[key], value, _dotted(section, key))


def _leaves(cls: type, section: str = "") -> dict[str, Any]:
  """Dotted name -> type of every value in `cls` and its sections."""
  leaves = {}
  for key, hint in _hints(cls).items():
    name = _dotted(section, key)
    leaves |= _leaves(hint, name) if _is_section(hint) else {name: hint}
  return leaves


def _is_section(hint: Any) -> TypeGuard[type]:
  return dataclasses.is_dataclass(hint)


def _nearest(name: str, names: Iterable[str]) -> str:
  return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _dotted(section: str, key: str) -> str:
  return f"{section}.{key}" if section else key


def _named(section: str) -> str:
  return f"section {section!r}" if section else "the configuration"


def _required(field: dataclasses.Field) -> bool:
  return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)
