"""What GET /status tells, and the page at / shows: counts, lengths and times. No text and no token of a request."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from typing import Any, NamedTuple

from sparse_serve_jax.server.outputs import Output, Outputs
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.request import State

SAMPLE_S = 1.0  # seconds between samples
SAMPLES = 180  # that are kept
ROWS = 64  # requests that are listed: so many of those that live, and of those that have ended


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


class _Sums(NamedTuple):
  """Of the engine since its start, or between two samples."""

  at: float
  output_tokens: float
  prefill_tokens: float
  decode_rows: float
  decode_steps: float
  attended: float
  missed: float
  loaded: float
  saved: float


class Status:
  """Reads what the engine counts; it asks no device, and keeps SAMPLES samples and ROWS requests. Belongs to the event
  loop.
  """

  def __init__(self, engine: Engine, outputs: Outputs):
    self._engine, self._outputs = engine, outputs
    self._samples: deque[Sample] = deque(maxlen=SAMPLES)
    self._ended: deque[dict[str, Any]] = deque(maxlen=ROWS)
    self._last = self._sums()
    self._began = self._last.at

  def ended(self, output: Output) -> None:
    """Notes an output that has ended."""
    self._ended.append(row(output, self._engine.clock.now()))

  async def watch(self) -> None:
    """Takes samples until it is cancelled."""
    while True:
      await asyncio.sleep(SAMPLE_S)
      self.sample()

  def sample(self) -> None:
    """The engine may count meanwhile: a sample may have a part of one iteration that the next one lacks."""
    new, held = self._sums(), self._engine.held
    of = _Sums(*(after - before for after, before in zip(new, self._last, strict=True)))
    if of.at <= 0:
      return
    size, live = self._engine.executor.shape.block_bytes, self._live()
    self._samples.append(
      Sample(
        at=round(new.at, 3),
        waiting=live["waiting"],
        prefill=live["prefilling"],
        decode=live["decoding"],
        output_tokens_s=round(of.output_tokens / of.at, 1),
        prefill_tokens_s=round(of.prefill_tokens / of.at, 1),
        batch=round(of.decode_rows / of.decode_steps, 2) if of.decode_steps else None,
        hit_rate=round(max(0.0, 1 - of.missed / of.attended), 4) if of.attended else None,
        loaded_bytes_s=round(of.loaded * size / of.at),
        saved_bytes_s=round(of.saved * size / of.at),
        hbm_bytes=held.hbm_kv_bytes,
        dram_bytes=held.dram_kv_bytes,
        slots=held.slots,
        kept_blocks=held.kept,
      )
    )
    self._last = new

  def body(self) -> dict[str, Any]:
    """The numbers of /status, as JSON holds them. Times are seconds of one clock, `now` is its time."""
    usage, shape, config = self._engine.usage, self._engine.executor.shape, self._engine.config
    now, held, live = self._engine.clock.now(), self._engine.held, self._live()
    shown = sorted(self._outputs.live, key=_waits)[:ROWS]
    columns = zip(*self._samples, strict=True) if self._samples else [()] * len(Sample._fields)
    return {
      "now": round(now, 3),
      "uptime_s": round(now - self._began, 1),
      "size": {
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
      },
      "held": held._asdict(),
      "live": {state: live[state] for state in ("waiting", "prefilling", "decoding")},
      "not_listed": len(self._outputs.live) - len(shown),
      "since_start": {
        "iterations": usage.iterations,
        "output_tokens": usage.output_tokens,
        "prefill_tokens": usage.prefill_tokens,
        "blocks_attended": usage.blocks_attended,
        "blocks_loaded": usage.blocks_loaded,
        "blocks_saved": usage.blocks_saved,
        "hit_rate": usage.hbm_hit_rate,
        "hbm_peak_bytes": usage.peak_hbm_kv_bytes,
        "dram_peak_bytes": usage.peak_dram_kv_bytes,
      },
      "sample_s": SAMPLE_S,
      "most_samples": SAMPLES,
      "samples": dict(zip(Sample._fields, map(list, columns), strict=True)),
      "requests": [*self._ended, *(row(output, now) for output in shown)],
    }

  def _live(self) -> Counter[str]:
    return Counter(map(_state, self._outputs.live))

  def _sums(self) -> _Sums:
    usage = self._engine.usage
    return _Sums(
      self._engine.clock.now(),
      usage.output_tokens,
      usage.prefill_tokens,
      usage.decode_rows,
      usage.decode_steps,
      usage.blocks_attended,
      usage.blocks_missed,
      usage.blocks_loaded,
      usage.blocks_saved,
    )


def row(output: Output, now: float) -> dict[str, Any]:
  """How far an output is: numbers, and when it came, was first worked on, had a token and ended. None: not yet."""
  stream = output.stream
  assert stream is not None
  request = stream.request
  end = now if output.ended else None
  times = [stream.arrival_time, None, None, end]
  if request is not None:
    times = [request.arrival_time, request.scheduled_time, request.first_token_time, request.finish_time or end]
  return {
    "id": None if request is None else request.id,  # the engine has not taken it yet, or refused it
    "state": _state(output),
    "prompt_tokens": stream.prompt_tokens,
    "cached_tokens": 0 if request is None else request.cached_tokens,
    "output_tokens": output.reading.n_tokens,
    "pool_blocks": 0 if request is None else request.pool_blocks,
    "preemptions": 0 if request is None else request.preemptions,
    "times": [time if time is None else round(time, 4) for time in times],
  }


def _state(output: Output) -> str:
  """A state of a request that goes on, or why it ended. Its prefill lasts until its first token has been read."""
  request = output.stream.request if output.stream else None
  if request is None:
    return "refused" if output.ended else "waiting"
  if output.ended:
    return output.finish_reason or "error"
  begun = request.state is State.DECODING and request.first_token_time is None
  return (State.PREFILLING if begun else request.state).value


def _waits(output: Output) -> bool:
  """Those that wait are listed last."""
  request = output.stream.request if output.stream else None
  return request is None or request.state is State.WAITING
