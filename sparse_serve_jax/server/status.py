"""What GET /status tells, and the page at / shows: counts, lengths and times. No text and no token of a request.

Each engine has its `Status`. What several of them tell is put together by `body`: counts are added, and rates and
shares are made of the sums.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.loop import Loop, Stream
from sparse_serve_jax.serving.metrics import Held
from sparse_serve_jax.serving.request import State

SAMPLE_S = 1.0  # seconds between samples
SAMPLES = 180  # that are kept
ROWS = 64  # requests that are listed of an engine: so many of those that live, and of those that have ended

Row = dict[str, Any]
_Numbers = TypeVar("_Numbers", "Sums", "Held", "Live")


class Sample(NamedTuple):
  """What was so at a moment, and what happened since the sample before it."""

  at: float  # seconds of the engine's clock
  waiting: int  # requests
  prefill: int
  decode: int
  output_tokens_s: float  # tokens a second
  prefill_tokens_s: float
  batch: float | None  # mean rows of an iteration that decodes; None: no iteration did
  hit_rate: float | None  # of the blocks that decode attended to; None: it attended to none
  loaded_bytes_s: float  # bytes a second, from DRAM to HBM
  saved_bytes_s: float
  hbm_bytes: int  # in use
  dram_bytes: int
  slots: int
  kept_blocks: int  # of the pool, that only the prefix cache keeps


class Sums(NamedTuple):
  """What an engine has counted since its start (`metrics.Usage`), or a second between two samples."""

  iterations: float
  output_tokens: float
  prefill_tokens: float
  blocks_attended: float
  blocks_missed: float
  blocks_loaded: float
  blocks_saved: float
  decode_rows: float
  decode_steps: float


class Live(NamedTuple):
  """Requests that have not ended."""

  waiting: int
  prefilling: int
  decoding: int


class Moment(NamedTuple):
  """A sample as it is kept: numbers that can be added to those of other engines."""

  at: float
  a_second: Sums  # since the moment before it
  held: Held
  live: Live


class Told(NamedTuple):
  """What one engine tells. Times are seconds of its clock."""

  now: float
  uptime_s: float
  size: dict[str, int]
  held: Held
  live: Live
  not_listed: int  # requests that live
  since_start: Sums
  peak: tuple[int, int]  # bytes of HBM and DRAM
  reasons: dict[str, int]  # outputs that ended, by the reason
  moments: list[Moment]
  ended: list[Row]
  going: list[Row]


class Status:
  """Reads what an engine counts; it asks no device, and keeps SAMPLES samples and ROWS requests. For any thread."""

  def __init__(self, engine: Engine, loop: Loop):
    self._engine, self._loop = engine, loop
    self._lock = threading.Lock()  # guards what follows; the loop's is never waited for within
    self._moments: deque[Moment] = deque(maxlen=SAMPLES)
    self._ended: deque[Row] = deque(maxlen=ROWS)
    self._reasons: Counter[str] = Counter()
    self._began = self._last_at = engine.clock.now()
    self._last = self._sums()

  def ended(self, stream: Stream) -> None:
    """Notes a stream that has ended."""
    of = row(stream, self._engine.clock.now())
    with self._lock:
      self._ended.append(of)
      self._reasons[of["state"]] += stream.request is not None

  def sample(self) -> None:
    """The engine may count meanwhile: a sample may have a part of one iteration that the next one lacks."""
    live = _live(self._loop.live)
    with self._lock:
      at, sums = self._engine.clock.now(), self._sums()
      if (seconds := at - self._last_at) <= 0:
        return
      a_second = Sums(*((after - before) / seconds for after, before in zip(sums, self._last, strict=True)))
      self._moments.append(Moment(at, a_second, self._engine.held, live))
      self._last_at, self._last = at, sums

  def told(self) -> Told:
    live, usage = self._loop.live, self._engine.usage
    shown = sorted(live, key=_waits)[:ROWS]
    with self._lock:
      now = self._engine.clock.now()
      return Told(
        now=now,
        uptime_s=now - self._began,
        size=self._size(),
        held=self._engine.held,
        live=_live(live),
        not_listed=len(live) - len(shown),
        since_start=self._sums(),
        peak=(usage.peak_hbm_kv_bytes, usage.peak_dram_kv_bytes),
        reasons=dict(self._reasons),
        moments=list(self._moments),
        ended=list(self._ended),
        going=[row(stream, now) for stream in shown],
      )

  def _size(self) -> dict[str, int]:
    shape, config = self._engine.executor.shape, self._engine.config
    return {
      "lanes": shape.R,
      "max_batch": config.scheduler.max_batch,
      "max_request_tokens": shape.max_context,
      "slots": shape.P,
      "pool_blocks": shape.M,
      "block_tokens": shape.S,
      "block_bytes": shape.block_bytes,
      "pool_block_bytes": shape.block_bytes * shape.L * shape.K,
      "hbm_bytes": shape.hbm_bytes,
      "hbm_fixed_bytes": shape.fixed_bytes,
      "dram_bytes": shape.pool_bytes if shape.offload else 0,
    }

  def _sums(self) -> Sums:
    usage = self._engine.usage
    return Sums(*(getattr(usage, name) for name in Sums._fields))


def row(stream: Stream, now: float) -> Row:
  """How far a request is: numbers, and when it came, was first worked on, had a token and ended. None: not yet."""
  request, end = stream.request, now if stream.ended else None
  times = [stream.arrival_time, None, None, end]
  if request is not None:
    times = [request.arrival_time, request.scheduled_time, request.first_token_time, request.finish_time or end]
  return {
    "id": None if request is None else request.id,  # the engine has not taken it yet, or refused it
    "state": _state(stream),
    "prompt_tokens": stream.prompt_tokens,
    "cached_tokens": 0 if request is None else request.cached_tokens,
    "output_tokens": 0 if request is None else len(request.output_tokens),
    "pool_blocks": 0 if request is None else request.pool_blocks,
    "preemptions": 0 if request is None else request.preemptions,
    "times": times,
  }


def _state(stream: Stream) -> str:
  """A state of a request that goes on, or why it ended. Its prefill lasts until its first token has been read."""
  request = stream.request
  if request is None:
    return "refused" if stream.ended else "waiting"
  if stream.ended:
    return request.finish_reason or "error"
  begun = request.state is State.DECODING and request.first_token_time is None
  return (State.PREFILLING if begun else request.state).value


def _waits(stream: Stream) -> bool:
  """Those that wait are listed last."""
  return stream.request is None or stream.request.state is State.WAITING


def _live(streams: Iterable[Stream]) -> Live:
  states = Counter(map(_state, streams))
  return Live(*(states[name] for name in Live._fields))


# ----------------------------------------------------------------------------------------------------- of all engines


def body(told: Mapping[int | None, Told]) -> dict[str, Any]:
  """The numbers of /status, as JSON holds them: of all engines together, and nothing of none.

  Args:
    told: by the number of a replica. Times become those of the first one's clock, whose time is `now`: clocks of
      different hosts are not the same, and all have told at about the same time.
  """
  if not told:
    return {}
  first, *_ = each = list(told.values())
  since, size = _added(of.since_start for of in each), _size([of.size for of in each])
  together = _together([[moment._replace(at=moment.at + first.now - of.now) for moment in of.moments] for of in each])
  samples = [_sample(moments, size["block_bytes"]) for moments in together]
  columns = zip(*samples, strict=True) if samples else [()] * len(Sample._fields)
  ended = [_shifted(row, i, first.now - of.now) for i, of in told.items() for row in of.ended]
  going = [_shifted(row, i, first.now - of.now) for i, of in told.items() for row in of.going]
  return {
    "now": round(first.now, 3),
    "uptime_s": round(max(of.uptime_s for of in each), 1),
    "size": size,
    "held": _added(of.held for of in each)._asdict(),
    "live": _added(of.live for of in each)._asdict(),
    "not_listed": sum(of.not_listed for of in each),
    "since_start": {
      "iterations": since.iterations,
      "output_tokens": since.output_tokens,
      "prefill_tokens": since.prefill_tokens,
      "blocks_attended": since.blocks_attended,
      "blocks_loaded": since.blocks_loaded,
      "blocks_saved": since.blocks_saved,
      "hit_rate": _hit_rate(since),
      "hbm_peak_bytes": sum(of.peak[0] for of in each),
      "dram_peak_bytes": sum(of.peak[1] for of in each),
    },
    "ended": dict(sum((Counter(of.reasons) for of in each), Counter[str]())),
    "sample_s": SAMPLE_S,
    "most_samples": SAMPLES,
    "samples": dict(zip(Sample._fields, map(list, columns), strict=True)),
    "requests": [*ended, *going],
  }


def _added(tuples: Iterable[_Numbers]) -> _Numbers:
  return functools.reduce(lambda a, b: a._make(x + y for x, y in zip(a, b, strict=True)), tuples)


def _size(sizes: Sequence[dict[str, int]]) -> dict[str, int]:
  """What engines have together. A block is as large in each; a request is one engine's."""
  first, *_ = sizes
  alike = {name: first[name] for name in ("block_tokens", "block_bytes", "pool_block_bytes")}
  most = min(size["max_request_tokens"] for size in sizes)
  return {name: sum(size[name] for size in sizes) for name in first} | alike | {"max_request_tokens": most}


def _together(moments: Sequence[Sequence[Moment]]) -> list[list[Moment]]:
  """Those of one time, oldest first. Engines take samples at the same time, and one that is younger has fewer."""
  n = max(map(len, moments))
  return [[of[i] for of in moments if len(of) >= -i] for i in range(-n, 0)]


def _sample(moments: Sequence[Moment], block_bytes: int) -> Sample:
  of, held = _added(moment.a_second for moment in moments), _added(moment.held for moment in moments)
  live, hit_rate = _added(moment.live for moment in moments), _hit_rate(of)
  return Sample(
    at=round(moments[0].at, 3),
    waiting=live.waiting,
    prefill=live.prefilling,
    decode=live.decoding,
    output_tokens_s=round(of.output_tokens, 1),
    prefill_tokens_s=round(of.prefill_tokens, 1),
    batch=round(of.decode_rows / of.decode_steps, 2) if of.decode_steps else None,
    hit_rate=None if hit_rate is None else round(hit_rate, 4),
    loaded_bytes_s=round(of.blocks_loaded * block_bytes),
    saved_bytes_s=round(of.blocks_saved * block_bytes),
    hbm_bytes=held.hbm_kv_bytes,
    dram_bytes=held.dram_kv_bytes,
    slots=held.slots,
    kept_blocks=held.kept,
  )


def _hit_rate(of: Sums) -> float | None:
  return max(0.0, 1 - of.blocks_missed / of.blocks_attended) if of.blocks_attended else None


def _shifted(of: Row, replica: int | None, by: float) -> Row:
  times = [time if time is None else round(time + by, 4) for time in of["times"]]
  return {**of, "replica": replica, "times": times}
