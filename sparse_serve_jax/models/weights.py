"""A model, and where it comes from: a Hugging Face directory, an orbax directory, or a random shape."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from sparse_serve_jax.config import ModelConfig, find_config, from_dict, read_config
from sparse_serve_jax.models import hf, llama, orbax
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


def load_model(name_or_path: str | pathlib.Path, dtype: str | None = None, seed: int = 0) -> Model:
  """Loads a model: all of it but its weights, which are only looked at.

  Args:
    name_or_path: a Hugging Face directory, a directory made by `save_model`, or "random:<shape>" with the shapes of
      configs/models and the byte tokenizer.
    dtype: "float32" or "bfloat16"; None keeps what the model says.
    seed: of random weights.

  Raises:
    ValueError: nothing there, an unknown shape, a model this decoder does not compute, or tensors that do not fit.
  """
  name = str(name_or_path)
  if name.startswith("random:"):
    cfg = _cast(read_config(ModelConfig, find_config("models", name.removeprefix("random:"))), dtype)
    tokenizer = tokenizer_lib.ByteTokenizer()
    return Model(cfg, random_params(cfg, seed), tokenizer, tokenizer.eos_token_ids, name)
  path = pathlib.Path(name_or_path)
  if (path / _CARD).exists():
    return _restore(path, dtype)
  if not (path / "config.json").exists():
    raise ValueError(f"{name!r} is no model: no config.json or {_CARD} there, and it does not begin with 'random:'")
  raw = hf.read_json(path / "config.json")
  cfg = _cast(hf.config_from_hf(raw), dtype)
  return Model(
    cfg, hf.open_params(path, cfg), tokenizer_lib.load_tokenizer(path), _eos_token_ids(path, raw), path.resolve().name
  )


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
  (directory / _CARD).write_text(json.dumps(card, indent=2) + "\n")


def save_hf(model: Model, path: str | pathlib.Path, shard_bytes: int = 4 << 30) -> None:
  """Writes a Hugging Face directory: config.json, sharded safetensors, generation_config.json, tokenizer.

  Raises:
    ValueError: the directory exists and is not empty, or no architecture there has this shape.
  """
  raw = hf.config_to_hf(model.config)
  directory = _new_directory(path)
  eos = {"eos_token_id": list(model.eos_token_ids)}
  (directory / "config.json").write_text(json.dumps(raw | eos, indent=2) + "\n")
  (directory / "generation_config.json").write_text(json.dumps(eos, indent=2) + "\n")
  hf.write_params(directory, model.config, model.params, shard_bytes)
  model.tokenizer.save(directory)


def _restore(path: pathlib.Path, dtype: str | None) -> Model:
  card = hf.read_json(path / _CARD)
  cfg = _cast(from_dict(ModelConfig, card["config"]), dtype)
  params = orbax.open_params(path.resolve() / "params", cfg)
  return Model(cfg, params, tokenizer_lib.load_tokenizer(path), tuple(card["eos_token_ids"]), card["name"])


def _new_directory(path: str | pathlib.Path) -> pathlib.Path:
  directory = pathlib.Path(path).resolve()
  if directory.exists() and any(directory.iterdir()):
    raise ValueError(f"{directory} exists and is not empty")
  directory.mkdir(parents=True, exist_ok=True)
  return directory


def _cast(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
  return cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype)


def _eos_token_ids(path: pathlib.Path, raw: dict[str, Any]) -> tuple[int, ...]:
  """Every EOS of generation_config.json, else of config.json."""
  file = path / "generation_config.json"
  eos = hf.read_json(file).get("eos_token_id") if file.exists() else None
  eos = raw.get("eos_token_id") if eos is None else eos
  return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
