"""What a ladder's folder keeps of a rung: enough to fit costs to, and to compare with what costs predict."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_serve_jax import results
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.config import EngineConfig, ModelConfig, from_dict
from sparse_serve_jax.evaluation.ladder import Row, shapes
from sparse_serve_jax.files import read_json, read_lines
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.simulation.measure import Iteration, from_columns
from sparse_serve_jax.workloads import WorkloadConfig


@dataclasses.dataclass(frozen=True)
class Kept:
  """A rung that served a workload."""

  folder: pathlib.Path
  rung: str
  config: EngineConfig
  model: ModelConfig
  model_name: str
  workload: WorkloadConfig
  max_request_tokens: int  # to which its source cut prompts: of the rung that has room for the least
  seed: int
  device: str
  cells: Mapping[float, Row]  # by rate, 0: all at once
  iterations: Mapping[float, Sequence[Iteration]]  # of the same cells

  @property
  def shape(self) -> CacheShape:
    return CacheShape.of(self.model, self.config, get_method(self.config.sparse.method).vectors)


def read(folder: pathlib.Path, rung: str) -> Kept:
  """Reads a folder of `ladder.Ladder`.

  Raises:
    ValueError: it is none, or has no cell of the rung with its iterations.
  """
  run = read_json(folder / results.RUN_FILE)
  setting: Mapping[str, Any] = run["setting"]
  configs = setting.get("configs", {})
  if rung not in configs:
    raise ValueError(f"{folder} has no rung {rung!r}, but {', '.join(configs) or 'none'}")
  device = run["parts"][0]["device"]  # later parts may be of another machine that made tables of what was there
  config = host_pool.chosen(from_dict(EngineConfig, configs[rung]), device["platform"])
  rows, cells = ([row for _, row in read_lines(folder / f"{name}.jsonl")] for name in ("iterations", "cells"))
  iterations = {row["rate"]: from_columns(row) for row in rows if row["rung"] == rung}  # the last of a cell is its own
  found = {row["rate"]: row for row in cells if row["rung"] == rung and row["rate"] in iterations}
  if not found:
    raise ValueError(f"{folder} has no cell of {rung} with its iterations")
  model = from_dict(ModelConfig, setting["model"]["config"])
  rungs = {name: from_dict(EngineConfig, of) for name, of in configs.items()}
  return Kept(
    folder,
    rung,
    config,
    model,
    setting["model"]["name"],
    from_dict(WorkloadConfig, setting["workload"]),
    min(shape.max_context for shape in shapes(rungs, model).values()),
    setting["seed"],
    device["kind"],
    found,
    {rate: iterations[rate] for rate in found},
  )
