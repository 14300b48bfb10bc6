"""A workload of one's own, served in an open loop: requests come when they are due, however busy the engine is.

python examples/workload.py [MODEL]
"""

from __future__ import annotations

import sys

import numpy as np

from sparse_serve_jax import Engine, JaxExecutor, load_config, load_model, override, workloads
from sparse_serve_jax.serving import metrics, run
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads import WORKLOADS, ArrivalConfig, Item, Refused, Source, WorkloadConfig

MEMORY = ["cache.hbm_bytes=64MiB", "cache.dram_bytes=256MiB", "scheduler.max_context=1024"]


def countdown(config: WorkloadConfig) -> Source:
  """`config.limit` prompts, each about a number. A source reads and checks files at once, and makes items later."""
  config.refuse("path", "tasks", "seed")  # which it does not read

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    prompts = [f"{i} bottles of milk on the wall, " * 5 for i in range(config.limit, 0, -1)]
    return [Item(f"bottles-{i}", np.array(tokenizer.encode(text), np.int32), 12) for i, text in enumerate(prompts)]

  return items


WORKLOADS["countdown"] = countdown


def main(model: str = "random:tiny", *, n: int = 6) -> run.Served:
  workload = WorkloadConfig("countdown", limit=n, arrivals=ArrivalConfig("poisson", rate=20.0))
  source = workloads.read(workload)
  loaded = load_model(model)
  engine = Engine(JaxExecutor(override(load_config("sparse_serve"), MEMORY), loaded))

  def on_end(end: Request | run.Refusal) -> None:
    text = end.error if isinstance(end, run.Refusal) else repr(loaded.tokenizer.decode(end.output_tokens))
    print(f"{end.id}: {text}")

  items = source(loaded.tokenizer, engine.max_request_tokens)
  served = run.serve(engine, items, workloads.arrival_times(workload.arrivals, len(items)), on_end)
  print(metrics.table({"countdown": served.to_dict()}))
  return served


if __name__ == "__main__":
  main(*sys.argv[1:2])
