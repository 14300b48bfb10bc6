"""Serves a workload in an open loop: requests come when they are due, however busy the engine is."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sparse_serve_jax.serving.audit import AuditSummary
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.metrics import Summary, distribution, gaps, summarize
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.workloads import Item, Refused


@dataclasses.dataclass(frozen=True)
class Refusal:
  """What could never run, and why: its source says so, or the engine."""

  id: str
  prompt_tokens: int | None  # None: it has no tokens
  error: str


@dataclasses.dataclass(frozen=True)
class Served:
  """A workload that was served."""

  summary: Summary  # of the requests that finished
  refused: int
  failed: int  # ended by an error
  elapsed_s: float  # from the start of the run to its end
  audits: AuditSummary | None = None  # if the configuration wants them

  def to_dict(self) -> dict[str, int | float | None]:
    """The summaries with the other fields, flat."""
    others = {"refused": self.refused, "failed": self.failed, "elapsed_s": self.elapsed_s}
    return self.summary.to_dict() | others | (self.audits.to_dict() if self.audits else {})


def serve(
  engine: Engine,
  items: Sequence[Item | Refused],
  arrivals: Sequence[float] | np.ndarray,
  on_end: Callable[[Request | Refusal], None],
  *,
  ignore_eos: bool = False,
) -> Served:
  """Adds each item when it arrives, and steps until all have ended.

  If it is interrupted, live requests are cancelled and not handed out, and the devices are waited for.

  Args:
    engine: idle.
    items: what to ask for, and what its source refuses.
    arrivals: seconds after the start, ascending, one for each item.
    on_end: is given each request when it ends, and a refusal of what cannot run when it is due.
    ignore_eos: the model's EOS tokens are output like others, if an item does not say otherwise.

  Returns:
    The summary; tokens and times stand in what `on_end` was given.

  Raises:
    ValueError: there is not one arrival for each item, or they do not ascend.
  """
  clock = engine.clock
  start = clock.now()
  coming = deque(zip(items, (start + _checked(arrivals, len(items))).tolist(), strict=True))
  ended: list[Request] = []
  refused = 0
  try:
    while coming or engine.has_work:
      while coming and coming[0][1] <= clock.now():
        item, arrival = coming.popleft()
        if refusal := _add(engine, item, arrival, ignore_eos):
          refused += 1
          on_end(refusal)
      if engine.has_work:
        for request in engine.step():
          ended.append(request)
          on_end(request)
      elif coming:
        clock.sleep_until(coming[0][1])
  except BaseException:
    if not engine.failed:
      engine.cancel_all()
    engine.wait()
    raise
  failed = sum(request.finish_reason == "error" for request in ended)
  audits = engine.audits and engine.audits.summary()
  return Served(summarize(ended, engine.usage), refused, failed, clock.now() - start, audits)


def row(end: Request | Refusal, start: float) -> dict[str, Any]:
  """What became of an item, its `end`, as JSON values; times are seconds since `start`, which is one of the clock."""
  if isinstance(end, Refusal):
    return {
      "request_id": end.id,
      "prompt_tokens": end.prompt_tokens,
      "output_token_ids": [],
      "finish_reason": "refused",
      "error": end.error,
    }

  def since(at: float | None) -> float | None:
    return None if at is None else at - start

  made = {
    "request_id": end.id,
    "prompt_tokens": len(end.prompt),
    "cached_tokens": end.cached_tokens,
    "output_token_ids": list(end.output_tokens),
    "finish_reason": end.finish_reason,
    "arrival_s": since(end.arrival_time),
    "scheduled_s": since(end.scheduled_time),
    "first_token_s": since(end.first_token_time),
    "token_s": [since(at) for at in end.token_times],
    "finish_s": since(end.finish_time),
  }
  return made if end.error is None else made | {"error": str(end.error)}


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int | float | None]:
  """What `rows`, made by `row` in one run or in several, tell of requests, under the names of `Served.to_dict`.

  Not what depends on more than one of them, such as throughput: each run has a zero of its own.
  """
  finished = [row for row in rows if "error" not in row]
  prompt_tokens, cached_tokens = (sum(row[key] for row in finished) for key in ("prompt_tokens", "cached_tokens"))
  refused = sum(row["finish_reason"] == "refused" for row in rows)
  gaps_of = [gaps(row["token_s"], len(row["output_token_ids"])) for row in finished]
  return {
    "requests": len(finished),
    "refused": refused,
    "failed": len(rows) - len(finished) - refused,
    "prompt_tokens": prompt_tokens,
    "cached_tokens": cached_tokens,
    "cached_share": cached_tokens / prompt_tokens if finished else None,
    "output_tokens": sum(len(row["output_token_ids"]) for row in finished),
    **distribution("ttft", [row["first_token_s"] - row["arrival_s"] for row in finished]),
    **distribution("tbt", np.concatenate([np.zeros(0), *gaps_of])),
    **distribution("latency", [row["finish_s"] - row["arrival_s"] for row in finished]),
    **distribution("scheduling_delay", [row["scheduled_s"] - row["arrival_s"] for row in finished]),
  }


def _add(engine: Engine, item: Item | Refused, arrival: float, ignore_eos: bool) -> Refusal | None:
  if isinstance(item, Refused):
    return Refusal(item.id, None, str(item))
  options = {"ignore_eos": ignore_eos, **item.options}
  try:
    engine.add_request(item.prompt, item.max_new_tokens, request_id=item.id, arrival_time=arrival, **options)
  except ValueError as error:
    return Refusal(item.id, len(item.prompt), str(error))
  return None


def _checked(arrivals: Sequence[float] | np.ndarray, n: int) -> np.ndarray:
  """As float64 [n]."""
  times = np.asarray(arrivals, np.float64)
  if times.shape != (n,):
    raise ValueError(f"{n} items need as many times of arrival, got an array of shape {times.shape}")
  if not (np.isfinite(times).all() and (np.diff(times) >= 0).all()):
    raise ValueError("times of arrival must be finite and ascend")
  return times
