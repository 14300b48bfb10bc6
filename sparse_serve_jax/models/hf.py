"""Hugging Face directories: safetensors to and from parameters. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.files import read_json, write_text
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.leaves import FileStamp, Leaf, mismatches

_ALL, _Q, _K, _V = np.s_[...], np.s_[..., :-2, :], np.s_[..., -2, :], np.s_[..., -1, :]
_GATE, _UP = np.s_[..., 0, :], np.s_[..., 1, :]

# Tensor of the checkpoint ("{}": layer), its axes ("," ends a dimension), parameter, axes of that part, part.
_TENSORS = (
  ("model.embed_tokens.weight", "V,d", "embed", "Vd", _ALL),
  ("model.norm.weight", "d", "final_norm", "d", _ALL),
  ("lm_head.weight", "V,d", "lm_head", "dV", _ALL),
  ("model.layers.{}.input_layernorm.weight", "d", "attn_norm", "d", _ALL),
  ("model.layers.{}.self_attn.q_proj.weight", "KGD,d", "wqkv", "dKGD", _Q),
  ("model.layers.{}.self_attn.k_proj.weight", "KD,d", "wqkv", "dKD", _K),
  ("model.layers.{}.self_attn.v_proj.weight", "KD,d", "wqkv", "dKD", _V),
  ("model.layers.{}.self_attn.q_proj.bias", "KGD", "bqkv", "KGD", _Q),
  ("model.layers.{}.self_attn.k_proj.bias", "KD", "bqkv", "KD", _K),
  ("model.layers.{}.self_attn.v_proj.bias", "KD", "bqkv", "KD", _V),
  ("model.layers.{}.self_attn.q_norm.weight", "D", "q_norm", "D", _ALL),
  ("model.layers.{}.self_attn.k_norm.weight", "D", "k_norm", "D", _ALL),
  ("model.layers.{}.self_attn.o_proj.weight", "d,KGD", "wo", "KGDd", _ALL),
  ("model.layers.{}.post_attention_layernorm.weight", "d", "mlp_norm", "d", _ALL),
  ("model.layers.{}.mlp.gate_proj.weight", "F,d", "w_gate_up", "dF", _GATE),
  ("model.layers.{}.mlp.up_proj.weight", "F,d", "w_gate_up", "dF", _UP),
  ("model.layers.{}.mlp.down_proj.weight", "d,F", "w_down", "Fd", _ALL),
)
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")  # computed here
_FLOATS = ("F64", "F32", "F16", "BF16")  # that tensors may be
_STRIP_BYTES = 32 << 20  # of a tensor that are read at once
_MOST_HEADER = 100 << 20  # bytes: more is no header (safetensors)
_SHOWN = 10  # tensors that an error lists
# Fields of config.json, and where a tensor shows them.
_SIZES = (
  ("vocab_size", "model.embed_tokens.weight", 0),
  ("hidden_size", "model.embed_tokens.weight", 1),
  ("intermediate_size", "model.layers.0.mlp.gate_proj.weight", 0),
  ("num_attention_heads x head_dim", "model.layers.0.self_attn.q_proj.weight", 0),
  ("num_key_value_heads x head_dim", "model.layers.0.self_attn.k_proj.weight", 0),
)


class _Tensor(NamedTuple):
  """A tensor of a checkpoint, and which part of which parameter it is."""

  name: str
  shape: tuple[int, ...]
  leaf: str  # "embed", "layers.wqkv"
  layer: int  # 0 where there are none
  part: Any  # index into the layer
  order: tuple[int, ...]  # of that part's axes in the tensor

  def view(self, layer: np.ndarray) -> np.ndarray:
    """The part of a parameter's layer that the tensor fills, in the order of the tensor's axes."""
    return layer[self.part].transpose(self.order)


class Stored(NamedTuple):
  """What a file says of a tensor."""

  file: FileStamp
  shape: tuple[int, ...]
  dtype: str


def open_params(directory: pathlib.Path, cfg: ModelConfig) -> tuple[ModelConfig, llama.Params]:
  """Parameters in cfg.dtype, as leaves that read their tensors when they are wanted. Only headers are read now.

  The configuration that is returned is `cfg`, without `tie_embeddings` where the file holds a head of its own.

  Raises:
    ValueError: no safetensors, or tensors that are missing, unknown, misshapen or no floats: the cause, then ten of
      them.
  """
  found: dict[str, Stored] = {}
  for path in _files(directory):
    stamp = FileStamp.of(path)
    with _open(path) as file:
      for name in file.keys():  # noqa: SIM118
        header = file.get_slice(name)
        found[name] = Stored(stamp, tuple(header.get_shape()), header.get_dtype())
  if cfg.tie_embeddings and _has_own_head(found):
    cfg = dataclasses.replace(cfg, tie_embeddings=False)
    warnings.warn(
      f"{directory}: config.json's tie_word_embeddings is true, and lm_head.weight is another matrix than "
      "model.embed_tokens.weight; the stored head is used, as in transformers",
      stacklevel=3,
    )

  def fill(name: str, view: np.ndarray) -> None:
    with _open(found[name].file.path) as file:
      _read(file.get_slice(name), view)

  return cfg, leaves(directory, cfg, found, fill)


def leaves(
  where: pathlib.Path, cfg: ModelConfig, found: Mapping[str, Stored], fill: Callable[[str, np.ndarray], None]
) -> llama.Params:
  """Parameters in cfg.dtype, as leaves that read their tensors when they are wanted.

  Args:
    where: what errors name.
    cfg: what the tensors have to fit.
    found: the tensors that there are.
    fill: writes a tensor into an array that has its axes, or some of them split.

  Raises:
    ValueError: tensors that are missing, unknown, misshapen or no floats: the cause, then ten of them.
  """
  # One layer too many is enough to say so, where a wrong file says a billion.
  tensors = _tensors(dataclasses.replace(cfg, n_layers=min(cfg.n_layers, len(found) + 1)))
  _check(where, cfg, tensors, found)
  parts: dict[str, dict[int, list[_Tensor]]] = {}
  for tensor in tensors:
    parts.setdefault(tensor.leaf, {}).setdefault(tensor.layer, []).append(tensor)

  def leaf(name: str, shape: tuple[int, ...]) -> Leaf:
    stacked, dtype = name.startswith("layers."), llama.dtype_of(cfg)

    def read(i: int) -> np.ndarray:
      layer = np.empty(shape[stacked:], dtype)
      for tensor in parts[name][i]:
        fill(tensor.name, tensor.view(layer))
      return layer

    stamps = {found[tensor.name].file for of_layer in parts[name].values() for tensor in of_layer}
    return Leaf(name, shape, dtype, read, stacked, tuple(sorted(stamps, key=lambda stamp: stamp.path)))

  return llama.map_shapes(leaf, cfg)


def write_params(directory: pathlib.Path, cfg: ModelConfig, params: llama.Params, shard_bytes: int) -> None:
  """Writes safetensors of at most `shard_bytes` each (a larger tensor gets its own) and their index.

  One shard is in memory at a time, and of leaves that are not, one layer.
  """
  item_bytes = llama.dtype_of(cfg).itemsize
  shards: list[list[_Tensor]] = []
  room = 0
  for tensor in _tensors(cfg):
    size = math.prod(tensor.shape) * item_bytes
    if not shards or size > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(tensor)
    room -= size
  weight_map, part_of = {}, _Parts(params)
  for i, shard in enumerate(shards):
    filename = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
    tensors = {}
    for tensor in shard:
      view = tensor.view(part_of(tensor))
      tensors[tensor.name] = np.empty(tensor.shape, view.dtype)
      copy_strips(tensors[tensor.name].reshape(view.shape), view)
    try:
      safetensors.numpy.save_file(tensors, directory / filename, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # as of a full disk
      raise OSError(f"{directory / filename}: {error}") from error
    (directory / filename).chmod(0o644)  # the library leaves it to its owner alone
    weight_map |= {tensor.name: filename for tensor in shard}
  total = sum(math.prod(tensor.shape) for tensor in _tensors(cfg)) * item_bytes
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


class _Parts:
  """The parameters that tensors are parts of, of which the last one is kept: it holds the next tensor too."""

  def __init__(self, params: llama.Params):
    self._leaves = params | {f"layers.{name}": leaf for name, leaf in params["layers"].items()}
    self._last: tuple[Any, np.ndarray | None] = (None, None)

  def __call__(self, tensor: _Tensor) -> np.ndarray:
    key = tensor.leaf, tensor.layer
    if self._last[0] != key:
      self._last = None, None  # before the next is read
      leaf = self._leaves[tensor.leaf]
      of_layer = tensor.leaf.startswith("layers.")
      if isinstance(leaf, Leaf) and (leaf.stacked or not of_layer):
        part = leaf.part(tensor.layer)
      else:
        part = np.asarray(np.asarray(leaf)[tensor.layer] if of_layer else leaf)
      self._last = key, part
    assert self._last[1] is not None
    return self._last[1]


def _tensors(cfg: ModelConfig) -> list[_Tensor]:
  """Every tensor of a checkpoint: what has no layers first, then layer by layer."""
  size = {"V": cfg.vocab_size, "d": cfg.d_model, "F": cfg.d_ff, "K": cfg.n_kv_heads, "G": cfg.group, "D": cfg.head_dim}
  shapes = llama.param_shapes(cfg)
  tensors = []
  for name, dims, leaf, axes, part in _TENSORS:
    shape = tuple(math.prod(size[a] for a in dim) for dim in dims.split(","))
    order = tuple(axes.index(a) for a in dims.replace(",", ""))
    if leaf in shapes:
      tensors.append(_Tensor(name, shape, leaf, 0, part, order))
    elif leaf in shapes["layers"]:
      of_layers = (_Tensor(name.format(i), shape, f"layers.{leaf}", i, part, order) for i in range(cfg.n_layers))
      tensors.extend(of_layers)
  return sorted(tensors, key=lambda tensor: (tensor.leaf.startswith("layers."), tensor.layer))


def _read(tensor: Any, to: np.ndarray) -> None:
  """Reads a tensor of a file into a view of the same axes, a strip of it at a time."""
  rows = tensor.get_shape()[0] // len(to)  # of the tensor, for each index of the view
  step = max(1, _STRIP_BYTES // to[0].nbytes)
  for i in range(0, len(to), step):
    strip = to[i : i + step]
    copy_strips(strip, tensor[i * rows : (i + len(strip)) * rows].astype(to.dtype, copy=False).reshape(strip.shape))


def copy_strips(to: np.ndarray, source: np.ndarray) -> None:
  """Copies in strips of 32 rows: what cache misses cost in a transposed copy falls to a quarter."""
  if to.ndim > 2 and len(to) <= 32:
    for a, b in zip(to, source, strict=True):
      copy_strips(a, b)
    return
  if to.dtype.itemsize == 2:
    to, source = to.view(np.uint16), source.view(np.uint16)  # numpy's own types copy faster than bfloat16
  for i in range(0, len(to), 32):
    to[i : i + 32] = source[i : i + 32]


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, "numpy")
  except (safetensors.SafetensorError, OSError) as error:
    if path.is_file() and (there := path.stat().st_size) < (wanted := _bytes_wanted(path)):
      raise ValueError(f"{path} is cut off: {there} bytes are there, {wanted} or more are expected") from error
    raise ValueError(f"{path} is no safetensors file: {error}") from error


def _bytes_wanted(path: pathlib.Path) -> int:
  """Bytes that a safetensors file has at least, by what is there of it: up to its last tensor, or to the end of its
  header. 0: what is there is no header."""
  with path.open("rb") as file:
    told, header = file.read(8), file.read(_MOST_HEADER)
  begin = len(told) + int.from_bytes(told, "little")
  if len(told) < 8 or not header:
    return 8 + len("{}")
  if header[:1] != b"{" or begin > _MOST_HEADER:
    return 0
  if 8 + len(header) < begin:
    return begin
  try:
    tensors = json.loads(header[: begin - 8])
    return begin + max((of["data_offsets"][1] for name, of in tensors.items() if name != "__metadata__"), default=0)
  except (ValueError, LookupError, TypeError, AttributeError):
    return 0


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint. (A directory may hold others, in another layout.)"""
  index = directory / "model.safetensors.index.json"
  if index.exists():
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
      raise ValueError(f"{index}: 'weight_map' is {names!r:.80}, wanted is an object, tensor name -> file name")
    paths = [directory / name for name in sorted(set(names.values()))]
  else:
    paths = [directory / "model.safetensors"]
  if absent := [path.name for path in paths if not path.exists()]:
    raise ValueError(f"{directory} lacks {', '.join(absent)} (weights are read from safetensors only)")
  return paths


def _check(directory: pathlib.Path, cfg: ModelConfig, tensors: list[_Tensor], found: Mapping[str, Stored]) -> None:
  ignored = {name for name in found if _IGNORED.fullmatch(name)}
  if cfg.tie_embeddings:
    ignored.add("lm_head.weight")
  shapes = {name: tensor.shape for name, tensor in found.items() if name not in ignored}
  lines = mismatches({tensor.name: tensor.shape for tensor in tensors}, shapes)
  lines += [
    f"type: {tensor.name} is {found[tensor.name].dtype}, not one of {', '.join(_FLOATS)}"
    for tensor in tensors
    if tensor.name in found and found[tensor.name].dtype not in _FLOATS
  ]
  if lines:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    n = f"{len(lines)} tensor{'s' * (len(lines) > 1)}"
    fault = f"{directory} does not fit its configuration in {n}: {_cause(cfg, tensors, shapes)}"
    raise ValueError(";\n  ".join([fault, *lines[:_SHOWN], *more]))


def _cause(cfg: ModelConfig, tensors: list[_Tensor], found: dict[str, tuple[int, ...]]) -> str:
  """One line of why a checkpoint does not fit: the fields of `config.json` that say another shape, if they do."""
  wanted = {tensor.name: tensor.shape for tensor in tensors}
  if found and not wanted.keys() & found.keys():
    return f"no tensor has a name that such a model has (one is {min(found)!r}, wanted are such as {min(wanted)!r})"
  layers = [int(match[1]) for name in found if (match := re.match(r"model\.layers\.(\d+)\.", name))]
  sizes = {"num_hidden_layers": (cfg.n_layers, max(layers, default=-1) + 1)}
  for field, name, axis in _SIZES:
    if len(found.get(name, ())) == len(wanted[name]):
      sizes[field] = wanted[name][axis], found[name][axis]
  told = [f"{field} is {said}, the tensors have {there}" for field, (said, there) in sizes.items() if said != there]
  return "; ".join(told) or "names or types differ, sizes do not"


def _has_own_head(found: dict[str, Stored]) -> bool:
  """Whether there is an output head that differs from the embeddings."""
  head, embed = (found.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
  if head is None or embed is None:
    return False
  if head.shape != embed.shape:
    return True
  with _open(head.file.path) as a, _open(embed.file.path) as b:
    first, second = a.get_slice("lm_head.weight"), b.get_slice("model.embed_tokens.weight")
    step = max(1, _STRIP_BYTES // (4 * math.prod(head.shape[1:])))
    for i in range(0, head.shape[0], step):
      strip = slice(i, min(i + step, head.shape[0]))
      if not np.array_equal(first[strip].astype(np.float32), second[strip].astype(np.float32), equal_nan=True):
        return True
  return False
