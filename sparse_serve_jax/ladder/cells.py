"""Rungs, which are configurations, serve the same requests at the same rates, one after the other.

A cell is a rung at a rate; at a rate of 0 all requests come at once. What the folder has is not run again. Programs are
compiled before any are timed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax import progress
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.ladder import floor
from sparse_serve_jax.ladder.folder import LadderFolder, Row
from sparse_serve_jax.ladder.goodput import Goodput, passing, search
from sparse_serve_jax.ladder.rungs import shapes
from sparse_serve_jax.memory.prefix import begin_alike
from sparse_serve_jax.models import Model
from sparse_serve_jax.serving import metrics, run
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.measure import Iteration, Stopwatch
from sparse_serve_jax.workloads import Item

ALONE_TOKENS = 32  # decode steps by which a decode iteration is timed
OVERLOAD = 1.1  # times the rate at which requests begin to wait


Ends = dict[str, Request | run.Refusal]  # by the names of requests


class Measured(NamedTuple):
  """What a rung did of some requests."""

  served: run.Served
  ended: Ends
  iterations: list[Iteration]
  rates: floor.Rates  # of the device


Serve = Callable[[str, Sequence[Item], np.ndarray], Measured]


class Engines:
  """The rungs' engines, of which one at a time is in memory."""

  def __init__(self, model: Model, configs: Mapping[str, EngineConfig], items: Sequence[Item]):
    """Arguments as those of `Ladder`."""
    self._model, self._configs, self._items = model, configs, items
    self._executor: tuple[str, JaxExecutor] | None = None
    self._rates: floor.Rates | None = None

  def serve(self, rung: str, items: Sequence[Item], arrivals: np.ndarray) -> Measured:
    executor = self.compiled(rung)
    assert self._rates is not None
    watch = Stopwatch(executor)
    engine = Engine(executor, observer=watch.observe)
    ended: Ends = {}
    with progress.bar(total=len(items), desc=rung, unit="request", leave=False) as bar:

      def on_end(end: Request | run.Refusal) -> None:
        ended[end.id] = end
        bar.update()

      return Measured(run.serve(engine, items, arrivals, on_end), ended, watch.iterations, self._rates)

  def compiled(self, rung: str) -> JaxExecutor:
    """A rung's executor, with all programs that the requests need.

    The device's rates are measured before the first executor takes memory.
    """
    self._rates = self._rates or floor.Rates.measure(self._model.config)
    if self._executor is None or self._executor[0] != rung:
      # The cache's memory is what the next one takes; the weights stay where they are.
      start, kept = time.monotonic(), self._executor and self._executor[1].params
      if self._executor is not None:
        self._executor[1].wait()  # a save that is on its way holds the pool
      self._executor = None
      executor = JaxExecutor(self._configs[rung], self._model)
      del kept
      sampled = any(item.options.get("temperature") or item.options.get("min_tokens") for item in self._items)
      prompts = [item.prompt for item in self._items]
      # A request that was preempted begins like itself.
      shared = executor.config.scheduler.reserve == "on_demand" or begin_alike(prompts, executor.shape.S)
      n = executor.compile(map(len, prompts), sampled, shared)
      print(f"{rung}: {n} programs compiled in {time.monotonic() - start:.1f} s", file=sys.stderr)
      self._executor = rung, executor
    return self._executor[1]


class Ladder:
  """Runs cells and keeps their rows."""

  def __init__(
    self,
    model: Model,
    configs: Mapping[str, EngineConfig],
    items: Sequence[Item],
    arrivals: Callable[[float], np.ndarray],
    folder: pathlib.Path,
  ):
    """Reads what is there.

    Args:
      model: answers.
      configs: the rungs by name, which `rungs.check` accepts; the others are compared with the first.
      items: the requests.
      arrivals: when they come, in seconds, at a mean rate in requests a second.
      folder: of the results, which is claimed for them.
    """
    self.rungs = list(configs)
    self._model, self._configs, self._items, self._arrivals = model, configs, items, arrivals
    self._folder = LadderFolder(folder)
    self._serve: Serve = Engines(model, configs, items).serve

  def served_by(self, serve: Serve) -> Ladder:
    """The same ladder, with the same rows, whose requests something else serves, as `Engines.serve` does. Several
    of them may run cells of different rungs at once, after `begin`.
    """
    other = copy.copy(self)
    other._serve = serve
    return other

  def begin(self, rates: Sequence[float]) -> None:
    """Runs what the rungs are compared with: a cell of the first one and, for any rate but 0, what that does alone."""
    self.cell(self.rungs[0], next(filter(None, rates), 0.0))

  @property
  def cells(self) -> list[Row]:
    """All cells there are, rung by rung, each by rate."""
    rows = [row for row in self._folder.cells.all if row["rate"] is not None]
    return sorted(rows, key=lambda row: (self.rungs.index(row["rung"]), row["rate"]))

  def cell(self, rung: str, rate: float) -> Row:
    """A rung at a rate, in requests a second, or 0: measured now, or what is there of it."""
    if there := next((row for row in self._folder.cells.all if (row["rung"], row["rate"]) == (rung, rate)), None):
      return there
    limit = rate and self.alone(self.rungs[0])["iteration_s"]
    if rate:
      self.alone(rung)
    served, ended, iterations, rates = self._serve(rung, self._items, self._arrivals(rate))
    if not any(row["rung"] == rung for row in self._folder.answers.all):
      self._folder.answers.append(*(self._answer(rung, item, ended[item.id]) for item in self._items))
    row = {"rung": rung, "rate": rate, **served.to_dict(), **self._quality(rung)}
    row |= self._floor(rung, ended, iterations, rates)
    # Refused requests do not count: no rung can serve them (`rungs.check`). All at once is no rate that could be kept.
    row["keeps_slo"] = metrics.keeps_slo(row, limit) and not served.failed if rate else None
    self._folder.add_cell(row, iterations)
    return row

  def alone(self, rung: str) -> Row:
    """What a rung does of one request, the middle one by length: "iteration_s", the median time of a decode step.

    It is measured at the rung's first cell, when all that the requests need has been compiled. The prompt is cut where
    the output would not fit any rung, and nothing but the length ends the output.
    """
    if there := next((row for row in self._folder.cells.all if (row["rung"], row["rate"]) == (rung, None)), None):
      return there
    middle = sorted(self._items, key=lambda item: len(item.prompt))[len(self._items) // 2]
    n = min(ALONE_TOKENS, max(2, max(item.max_new_tokens for item in self._items)))
    room = min(shape.max_context for shape in shapes(self._configs, self._model.config).values()) - n
    options = {**middle.options, "ignore_eos": True, "stop_token_ids": (), "min_tokens": 0}
    item = dataclasses.replace(middle, prompt=middle.prompt[: max(1, room)], max_new_tokens=n, options=options)
    end = self._serve(rung, [item], np.zeros(1)).ended[item.id]
    if isinstance(end, run.Refusal) or len(end.output_tokens) < n:
      raise ValueError(f"{rung} cannot serve a request of {len(item.prompt)} prompt tokens: {end.error}")
    gaps = metrics.times_between_tokens(end)
    row = {"rung": rung, "rate": None, "iteration_s": float(np.median(gaps)), "prompt_tokens": len(item.prompt)}
    self._folder.cells.append(row)
    return row

  def goodput(self, rung: str, rates: Sequence[float], most_runs: int) -> Goodput:
    """Searches the highest rate at which a rung serves well: `rates` first, ascending, then between them by halves of
    their ratio until they are within `goodput.CLOSE` or `most_runs` more cells have been run.
    """
    return search(lambda rate: self.cell(rung, rate)["keeps_slo"], [rate for rate in rates if rate], most_runs)

  def overload(self, rates: Sequence[float], most_runs: int) -> float:
    """The rate that is `OVERLOAD` times the one at which requests to the first rung begin to wait longer than goodput
    allows, on average. It is searched for as in `goodput`, then interpolated between the delays around it.

    Raises:
      ValueError: they wait so long at all rates, or at none.
    """
    return OVERLOAD * passing(self._delay, rates, most_runs)

  def _delay(self, rate: float) -> float:
    """Seconds that requests to the first rung wait on average before they are worked on."""
    delay = self.cell(self.rungs[0], rate)["scheduling_delay_mean_s"]
    return math.inf if delay is None else delay

  def _floor(self, rung: str, ended: Ends, iterations: Sequence[Iteration], rates: floor.Rates) -> Row:
    """What a cell's work takes at least, beside the seconds in which there was any; and iterations in numbers."""
    config, cfg = self._configs[rung], self._model.config
    shape = shapes({rung: config}, cfg)[rung]
    decoding = [of.seconds for of in iterations if of.rows and not of.work.prefill_tokens]
    requests = [end for end in ended.values() if isinstance(end, Request) and end.first_token_time is not None]
    busy, attended = sum(of.seconds for of in iterations), sum(of.work.attended_blocks for of in iterations)
    least = floor.prefill_s(rates, cfg, requests, config.tp) + floor.decode_s(rates, cfg, shape, iterations, config.tp)
    return {
      "decode_steps": sum(bool(of.rows) for of in iterations),
      "decode_step_s": float(np.median(decoding)) if decoding else None,  # with no piece of a prompt beside it
      "loaded_an_iteration": sum(of.work.loaded_blocks for of in iterations) / max(1, len(iterations)),
      "missed_share": sum(of.missed_blocks for of in iterations) / max(1, attended),
      "busy_s": busy,
      "floor_s": least,
      "floor_share": least / busy if busy else None,
    } | {f"{name}_rate": rate for name, rate in dataclasses.asdict(rates).items()}

  def _answer(self, rung: str, item: Item, end: Request | run.Refusal) -> Row:
    tokens = [int(token) for token in end.output_tokens] if isinstance(end, Request) else []
    score = item.judge(self._model.tokenizer.decode(tokens)) if item.judge and isinstance(end, Request) else None
    return {"rung": rung, "request_id": item.id, "tokens": tokens, "score": score}

  def _quality(self, rung: str) -> Row:
    """Of a rung's answers the mean score, and the share of the first rung's tokens that are its own, up to where they
    part. What follows an answer of known length does not count.
    """
    ends = {item.id: item.answer_tokens for item in self._items}
    of = {
      name: {row["request_id"]: row for row in self._folder.answers.all if row["rung"] == name}
      for name in (rung, self.rungs[0])
    }
    scores = [row["score"] for row in of[rung].values() if row["score"] is not None]
    first = of[self.rungs[0]]
    pairs = [(row["tokens"], first[name]["tokens"][: ends[name]]) for name, row in of[rung].items() if name in first]
    return {"score_mean": float(np.mean(scores)) if scores else None, "tokens_as_first": share_equal(pairs)}


def share_equal(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float | None:
  """Of the tokens of the second of each pair, those before the first that differs; None if there are none."""
  total = sum(len(theirs) for _, theirs in pairs)
  alike = 0
  for ours, theirs in pairs:
    n = min(len(ours), len(theirs))
    differs = np.flatnonzero(np.not_equal(ours[:n], theirs[:n]))
    alike += int(differs[0]) if differs.size else n
  return alike / total if total else None
