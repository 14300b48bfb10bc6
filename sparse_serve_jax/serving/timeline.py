"""What happened when, as a picture: a JSON file that https://ui.perfetto.dev and chrome://tracing open.

  timeline = Timeline(clock)
  engine = Engine(timeline.watch(executor), clock=clock)
  timeline.add(request)  # each, when it has ended
  timeline.write("timeline.json")

Above are the iterations: when the host dispatched them, and when the device ran them. Below is a line for each
request: waiting, prefill, decode, paused. Between them, for each iteration, rows that decoded and blocks that moved.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, cast

from sparse_serve_jax.serving.clock import Clock
from sparse_serve_jax.serving.plan import Executor, Plan, StepResult, StepStats
from sparse_serve_jax.serving.request import Request

ENGINE, REQUESTS = 1, 2  # processes of the trace
DISPATCH, DEVICE = 1, 2  # threads of the engine's
COUNTERS = ("decode rows", "blocks missed", "blocks loaded")


@dataclasses.dataclass
class _Iteration:
  """Times in seconds of the clock."""

  number: int
  planned: float  # handed to the executor
  dispatched: float  # the executor has returned
  done: float  # its result was read
  start: float  # the device could begin: it was dispatched, and the one before was done
  prefill_tokens: int  # token x layers
  decode: tuple[str, ...]  # ids of the requests
  stats: StepStats


class Timeline:
  """Collects iterations and requests in memory."""

  def __init__(self, clock: Clock):
    """Takes the engine's clock."""
    self._clock = clock
    self._iterations: list[_Iteration] = []
    self._requests: list[Request] = []

  def watch(self, executor: Executor) -> Executor:
    """The executor, whose iterations are noted when their results are read."""
    return cast(Executor, _Watched(executor, self))

  def add(self, request: Request) -> None:
    """Takes a request that has ended."""
    self._requests.append(request)

  def write(self, file: str | os.PathLike[str]) -> None:
    pathlib.Path(file).write_text(json.dumps(self.to_dict()), encoding="utf-8")

  def to_dict(self) -> dict[str, Any]:
    """The trace in Chrome's format: times in microseconds after the first event."""
    requests = sorted(self._requests, key=_arrival)
    times = [it.planned for it in self._iterations] + [request.arrival_time for request in requests]
    events = [*_names(requests), *self._engine_events(), *self._request_events(requests)]
    origin = min(times, default=0.0)
    for event in events:
      if "ts" in event:
        event["ts"] = round((event["ts"] - origin) * 1e6, 3)
      if "dur" in event:
        event["dur"] = round(event["dur"] * 1e6, 3)
    return {"displayTimeUnit": "ms", "traceEvents": events}

  def _done(self, plan: Plan, planned: float, dispatched: float, result: StepResult) -> None:
    done = self._clock.now()
    start = max(dispatched, self._iterations[-1].done) if self._iterations else dispatched
    tokens = sum(len(work.tokens) * work.n_layers for work in plan.prefill)
    decode = tuple(row.request_id for row in plan.decode)
    self._iterations.append(_Iteration(plan.iteration, planned, dispatched, done, start, tokens, decode, result.stats))

  def _engine_events(self) -> Iterator[dict[str, Any]]:
    for it in self._iterations:
      yield _slice(f"dispatch {it.number}", ENGINE, DISPATCH, it.planned, it.dispatched)
      counts = {"decode rows": len(it.decode), "prefill tokens x layers": it.prefill_tokens}
      blocks = {f"blocks {name}": n for name, n in dataclasses.asdict(it.stats).items()}
      yield _slice(f"iteration {it.number}", ENGINE, DEVICE, it.start, it.done, counts | blocks)
      values = (len(it.decode), it.stats.missed, it.stats.loaded)
      for name, value in zip(COUNTERS, values, strict=True):
        yield {"name": name, "ph": "C", "ts": it.start, "pid": ENGINE, "args": {"value": value}}

  def _request_events(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
    ran: dict[str, list[_Iteration]] = {}
    for it in self._iterations:
      for name in it.decode:
        ran.setdefault(name, []).append(it)
    for line, request in enumerate(requests, 1):
      assert request.finish_time is not None
      args = {"request": request.id, "prompt tokens": len(request.prompt), "finish": request.finish_reason}
      for phase, start, end in _phases(request, ran.get(request.id, [])):
        yield _slice(phase, REQUESTS, line, start, end, args)


class _Watched:
  """An executor, and when it did what."""

  def __init__(self, executor: Executor, timeline: Timeline):
    self._executor, self._timeline = executor, timeline

  def __getattr__(self, name: str) -> Any:
    return getattr(self._executor, name)

  def submit(self, plan: Plan) -> _WatchedStep:
    planned = self._timeline._clock.now()
    step = self._executor.submit(plan)
    return _WatchedStep(step, plan, planned, self._timeline._clock.now(), self._timeline)


@dataclasses.dataclass
class _WatchedStep:
  """An iteration on its way, whose result is read once."""

  step: Any
  plan: Plan
  planned: float
  dispatched: float
  timeline: Timeline

  def result(self) -> StepResult:
    result = self.step.result()
    self.timeline._done(self.plan, self.planned, self.dispatched, result)
    return result


def _phases(request: Request, ran: list[_Iteration]) -> Iterator[tuple[str, float, float]]:
  """What a request did from when until when, in order and without a gap.

  `ran` are the iterations that decoded a request of this name, in order: others of the name are outside its time.
  """
  end = request.finish_time
  assert end is not None
  scheduled = end if request.scheduled_time is None else request.scheduled_time
  first = end if request.first_token_time is None else request.first_token_time
  bounds = [("waiting", request.arrival_time, scheduled), ("prefill", scheduled, first)]
  spans: list[list[float]] = []  # decoding without a pause
  last = None
  for it in ran:
    if it.done <= first or it.start >= end:
      continue
    if it.number - 1 == last:
      spans[-1][1] = it.done
    else:
      spans.append([max(it.start, first), it.done])
    last = it.number
  if spans and request.finish_reason != "cancelled":
    spans[-1][1] = end  # the host came to it a little later
  now = first
  for start, done in spans:
    bounds += [("paused", now, start), ("decode", start, min(done, end))]
    now = min(done, end)
  bounds.append(("paused", now, end))
  return ((phase, start, until) for phase, start, until in bounds if until > start)


def _arrival(request: Request) -> float:
  return request.arrival_time


def _names(requests: list[Request]) -> Iterator[dict[str, Any]]:
  """What the lines of the picture are called."""
  lines = {(ENGINE, DISPATCH): "dispatch", (ENGINE, DEVICE): "iterations"}
  lines |= {(REQUESTS, line): request.id for line, request in enumerate(requests, 1)}
  for pid, name in ((ENGINE, "engine"), (REQUESTS, "requests")):
    yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
  for (pid, tid), name in lines.items():
    yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _slice(
  name: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
  """Something that took from `start` until `end`, in seconds."""
  return {"name": name, "ph": "X", "ts": start, "dur": end - start, "pid": pid, "tid": tid, "args": args or {}}
