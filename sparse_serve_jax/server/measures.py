"""What /metrics tells of an engine, in the form of Prometheus."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

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
    usage, shape = engine.usage, engine.executor.shape
    for name, about, value in (
      ("requests_waiting", "Outputs that have no token yet.", lambda: sum(_waits(stream) for stream in loop.live)),
      (
        "requests_running",
        "Outputs that have a token and go on.",
        lambda: sum(not _waits(stream) for stream in loop.live),
      ),
      ("iterations", "Iterations of the engine since its start.", lambda: usage.iterations),
      ("blocks_attended", "Blocks that decode attended to since the start.", lambda: usage.blocks_attended),
      ("blocks_loaded", "Blocks loaded from DRAM since the start.", lambda: usage.blocks_loaded),
      ("blocks_saved", "Blocks saved to DRAM since the start.", lambda: usage.blocks_saved),
      ("hbm_hit_rate", "Share of attended blocks that HBM held; NaN of none.", lambda: _number(usage.hbm_hit_rate)),
      ("hbm_kv_bytes", "Bytes of KV and its tables in HBM now.", lambda: engine.held.hbm_kv_bytes),
      ("dram_kv_bytes", "Bytes of KV that requests own in DRAM now.", lambda: engine.held.dram_kv_bytes),
      ("hbm_kv_peak_bytes", "Most bytes of KV and its tables in HBM since the start.", lambda: usage.peak_hbm_kv_bytes),
      ("dram_kv_peak_bytes", "Most bytes of KV in DRAM since the start.", lambda: usage.peak_dram_kv_bytes),
      ("slots_used", "Slots of HBM that hold a block now.", lambda: engine.held.slots),
      ("slots", "Slots of HBM.", lambda: shape.P),
      ("pool_blocks_owned", "Blocks of the pool that requests own now.", lambda: engine.held.owned),
      ("pool_blocks_kept", "Blocks of the pool that only the prefix cache keeps now.", lambda: engine.held.kept),
      ("pool_blocks", "Blocks of the pool.", lambda: shape.M),
      ("hbm_capacity_bytes", "Bytes of the cache in HBM.", lambda: shape.hbm_bytes),
      ("dram_capacity_bytes", "Bytes of the pool in DRAM.", lambda: shape.pool_bytes if shape.offload else 0),
    ):
      Gauge(name, about, **of).set_function(value)

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


def _number(value: float | None) -> float:
  """NaN is how Prometheus writes what has no value yet."""
  return math.nan if value is None else value


def _waits(stream: Stream) -> bool:
  return stream.request is None or not stream.request.output_tokens


def by_label(counter: Counter) -> dict[str, int]:
  """Of a counter with one label, what each of its values has come to."""
  (metric,) = counter.collect()
  return {value: int(of.value) for of in metric.samples if of.name.endswith("_total") for value in of.labels.values()}
