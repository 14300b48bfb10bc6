"""GGUF files of llama.cpp: weights, tokenizer and chat template of one file, by the package `gguf`.

Weights are dequantized when they are read. llama.cpp stores the rows of q and k of its "llama" architecture in pairs
(i, i + D / 2) beside each other; here they go back to where `llama.qkv` wants them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax.config import ModelConfig, RopeConfig
from sparse_serve_jax.models import hf, hf_config, llama
from sparse_serve_jax.models.gguf_tokenizer import read_tokenizer
from sparse_serve_jax.models.leaves import FileStamp
from sparse_serve_jax.models.tokenizer import FileTokenizer

_ARCHITECTURES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3"}  # -> model_type
_PAIRED = ("llama", "mistral")  # whose q and k are stored by pairs
_NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_STRIP_VALUES = 8 << 20  # of a tensor that are dequantized at once
_FACTORS = "rope_freqs.weight"  # what Llama 3.1 and later divide their frequencies by


class Opened(NamedTuple):
  """What `Model` is made of."""

  config: ModelConfig
  params: llama.Params
  tokenizer: FileTokenizer
  eos: dict[int, str]  # token ids that end an output -> where they come from


def open_gguf(path: pathlib.Path, dtype: str | None) -> Opened:
  """Opens a file: all but the weights, of which only names and shapes are read.

  Args:
    path: of the file.
    dtype: "float32" or "bfloat16"; None is float32 for a file of that, else bfloat16.

  Raises:
    ValueError: the package is missing, this is no GGUF, or its architecture, quantization or tokenizer is not
      supported; it is named.
  """
  gguf = _package()
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, IndexError, KeyError, OSError) as error:
    there, wanted = path.stat().st_size, _bytes_wanted(gguf, path)
    if there < wanted:
      raise ValueError(f"{path} is cut off: {there} bytes are there, {wanted} are expected") from None
    raise ValueError(f"{path}, {there} bytes, is no GGUF file or not all of one: {error}") from None
  fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
  tensors = {tensor.name: tensor for tensor in reader.tensors}
  _check_quantization(gguf, path, tensors)
  plain = all(tensor.tensor_type.name == "F32" for tensor in tensors.values())
  cfg = _config(path, fields, tensors, dtype or ("float32" if plain else "bfloat16"))
  stamp, paired = FileStamp.of(path), fields["general.architecture"] in _PAIRED
  ours = {_hf_name(name): tensor for name, tensor in tensors.items() if name != _FACTORS}
  stored = {name: hf.Stored(stamp, tuple(int(n) for n in t.shape[::-1]), "F32") for name, t in ours.items()}

  def fill(name: str, view: np.ndarray) -> None:
    tensor = ours[name]
    heads = _heads(cfg, name) if paired else 0
    _dequantize(gguf, tensor, view, heads)

  params = hf.leaves(path, cfg, stored, fill)
  tokenizer = read_tokenizer(path, {name: field.contents for name, field in reader.fields.items()})
  return Opened(cfg, params, tokenizer.tokenizer, tokenizer.eos)


def _package() -> Any:
  try:
    import gguf
  except ImportError:
    raise ValueError("a GGUF file is read by the package gguf: pip install 'sparse-serve-jax[gguf]'") from None
  return gguf


def _bytes_wanted(gguf: Any, path: pathlib.Path) -> int:
  """Bytes up to the end of the last tensor, by the header; 0 if that cannot be read."""
  ends = [0]

  class Header(gguf.GGUFReader):
    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
      for field in fields:
        *_, dims, kind, offset = field.parts
        block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
        ends.append(int(start_offs) + int(offset[0]) + math.prod(dims.tolist()) // block * n_bytes)

  with contextlib.suppress(ValueError, IndexError, KeyError, OSError):
    Header(path)
  return max(ends)


def _check_quantization(gguf: Any, path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
  known = {"F32", "F16", *(kind.name for kind in gguf.quants._type_traits)}
  if unknown := sorted({tensor.tensor_type.name for tensor in tensors.values()} - known):
    raise ValueError(f"{path}: quantization {', '.join(unknown)} is not supported (known: {', '.join(sorted(known))})")


def _config(path: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, Any], dtype: str) -> ModelConfig:
  """The shape, by way of the config.json that such a model has."""
  kind = fields.get("general.architecture")
  if kind not in _ARCHITECTURES:
    raise ValueError(f"{path}: architecture {kind!r} is not supported (known: {', '.join(_ARCHITECTURES)})")
  if fields.get("split.count", 1) > 1:
    raise ValueError(f"{path} is one of {fields['split.count']} files: join them by llama-gguf-split --merge")
  get = lambda name, default=None: fields.get(f"{kind}.{name}", default)  # noqa: E731
  heads, width = get("attention.head_count"), get("embedding_length")
  if not isinstance(heads, int) or not isinstance(width, int):
    raise ValueError(f"{path}: {kind}.attention.head_count is {heads!r} and {kind}.embedding_length {width!r}")
  head_dim = get("attention.key_length", width // heads)
  refused = {
    f"attention.value_length {get('attention.value_length')}": get("attention.value_length", head_dim) != head_dim,
    f"rope.dimension_count {get('rope.dimension_count')}": get("rope.dimension_count", head_dim) != head_dim,
    f"attention.sliding_window {get('attention.sliding_window')}": get("attention.sliding_window"),
    f"expert_count {get('expert_count')}": get("expert_count"),
  }
  if wrong := [f"{kind}.{what}" for what, present in refused.items() if present]:
    raise ValueError(f"{path}: {', '.join(wrong)} is not supported (head_dim is {head_dim})")
  embed = tensors.get("token_embd.weight")
  raw = {
    "model_type": _ARCHITECTURES[kind],
    "vocab_size": int(embed.shape[1]) if embed is not None else get("vocab_size"),
    "hidden_size": width,
    "num_hidden_layers": get("block_count"),
    "num_attention_heads": heads,
    "num_key_value_heads": get("attention.head_count_kv", heads),
    "head_dim": head_dim,
    "intermediate_size": get("feed_forward_length"),
    "max_position_embeddings": get("context_length"),
    "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
    "rope_theta": get("rope.freq_base", 10000.0),
    "rope_scaling": _rope_scaling(path, get),
    "tie_word_embeddings": "output.weight" not in tensors,
    "sliding_window": None,
    "dtype": dtype,
  }
  cfg = hf_config.config_from_hf(raw, str(path))
  return cfg if _FACTORS not in tensors else _with_factors(path, cfg, tensors[_FACTORS].data)


def _rope_scaling(path: pathlib.Path, get: Any) -> dict[str, Any] | None:
  """The entry of a config.json: none, linear or yarn."""
  kind, factor = get("rope.scaling.type"), get("rope.scaling.factor", get("rope.scale_linear", 1.0))
  if kind == "none" or factor in (0, 1):
    return None
  if kind in (None, "linear"):
    return {"rope_type": "linear", "factor": factor}
  if kind != "yarn":
    raise ValueError(f"{path}: rope.scaling.type {kind!r} is not supported (known: none, linear, yarn)")
  made = {"rope_type": "yarn", "factor": factor}
  others = {
    "original_max_position_embeddings": "original_context_length",
    "attention_factor": "attn_factor",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
  }
  return made | {key: value for key, name in others.items() if (value := get(f"rope.scaling.{name}")) is not None}


def _with_factors(path: pathlib.Path, cfg: ModelConfig, factors: np.ndarray) -> ModelConfig:
  """With the Llama 3 scaling that divides frequencies by `factors` [D / 2], which is all that the file has of it."""
  plain = llama.rope_frequencies(cfg)
  for factor in (8.0, 32.0):  # of Llama 3.1 and 3.3, of 3.2
    rope = RopeConfig(theta=cfg.rope.theta, kind="llama3", factor=factor, original_context=8192)
    made = dataclasses.replace(cfg, rope=rope)
    if factors.shape == plain.shape and np.allclose(plain / llama.rope_frequencies(made), factors, rtol=1e-3):
      return made
  raise ValueError(f"{path}: {_FACTORS} is none of the rope scalings of Llama 3.1, 3.2 and 3.3, which are known")


def _hf_name(name: str) -> str:
  """The name in a Hugging Face checkpoint; a tensor that is unknown there keeps its own."""
  match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
  if match is None or match[2] not in _NAMES:
    return name
  layer = "" if match[1] is None else f"model.layers.{match[1]}."
  return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def _heads(cfg: ModelConfig, name: str) -> int:
  """Heads of a tensor of queries or keys; 0 for another."""
  return cfg.n_heads if ".q_proj." in name else cfg.n_kv_heads if ".k_proj." in name else 0


def _dequantize(gguf: Any, tensor: Any, view: np.ndarray, heads: int) -> None:
  """Writes a tensor into `view`, whose first axes are its rows; with `heads` its rows are stored by pairs."""
  shape = tuple(int(n) for n in tensor.shape[::-1])
  values = lambda rows: gguf.quants.dequantize(rows, tensor.tensor_type)  # noqa: E731
  if heads:
    whole = values(tensor.data).reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
    hf.copy_strips(view, whole.swapaxes(1, 2).reshape(view.shape).astype(view.dtype))
    return
  rows = shape[0] // len(view)  # of the tensor, for each index of the view
  step = max(1, _STRIP_VALUES * len(view) // int(np.prod(shape)))
  for i in range(0, len(view), step):
    strip = view[i : i + step]
    part = values(tensor.data[i * rows : (i + len(strip)) * rows])
    hf.copy_strips(strip, part.reshape(strip.shape).astype(view.dtype))
