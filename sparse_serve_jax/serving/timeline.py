"""What happened when, as a picture: a JSON file that https://ui.perfetto.dev and chrome://tracing open.

  timeline = Timeline(executor.shape)
  engine = Engine(executor, observer=timeline.observe)
  timeline.add(request)  # each, when it has ended
  timeline.write("timeline.json")

Above are the iterations: when the host dispatched them, and when the device ran them. Below is a line for each
request: waiting, prefill, decode, paused, and waiting anew after it was preempted. Between them are counters
(`COUNTERS`), with a value for each iteration.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from sparse_serve_jax.files import write_text
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Observed, StepStats
from sparse_serve_jax.serving.request import Request

ENGINE, REQUESTS = 1, 2  # processes of the trace
DISPATCH, DEVICE = 1, 2  # threads of the engine's
COUNTERS = (
  "decode rows",
  "bytes loaded",  # read from DRAM in the iteration
  "bytes saved",  # written to the pool in it
  "bytes in HBM",  # of KV blocks, after it: in slots, or in the pool where that lies there
  "bytes in DRAM",  # of the pool's blocks that requests own; 0 without offload
)


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
  preempted: tuple[str, ...]
  admitted: tuple[str, ...]
  stats: StepStats
  counters: tuple[int, ...]  # values of COUNTERS


class Timeline:
  """Collects iterations and requests in memory."""

  def __init__(self, shape: CacheShape):
    """Takes the shape of the engine's cache, for bytes."""
    self._shape = shape
    self._in_slots = 0  # blocks, after the last iteration that told
    self._iterations: list[_Iteration] = []
    self._requests: list[Request] = []

  def observe(self, seen: Observed) -> None:
    """Takes an iteration of the engine."""
    plan, stats, shape = seen.plan, seen.result.stats, self._shape
    if plan.prefill or plan.decode:  # others do not tell
      self._in_slots = stats.slots_used
    owned = seen.pool_blocks * shape.L * shape.K
    held = (self._in_slots, owned) if shape.offload else (owned, 0)
    moved = (n * shape.block_bytes for n in (stats.loaded, stats.saved, *held))
    start = max(seen.dispatched, self._iterations[-1].done) if self._iterations else seen.dispatched
    self._iterations.append(
      _Iteration(
        number=plan.iteration,
        planned=seen.planned,
        dispatched=seen.dispatched,
        done=seen.done,
        start=start,
        prefill_tokens=sum(len(work.tokens) * work.n_layers for work in plan.works),
        decode=tuple(row.request_id for row in plan.decode),
        preempted=plan.preempt,
        admitted=tuple(admission.request_id for admission in plan.admit),
        stats=stats,
        counters=(len(plan.decode), *moved),
      )
    )

  def add(self, request: Request) -> None:
    """Takes a request that has ended."""
    self._requests.append(request)

  def write(self, file: str | pathlib.Path) -> None:
    write_text(file, json.dumps(self.to_dict()))

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

  def _engine_events(self) -> Iterator[dict[str, Any]]:
    for it in self._iterations:
      yield _slice(f"dispatch {it.number}", ENGINE, DISPATCH, it.planned, it.dispatched)
      counts = {"decode rows": len(it.decode), "prefill tokens x layers": it.prefill_tokens}
      counts |= {"preempted": len(it.preempted)}
      blocks = {f"blocks {name}": n for name, n in dataclasses.asdict(it.stats).items()}
      yield _slice(f"iteration {it.number}", ENGINE, DEVICE, it.start, it.done, counts | blocks)
    for it, following in itertools.zip_longest(self._iterations, self._iterations[1:]):
      yield from _counts(it.start, it.counters)
      if following is None or following.start > it.done:  # the device is idle: nothing moves, what is held stays
        yield from _counts(it.done, (0, 0, 0, *it.counters[3:]))

  def _request_events(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
    ran: dict[str, list[_Iteration]] = {}
    turns: dict[str, list[tuple[float, str]]] = {}
    for it in self._iterations:
      for name in it.decode:
        ran.setdefault(name, []).append(it)
      for phase, names in (("waiting", it.preempted), ("prefill", it.admitted)):
        for name in names:
          turns.setdefault(name, []).append((it.start, phase))
    for line, request in enumerate(requests, 1):
      assert request.finish_time is not None
      args = {"request": request.id, "prompt tokens": len(request.prompt), "finish": request.finish_reason}
      for bound in _phases(request, ran.get(request.id, [])):
        for phase, start, end in _turned(bound, turns.get(request.id, [])):
          yield _slice(phase, REQUESTS, line, start, end, args)


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


def _turned(bound: tuple[str, float, float], turns: list[tuple[float, str]]) -> Iterator[tuple[str, float, float]]:
  """A phase in its parts: `turns` are the times, in order, at which the request was preempted or admitted, and the
  phase that began then.
  """
  phase, now, end = bound
  for at, following in turns:
    if now <= at < end and phase not in ("decode", following):
      if at > now:
        yield phase, now, at
      phase, now = following, at
  yield phase, now, end


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


def _counts(at: float, values: tuple[int, ...]) -> Iterator[dict[str, Any]]:
  """What the counters show from then on."""
  for name, value in zip(COUNTERS, values, strict=True):
    yield {"name": name, "ph": "C", "ts": at, "pid": ENGINE, "args": {"value": value}}


def _slice(
  name: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any] | None = None
) -> dict[str, Any]:
  """Something that took from `start` until `end`, in seconds."""
  return {"name": name, "ph": "X", "ts": start, "dur": end - start, "pid": pid, "tid": tid, "args": args or {}}
