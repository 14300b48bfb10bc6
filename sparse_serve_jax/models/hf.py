"""Hugging Face directories: `config.json` to and from ModelConfig, safetensors to and from parameters. No torch.

What this decoder does not compute (sliding windows, experts, other rope types, extra biases, quantized weights) is
refused by name, so that no checkpoint runs as something it is not.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from sparse_serve_jax.config import ModelConfig, RopeConfig
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.leaves import FileStamp, Leaf, mismatches

# What each architecture has, and the values of `sliding_window`, `use_sliding_window` and `head_dim` where absent.
_ARCHITECTURES = {
  "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False, "window": None, "use_window": True, "head_dim": None},
  "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False, "window": 4096, "use_window": True, "head_dim": None},
  "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False, "window": 4096, "use_window": False, "head_dim": None},
  "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True, "window": 4096, "use_window": False, "head_dim": 128},
}

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


def config_from_hf(raw: dict[str, Any]) -> ModelConfig:
  """`config.json` as a ModelConfig. float16 becomes bfloat16, the only half precision here.

  Raises:
    ValueError: the model is of a kind that this decoder does not compute; all reasons are named at once.
  """
  name = str((raw.get("architectures") or [None])[0])
  family = _ARCHITECTURES.get(name)
  problems = [] if family else [f"architecture {name!r} (known: {', '.join(_ARCHITECTURES)})"]
  problems += _unsupported(raw, family or _ARCHITECTURES["LlamaForCausalLM"])
  if problems or family is None:
    raise ValueError("config.json asks for what is not supported: " + "; ".join(problems))
  try:
    heads = raw["num_attention_heads"]
    rope = _rope_from_hf(raw)
    return ModelConfig(
      vocab_size=raw["vocab_size"],
      d_model=raw["hidden_size"],
      n_layers=raw["num_hidden_layers"],
      n_heads=heads,
      n_kv_heads=raw.get("num_key_value_heads") or heads,
      head_dim=raw.get("head_dim") or family["head_dim"] or raw["hidden_size"] // heads,
      d_ff=raw["intermediate_size"],
      max_context=_max_context(raw["max_position_embeddings"], rope),
      norm_eps=raw["rms_norm_eps"],
      rope=rope,
      tie_embeddings=raw.get("tie_word_embeddings", False),
      qkv_bias=family["qkv_bias"],
      qk_norm=family["qk_norm"],
      dtype="float32" if _hf_dtype(raw) == "float32" else "bfloat16",
    )
  except KeyError as error:
    raise ValueError(f"config.json lacks {error.args[0]!r}") from None


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
  """The inverse, in the form that old and new `transformers` read.

  Raises:
    ValueError: no architecture has both qkv_bias and qk_norm.
  """
  wanted = cfg.qkv_bias, cfg.qk_norm
  name = next((n for n, family in _ARCHITECTURES.items() if (family["qkv_bias"], family["qk_norm"]) == wanted), None)
  if name is None:
    raise ValueError(f"no Hugging Face architecture has {cfg.qkv_bias=} with {cfg.qk_norm=}")
  rope = cfg.rope
  scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
  if rope.kind in ("llama3", "yarn"):
    scaling["original_max_position_embeddings"] = rope.original_context
  if rope.kind == "llama3":
    scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
  if rope.kind == "yarn":
    scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    scaling |= {"attention_factor": llama.rope_amplitude(rope)}
  shrink = rope.factor if rope.kind == "linear" else 1  # see _max_context
  return {
    "architectures": [name],
    "model_type": name.removesuffix("ForCausalLM").lower(),
    "vocab_size": cfg.vocab_size,
    "hidden_size": cfg.d_model,
    "num_hidden_layers": cfg.n_layers,
    "num_attention_heads": cfg.n_heads,
    "num_key_value_heads": cfg.n_kv_heads,
    "head_dim": cfg.head_dim,
    "intermediate_size": cfg.d_ff,
    "max_position_embeddings": round(cfg.max_context / shrink),
    "rms_norm_eps": cfg.norm_eps,
    "hidden_act": "silu",
    "rope_theta": rope.theta,
    "rope_scaling": None if rope.kind == "default" else scaling,
    "tie_word_embeddings": cfg.tie_embeddings,
    "torch_dtype": cfg.dtype,
  }


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


def open_params(directory: pathlib.Path, cfg: ModelConfig) -> llama.Params:
  """Parameters in cfg.dtype, as leaves that read their tensors when they are wanted. Only headers are read now.

  Raises:
    ValueError: no safetensors, or tensors that are missing, unknown, misshapen or no floats; all are listed.
  """
  found: dict[str, _Found] = {}
  for path in _files(directory):
    stamp = FileStamp.of(path)
    with _open(path) as file:
      for name in file.keys():  # noqa: SIM118
        header = file.get_slice(name)
        found[name] = _Found(stamp, tuple(header.get_shape()), header.get_dtype())
  tensors = _tensors(cfg)
  _check(directory, cfg, tensors, found)
  parts: dict[str, dict[int, list[_Tensor]]] = {}
  for tensor in tensors:
    parts.setdefault(tensor.leaf, {}).setdefault(tensor.layer, []).append(tensor)
  files = {tensor.name: found[tensor.name].file for tensor in tensors}

  def leaf(name: str, shape: tuple[int, ...]) -> Leaf:
    stacked, dtype = name.startswith("layers."), llama.dtype_of(cfg)

    def read(i: int) -> np.ndarray:
      layer = np.empty(shape[stacked:], dtype)
      for tensor in parts[name][i]:
        with _open(files[tensor.name].path) as file:
          _read(file.get_slice(tensor.name), tensor.view(layer))
      return layer

    stamps = {files[tensor.name] for of_layer in parts[name].values() for tensor in of_layer}
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
      _copy(tensors[tensor.name].reshape(view.shape), view)
    safetensors.numpy.save_file(tensors, directory / filename, metadata={"format": "pt"})
    (directory / filename).chmod(0o644)  # the library leaves it to its owner alone
    weight_map |= {tensor.name: filename for tensor in shard}
  total = sum(math.prod(tensor.shape) for tensor in _tensors(cfg)) * item_bytes
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
    _copy(strip, tensor[i * rows : (i + len(strip)) * rows].astype(to.dtype, copy=False).reshape(strip.shape))


def _copy(to: np.ndarray, source: np.ndarray) -> None:
  """Copies in strips of 32 rows: what cache misses cost in a transposed copy falls to a quarter."""
  if to.ndim > 2 and len(to) <= 32:
    for a, b in zip(to, source, strict=True):
      _copy(a, b)
    return
  if to.dtype.itemsize == 2:
    to, source = to.view(np.uint16), source.view(np.uint16)  # numpy's own types copy faster than bfloat16
  for i in range(0, len(to), 32):
    to[i : i + 32] = source[i : i + 32]


def read_json(path: pathlib.Path) -> Any:
  """Reads a JSON file; ValueError names it."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, "numpy")
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is no safetensors file: {error}") from error


def _files(directory: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint. (A directory may hold others, in another layout.)"""
  index = directory / "model.safetensors.index.json"
  if index.exists():
    paths = [directory / name for name in sorted(set(read_json(index)["weight_map"].values()))]
  else:
    paths = [directory / "model.safetensors"]
  if absent := [path.name for path in paths if not path.exists()]:
    raise ValueError(f"{directory} lacks {', '.join(absent)} (weights are read from safetensors only)")
  return paths


class _Found(NamedTuple):
  """What a file's header says of a tensor."""

  file: FileStamp
  shape: tuple[int, ...]
  dtype: str


def _check(directory: pathlib.Path, cfg: ModelConfig, tensors: list[_Tensor], found: dict[str, _Found]) -> None:
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
    raise ValueError(f"{directory} does not fit its configuration in {len(lines)} tensors:\n  " + "\n  ".join(lines))


def _hf_dtype(raw: dict[str, Any]) -> str:
  return raw.get("dtype") or raw.get("torch_dtype") or "float32"


def _unsupported(raw: dict[str, Any], family: dict[str, Any]) -> list[str]:
  """Names what `config.json` asks for and the decoder does not compute."""
  window = raw.get("sliding_window", family["window"])
  windowed = window is not None and raw.get("use_sliding_window", family["use_window"])
  kinds = sorted(set(raw.get("layer_types") or []) - {"full_attention"})
  experts = [key for key in ("num_experts", "num_local_experts", "n_routed_experts") if raw.get(key)]
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1
  checks = {
    f"a sliding window of {window} tokens": windowed,
    f"layer types {', '.join(kinds)}": kinds,
    f"a mixture of experts ({', '.join(f'{key}={raw[key]}' for key in experts)})": experts,
    f"rope type {_rope_type(rope)!r}": _rope_type(rope) not in ("default", "linear", "llama3", "yarn"),
    f"partial_rotary_factor {partial}": partial != 1,
    f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
    "attention_bias": raw.get("attention_bias"),
    "mlp_bias": raw.get("mlp_bias"),
    f"dtype {_hf_dtype(raw)!r}": _hf_dtype(raw) not in ("float32", "bfloat16", "float16"),
    "quantization_config": raw.get("quantization_config"),
  }
  return [what for what, present in checks.items() if present]


def _rope_type(rope: dict[str, Any]) -> str:
  return rope.get("rope_type") or rope.get("type") or "default"


def _rope_from_hf(raw: dict[str, Any]) -> RopeConfig:
  """From `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  kind = _rope_type(rope)
  fields: dict[str, Any] = {"theta": rope.get("rope_theta") or raw.get("rope_theta") or 10000.0, "kind": kind}
  if kind in ("llama3", "yarn"):
    original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    fields["original_context"] = original or raw["max_position_embeddings"]
  if kind in ("linear", "llama3", "yarn"):
    fields["factor"] = rope["factor"]
  if kind == "llama3":
    fields |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
  if kind == "yarn":
    if fields["factor"] is None:
      fields["factor"] = raw["max_position_embeddings"] / fields["original_context"]
    fields |= {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    fields |= {"truncate": rope.get("truncate", True), "attention_factor": _yarn_attention(rope, fields["factor"])}
  return RopeConfig(**fields)


def _yarn_attention(rope: dict[str, Any], factor: float) -> float:
  """The explicit factor, else the quotient of two magnitudes, else 0: the default of RopeConfig."""
  if rope.get("attention_factor") is not None:
    return rope["attention_factor"]
  up, down = rope.get("mscale"), rope.get("mscale_all_dim")
  if not (up and down) or factor <= 1:
    return 0.0
  return (0.1 * up * math.log(factor) + 1) / (0.1 * down * math.log(factor) + 1)


def _max_context(positions: int, rope: RopeConfig) -> int:
  """Tokens after scaling. `max_position_embeddings` is the unscaled length for linear scaling, either one for YaRN."""
  if rope.kind == "linear":
    return round(positions * rope.factor)
  return max(positions, round(rope.original_context * rope.factor)) if rope.kind == "yarn" else positions
