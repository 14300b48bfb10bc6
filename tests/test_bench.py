"""The benchmark programs run from end to end on tiny shapes; their arithmetic by numbers made by hand."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax.benchmarks import kernels, prefill, step, timing
from sparse_serve_jax.benchmarks.timing import Ceilings, Effort, Report, Timing
from sparse_serve_jax.config import ModelConfig, find_config, override, read_config
from sparse_serve_jax.ladder import floor
from sparse_serve_jax.memory import create
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.models import init_params
from sparse_serve_jax.results import Rows
from tests import jsonl
from tests.forks import start

TIMED = {"us", "best_us", "spread", "floor_us", "fraction", "moved"}
NO_GPU = "NotImplementedError: needs an NVIDIA GPU"
CEILINGS = Ceilings(hbm=4e12, hbm_read=4.4e12, h2d=5e10, d2h=2.5e10, flops=5e14)


def run(program: str, *arguments: str) -> tuple[list[str], dict[str, dict]]:
  """What a program prints with --smoke: lines, and the JSON object of the last one."""
  done = start(f"experiments.{program}", "--smoke", *arguments)
  assert done.returncode == 0, done.stderr
  *lines, last = done.stdout.splitlines()
  return lines, json.loads(last)


def numbers(value: object) -> list[float]:
  """All numbers in rows of rows."""
  if isinstance(value, dict):
    return [number for part in value.values() for number in numbers(part)]
  if value == NO_GPU:
    return []
  assert isinstance(value, int | float), value  # text would be an error's
  return [value]


def check(results: dict[str, dict], file: Path) -> None:
  """Every row has its keys and finite numbers, and stands in the file with a stamp."""
  assert all(row.keys() >= TIMED and row["best_us"] <= row["us"] for row in results.values())
  assert all(map(math.isfinite, numbers(results)))
  written = jsonl.read(file)
  assert [f"{row['op']}-{row['case']}" for row in written] == list(results)
  for row, result in zip(written, results.values(), strict=True):
    assert result.items() <= row.items()
    assert row["device"] == "cpu" and row["jax"] and row["commit"] == "abc" and row["ceilings"]["hbm"] > 0
    assert row["smoke"] and row["implementation"] == "xla"


# -------------------------------------------------------------------------------------------------------- the programs


def test_bench_kernels(tmp_path):
  lines, results = run("bench_kernels", f"--out={tmp_path}", "--commit=abc")
  check(results, tmp_path / "kernels.jsonl")
  ops = ["digest", "score", "select", "residency", "attend", "copy", "moves", "prefill", "prefill_tiles", "tile_lists"]
  assert list(dict.fromkeys(name.partition("-")[0] for name in results)) == ops
  assert [line.split()[0] for line in lines if " baselines (us)" in line] == ops
  assert lines[-1] == "smoke: times mean nothing"
  ragged = "attend-dense, 2 of 3 rows, longest 64 tokens"  # beside which there is nothing contiguous
  assert [name for name, row in results.items() if not row["baselines"]] == [ragged]
  assert all(results[f"copy-{name} 16"]["baselines"]["memcpy each"] == NO_GPU for name in ("load", "store"))
  moves = {name: row for name, row in results.items() if name.startswith("moves-")}
  assert [name.removeprefix("moves-") for name in moves] == [
    *(f"load 16 {way}" for way in ("gather", "staged", "per_block")),
    *(f"save 16 {way}" for way in ("direct", "staged", "per_block")),
  ]
  for name, row in moves.items():
    assert row["baselines"] == {"driver": NO_GPU} and "times_driver" not in row
    assert row["moved"] == {"h2d" if "load" in name else "d2h": 16 * 512}
    assert row["gb_s"] == pytest.approx(16 * 512 / row["us"] / 1e3)
  # Four tiles of two blocks, with 0 + 2 + 4 + 6 before them for each of two heads, of which all are read, or a quarter
  # of each rounded up; and 4 of their own.
  every, quarter = (results[f"prefill_tiles-64 share {share}"] for share in ("1", "0.25"))
  assert every["blocks_read"] == 2 * (12 + 4) and quarter["blocks_read"] == 2 * (0 + 1 + 1 + 2 + 4)
  assert every["times_dense_per_block"] == pytest.approx(every["us"] / every["baselines"]["dense"])
  assert 0.05 < results["residency-2x2x4 miss 30%"]["miss_rate"] < 0.8  # lists of four blocks
  assert 0 < results["attend-2x8 miss 30%"]["miss_rate"] < 1
  assert results["attend-dense 2x64 tokens"]["moved"] == {"hbm": 2 * 2 * 9 * 512}
  assert results[ragged]["moved"] == {"hbm": 2 * (8 + 3 + 3) * 512}  # a tail for each row


def test_bench_kernels_of_some_ops():
  lines, results = run("bench_kernels", "--ops=select,select", "--implementation=interpret")
  assert {name.partition("-")[0] for name in results} == {"select"}
  assert json.loads(lines[0])["implementation"] == "interpret"


def test_bench_prefill(tmp_path):
  _, results = run("bench_prefill", f"--out={tmp_path}", "--commit=abc", "--ways=quarter,cached")
  check(results, tmp_path / "prefill.jsonl")
  assert list(results) == ["prefill-3x300 quarter", "prefill-3x300 cached"]
  for row in results.values():
    assert row["floor_us"] == pytest.approx(sum(row["floors_us"].values()))
    assert row["tokens_per_s"] == pytest.approx(900e6 / row["us"])


def test_what_a_cached_prompt_has_new():
  first, second = (prefill.Case(2, 40, "cached").prompts(264, i) for i in range(2))
  assert all((a[:36] == b[:36]).all() and (a[36:] != b[36:]).any() for a, b in zip(first, second, strict=True))
  assert (first[0] != first[1]).any()
  assert (prefill.Case(1, 40, "quarter").prompts(264, 0)[0] != prefill.Case(1, 40, "quarter").prompts(264, 1)[0]).any()


def test_rows_of_a_step_are_called_by_their_load():
  """Whichever comes first: rows of one name are of one thing, in all files."""
  ways = step.Runs(steps=1, profile=False, loads=["gather", "fused"], dense=False).ways
  assert {name: changes[-1] for name, changes in ways.items()} == {
    "topk by gather": "cache.load=gather",
    "topk": "cache.load=fused",
    "psa": "cache.load=fused",
  }


def test_a_random_pool_in_hbm_is_made_once(monkeypatch):
  """Freed and made anew it may find no gap of its size."""
  cfg = read_config(ModelConfig, find_config("models", "tiny"))
  cases = step.Case.all_of(cfg, {"1x64": (1, 64)}, step.SMOKE_CHANGES)
  shape = step.cache_shape(cfg, {name: case.densely() for name, case in cases.items()})
  assert shape is not None
  monkeypatch.setattr(create, "_create_pool", lambda *_: pytest.fail("a pool is made beside the random one"))
  cache = step.filled_cache(shape, make_mesh(1))
  assert cache.pool.shape == shape.pool_shape and 0.9 < float(cache.pool.std()) < 1.1


@pytest.mark.parametrize(
  ("change", "read"),
  [
    ("sparse.token_budget=64", True),
    ("sparse.token_budget=128", False),  # as much as a table holds
    ("sparse.policy=psa", True),
    ("sparse.method=top_p", True),  # it has a budget of its own
    ("sparse.policy=dense", False),
  ],
)
def test_digests_are_counted_where_tables_are_ranked(change: str, read: bool):
  cfg = read_config(ModelConfig, find_config("models", "tiny"))
  cases = step.Case.all_of(cfg, {"2x128": (2, 128)}, [*step.SMOKE_CHANGES, "sparse.token_budget=128"])
  shape = step.cache_shape(cfg, cases)
  assert shape is not None
  report = SimpleNamespace(ceilings=SimpleNamespace(floor_us=lambda **moved: sum(moved.values())))
  bench = step.Bench(cfg, {}, make_mesh(1), shape, report)  # type: ignore[arg-type]
  case = dataclasses.replace(cases["2x128"], config=override(cases["2x128"].config, [change]))
  assert (bench.row(case, Timing.of([1.0], 1), 10, 0)["floors_us"]["digests"] > 0) == read


POLICIES = ("topk", 0), ("topk", 50.5), ("psa", 0)


def test_bench_step(tmp_path):
  arguments = "--commit=abc", "--steps=4", "--misses=0,0.505,0.5050", "--profile"
  _, results = run("bench_step", f"--out={tmp_path}", *arguments)
  check(results, tmp_path / "step.jsonl")
  cases = [f"{policy} {n} miss {share}%" for n in ("2x128", "1x256") for policy, share in POLICIES]
  assert list(results) == ["dense part-batch 2", *(f"step-{case}" for case in cases)]
  cfg = read_config(ModelConfig, find_config("models", "tiny"))
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(init_params(cfg, 0)))
  unread = 0 if cfg.tie_embeddings else (cfg.vocab_size - 2) * cfg.d_model * 4  # of the embedding: two rows are read
  assert results["dense part-batch 2"]["moved"] == {"hbm": weights - unread}
  whole, half, _, other, *_ = rows = [results[f"step-{case}"] for case in cases]
  for row in rows:
    assert row["recompiled"] == 0
    assert (row["padded_rows"], row["padded_blocks"]) == (8, 16 if row in rows[:3] else 32)
    assert row["floor_us"] == pytest.approx(sum(row["floors_us"].values()))
  # Two rows of 15 full blocks, of which the budget of 64 tokens reads eight; 2 heads in 4 layers.
  assert whole["blocks_attended"] == half["blocks_attended"] == 2 * 2 * 4 * 8
  assert whole["miss_rate"] == 0 and 0.35 < half["miss_rate"] < 0.65
  # The other case's cache is this one's, but nothing of the one before is in its slots.
  assert whole["slots_in_use"] == 2 * other["slots_in_use"] == 128
  assert half["moved"]["h2d"] == pytest.approx(half["miss_rate"] * 128 * 2 * 8 * 16 * 4)


@pytest.mark.parametrize(
  ("program", "arguments", "message"),
  [
    ("bench_kernels", "--ops=scores", "--ops: no scores; there are digest, score,"),
    ("bench_kernels", "", "needs an NVIDIA GPU, JAX runs on cpu; --smoke tries it anywhere"),
    ("bench_kernels", f"--out={__file__}", f"{__file__} is a file, results need a folder"),
    ("bench_step", "--smoke --cases=64x", "--cases: '64x' is not <requests>x<tokens>"),
    ("bench_prefill", "--smoke --cases=64", "--cases: '64' is not <requests>x<tokens>"),
    ("bench_prefill", "--smoke --ways=all,half", "--ways: no half; there are hbm_pool, layer_segmented, chunked"),
    ("bench_prefill", "--smoke --ways=", "--ways=: there is nothing to time"),
    ("bench_prefill", "--cases=1x300000", "a prompt of 300000 tokens and one more exceed the model's context, 262144"),
    ("bench_step", "--cases=2x128,2x16", "2x16 has no full block of 32 tokens"),
    ("bench_step", "--smoke --dense_batches=0", "--dense_batches: '0' is no number of rows"),
    ("bench_step", "--smoke --model=llama", "configs/models has no 'llama'; there are: "),
    ("bench_step", "--misses=0,abc", "--misses: 'abc' is no share in [0, 1]"),
    ("bench_step", "--misses=nan", "--misses: 'nan' is no share in [0, 1]"),
    ("bench_step", "--smoke --set=sparse.policy=dense", "sparse.policy cannot be set: every row has its own"),
    ("bench_step", "--smoke --set=implementation=xla", "implementation cannot be set: it is the device's"),
    ("bench_step", "--smoke --set=tp=2", "tp cannot be set: one device is timed"),
    ("bench_step", "--smoke --set=sparse.dense_layers=1", "sparse.dense_layers cannot be set: floors take all layers"),
    ("bench_step", "--set=scheduler.max_batch=32", "batch of rows 64 exceeds the largest bucket, 32"),
    ("bench_step", "--set=cache.dram_bytes=1GiB", "64 requests of 320 blocks do not fit 64 lanes and 256 blocks"),
  ],
)
def test_a_mistake_is_told_in_a_line(program, arguments, message):
  done = start(f"experiments.{program}", *arguments.split())
  (line,) = done.stderr.splitlines()
  assert done.returncode == 2 and line.startswith("error: ") and message in line and not done.stdout


# ------------------------------------------------------------------------------------------------------ the arithmetic


def test_a_time_is_the_median_of_the_calls():
  timed = Timing.of([4e-3, 2e-3, 3e-3], repetitions=100)
  assert (timed.us, timed.best_us) == pytest.approx((30, 20)) and timed.spread == pytest.approx(2 / 3)


def test_the_floor_is_the_slowest_way():
  assert CEILINGS.floor_us(hbm=4e6) == pytest.approx(1)
  assert CEILINGS.floor_us(hbm=4e6, h2d=1e6) == pytest.approx(20)
  assert CEILINGS.floor_us(hbm=4e6, d2h=1e6) == pytest.approx(40)
  assert CEILINGS.floor_us(hbm=4e6, flops=1.5e9) == pytest.approx(3)
  row = timing.row(Timing(50, 40, 0.1, 8), 20, {"h2d": 1e6}, miss_rate=0.5)
  moved = {"h2d": 1e6}
  expected = dict(us=50, best_us=40, spread=0.1, repetitions=8, floor_us=20, fraction=0.4, moved=moved, miss_rate=0.5)
  assert row == expected


@pytest.mark.parametrize("n_variants", [1, 3])
def test_every_repetition_is_run_and_counted(n_variants):
  """A state that counts; the last round's results come back."""
  effort = Effort(calls=2, seconds=0, rounds=4)
  variants = [jnp.int32(10 * i) for i in range(n_variants)]

  def op(state, shared, inputs):
    return state + 1, (state + inputs) * shared

  timed, state, results = timing.measure(op, variants, effort, state=jnp.int32(0), shared=jnp.int32(2))
  # Four times a short loop; then, with its rounds on top, the one that is timed, once to compile.
  n = (4 + (1 + effort.calls) * 2) * effort.rounds * n_variants
  assert state == n and timed.repetitions == effort.rounds * n_variants
  assert [int(r) for r in results] == [2 * (n - n_variants + i + 10 * i) for i in range(n_variants)]


def test_a_call_takes_the_seconds_asked_for():
  """So it has to be known what a round takes, and that is not what a compilation takes."""
  x, state = (jnp.full((256, 256), i / 256) for i in (1, 2))
  timed, _, _ = timing.measure(lambda state, _, x: (state @ x, ()), [x], Effort(calls=3, seconds=0.2), state=state)
  assert timed.us * timed.repetitions > 0.03e6


def test_a_failure_is_a_row_and_the_rest_goes_on(tmp_path, capsys):
  def fails():
    raise ValueError("no room\nfor it")

  report = Report(Rows(tmp_path / "rows.jsonl"), CEILINGS, timing.SMOKE, "xla", commit=None)
  report.add("op", "bad", fails)
  report.add(
    "op", "good", lambda: timing.row(Timing(50, 40, 0.1, 8), 20, {"h2d": 2**20}, baselines={"other": 60.0}, n=3)
  )
  assert report.close() == 1
  said = capsys.readouterr()
  assert said.err == "op bad: ValueError: no room\n"
  stamp, _, titles, bad, good, _, smoke, last = said.out.splitlines()
  assert json.loads(stamp)["ceilings"]["h2d"] == 5e10
  assert titles.split() == ["op", "us", "±", "MiB", "floor", "share", "baselines", "(us)"]
  assert bad.split() == "bad failed: ValueError: no room".split()
  assert good.split() == ["good", "50.0", "10%", "1.0", "20.0", "0.40", "other", "60,", "[n]", "3"]
  assert smoke == "smoke: times mean nothing" and list(json.loads(last)) == ["op-bad", "op-good"]
  assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2


def test_baselines_tell_why_there_is_none():
  def fails():
    raise NotImplementedError("not here")

  found = timing.measure_baselines({"good": lambda: Timing(3, 2, 0, 8), "bad": fails})
  assert found == {"good": 3, "bad": "NotImplementedError: not here"}


class Driver:
  """What `timing.memcpy_each` calls of CUDA, on arrays that the CPU can read."""

  def __init__(self, code: int = 0):
    self.code, self.copied = code, 0

  def __getattr__(self, name: str):
    def call(*arguments):
      if name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"):
        ctypes.memmove(*arguments[:3])
        self.copied += 1
        return self.code
      return 0

    return call


@pytest.mark.parametrize("loads", [True, False])
def test_the_driver_copies_a_block_a_call(loads, monkeypatch):
  host, device = (jnp.asarray(np.arange(48.0, dtype=np.float32).reshape(6, 8) + start) for start in (0, 100))
  blocks, slots, driver = np.array([5, 0, 2]), np.array([1, 4, 3]), Driver()
  expected = [np.array(host), np.array(device)]
  if loads:
    expected[1][slots] = expected[0][blocks]
  else:
    expected[0][blocks] = expected[1][slots]
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
  timing.memcpy_each(loads, host, blocks, device, slots, 32)()
  found = [timing.writable(x).view(np.float32).reshape(6, 8) for x in (host, device)]
  assert driver.copied == 3 and all(np.array_equal(*both) for both in zip(found, expected, strict=True))
  driver.code = 700
  with pytest.raises(RuntimeError, match="the CUDA driver returned 700"):
    timing.memcpy_each(loads, host, blocks, device, slots, 32)()


def test_the_driver_copies_the_blocks_that_the_others_copy(monkeypatch):
  """From and to the pool that they use; so many bytes each, and every figure of it in the row."""
  seen = []

  def memcpy_each(loads, host, blocks, device, slots, n_bytes):
    seen.append((loads, blocks))
    assert host.nbytes == n_bytes * bench.heads * bench.n_pool and device.nbytes == n_bytes * bench.n_slots
    assert 0 <= slots.min() <= slots.max() < bench.n_slots and len(set(slots.tolist())) == len(slots) == 16
    return lambda: None

  bench = kernels.Bench(Report(None, CEILINGS, timing.SMOKE, "xla", commit=None))
  monkeypatch.setattr(timing, "memcpy_each", memcpy_each)
  lists = []
  variants = bench.variants
  monkeypatch.setattr(bench, "variants", lambda make: lists.append(variants(make)) or lists[-1])
  for case, make in kernels.moves(bench):
    row = make()
    of = lists.pop()[0]
    blocks = np.asarray(of.blocks[0] if case.startswith("load") else np.broadcast_to(of[1], (bench.heads, 8)))
    loads, ids = seen.pop()
    assert loads == case.startswith("load")
    assert np.array_equal(ids, [head * bench.n_pool + block for head, list in enumerate(blocks) for block in list])
    assert row["times_driver"] == pytest.approx(row["us"] / row["baselines"]["driver"])
    assert row["driver_gb_s"] == pytest.approx(row["times_driver"] * row["gb_s"])


def test_kernels_of_a_trace():
  named = lambda what, pid, tid, name: {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}  # noqa: E731
  ran = lambda name, pid, tid, us, module="jit_f": {  # noqa: E731
    "ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0, "dur": us, "args": {"hlo_module": module}
  }  # fmt: skip
  events = [
    named("process_name", 1, 0, "/device:GPU:0"),
    named("process_name", 2, 0, "/host:CPU"),
    named("thread_name", 1, 7, "Stream #7(Compute)"),
    named("thread_name", 1, 8, "XLA Ops"),
    named("thread_name", 2, 7, "Stream of thought"),
    ran("score", 1, 7, 2.0),
    ran("attend", 1, 7, 5.0),
    ran("score", 1, 7, 4.5),
    ran("attend", 1, 8, 100.0),
    ran("attend", 2, 7, 100.0),
    ran("scatter", 1, 7, 100.0, "jit_evict"),
    {"ph": "X", "name": "memcpy", "pid": 1, "tid": 7, "dur": 1.0},
    {},
  ]
  times = timing.kernel_times({"traceEvents": events}, without="evict")
  assert list(times.items()) == [("score", (2, 6.5)), ("attend", (1, 5.0)), ("memcpy", (1, 1.0))]


def test_products_of_a_floor_are_all_made(monkeypatch):
  """XLA drops what the next round overwrites, where it can tell: then twice a device's rate would be measured."""
  dots: list[int] = []

  def measure(op, variants, effort, *, state, shared):
    def two_rounds(state, shared, variants):
      for inputs in variants:
        state, _ = op(state, shared, inputs)
      return state

    program = jax.jit(two_rounds).lower(state, shared, variants).compile()
    dots.append(program.as_text().count(" dot("))
    return Timing(1.0, 1.0, 0.0, 1), state, ()

  with monkeypatch.context() as patched:
    patched.setattr(prefill, "attention_us", lambda *_: 1.0)
    patched.setattr(floor.Ceilings, "measure", lambda effort: CEILINGS)
    patched.setattr(timing, "measure", measure)
    floor.Rates.measure(read_config(ModelConfig, find_config("models", "tiny")))
  assert dots == [2 * len(prefill.WEIGHTS)]
