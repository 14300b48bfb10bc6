"""Prompts to serve, where they come from and when they arrive.

config -> needle, longbench, jsonl -> WORKLOADS   what is served, by name
       -> arrivals                                when, by name

A new source is a function and an entry of WORKLOADS, a new arrival process one of `arrivals.ARRIVALS`.
"""

from __future__ import annotations

from collections.abc import Callable

from sparse_serve_jax.variants import variant
from sparse_serve_jax.workloads import jsonl, longbench, needle
from sparse_serve_jax.workloads.arrivals import ARRIVALS, arrival_times
from sparse_serve_jax.workloads.config import ArrivalConfig, WorkloadConfig, load_workload
from sparse_serve_jax.workloads.item import Item, Refused, Source

__all__ = [
  "ARRIVALS",
  "WORKLOADS",
  "ArrivalConfig",
  "Item",
  "Refused",
  "Source",
  "WorkloadConfig",
  "arrival_times",
  "load_workload",
  "read",
]

# A source is read in two steps, so that a file is found whole before a model is loaded: see `read`.
WORKLOADS: dict[str, Callable[[WorkloadConfig], Source]] = {
  "jsonl": jsonl.read,
  "longbench": longbench.read,
  "needle": needle.read,
}


def read(config: WorkloadConfig) -> Source:
  """Reads and checks all that needs no model. The source that it returns makes the items.

  Raises:
    ValueError: no such source or arrival process, or what they say is wrong; in a file with its line.
  """
  read_source = variant(WORKLOADS, config.source, "workload")
  arrival_times(config.arrivals, 0)
  return read_source(config)
