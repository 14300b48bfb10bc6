"""Fits a cost to iterations that ran, on this machine or wherever a ladder was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import jax

from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.models import Model
from sparse_serve_jax.simulation.cost import About, Cost, fit
from sparse_serve_jax.simulation.measure import Iteration, typical
from sparse_serve_jax.simulation.reuse import Reuse
from sparse_serve_jax.simulation.served import Asked, serve_here
from sparse_serve_jax.workloads import WorkloadConfig


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
  """Iterations by which an engine served a workload, and what it was that ran."""

  config: EngineConfig
  model: ModelConfig
  model_name: str
  device: str
  workload: WorkloadConfig
  iterations: Sequence[Iteration]


def run_here(config: EngineConfig, model: Model, asked: Asked, repeats: int) -> MeasuredRun:
  """Serves a workload on this machine so many times; an iteration took what is `typical` of it.

  Raises:
    ValueError: not all requests arrive at once, or one has failed.
  """
  if asked.config.arrivals.process != "all_at_once":
    raise ValueError(
      "costs are fitted to requests that all arrive at once, so that each pass plans the same: leave out --rate; "
      f"arrivals.process is {asked.config.arrivals.process}"
    )
  served = serve_here(config, model, asked, repeats)
  if not served[0].iterations:
    raise ValueError(f"nothing was served: {served[0].served.refused} requests do not fit, `sparse-serve run` says why")
  passes = [one.iterations for one in served]
  if len({len(one) for one in passes}) > 1:
    raise ValueError(f"the passes have different iterations, {[len(one) for one in passes]}: a request has failed")
  took = [one._replace(seconds=seconds) for one, seconds in zip(passes[0], typical(passes), strict=True)]
  return MeasuredRun(config, model.config, model.name, jax.devices()[0].device_kind, asked.config, took)


def calibrate(ran: Sequence[MeasuredRun], reuse: Reuse, selections: str) -> Cost:
  """A cost that fits all iterations together.

  Args:
    ran: of one model and device; the configuration is the first one's.
    reuse: how selections come back. With sparse.policy=psa its `psa_blocks` is told by the iterations.
    selections: what `reuse` was found in.

  Raises:
    ValueError: they are of several models or devices; or as `fit` does.
  """
  if len(of := {f"{one.model_name} in {one.model.dtype} on {one.device}" for one in ran}) > 1:
    raise ValueError(f"costs are of one model and device, these are of {', '.join(sorted(of))}")
  first, iterations = ran[0], [one for of in ran for one in of.iterations]
  if first.config.sparse.policy == "psa":
    reuse = dataclasses.replace(reuse, psa_blocks=_blocks_read(first, iterations))
  found = fit([one.work for one in iterations], [one.seconds for one in iterations])
  about = About(
    model=first.model_name,
    dtype=first.model.dtype,
    device=first.device,
    config=json.dumps(dataclasses.asdict(first.config)),
    workload=json.dumps([dataclasses.asdict(of.workload) for of in ran]),
    selections=selections,
    iterations=len(iterations),
    mean_error=found.mean_error,
    total_error=found.total_error,
  )
  return Cost(about, found.seconds, reuse)


def _blocks_read(of: MeasuredRun, iterations: Sequence[Iteration]) -> float:
  """Mean blocks that a step of PSA reads of a KV head, in the layers where it may stop.

  Raises:
    ValueError: there is no such step.
  """
  dense_layers = of.config.sparse.dense_layers
  rows = sum(iteration.rows for iteration in iterations)
  if not rows or dense_layers >= of.model.n_layers:
    raise ValueError(
      f"no step says what PSA reads: {rows} rows, {dense_layers} of {of.model.n_layers} layers are dense"
    )
  attended = sum(iteration.work.attended_blocks for iteration in iterations) / of.model.n_kv_heads
  attended -= dense_layers * sum(iteration.full_blocks for iteration in iterations)
  return attended / (rows * (of.model.n_layers - dense_layers))
