"""The ladder: rungs, which are configurations, serve the same requests at the same rates, one after the other.

A cell is a rung at a rate. The folder of a ladder holds

  cells.jsonl    a row for each cell: `metrics.Summary`, what was refused or failed, whether goodput's condition holds.
                 A rung's row without a rate: what it does alone, and what its programs took to compile
  answers.jsonl  a row for each request of each rung: its tokens, and the score of its answer if it is judged

What is there is not run again. Programs are compiled before anything is timed.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_serve_jax import progress, results
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.config import EngineConfig, ModelConfig, load_config, override, with_fixed_sizes
from sparse_serve_jax.memory import host_pool
from sparse_serve_jax.memory.prefix import begin_alike
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import Model
from sparse_serve_jax.serving import metrics, run
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.workloads import Item

Row = dict[str, Any]

ALONE_TOKENS = 32  # decode steps by which a decode iteration is timed
CLOSE = 1.1  # the search for goodput ends where the rates around it are within this factor


@dataclasses.dataclass(frozen=True)
class Goodput:
  """The highest rate at which a rung serves well: `metrics.keeps_slo`."""

  rate: float | None  # requests a second, measured; None: not even the lowest rate that was tried
  fails_at: float | None  # the lowest rate above it that was tried; None: the highest that was tried serves well too


def read_rungs(names: Sequence[str], changes: Sequence[str] = ()) -> dict[str, EngineConfig]:
  """Configurations by rung: of names in configs/serving, or of JSON files, which are named without their folder. Sizes
  that are left open are those of `with_fixed_sizes`, so that all machines compare the same.

  Args:
    names: of the rungs.
    changes: overrides of them all, such as "cache.hbm_bytes=8GiB".

  Raises:
    ValueError: there is none, or no such rung, it is given twice, or its parts exclude each other.
  """
  if not names:
    raise ValueError("a ladder has one rung or more, got none")
  configs: dict[str, EngineConfig] = {}
  for given in names:
    name = pathlib.Path(given).stem
    if name in configs:
      raise ValueError(f"the rung {name} is given twice")
    try:
      configs[name] = with_fixed_sizes(override(load_config(given), changes))
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
  """Refuses rungs that cannot be compared: within different `cache.hbm_bytes`, or of which some cannot serve a request
  that others can, or none any.

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


Ends = dict[str, Request | run.Refusal]  # by the names of requests


class Bench:
  """Serves requests, one rung's engine in memory at a time."""

  def __init__(self, model: Model, configs: Mapping[str, EngineConfig], items: Sequence[Item]):
    """Arguments as those of `Ladder`."""
    self._model, self._configs, self._items = model, configs, items
    self._executor: tuple[str, JaxExecutor] | None = None

  def serve(self, rung: str, items: Sequence[Item], arrivals: np.ndarray) -> tuple[run.Served, Ends]:
    engine = Engine(self.compiled(rung))
    ended: Ends = {}
    with progress.bar(total=len(items), desc=rung, unit="request", leave=False) as bar:

      def on_end(end: Request | run.Refusal) -> None:
        ended[end.id] = end
        bar.update()

      return run.serve(engine, items, arrivals, on_end), ended

  def compiled(self, rung: str) -> JaxExecutor:
    """With all programs that the requests need."""
    if self._executor is None or self._executor[0] != rung:
      # The cache's memory is what the next one takes; the weights stay where they are.
      start, kept = time.monotonic(), self._executor and self._executor[1].params
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
      configs: the rungs by name, which `check` accepts; the others are compared with the first.
      items: the requests.
      arrivals: when they come, in seconds, at a mean rate in requests a second.
      folder: of the results, which is claimed for them.
    """
    self.rungs = list(configs)
    self._model, self._configs, self._items, self._arrivals = model, configs, items, arrivals
    self._cells, self._answers = (results.Rows(folder / f"{name}.jsonl") for name in ("cells", "answers"))
    self._serve = Bench(model, configs, items).serve

  def served_by(self, serve: Callable[[str, Sequence[Item], np.ndarray], tuple[run.Served, Ends]]) -> Ladder:
    """The same ladder, with the same rows, whose requests something else serves, as `Bench.serve` does. Several of them
    may run cells of different rungs at once, when the first rung has a cell.
    """
    other = copy.copy(self)
    other._serve = serve
    return other

  @property
  def cells(self) -> list[Row]:
    """All cells there are, rung by rung, each by rate."""
    rows = [row for row in self._cells.all if row["rate"] is not None]
    return sorted(rows, key=lambda row: (self.rungs.index(row["rung"]), row["rate"]))

  def cell(self, rung: str, rate: float) -> Row:
    """A rung at a rate, in requests a second: measured now, or what is there of it."""
    if there := next((row for row in self._cells.all if (row["rung"], row["rate"]) == (rung, rate)), None):
      return there
    limit = self.alone(self.rungs[0])["iteration_s"]
    self.alone(rung)
    served, ended = self._serve(rung, self._items, self._arrivals(rate))
    if not any(row["rung"] == rung for row in self._answers.all):
      self._answers.append(*(self._answer(rung, item, ended[item.id]) for item in self._items))
    row = {"rung": rung, "rate": rate, **served.to_dict(), **self._quality(rung)}
    # What is refused no rung can serve (`check`), at no rate.
    row["keeps_slo"] = metrics.keeps_slo(row, limit) and not served.failed
    self._cells.append(row)
    return row

  def alone(self, rung: str) -> Row:
    """What a rung does of one request, the middle one by length: "iteration_s", the median time of a decode step.

    It is measured at the rung's first cell, when all that the requests need has been compiled. The prompt is cut where
    the output would not fit any rung, and nothing but the length ends the output.
    """
    if there := next((row for row in self._cells.all if (row["rung"], row["rate"]) == (rung, None)), None):
      return there
    middle = sorted(self._items, key=lambda item: len(item.prompt))[len(self._items) // 2]
    n = min(ALONE_TOKENS, max(2, max(item.max_new_tokens for item in self._items)))
    room = min(shape.max_context for shape in shapes(self._configs, self._model.config).values()) - n
    options = {**middle.options, "ignore_eos": True, "stop_token_ids": (), "min_tokens": 0}
    item = dataclasses.replace(middle, prompt=middle.prompt[: max(1, room)], max_new_tokens=n, options=options)
    end = self._serve(rung, [item], np.zeros(1))[1][item.id]
    if isinstance(end, run.Refusal) or len(end.output_tokens) < n:
      raise ValueError(f"{rung} cannot serve a request of {len(item.prompt)} prompt tokens: {end.error}")
    gaps = metrics.times_between_tokens(end)
    row = {"rung": rung, "rate": None, "iteration_s": float(np.median(gaps)), "prompt_tokens": len(item.prompt)}
    self._cells.append(row)
    return row

  def goodput(self, rung: str, rates: Sequence[float], most_runs: int = 8) -> Goodput:
    """Searches the highest rate at which a rung serves well: `rates` first, ascending, then between them by halves of
    their ratio until they are within `CLOSE` or `most_runs` more cells have been run.
    """
    return search(lambda rate: self.cell(rung, rate)["keeps_slo"], rates, most_runs)

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
      name: {row["request_id"]: row for row in self._answers.all if row["rung"] == name}
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


def search(serves_well: Callable[[float], bool], rates: Sequence[float], most_runs: int) -> Goodput:
  """The highest rate that serves well below the first that does not; see `Ladder.goodput`."""
  good: float | None = None
  bad: float | None = None
  for rate in sorted(rates):
    if not serves_well(rate):
      bad = rate
      break
    good = rate
  while good is not None and bad is not None and bad / good > CLOSE and most_runs:
    middle, most_runs = math.sqrt(good * bad), most_runs - 1
    good, bad = (middle, bad) if serves_well(middle) else (good, middle)
  return Goodput(good, bad)


def goodputs(cells: Sequence[Row]) -> dict[str, Goodput]:
  """Of each rung, by the cells that there are."""
  found = {}
  for rung in dict.fromkeys(cell["rung"] for cell in cells):
    serves_well = {cell["rate"]: cell["keeps_slo"] for cell in cells if cell["rung"] == rung}
    found[rung] = search(serves_well.__getitem__, list(serves_well), most_runs=0)
  return found
