"""Configuration as frozen dataclasses, read from strict JSON.

One `EngineConfig` says everything a run depends on besides the model. Every field is checked where it is made, so that
a wrong value is met at once and with its numbers, not ten layers down.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar

if TYPE_CHECKING:
  from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding.

  `kind` "llama3" and "yarn" follow the Hugging Face `rope_scaling` entries of the same names; "linear" divides
  positions by `factor`.
  """

  theta: float = 10000.0
  kind: Literal["default", "linear", "llama3", "yarn"] = "default"
  factor: float = 1.0
  original_context: int = 0  # tokens; llama3 and yarn
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float = 0.0  # yarn; 0: 0.1 ln(factor) + 1
  truncate: bool = True  # yarn: round the correction range to whole dimensions

  def __post_init__(self):
    _check_fields(self, positive=("theta", "factor"), not_negative=("original_context", "attention_factor"))
    if self.kind in ("llama3", "yarn") and not self.original_context:
      raise ValueError(f"rope kind {self.kind!r} needs original_context, the tokens before scaling; it is 0")
    if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
      raise ValueError(f"llama3 rope needs 0 < {self.low_freq_factor=} < {self.high_freq_factor=}")
    if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
      raise ValueError(f"yarn rope needs 0 < {self.beta_slow=} < {self.beta_fast=}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a llama-family decoder; the letters beside the fields are `docs/alphabet.md`'s."""

  vocab_size: int  # V
  d_model: int  # d
  n_layers: int  # L
  n_heads: int  # H
  n_kv_heads: int  # K
  head_dim: int  # D
  d_ff: int  # F
  max_context: int  # tokens
  norm_eps: float = 1e-5
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  tie_embeddings: bool = False
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # Qwen3
  dtype: Literal["float32", "bfloat16"] = "bfloat16"

  def __post_init__(self):
    sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_context")
    _check_fields(self, positive=(*sizes, "norm_eps"))
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd; rope turns pairs")

  @property
  def group(self) -> int:
    """G, query heads per KV head."""
    return self.n_heads // self.n_kv_heads


BLOCK_SIZES = (8, 16, 32, 64, 128)  # S: powers of two, for kernels


@dataclasses.dataclass(frozen=True)
class CacheConfig:
  """Where KV lives. Sizes are bytes over all devices; JSON may write "8GiB"."""

  block_tokens: int = 32  # S
  offload: bool = True  # False: the pool of all blocks lies in HBM and there are no slots (vLLM, vLLM-S)
  dram_bytes: int = 1 << 30  # the pool, when offloading
  hbm_bytes: int = 1 << 28  # slots, digests, maps, tails, prefill slab; and the pool when not offloading
  rows: int = 64  # R, resident requests: prefilling, decoding or paused

  def __post_init__(self):
    _check_fields(self, positive=("block_tokens", "dram_bytes", "hbm_bytes", "rows"))
    if self.block_tokens not in BLOCK_SIZES:
      raise ValueError(f"block_tokens={self.block_tokens} is not one of {BLOCK_SIZES}")


@dataclasses.dataclass(frozen=True)
class SparseConfig:
  """What a decode step attends to."""

  policy: Literal["dense", "topk", "psa"] = "topk"
  method: str = "cuboid_mean"  # a name in attention.methods.METHODS
  # topk: attended tokens a step, sinks and window included. Every policy: how much of the end of a prompt, or of each
  # piece that it is cut into, enters slots.
  token_budget: int = 2048
  sink_tokens: int = 64  # always attended, as in ArkVale (two blocks of 32)
  window_tokens: int = 64  # the newest full blocks, always attended
  dense_layers: int = 0  # the first layers that attend to everything (2 in ArkVale and Quest)
  group_reduce: Literal["mean", "max"] = "mean"  # over the query heads of a KV head
  threshold: float = 0.95  # psa: epsilon, stop when the estimated share of attention mass exceeds it
  group_blocks: int = 4  # psa: blocks between two stop tests

  def __post_init__(self):
    _check_fields(self, ("token_budget", "group_blocks"), ("sink_tokens", "window_tokens", "dense_layers"))
    if not 0 < self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold} is not in (0, 1]")
    if self.group_blocks & (self.group_blocks - 1):
      raise ValueError(f"group_blocks={self.group_blocks} is not a power of two")


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
  """Who runs in an iteration."""

  max_batch: int = 64  # decode rows
  max_context: int = 0  # prompt + output tokens of one request; 0: what model and pool allow
  prefill: Literal["layer_segmented", "chunked"] = "layer_segmented"
  chunk_tokens: int = 2048  # chunked: prompt tokens an iteration, through all layers
  max_inject_tokens: int = 0  # layer_segmented: token x layers an iteration; 0: 2048 x layers (SparseServe, section 4)
  batch_control: Literal["working_set", "none"] = "working_set"
  working_set_steps: int = 12  # w of Algorithm 1, SparseServe

  def __post_init__(self):
    _check_fields(
      self,
      positive=("max_batch", "chunk_tokens", "working_set_steps"),
      not_negative=("max_context", "max_inject_tokens"),
    )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
  """Everything a run depends on besides the model."""

  cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
  sparse: SparseConfig = dataclasses.field(default_factory=SparseConfig)
  scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)
  implementation: Literal["auto", "xla", "triton", "interpret"] = "auto"
  tp: int = 1  # devices on the mesh axis "tp"

  def __post_init__(self):
    _check_fields(self, positive=("tp",))
    size, sparse, chunk = self.cache.block_tokens, self.sparse, self.scheduler.chunk_tokens
    least = max(1, self.sink_blocks + self.window_blocks)
    if sparse.policy == "topk" and self.budget_blocks < least:
      raise ValueError(
        f"token_budget={sparse.token_budget} is {self.budget_blocks} blocks of {size} tokens, but sinks "
        f"({sparse.sink_tokens} tokens: {self.sink_blocks} blocks) and window ({sparse.window_tokens} tokens: "
        f"{self.window_blocks} blocks) need {least}: token_budget must be at least {least * size}"
      )
    if self.scheduler.prefill == "chunked" and chunk % (8 * size if chunk > 8 * size else size):
      raise ValueError(f"chunk_tokens={chunk} is not whole blocks of {size}, or beyond 8 not a multiple of 8 blocks")

  def prefill_allowance(self, n_layers: int) -> int:
    """What one iteration may prefill: token x layers when layer-segmented, tokens (through all layers) when chunked.

    It is also the most tokens that are prefilled at once.
    """
    if self.scheduler.prefill == "chunked":
      return self.scheduler.chunk_tokens
    return self.scheduler.max_inject_tokens or 2048 * n_layers  # B x L, SparseServe, section 4

  @property
  def budget_blocks(self) -> int:
    """Full blocks that a top-k step attends to, sinks and window included."""
    return self.sparse.token_budget // self.cache.block_tokens

  @property
  def sink_blocks(self) -> int:
    return math.ceil(self.sparse.sink_tokens / self.cache.block_tokens)

  @property
  def window_blocks(self) -> int:
    return math.ceil(self.sparse.window_tokens / self.cache.block_tokens)


def load_config(name_or_path: str | Path) -> EngineConfig:
  """The engine configuration of a name ("psa": configs/serving/psa.json) or of a JSON file's path.

  The byte sizes and row counts in configs/serving suit a first run on any machine. For a real one, `override` them:
  cache.hbm_bytes, cache.dram_bytes, cache.rows and scheduler.max_batch.
  """
  return read_config(EngineConfig, find_config("serving", name_or_path))


def find_config(kind: Literal["serving", "models", "training"], name_or_path: str | Path) -> Path:
  """The file of a configuration, in a checkout or in an installed package.

  What ends in ".json" is a path; anything else is a name in configs/<kind>.
  """
  if str(name_or_path).endswith(".json"):
    if not Path(name_or_path).is_file():
      raise ValueError(f"no such file: {name_or_path}")
    return Path(name_or_path)
  package = Path(__file__).resolve().parent  # a wheel has configs/ in the package, a checkout beside it
  folder = next((d for d in (package / "configs" / kind, package.parent / "configs" / kind) if d.is_dir()), None)
  files = {path.stem: path for path in sorted(folder.glob("*.json"))} if folder else {}
  if str(name_or_path) not in files:
    raise ValueError(f"no {kind} configuration {str(name_or_path)!r}; there are: {', '.join(files) or 'none'}")
  return files[str(name_or_path)]


def read_config(cls: type[Config], path: Path) -> Config:
  """Reads a JSON file strictly. "extends": "other" takes other.json of the same folder as the base, to any depth."""
  data = _read(cls, Path(path).resolve(), ())
  try:
    return from_dict(cls, data)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def from_dict(cls: type[Config], data: Mapping[str, Any], section: str = "") -> Config:
  """Builds a configuration dataclass from JSON values.

  An integer will do for a float, and text such as "8GiB" for a field in bytes; nothing else is converted.

  Raises:
    ValueError: an unknown or missing key, a value of the wrong type, or one that the dataclass refuses.
  """
  hints = _hints(cls)
  _check_keys(cls, data, section)
  missing = [field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in data]
  if missing:
    raise ValueError(f"section {section or cls.__name__!r} lacks {', '.join(missing)}")
  return cls(**{key: _convert(hints[key], value, _dotted(section, key)) for key, value in data.items()})


def override(config: Config, assignments: Iterable[str]) -> Config:
  """`config` with assignments such as "sparse.token_budget=4096" or "cache.hbm_bytes=8GiB" applied together."""
  data, leaves = dataclasses.asdict(config), _leaves(type(config))
  for assignment in assignments:
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not equals:
      raise ValueError(f"{assignment!r} is not of the form key=value")
    if key not in leaves:
      raise ValueError(f"unknown key {key!r}; the nearest is {_nearest(key, leaves)!r}")
    *sections, name = key.split(".")
    functools.reduce(lambda node, section: node[section], sections, data)[name] = _from_text(leaves[key], text)
  return from_dict(type(config), data)


def to_json(config: Any) -> str:
  """The JSON that `from_dict` reads back to an equal configuration."""
  return json.dumps(dataclasses.asdict(config), indent=2)


_UNITS = {"B": 1} | {
  f"{prefix}{suffix}": base**power
  for power, prefix in enumerate("KMGT", start=1)
  for suffix, base in (("B", 1000), ("iB", 1024))
}


def parse_bytes(text: str) -> int:
  """Bytes in "8GiB" (1024s), "1.5GB" (1000s) or "4096B"; a fraction of a byte is dropped."""
  match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
  if not match or match[2] not in _UNITS:
    raise ValueError(f"{text!r} is not a size: write a number of bytes, or a number with one of {', '.join(_UNITS)}")
  return int(Fraction(match[1]) * _UNITS[match[2]])


def _check_fields(config: Any, positive: Iterable[str] = (), not_negative: Iterable[str] = ()) -> None:
  """Checks the type of every field, and the range of those named. Converts as `from_dict` does."""
  name = type(config).__name__
  for key, hint in _hints(type(config)).items():
    object.__setattr__(config, key, _convert(hint, getattr(config, key), f"{name}.{key}"))
  for key in positive:
    if not 0 < getattr(config, key) < math.inf:
      raise ValueError(f"{name}.{key}={getattr(config, key)} must be positive")
  for key in not_negative:
    if not 0 <= getattr(config, key) < math.inf:
      raise ValueError(f"{name}.{key}={getattr(config, key)} must not be negative")


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
  if hint is int and isinstance(value, str) and where.endswith("_bytes"):
    try:
      return parse_bytes(value)
    except ValueError as error:
      raise ValueError(f"{where}: {error}") from None
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise ValueError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
  return value


def _from_text(hint: Any, text: str) -> Any:
  """What a command line means by `text` for a field of type `hint`."""
  if hint not in (int, float, bool):
    return text
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return text  # "8GiB", or wrong: `_convert` decides


def _read(cls: type, path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
  if path in chain:
    circle = " -> ".join(p.stem for p in (*chain, path))
    raise ValueError(f"{path}: 'extends' runs in a circle: {circle}")
  try:
    data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    base = data.pop("extends", None) if isinstance(data, dict) else None
    _check_keys(cls, data, "")
    if base is not None and (not isinstance(base, str) or not path.with_name(f"{base}.json").is_file()):
      names = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
      raise ValueError(f"'extends' names {base!r}, which is none of: {names}")
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  return data if base is None else _merged(_read(cls, path.with_name(f"{base}.json"), (*chain, path)), data)


def _merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
  both = {key: _merged(base[key], top[key]) for key in base if isinstance(base[key], dict) and key in top}
  return base | top | both


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  keys = [key for key, _ in pairs]
  if twice := sorted({key for key in keys if keys.count(key) > 1}):
    raise ValueError(f"key given twice: {', '.join(twice)}")
  return dict(pairs)


def _check_keys(cls: type, data: Any, section: str) -> None:
  """Refuses keys that `cls`, or a section in it, does not have."""
  if not isinstance(data, Mapping):
    wrong = f"expected an object for {cls.__name__}, got {data!r} ({type(data).__name__})"
    raise ValueError(f"section {section or cls.__name__!r}: {wrong}")
  hints = _hints(cls)
  for key, value in data.items():
    if key not in hints:
      raise ValueError(
        f"unknown key {key!r} in section {section or cls.__name__!r}; the nearest is {_nearest(key, hints)!r}"
      )
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


def _required(field: dataclasses.Field) -> bool:
  return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
  return typing.get_type_hints(cls)
