"""What a run is measured by. Every formula stands in a docstring, and rests on event times and counted blocks alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Plan, StepStats
from sparse_serve_jax.serving.request import Request, State

MOST_ITERATIONS, MOST_DELAY_S = 25, 2.0  # of goodput


class Held(NamedTuple):
  """What a cache holds at a moment."""

  owned: int  # blocks of the pool, each of all layers and KV heads, that requests own
  kept: int  # others that the prefix cache keeps
  slots: int  # slots that hold a block
  hbm_kv_bytes: int  # over all devices, tables and tails included
  dram_kv_bytes: int  # of the blocks that requests own; 0 without offload


class Usage:
  """Sums and peaks over the iterations of an engine. It is changed by the engine's thread; any thread may read it."""

  def __init__(self, shape: CacheShape):
    self._shape = shape
    self.iterations = 0
    self.blocks_attended = 0
    self.blocks_missed = 0
    self.blocks_loaded = 0
    self.blocks_saved = 0
    self.decode_rows = 0
    self.decode_steps = 0  # iterations that decode
    self.last_rows = 0  # of the last of them
    self.output_tokens = 0
    self._prefill_work = 0  # tokens x layers
    self._slots = 0  # slots used after the last iteration that told
    self._peak_slots = 0
    self._peak_pool = 0

  def count_step(self, plan: Plan, stats: StepStats, output_tokens: int) -> None:
    """Takes an iteration that has run, and how many `output_tokens` it brought to requests."""
    self.iterations += 1
    if plan.decode:
      self.last_rows = len(plan.decode)
      self.decode_rows += self.last_rows
      self.decode_steps += 1
    self.output_tokens += output_tokens
    self._prefill_work += sum(len(work.tokens) * work.n_layers for work in plan.works)
    if plan.prefill or plan.decode:  # others do not tell
      self._slots = stats.slots_used
    self.blocks_attended += stats.attended
    self.blocks_missed += stats.missed
    self.blocks_loaded += stats.loaded
    self.blocks_saved += stats.saved
    self._peak_slots = max(self._peak_slots, stats.slots_used)

  def count_pool(self, blocks_in_use: int) -> None:
    """Takes the pool's `blocks_in_use`, those that requests own at the moment."""
    self._peak_pool = max(self._peak_pool, blocks_in_use)

  def held(self, owned: int, kept: int) -> Held:
    """What the cache holds when `owned` pool blocks are requests' and the prefix cache has `kept` others.

    Slots are as the last iteration that ran left them, less those of blocks that are nobody's since then.
    """
    slots = min(self._slots, (owned + kept) * self._shape.L * self._shape.K)
    return Held(owned, kept, slots, self._hbm_bytes(slots, owned), self._dram_bytes(owned))

  @property
  def prefill_tokens(self) -> int:
    """Tokens of prompts that went through the model; of a part of its layers, as many as would be the same work."""
    return self._prefill_work // self._shape.L

  @property
  def hbm_hit_rate(self) -> float | None:
    """1 - blocks that decode read from DRAM / blocks it attended to; None if it attended to none."""
    return 1 - self.blocks_missed / self.blocks_attended if self.blocks_attended else None

  @property
  def peak_hbm_kv_bytes(self) -> int:
    """Bytes over all devices: `CacheShape.fixed_bytes` (all but slots and pool) + most KV blocks held at a time.

    With offload the blocks are those in slots, kept ones too: peak slots used x block bytes. Without, they are the
    pool's: peak pool blocks owned by requests x layers x KV heads x block bytes.
    """
    return self._hbm_bytes(self._peak_slots, self._peak_pool)

  @property
  def peak_dram_kv_bytes(self) -> int:
    """Peak pool blocks owned by requests x layers x KV heads x block bytes; 0 without offload."""
    return self._dram_bytes(self._peak_pool)

  def _hbm_bytes(self, slots: int, pool_blocks: int) -> int:
    kv = slots * self._shape.block_bytes if self._shape.offload else self._pool_bytes(pool_blocks)
    return self._shape.fixed_bytes + kv

  def _dram_bytes(self, pool_blocks: int) -> int:
    return self._pool_bytes(pool_blocks) if self._shape.offload else 0

  def _pool_bytes(self, pool_blocks: int) -> int:
    return pool_blocks * self._shape.L * self._shape.K * self._shape.block_bytes


@dataclasses.dataclass(frozen=True)
class Summary:
  """A run in numbers; times in seconds, None where there is nothing to average. `summarize` says how each is made."""

  requests: int
  prompt_tokens: int
  cached_tokens: int  # of these, that the cache held
  cached_share: float | None
  output_tokens: int
  preemptions: int
  recomputed_tokens: int  # of which KV was made again after a preemption
  ttft_mean_s: float | None
  ttft_p50_s: float | None
  ttft_p90_s: float | None
  ttft_p99_s: float | None
  tbt_mean_s: float | None
  tbt_p50_s: float | None
  tbt_p90_s: float | None
  tbt_p99_s: float | None
  latency_mean_s: float | None
  latency_p50_s: float | None
  latency_p90_s: float | None
  latency_p99_s: float | None
  scheduling_delay_mean_s: float | None
  scheduling_delay_p99_s: float | None
  throughput_tok_s: float | None
  iterations: int  # of the engine
  hbm_hit_rate: float | None
  blocks_attended: int
  blocks_loaded: int
  blocks_saved: int
  peak_hbm_kv_bytes: int
  peak_dram_kv_bytes: int

  def to_dict(self) -> dict[str, int | float | None]:
    """The fields by their names."""
    return dataclasses.asdict(self)


def time_to_first_token(request: Request) -> float:
  """TTFT: time its first token was read - arrival time. In seconds, of a request that has a token."""
  assert request.first_token_time is not None
  return request.first_token_time - request.arrival_time


def times_between_tokens(request: Request) -> np.ndarray:
  """TBT: the gaps between the times of consecutive output tokens, float64 [output tokens - 1], in seconds."""
  return gaps(request.token_times, len(request.token_times))


def gaps(times: Sequence[float], n_tokens: int) -> np.ndarray:
  """The gaps between consecutive tokens, float64 [n_tokens - 1], which came at these ascending times: 0 between those
  that came together, where there are fewer times than tokens."""
  together = max(0, n_tokens - len(times)) if len(times) else 0
  return np.concatenate([np.diff(np.asarray(times, np.float64)), np.zeros(together)])


def scheduling_delay(request: Request) -> float:
  """Time its first work was planned - arrival time. In seconds, of a request that was admitted."""
  assert request.scheduled_time is not None
  return request.scheduled_time - request.arrival_time


def latency(request: Request) -> float:
  """Time it ended - arrival time. In seconds, of a request that has ended."""
  assert request.finish_time is not None
  return request.finish_time - request.arrival_time


def request_metrics(request: Request) -> dict[str, float | None]:
  """Times of one request that ended, in seconds: TTFT, mean TBT, scheduling delay, and total from arrival to finish.

  None for what a cancelled request did not live to see.
  """
  return {
    "ttft_s": None if request.first_token_time is None else time_to_first_token(request),
    "tbt_mean_s": _mean(times_between_tokens(request)),
    "scheduling_delay_s": None if request.scheduled_time is None else scheduling_delay(request),
    "total_s": latency(request),
  }


def throughput(requests: Sequence[Request]) -> float | None:
  """Output tokens of all requests / (last finish time - first arrival time); None for no requests or no time."""
  if not requests:
    return None
  span = max(request.finish_time or 0.0 for request in requests) - min(request.arrival_time for request in requests)
  return sum(len(request.output_tokens) for request in requests) / span if span > 0 else None


def summarize(requests: Sequence[Request], usage: Usage) -> Summary:
  """Sums up a run.

  Args:
    requests: of which the finished ones count; others count only in `usage`.
    usage: of the engine that served them.

  ttft (to the first token), latency (from arrival to finish) and scheduling_delay are over requests; tbt (between
  tokens) is over all gaps of all requests, so a long request weighs more. Percentiles are linear between ranks.
  cached_share is of prompt tokens: those before which a prefill began / all.
  """
  finished = [request for request in requests if request.state is State.FINISHED]
  prompt_tokens = sum(len(request.prompt) for request in finished)
  cached_tokens = sum(request.cached_tokens for request in finished)
  gaps = np.concatenate([np.zeros(0), *(times_between_tokens(request) for request in finished)])
  delays = [scheduling_delay(request) for request in finished]
  return Summary(
    requests=len(finished),
    prompt_tokens=prompt_tokens,
    cached_tokens=cached_tokens,
    cached_share=cached_tokens / prompt_tokens if finished else None,
    output_tokens=sum(len(request.output_tokens) for request in finished),
    preemptions=sum(request.preemptions for request in finished),
    recomputed_tokens=sum(request.recomputed_tokens for request in finished),
    **distribution("ttft", [time_to_first_token(request) for request in finished]),
    **distribution("tbt", gaps),
    **distribution("latency", [latency(request) for request in finished]),
    scheduling_delay_mean_s=_mean(delays),
    scheduling_delay_p99_s=_percentile(delays, 99),
    throughput_tok_s=throughput(finished),
    iterations=usage.iterations,
    hbm_hit_rate=usage.hbm_hit_rate,
    blocks_attended=usage.blocks_attended,
    blocks_loaded=usage.blocks_loaded,
    blocks_saved=usage.blocks_saved,
    peak_hbm_kv_bytes=usage.peak_hbm_kv_bytes,
    peak_dram_kv_bytes=usage.peak_dram_kv_bytes,
  )


def keeps_slo(summary: Mapping[str, Any], iteration_s: float) -> bool:
  """Whether a run is served well, as SparseServe's goodput wants it (section 4.1): 99 % of the times between tokens are
  at most 25 decode iterations long, and requests wait at most 2 s on average before they are first worked on.

  Args:
    summary: of the run, as `Summary.to_dict` has it.
    iteration_s: of one decode iteration, in seconds.
  """
  gap, delay = summary["tbt_p99_s"], summary["scheduling_delay_mean_s"]
  if delay is None:  # nothing has finished
    return False
  return delay <= MOST_DELAY_S and (gap is None or gap <= MOST_ITERATIONS * iteration_s)


def table(columns: Mapping[str, Mapping[str, int | float | str | None]]) -> str:
  """Text with one of the `columns` under each name, rows in order of the first one's keys; "-" is None or absent."""
  names = list(columns)
  keys = list(columns[names[0]]) if names else []
  rows = [["", *names]] + [[key, *(_shown(columns[name].get(key)) for name in names)] for key in keys]
  widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
    for row in rows
  ]
  return "\n".join(line.rstrip() for line in lines)


def distribution(name: str, seconds: Sequence[float] | np.ndarray) -> dict[str, float | None]:
  """Mean and percentiles of `seconds`, linear between ranks, as fields of `Summary` that begin with `name`; None of
  nothing."""
  percentiles = {f"{name}_p{p}_s": _percentile(seconds, p) for p in (50, 90, 99)}
  return {f"{name}_mean_s": _mean(seconds), **percentiles}


def _percentile(values: Sequence[float] | np.ndarray, p: int) -> float | None:
  return float(np.percentile(values, p)) if len(values) else None


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
  return float(np.mean(values)) if len(values) else None


def _shown(value: int | float | str | None) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
  return f"{value:,}" if isinstance(value, int) else value
