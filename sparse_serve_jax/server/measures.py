"""What /metrics tells of an engine, in the form of Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.loop import Loop, Stream
from sparse_serve_jax.serving.metrics import time_to_first_token, times_between_tokens
from sparse_serve_jax.serving.request import Request

_TTFT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
_TBT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Measures:
  """Numbers of one engine, in a registry of its own."""

  def __init__(self, engine: Engine, loop: Loop):
    self.registry = CollectorRegistry()
    of = {"namespace": "sparse_serve", "registry": self.registry}
    self._ttft = Histogram("time_to_first_token_seconds", "From arrival to the first token.", buckets=_TTFT, **of)
    self._tbt = Histogram("time_between_tokens_seconds", "Gaps between output tokens.", buckets=_TBT, **of)
    self._requests = Counter("requests", "Outputs that ended, by the reason.", ["finish_reason"], **of)
    self._prompt = Counter("prompt_tokens", "Tokens of prompts of outputs that ended.", **of)
    self._cached = Counter("cached_tokens", "Of these, tokens that the cache held.", **of)
    self._output = Counter("output_tokens", "Tokens of outputs that ended.", **of)
    self._engine, self._loop = engine, loop
    self.registry.register(self)  # pyright: ignore[reportArgumentType]  # whose class need not be its Collector

  def collect(self) -> Iterator[Metric]:
    """What engine and loop count themselves: it only rises in counters. Waits for no device."""
    usage, held, shape = self._engine.usage, self._engine.held, self._engine.executor.shape
    live = self._loop.live
    waiting = sum(map(_waits, live))
    for name, about, value in (
      ("iterations", "Iterations of the engine.", usage.iterations),
      ("decode_steps", "Iterations that decoded.", usage.decode_steps),
      ("decode_rows", "Rows of all decode steps.", usage.decode_rows),
      ("blocks_attended", "Blocks that decode attended to.", usage.blocks_attended),
      ("blocks_missed", "Of these, blocks that HBM did not hold.", usage.blocks_missed),
      ("blocks_loaded", "Blocks loaded from DRAM.", usage.blocks_loaded),
      ("blocks_saved", "Blocks saved to DRAM.", usage.blocks_saved),
    ):
      yield CounterMetricFamily(f"sparse_serve_{name}", about, value)
    for name, about, value in (
      ("requests_waiting", "Outputs that have no token yet.", waiting),
      ("requests_running", "Outputs that have a token and go on.", len(live) - waiting),
      ("decode_batch", "Rows of the last decode step.", usage.last_rows),
      ("hbm_hit_rate", "Share of attended blocks that HBM held since the start; NaN of none.", usage.hbm_hit_rate),
      ("hbm_kv_bytes", "Bytes of KV and its tables in HBM now.", held.hbm_kv_bytes),
      ("dram_kv_bytes", "Bytes of KV that requests own in DRAM now.", held.dram_kv_bytes),
      ("hbm_kv_peak_bytes", "Most bytes of KV and its tables in HBM since the start.", usage.peak_hbm_kv_bytes),
      ("dram_kv_peak_bytes", "Most bytes of KV in DRAM since the start.", usage.peak_dram_kv_bytes),
      ("slots_used", "Slots of HBM that hold a block now.", held.slots),
      ("slots", "Slots of HBM.", shape.P),
      ("pool_blocks_owned", "Blocks of the pool that requests own now.", held.owned),
      ("pool_blocks_kept", "Blocks of the pool that only the prefix cache keeps now.", held.kept),
      ("pool_blocks", "Blocks of the pool.", shape.M),
      ("hbm_capacity_bytes", "Bytes of the cache in HBM.", shape.hbm_bytes),
      ("dram_capacity_bytes", "Bytes of the pool in DRAM.", shape.pool_bytes if shape.offload else 0),
    ):
      yield GaugeMetricFamily(f"sparse_serve_{name}", about, math.nan if value is None else value)

  def ended(self, request: Request) -> None:
    """Counts an output, once."""
    self._requests.labels(request.finish_reason or "error").inc()
    self._prompt.inc(len(request.prompt))
    self._cached.inc(request.cached_tokens)
    self._output.inc(len(request.output_tokens))
    if request.first_token_time is not None:
      self._ttft.observe(time_to_first_token(request))
    for gap in times_between_tokens(request):
      self._tbt.observe(float(gap))


def _waits(stream: Stream) -> bool:
  return stream.request is None or not stream.request.output_tokens


def by_label(counter: Counter) -> dict[str, int]:
  """Of a counter with one label, what each of its values has come to."""
  (metric,) = counter.collect()
  return {value: int(of.value) for of in metric.samples if of.name.endswith("_total") for value in of.labels.values()}
