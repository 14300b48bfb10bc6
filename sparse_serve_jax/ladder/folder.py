"""The folder of a ladder: what made it, its rows, and what costs are fitted to and compared with.

  run.json          what `claim` says decides whether two ladders are the same, and who went on with it (`results`)
  cells.jsonl       a row for each cell, a rung at a rate: `metrics.Summary`, what was refused or failed, whether
                    goodput's condition holds, and the least time of its work. A rung's row without a rate: what it
                    does alone
  iterations.jsonl  a row for each cell: what each of its iterations did and took
  answers.jsonl     a row for each request of each rung: its tokens, and the score of its answer if it is judged

At a rate of 0 all requests come at once.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sparse_serve_jax import results
from sparse_serve_jax.config import EngineConfig, ModelConfig, from_dict
from sparse_serve_jax.files import read_json, read_lines
from sparse_serve_jax.ladder.rungs import shapes
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.models import Model
from sparse_serve_jax.simulation.calibrate import MeasuredRun
from sparse_serve_jax.simulation.measure import Iteration, from_columns, to_columns
from sparse_serve_jax.workloads import WorkloadConfig

Row = dict[str, Any]

CELLS, ITERATIONS, ANSWERS = "cells.jsonl", "iterations.jsonl", "answers.jsonl"


def claim(
  path: str | os.PathLike[str],
  configs: Mapping[str, EngineConfig],
  model: Model,
  workload: WorkloadConfig,
  prompts: str | None,
  seed: int,
  device: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Makes a folder that of one ladder only; one that holds some of its cells is gone on with.

  Args:
    path: of the folder.
    configs: the rungs by name; the others are compared with the first.
    model: answers.
    workload: what is served.
    prompts: digest of the file that prompts come from, if they do.
    seed: of random weights.
    device: as `results.claim` takes it.

  Raises:
    ValueError: as `results.claim` does.
  """
  setting = {"configs": configs, "model": {"name": model.name, "config": model.config}, "workload": workload}
  setting |= {"compared_with": next(iter(configs))}  # cells of all rungs are measured by its iterations and tokens
  return results.claim(path, setting | {"prompts": prompts, "seed": seed}, device=device)


class LadderFolder:
  """Rows of a ladder that is run: those that are there, and those that are added."""

  def __init__(self, folder: pathlib.Path):
    self.cells, self.iterations, self.answers = (results.Rows(folder / name) for name in (CELLS, ITERATIONS, ANSWERS))

  def add_cell(self, cell: Row, iterations: Sequence[Iteration]) -> None:
    """Adds the row of a cell, after what its iterations did: where there is a cell, its iterations are."""
    self.iterations.append({"rung": cell["rung"], "rate": cell["rate"], **to_columns(iterations)})
    self.cells.append(cell)


class MeasuredRung(NamedTuple):
  """A rung that served a workload, as its ladder's folder has it."""

  ran: MeasuredRun  # with the iterations of all its cells
  max_request_tokens: int  # to which its source cut prompts: of the rung that has room for the least
  seed: int  # of random weights
  cells: Mapping[float, Row]  # by rate


def read_cells(folder: pathlib.Path) -> list[Row]:
  """The rows of cells, without those of rungs alone; none if there is no such file."""
  file = folder / CELLS
  return [row for _, row in read_lines(file) if row["rate"] is not None] if file.is_file() else []


def read_rung(folder: pathlib.Path, rung: str) -> MeasuredRung:
  """What a folder has of a rung.

  Raises:
    ValueError: it is no ladder's, or has no cell of the rung with its iterations.
  """
  run = read_json(folder / results.RUN_FILE)
  setting: Mapping[str, Any] = run["setting"]
  configs = setting.get("configs", {})
  if rung not in configs:
    raise ValueError(f"{folder} has no rung {rung!r}, but {', '.join(configs) or 'none'}")
  device = run["parts"][0]["device"]  # a later part may come from another machine, which only made tables
  config = host_pool.chosen(from_dict(EngineConfig, configs[rung]), device["platform"])
  rows = [row for _, row in read_lines(folder / ITERATIONS) if row["rung"] == rung]
  iterations = {row["rate"]: from_columns(row) for row in rows}  # a cell's own are the last: one before was stopped
  cells = {row["rate"]: row for row in read_cells(folder) if row["rung"] == rung and row["rate"] in iterations}
  if not cells:
    raise ValueError(f"{folder} has no cell of {rung} with its iterations")
  model = from_dict(ModelConfig, setting["model"]["config"])
  rungs = {name: from_dict(EngineConfig, of) for name, of in configs.items()}
  ran = MeasuredRun(
    config,
    model,
    setting["model"]["name"],
    device["kind"],
    from_dict(WorkloadConfig, setting["workload"]),
    [one for rate in cells for one in iterations[rate]],
  )
  max_request_tokens = min(shape.max_context for shape in shapes(rungs, model).values())
  return MeasuredRung(ran, max_request_tokens, setting["seed"], cells)
