"""Prompts to serve, where they come from and when they arrive.

config         -> needle, longbench, jsonl -> WORKLOADS   what is served, by name
config, traces -> generated                -> WORKLOADS
               -> arrivals                                when, by name

A new source is a function and an entry of WORKLOADS, a new arrival process one of `arrivals.ARRIVALS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from sparse_serve_jax.variants import variant
from sparse_serve_jax.workloads import generated, jsonl, longbench, needle
from sparse_serve_jax.workloads.arrivals import ARRIVALS, arrival_times, checked_rate
from sparse_serve_jax.workloads.config import ArrivalConfig, WorkloadConfig, load_workload
from sparse_serve_jax.workloads.item import FileSource, Item, Refused, Source, refused_by
from sparse_serve_jax.workloads.traces import Trace, read_trace

__all__ = [
  "ARRIVALS",
  "WORKLOADS",
  "ArrivalConfig",
  "FileSource",
  "Item",
  "Refused",
  "Source",
  "Trace",
  "WorkloadConfig",
  "arrival_times",
  "checked_rate",
  "load_workload",
  "read",
  "read_trace",
  "refused_by",
  "times_of",
]

# A source is read in two steps, so that a file is found whole before a model is loaded: see `read`.
WORKLOADS: dict[str, Callable[[WorkloadConfig], Source]] = {
  "jsonl": jsonl.read,
  "longbench": longbench.read,
  "needle": needle.read,
  "text": generated.read,
  "trace": generated.read,
}


def read(config: WorkloadConfig) -> Source:
  """Reads and checks all that needs no model.

  Args:
    config: what is served; `load_workload` reads one.

  Returns:
    What makes the items once there is a model: source(tokenizer, most tokens of prompt and output together).

  Raises:
    ValueError: no such source or arrival process, or what they say is wrong; in a file with its line.
  """
  read_source = variant(WORKLOADS, config.source, "workload")
  times_of(config, 0)
  return read_source(config)


def times_of(config: WorkloadConfig, n: int) -> np.ndarray:
  """When `n` requests of a workload arrive: `arrival_times`, where a trace that has no path is that of the prompts.

  Raises:
    ValueError: as `arrival_times` does.
  """
  arrivals = config.arrivals
  if config.source == arrivals.process == "trace" and config.path:
    arrivals = dataclasses.replace(arrivals, options={"path": config.path, **arrivals.options})
  return arrival_times(arrivals, n)
