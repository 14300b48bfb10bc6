"""Metrics of runs small enough to do by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from sparse_serve_jax.buckets import PrefillProgram
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.serving.plan import DecodeRow, Plan, PrefillCall, PrefillWork, Sampling, StepStats
from sparse_serve_jax.serving.request import Request

SHAPE = CacheShape(
  K=2, L=3, M=100, P=50, R=4, S=8, D=4, E=2, dtype="float32", offload=True, max_context=99, slab_tokens=8
)  # blocks of 2 * 8 * 4 * 4 = 256 bytes


def request(arrival: float, scheduled: float, times: list[float], n_prompt: int = 5) -> Request:
  made = Request("r", np.zeros(n_prompt, np.int32), len(times), arrival_time=arrival)
  made.scheduled_time = scheduled
  for time in times:
    made.receive(1, time)
  return made


def plan(rows: int, tokens: int, n_layers: int = 2) -> Plan:
  """So many decode rows, and a piece of a prompt through some layers."""
  work = PrefillWork("p", 0, np.zeros(tokens, np.int32), 0, 0, n_layers, False, Sampling())
  piece = PrefillCall(PrefillProgram(tokens, 0, n_layers), (work,))
  row = DecodeRow("d", 0, 0, 0, Sampling())
  return Plan(1, np.zeros(0, np.int32), (), (piece,) if tokens else (), (row,) * rows, ())


def usage(offload: bool = True) -> metrics.Usage:
  made = metrics.Usage(dataclasses.replace(SHAPE, offload=offload))
  for attended, loaded, saved, slots, pool in [(10, 1, 6, 20, 4), (30, 4, 0, 30, 9), (0, 0, 0, 25, 5)]:
    made.count_pool(pool)
    missed = loaded - 1 if loaded else 0  # one block was read for a prefill
    made.count_step(plan(attended // 10, saved), StepStats(attended, missed, loaded, saved, slots * offload), 2)
  return made


def test_summary_by_hand():
  a = request(1.0, 1.5, [3.0, 4.0, 8.0])
  b = request(2.0, 4.0, [6.0, 6.5], n_prompt=7)
  cancelled = request(0.0, 0.0, [1.0, 50.0])
  cancelled.end("cancelled", 99.0)
  b.cached_tokens, cancelled.cached_tokens = 6, 4
  a.preemptions, b.preemptions, b.recomputed_tokens, cancelled.preemptions = 1, 2, 30, 9
  assert metrics.summarize([a, cancelled, b], usage()) == metrics.Summary(
    requests=2,
    prompt_tokens=12,
    cached_tokens=6,
    cached_share=0.5,
    output_tokens=5,
    preemptions=3,
    recomputed_tokens=30,
    ttft_mean_s=3.0,  # (2 + 4) / 2
    ttft_p50_s=3.0,
    ttft_p90_s=pytest.approx(3.8),  # rank 0.9 of 2, 4
    ttft_p99_s=pytest.approx(3.98),
    tbt_mean_s=pytest.approx((1 + 4 + 0.5) / 3),
    tbt_p50_s=1.0,
    tbt_p90_s=pytest.approx(1 + (4 - 1) * 0.8),  # rank 0.9 x 2 of 0.5, 1, 4
    tbt_p99_s=pytest.approx(1 + (4 - 1) * 0.98),
    latency_mean_s=5.75,  # (7 + 4.5) / 2
    latency_p50_s=5.75,
    latency_p90_s=pytest.approx(6.75),
    latency_p99_s=pytest.approx(6.975),
    scheduling_delay_mean_s=1.25,
    scheduling_delay_p99_s=pytest.approx(1.985),  # rank 0.99 of 0.5, 2
    throughput_tok_s=pytest.approx(5 / 7),  # from 1 to 8
    iterations=3,
    hbm_hit_rate=1 - 3 / 40,
    blocks_attended=40,
    blocks_loaded=5,
    blocks_saved=6,
    peak_hbm_kv_bytes=SHAPE.fixed_bytes + 30 * 256,
    peak_dram_kv_bytes=9 * 3 * 2 * 256,
  )


def test_without_offload_the_pool_lies_in_hbm():
  assert (usage(False).peak_hbm_kv_bytes, usage(False).peak_dram_kv_bytes) == (SHAPE.fixed_bytes + 9 * 3 * 2 * 256, 0)


def test_sums_of_iterations():
  """Two decode, of 1 and 3 rows; 6 tokens of a prompt pass 2 of 3 layers; the third told nothing of slots."""
  made = usage()
  assert (made.decode_rows, made.decode_steps, made.output_tokens, made.prefill_tokens) == (4, 2, 6, 6 * 2 // 3)
  assert made.held(5, 1).slots == 30


def test_what_is_held_now():
  """Now, and not at the peak; slots hold no more than the blocks that are somebody's."""
  size = 3 * 2 * 256  # a pool block: layers, heads, bytes
  assert usage().held(5, 1) == metrics.Held(5, 1, 30, SHAPE.fixed_bytes + 30 * 256, 5 * size)
  assert usage().held(1, 1) == metrics.Held(1, 1, 12, SHAPE.fixed_bytes + 12 * 256, size)
  assert usage().held(0, 0) == metrics.Held(0, 0, 0, SHAPE.fixed_bytes, 0)
  assert usage(False).held(5, 1) == metrics.Held(5, 1, 0, SHAPE.fixed_bytes + 5 * size, 0)


def test_nothing_to_average():
  summary = metrics.summarize([], metrics.Usage(SHAPE))
  assert (summary.requests, summary.ttft_mean_s, summary.tbt_p99_s, summary.throughput_tok_s) == (0, None, None, None)
  assert summary.hbm_hit_rate is None  # no block was attended to
  one = metrics.summarize([request(0.0, 0.5, [2.0])], metrics.Usage(SHAPE))
  assert (one.tbt_mean_s, one.ttft_mean_s, one.throughput_tok_s) == (None, 2.0, 0.5)
  assert json.loads(json.dumps(one.to_dict()))["tbt_mean_s"] is None


def test_a_first_token_that_stops_counts_for_ttft_only():
  stopped = Request("r", np.zeros(3, np.int32), 4, arrival_time=1.0, stop_token_ids=frozenset({9}))
  stopped.scheduled_time = 1.0
  assert not stopped.receive(9, 3.0)
  summary = metrics.summarize([stopped], usage())
  assert (summary.requests, summary.output_tokens, summary.ttft_mean_s, summary.throughput_tok_s) == (1, 0, 2.0, 0.0)


def test_one_request():
  assert metrics.request_metrics(request(1.0, 1.5, [3.0, 4.0, 8.0])) == {
    "ttft_s": 2.0,
    "tbt_mean_s": 2.5,
    "scheduling_delay_s": 0.5,
    "total_s": 7.0,
  }


def test_table():
  shown = metrics.table(
    {
      "a": {"count": 12345, "rate": 0.123456, "ms": 11183.5, "x": None},
      "long": {"count": 1, "rate": 2.0, "ms": 999.96, "x": "y"},
    }
  )
  assert shown.split("\n") == [
    "            a  long",
    "count  12,345     1",
    "rate   0.1235     2",
    "ms     11,184  1000",
    "x           -     y",
  ]


@pytest.mark.parametrize(
  ("gap", "delay", "keeps"),
  [(2.5, 2.0, True), (2.51, 0.0, False), (0.0, 2.01, False), (None, 1.0, True), (None, None, False)],
)
def test_goodputs_condition(gap, delay, keeps):
  """25 iterations of 0.1 s, and 2 s; a run of single tokens has no gaps, one in which nothing finished no delay."""
  assert metrics.keeps_slo({"tbt_p99_s": gap, "scheduling_delay_mean_s": delay}, 0.1) == keeps
