"""A model, and where it comes from: a Hugging Face directory, an orbax directory, a GGUF file, or a random shape."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from sparse_serve_jax import files
from sparse_serve_jax.config import ModelConfig, find_config, from_dict, read_config
from sparse_serve_jax.models import gguf, hf, hf_config, llama, orbax, reference
from sparse_serve_jax.models import tokenizer as tokenizer_lib
from sparse_serve_jax.models.initial import random_params

_CARD = "model.json"  # marks an orbax directory of ours


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Weights with all that is needed to use them.

  A loaded model has no weight in memory: its leaves are `Leaf`s, which say where each is read from and are known to
  fit `config`. `place_params` puts them on devices; `np.asarray(leaf)` is one of them on the host. A model that is made
  here, such as a trained one, may have arrays.
  """

  config: ModelConfig
  params: llama.Params
  tokenizer: tokenizer_lib.Tokenizer
  eos_token_ids: tuple[int, ...]  # any of them ends an output
  name: str
  eos_sources: Mapping[int, str] = dataclasses.field(default_factory=dict)  # what file each of them comes from

  def describe(self) -> str:
    """Lines for a reader: name, shape, tokenizer, where each special token comes from, chat template or none."""
    cfg = self.config
    count = sum(jax.tree.leaves(llama.map_shapes(lambda _, shape: math.prod(shape), cfg)))
    rope = "" if cfg.rope.kind == "default" else f" ({cfg.rope.kind}, factor {cfg.rope.factor:g})"
    shape = (
      f"{count:,} parameters in {cfg.dtype}: {cfg.n_layers} layers of {cfg.d_model}, {cfg.n_heads} heads of "
      f"{cfg.head_dim}, {cfg.n_kv_heads} of KV, MLP of {cfg.d_ff}, vocabulary of {cfg.vocab_size}"
    )
    ends = [f"{i} ({self.eos_sources.get(i, 'given')})" for i in self.eos_token_ids]
    return "\n".join(
      [
        f"{self.name}: {shape}",
        f"context: {cfg.max_context} tokens, rope theta {cfg.rope.theta:g}{rope}",
        f"an output ends with: {', '.join(ends) or 'no token'}",
        self.tokenizer.describe(),
      ]
    )


def load_model(name_or_path: str | pathlib.Path, dtype: str | None = None, seed: int = 0) -> Model:
  """Loads a model: all of it but its weights, which are only looked at.

  Args:
    name_or_path: a Hugging Face directory, a directory made by `save_model`, a GGUF file, "reference" (see
      `reference.find`), or "random:<shape>" with the shapes of configs/models and the byte tokenizer.
    dtype: "float32" or "bfloat16"; None keeps what the model says.
    seed: of random weights.

  Raises:
    ValueError: nothing there, an unknown shape, a model this decoder does not compute, or tensors that do not fit.
  """
  if not isinstance(name_or_path, str | pathlib.Path):
    raise ValueError(f"a model is a directory, a GGUF file or random:<shape>, got {name_or_path!r:.80}")
  name = str(name_or_path)
  if name.startswith("random:"):
    cfg = _cast(read_config(ModelConfig, find_config("models", name.removeprefix("random:"))), dtype)
    tokenizer = tokenizer_lib.ByteTokenizer()
    return Model(cfg, random_params(cfg, seed), tokenizer, tokenizer.eos_token_ids, name, tokenizer.turn_ends())
  path = reference.find() if reference.is_meant(name) else pathlib.Path(name_or_path)
  if (path / _CARD).exists():
    return _restore(path, dtype)
  if path.suffix == ".gguf" and path.is_file():
    opened = gguf.open_gguf(path, dtype)
    ends = _union(name, opened.config, [*opened.eos.items(), *opened.tokenizer.turn_ends().items()])
    return Model(opened.config, opened.params, opened.tokenizer, tuple(ends), path.stem, ends)
  if not (path / "config.json").exists():
    raise ValueError(_no_model(name, path))
  raw = files.read_json(path / "config.json")
  cfg, params = hf.open_params(path, _cast(hf_config.config_from_hf(raw, str(path / "config.json")), dtype))
  tokenizer = tokenizer_lib.load_tokenizer(path)
  ends = _ends(path, cfg, raw, tokenizer)
  return Model(cfg, params, tokenizer, tuple(ends), path.resolve().name, ends)


def save_model(model: Model, path: str | pathlib.Path) -> None:
  """Writes configuration, tokenizer and, by orbax, parameters into a new directory. All of them are in memory then.

  Raises:
    ValueError: the directory exists and is not empty.
  """
  directory = _new_directory(path)
  orbax.write_params(directory / "params", model.params)
  model.tokenizer.save(directory)
  config = dataclasses.asdict(model.config)
  card = {"name": model.name, "eos_token_ids": list(model.eos_token_ids), "config": config}
  files.write_text(directory / _CARD, json.dumps(card, indent=2) + "\n")


def save_hf(model: Model, path: str | pathlib.Path, shard_bytes: int = 4 << 30) -> None:
  """Writes a Hugging Face directory: config.json, sharded safetensors, generation_config.json, tokenizer.

  Args:
    model: loaded, or one with arrays.
    path: of the directory.
    shard_bytes: of a file of weights, at most, unless one tensor has more.

  Raises:
    ValueError: the directory exists and is not empty, or no architecture there has this shape.
    OSError: a file could not be written whole.
  """
  raw = hf_config.config_to_hf(model.config)
  directory = _new_directory(path)
  eos = {"eos_token_id": list(model.eos_token_ids)}
  files.write_text(directory / "config.json", json.dumps(raw | eos, indent=2) + "\n")
  files.write_text(directory / "generation_config.json", json.dumps(eos, indent=2) + "\n")
  hf.write_params(directory, model.config, model.params, shard_bytes)
  model.tokenizer.save(directory)


def _restore(path: pathlib.Path, dtype: str | None) -> Model:
  card, where = files.read_json(path / _CARD), str(path / _CARD)
  if absent := [key for key in ("name", "config") if key not in card]:
    raise ValueError(f"{where} lacks {absent[0]!r}")
  with files.placed(where):
    cfg = _cast(from_dict(ModelConfig, card["config"]), dtype)
  params = orbax.open_params(path.resolve() / "params", cfg)
  ends = dict.fromkeys(hf_config.token_ids(card, "eos_token_ids", where), _CARD)
  return Model(cfg, params, tokenizer_lib.load_tokenizer(path), tuple(ends), card["name"], ends)


def _new_directory(path: str | pathlib.Path) -> pathlib.Path:
  directory = pathlib.Path(path).resolve()
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f"{directory} exists and is not empty")
  directory.mkdir(parents=True, exist_ok=True)
  return directory


def _cast(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
  return cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype)


def _ends(
  path: pathlib.Path, cfg: ModelConfig, raw: dict[str, Any], tokenizer: tokenizer_lib.Tokenizer
) -> dict[int, str]:
  """Every token that ends an output, and where it comes from: generation_config.json, config.json, the tokenizer."""
  file, config = path / "generation_config.json", path / "config.json"
  generation = files.read_json(file) if file.exists() else {}
  told = [(i, file.name) for i in hf_config.token_ids(generation, "eos_token_id", str(file))]
  told += [(i, config.name) for i in hf_config.token_ids(raw, "eos_token_id", str(config))]
  return _union(str(path), cfg, [*told, *tokenizer.turn_ends().items()])


def _union(where: str, cfg: ModelConfig, told: list[tuple[int, str]]) -> dict[int, str]:
  """Each token once, with all the places that it comes from. A warning names those that the model cannot draw."""
  sources: dict[int, str] = {}
  for i, source in told:
    sources[i] = f"{sources[i]}, {source}" if i in sources else source
  for i in [i for i in sources if i >= cfg.vocab_size]:
    warnings.warn(
      f"{where}: the end of an output, {i} of {sources.pop(i)}, is beyond the vocabulary of {cfg.vocab_size}: it never "
      "comes",
      stacklevel=3,
    )
  return sources


def _no_model(name: str, path: pathlib.Path) -> str:
  """Why there is no model at a path."""
  if path.is_file():
    return f"{name!r} is a file: wanted is a directory with a config.json, or a file that ends in .gguf"
  if path.is_dir():
    return f"{name!r} is no model: it has no config.json and no {_CARD}"
  if re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # as names of the Hugging Face hub are
    return (
      f"{name!r} is no model: there is no such directory with a config.json, and nothing is downloaded. "
      f"`hf download {name} --local-dir DIR` (of the package huggingface_hub) fetches it; then give DIR"
    )
  return f"{name!r} is no model: no config.json or {_CARD} is there, and it does not begin with 'random:'"
