"""The same requests twice: in virtual time over a device that is only a cost, and on this machine."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax import workloads
from sparse_serve_jax.attention.decode import Selector
from sparse_serve_jax.attention.prefill import TileSelector
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.models import Model
from sparse_serve_jax.serving import run
from sparse_serve_jax.serving.clock import Virtual
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.cost import Cost
from sparse_serve_jax.simulation.executor import SimulatedExecutor
from sparse_serve_jax.simulation.measure import Iteration, Stopwatch
from sparse_serve_jax.simulation.prefix import prompt_of
from sparse_serve_jax.workloads import Item, Refused, generated


class Asked:
  """What is served, and when. Files are read at once, text is made where it is needed."""

  def __init__(self, config: workloads.WorkloadConfig):
    """Raises ValueError as `workloads.read` does."""
    self.config, self._source = config, workloads.read(config)

  def items(self, model: Model, max_request_tokens: int) -> list[Item | Refused]:
    """The requests, as token ids of the model; none has more than `max_request_tokens`, prompt and output.

    Raises:
      ValueError: not one prompt has room in these.
    """
    return self._source(model.tokenizer, max_request_tokens)

  def without_text(self, model: Model, max_request_tokens: int) -> list[Item | Refused]:
    """Those of `items` with prompts of zeros, which take no memory and share nothing; or by the ids of a trace."""

    def bare(name: str, n_prompt: int, n_output: int) -> Item:
      return Item(name, np.broadcast_to(np.int32(0), (n_prompt,)), n_output, {"cache_salt": name})

    if self.config.source in ("text", "trace"):  # text as long as that of thousands of requests takes minutes
      source, asked = self.config.source, generated.lengths(self.config)
      each = enumerate(zip(asked.prompt_tokens.tolist(), asked.output_tokens.tolist(), strict=True))
      if asked.hash_ids is None:
        return [bare(f"{source}-{i}", *both) for i, both in each]
      vocab = model.config.vocab_size
      return [Item(f"{source}-{i}", prompt_of(asked.hash_ids[i], n, vocab), output) for i, (n, output) in each]
    return [
      bare(item.id, len(item.prompt), item.max_new_tokens) if isinstance(item, Item) else item
      for item in self.items(model, max_request_tokens)
    ]


def simulate(
  config: EngineConfig, model: Model, cost: Cost, asked: Asked, of_ladder: int | None = None
) -> tuple[run.Served, list[dict[str, Any]]]:
  """Serves a workload in virtual time, without the weights of the model.

  Args:
    config: of the engine.
    model: its sizes, and what makes tokens.
    cost: of the device.
    asked: the workload.
    of_ladder: tokens to which a ladder cut requests, and that what their source refuses is left out as it does there,
      before requests have times; None: requests are cut to what the engine has room for.

  Returns:
    Its summary, and a row for each request (`run.row`, with the number of output tokens instead of the tokens).
  """
  clock, rows = Virtual(), []
  TileSelector.of(config)  # refuses what an engine does, as the other one does
  executor = SimulatedExecutor(config, model.config, cost, clock, Selector.of(config).method.vectors)
  items, start = asked.without_text(model, of_ladder or executor.shape.max_context), clock.now()
  if of_ladder is not None:
    items = [item for item in items if isinstance(item, Item)]

  def ended(end: Request | run.Refusal) -> None:
    row = run.row(end, start)
    row["output_tokens"] = len(row.pop("output_token_ids"))
    row.pop("token_s", None)
    rows.append(row)

  arrivals = workloads.times_of(asked.config, len(items))
  return run.serve(Engine(executor, clock=clock), items, arrivals, ended, ignore_eos=True), rows


class Pass(NamedTuple):
  """A workload that was served once, and what each iteration took."""

  served: run.Served
  iterations: list[Iteration]


def serve_here(config: EngineConfig, model: Model, asked: Asked, repeats: int) -> list[Pass]:
  """Serves a workload on this machine: `repeats` times that are returned, after once to compile."""
  executor, passes = JaxExecutor(config, model), []
  items = asked.items(model, executor.shape.max_context)
  arrivals = workloads.times_of(asked.config, len(items))
  for _ in range(repeats + 1):
    watch = Stopwatch(executor)
    engine = Engine(executor, observer=watch.observe)
    passes.append(Pass(run.serve(engine, items, arrivals, lambda _: None, ignore_eos=True), watch.iterations))
  return passes[1:]
