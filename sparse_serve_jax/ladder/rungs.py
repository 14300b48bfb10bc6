"""Rungs of a ladder, which are configurations: what they are by name, and whether they can be compared."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from sparse_serve_jax.attention import get_method
from sparse_serve_jax.config import EngineConfig, ModelConfig, load_config, override, with_fixed_sizes
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.workloads import Item


def read_rungs(
  names: Sequence[str], changes: Sequence[str] = (), varied: Mapping[str, Sequence[str]] | None = None
) -> dict[str, EngineConfig]:
  """Configurations by rung: of names in configs/serving, or of JSON files, which are named without their folder. Sizes
  that are left open are those of `with_fixed_sizes`, so that all machines compare the same.

  Args:
    names: of the rungs.
    changes: overrides of them all, such as "cache.hbm_bytes=8GiB".
    varied: values by key of a configuration. There is a rung for each choice of them, "psa max_batch=2".

  Raises:
    ValueError: there is none, or no such rung, it is given twice, or its parts exclude each other.
  """
  if not names:
    raise ValueError("a ladder has one rung or more, got none")
  configs: dict[str, EngineConfig] = {}
  choices = itertools.product(*([(key, value) for value in values] for key, values in (varied or {}).items()))
  for given, chosen in itertools.product(names, choices):
    name = " ".join([pathlib.Path(given).stem, *(f"{key.partition('.')[2]}={value}" for key, value in chosen)])
    if name in configs:
      raise ValueError(f"the rung {name} is given twice")
    try:
      of = override(load_config(given), [*changes, *(f"{key}={value}" for key, value in chosen)])
      configs[name] = with_fixed_sizes(of)
    except ValueError as error:
      raise ValueError(f"{name}: {error}") from None
  return configs


def shapes(configs: Mapping[str, EngineConfig], model: ModelConfig) -> dict[str, CacheShape]:
  """What each rung's memory is cut into.

  Raises:
    ValueError: rungs that could not run, each with its reason.
  """
  made, wrong = {}, []
  for name, config in configs.items():
    try:
      config.check_model(model)
      made[name] = CacheShape.of(model, host_pool.chosen(config), get_method(config.sparse.method).vectors)
    except ValueError as error:
      wrong.append(f"{name}: {error}")
  if wrong:
    raise ValueError("; ".join(wrong))
  return made


def check(configs: Mapping[str, EngineConfig], model: ModelConfig, items: Sequence[Item]) -> None:
  """Refuses rungs that cannot be compared: those with different `cache.hbm_bytes`, or where some cannot serve a request
  that others can, or where no rung can serve any.

  Raises:
    ValueError: with the least cache.hbm_bytes that each rung needs for the longest request that some rung can serve, or
      for the shortest of all.
  """
  budgets = {name: config.cache.hbm_bytes for name, config in configs.items()}
  if len(set(budgets.values())) > 1:
    told = ", ".join(f"{name} {n}" for name, n in budgets.items())
    raise ValueError(f"rungs are compared within one cache.hbm_bytes, these have {told}: set one for all")
  most = {name: shape.max_context for name, shape in shapes(configs, model).items()}
  lengths = [len(item.prompt) + item.max_new_tokens for item in items]
  longest = max((n for n in lengths if n <= max(most.values())), default=min(lengths, default=0))
  wrong = [
    f"{name}: a request has {longest} tokens, and only {n} fit; {_remedy(configs[name], model, longest)}"
    for name, n in most.items()
    if n < longest
  ]
  if wrong:
    raise ValueError("; ".join(wrong))


def _remedy(config: EngineConfig, model: ModelConfig, n_tokens: int) -> str:
  """What lets a rung serve a request of so many tokens: the least cache.hbm_bytes, if HBM is what it lacks."""
  if n_tokens > model.max_context:
    return f"the model's context is {model.max_context} tokens"
  config, vectors = host_pool.chosen(config), get_method(config.sparse.method).vectors

  def fits(hbm_bytes: int) -> bool:
    cache = dataclasses.replace(config.cache, hbm_bytes=hbm_bytes)
    try:
      return CacheShape.of(model, dataclasses.replace(config, cache=cache), vectors).max_context >= n_tokens
    except ValueError:
      return False

  low, high = 0, 1 << 50
  if not fits(high):
    dram, context = config.cache.dram_bytes, config.scheduler.max_context
    return f"cache.dram_bytes={dram} or scheduler.max_context={context} is too small"
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle, high)
  return (
    f"cache.hbm_bytes={config.cache.hbm_bytes} is below the minimum of {high} bytes for it, set cache.hbm_bytes={high} "
    "or more"
  )
