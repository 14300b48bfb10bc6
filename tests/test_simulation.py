"""Serving in virtual time: costs, blocks that come back, and rules that hold in every iteration of long runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter

import numpy as np
import pytest

from sparse_serve_jax.config import EngineConfig, ModelConfig, override
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving import run
from sparse_serve_jax.serving.clock import Virtual
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.plan import DecodeRow, Observed, Plan, PrefillWork, Sampling
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.cost import About, Cost, Seconds, Work, fit, not_negative_least_squares, read_cost
from sparse_serve_jax.simulation.executor import SimulatedExecutor
from sparse_serve_jax.simulation.measure import Iteration, Stopwatch, typical
from sparse_serve_jax.simulation.reuse import Blocks, Reuse, fit_reuse
from sparse_serve_jax.workloads import Item
from tests import jsonl
from tests.forks import start

MODEL = ModelConfig(
  vocab_size=97, d_model=8, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=8, max_context=4096, dtype="float32"
)
PRICES = dict.fromkeys(Work._fields, 0.0) | {
  "iterations": 1e-3,
  "prefill_tokens": 1e-5,
  "decodes": 4e-3,
  "loaded_blocks": 1e-6,
}
REUSE = Reuse(first=0.2, decay=0.7, density=0.25, psa_blocks=6.5)
ABOUT = About("random:tiny", "float32", "none", "", "", "", 1, 0.0, 0.0)


def cost(**prices: float) -> Cost:
  return Cost(ABOUT, Seconds(**(PRICES | prices)), REUSE)


def config(*changes: str) -> EngineConfig:
  small = [
    "cache.prefix=false", "cache.block_tokens=8", "cache.lanes=12", "cache.dram_bytes=4MiB", "cache.hbm_bytes=900KB",
    "sparse.token_budget=64", "sparse.sink_tokens=8", "sparse.window_tokens=8",
    "scheduler.max_batch=6", "scheduler.max_context=512", "scheduler.max_inject_tokens=512",
  ]  # fmt: skip
  return override(EngineConfig(), [*small, *changes])


def executor(conf: EngineConfig, clock: Virtual, **prices: float) -> SimulatedExecutor:
  return SimulatedExecutor(conf, MODEL, cost(**prices), clock, vectors=2)


def items(prompts: list[int], outputs: list[int]) -> list[Item]:
  zero = np.int32(0)
  return [
    Item(str(i), np.broadcast_to(zero, (n,)), out) for i, (n, out) in enumerate(zip(prompts, outputs, strict=True))
  ]


def rows(*at: tuple[int, int]) -> list[DecodeRow]:
  """Of (position, step)."""
  return [DecodeRow(str(i), i, position, step, Sampling()) for i, (position, step) in enumerate(at)]


# ---------------------------------------------------------------------------------------------------------------- time


def test_a_request_takes_as_long_as_its_iterations():
  """Prefill of 64 tokens in 4 layers, then two steps, with nothing else on the device."""
  clock = Virtual(5.0)
  conf = config("cache.offload=false", "cache.hbm_bytes=4MiB", "scheduler.batch_control=none")
  served = run.serve(Engine(executor(conf, clock), clock=clock), items([64], [3]), [0.0], lambda _: None)
  prefill = 1e-3 + 512 * 4 * 1e-5  # the smallest piece that is compiled: 512 tokens
  assert served.summary.ttft_mean_s == pytest.approx(prefill)
  assert served.summary.tbt_mean_s == pytest.approx(5e-3)
  assert served.elapsed_s == pytest.approx(prefill + 2 * 5e-3 + 1e-3)  # and a plan that releases the blocks


def test_one_iteration_is_in_flight_while_the_next_waits():
  """Two that are dispatched at once are done one after the other; one that is dispatched late begins then."""
  clock = Virtual()
  device = executor(config(), clock)

  def plan(i: int) -> Plan:
    return Plan(i, np.zeros(0, np.int32), (), (), tuple(rows((100, 3))), ())

  first, second = device.submit(plan(1)), device.submit(plan(2))
  assert clock.now() == 0
  took = first.done_at
  first.result()
  assert clock.now() == took and second.done_at == pytest.approx(2 * took)
  second.result()
  clock.sleep_until(10.0)
  assert device.submit(plan(3)).done_at == pytest.approx(10 + took)
  device.wait()
  assert clock.now() == pytest.approx(10 + took)


def test_a_loaded_device_delays_who_comes_later():
  def served(rate: float) -> run.Served:
    clock = Virtual()
    arrivals = np.arange(30) / rate
    return run.serve(
      Engine(executor(config(), clock), clock=clock), items([200] * 30, [20] * 30), arrivals, lambda _: None
    )

  slow, fast = served(1.0), served(200.0)
  assert slow.summary.requests == fast.summary.requests == 30
  assert (fast.summary.ttft_mean_s or 0) > 3 * (slow.summary.ttft_mean_s or 1)
  assert served(200.0) == fast  # nothing is drawn


def test_a_stopwatch_tells_the_seconds_of_every_iteration():
  clock = Virtual()
  device = executor(config(), clock)
  watch = Stopwatch(device)
  engine = Engine(device, clock=clock, observer=watch.observe)
  run.serve(engine, items([300, 90, 33], [12, 5, 30]), [0, 0, 0.5], lambda _: None)
  assert len(watch.iterations) > 30
  for iteration in watch.iterations:
    assert iteration.seconds == pytest.approx(device._seconds.of(iteration.work), abs=1e-12)
  assert sum(iteration.rows for iteration in watch.iterations) == 11 + 4 + 29


def test_passes_are_as_long_as_the_median_one():
  """Each is disturbed once, in another iteration: no iteration stands out, and none of the time is lost."""
  nothing = Work(*[0] * len(Work._fields))
  passes = [[Iteration(nothing, 0, 0, 0, 1.0 + 3 * (i == late)) for i in range(4)] for late in (0, 1, 3)]
  assert typical(passes) == pytest.approx([7 / 4] * 4)
  assert typical(passes[:1]) == [4.0, 1.0, 1.0, 1.0]


def test_what_never_fits_is_refused_and_the_others_run():
  clock = Virtual()
  ends: list[Request | run.Refusal] = []
  served = run.serve(
    Engine(executor(config(), clock), clock=clock), items([40, 600, 50], [4, 4, 4]), [0] * 3, ends.append
  )
  assert (served.summary.requests, served.refused, served.failed) == (2, 1, 0)
  (refused,) = (end for end in ends if isinstance(end, run.Refusal))
  assert refused.id == "1" and "600" in refused.error and "512" in refused.error


# --------------------------------------------------------------------------------------------------------------- costs


def test_fit_finds_the_prices_that_made_the_durations():
  rng = np.random.default_rng(0)
  works = [
    Work(1, *(int(n) for n in rng.integers(0, 10 ** rng.integers(1, 6), len(Work._fields) - 1))) for _ in range(60)
  ]
  true = Seconds(**dict(zip(Work._fields, rng.uniform(1e-6, 1e-3, len(Work._fields)).tolist(), strict=True)))
  found = fit(works, [true.of(work) for work in works])
  assert found.seconds.prices == pytest.approx(true.prices, rel=1e-5)
  assert found.mean_error < 1e-6


def test_predictions_of_a_fit_add_up_and_no_price_is_negative():
  rng = np.random.default_rng(1)
  works = [Work(1, *(int(n) for n in rng.integers(0, 50, len(Work._fields) - 1))) for _ in range(80)]
  seconds = [2.0 + 0.1 * work.prefill_tokens - 0.01 * work.saved_blocks + rng.uniform(0, 0.5) for work in works]
  found = fit(works, seconds)
  assert min(found.seconds.prices) >= 0 and found.seconds.saved_blocks == 0
  assert found.total_error < 1e-6 and 0 < found.mean_error < 0.1
  assert sum(map(found.seconds.of, works)) == pytest.approx(sum(seconds))


def test_least_squares_are_the_best_of_all_choices_of_zeros():
  rng = np.random.default_rng(2)
  for _ in range(20):
    a, b = rng.normal(size=(9, 4)), rng.normal(size=9)
    best = np.linalg.norm(b)
    for chosen in range(1, 16):
      free = [i for i in range(4) if chosen >> i & 1]
      x = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
      if (x >= 0).all():
        best = min(best, float(np.linalg.norm(a[:, free] @ x - b)))
    found = not_negative_least_squares(a, b)
    assert (found >= 0).all() and np.linalg.norm(a @ found - b) == pytest.approx(best)


def test_fit_refuses_too_few_iterations_and_no_time():
  works = [Work(*range(1, 11))] * 10
  with pytest.raises(ValueError, match="10 prices need .* got 9"):
    fit(works[:9], [1.0] * 9)
  with pytest.raises(ValueError, match="1 of 10 durations"):
    fit(works, [1.0] * 9 + [0.0])


@pytest.mark.parametrize(
  "where, value, told",
  [
    (("seconds", "decodes"), -1.0, r"seconds.decodes=-1.0 must not be negative"),
    (("seconds", "decodes"), float("nan"), r"seconds.decodes=nan"),
    (("seconds", "decodes"), "fast", r"seconds.decodes: expected float, got 'fast'"),
    (("seconds", "decode"), 1.0, r"unknown key 'decode' .*'decodes'"),
    (("reuse", "first"), 1.5, r"reuse.first=1.5 is not in \(0, 1\)"),
    (("about", "iterations"), 0, r"about.iterations=0 must be positive"),
    (("seconds",), PRICES | dict.fromkeys(PRICES, 0.0), r"every value is 0"),
    (("reuse",), {"first": 0.5}, r"lacks decay, density"),
  ],
)
def test_a_broken_cost_is_told_by_file_field_and_value(tmp_path, where, value, told):
  data = dataclasses.asdict(cost())
  node = data
  for key in where[:-1]:
    node = node[key]
  node[where[-1]] = value
  file = tmp_path / "cost.json"
  file.write_text(json.dumps(data))
  with pytest.raises(ValueError, match=rf"{file}: .*{told}"):
    read_cost(file)


def test_a_cost_is_read_as_it_was_written(tmp_path):
  file = tmp_path / "cost.json"
  file.write_text(json.dumps(dataclasses.asdict(cost())))
  assert read_cost(file) == cost()
  with pytest.raises(ValueError, match=r"nowhere.json is no file"):
    read_cost(tmp_path / "nowhere.json")


# -------------------------------------------------------------------------------------------------------------- blocks


def blocks(*changes: str, slots: int = 10**9, reuse: Reuse = REUSE) -> Blocks:
  conf = config(*changes)
  return Blocks(conf, dataclasses.replace(CacheShape.of(MODEL, conf, 2), P=slots), reuse)


def test_a_fit_of_reuse_finds_the_curve_that_made_it():
  shares = [1 - 0.2 * w**-0.7 for w in range(1, 33)]
  made = fit_reuse(shares, 0.25)
  assert (made.first, made.decay) == (pytest.approx(0.2), pytest.approx(0.7))
  with pytest.raises(ValueError, match="between 0 and 1"):
    fit_reuse([0.9, 1.0], 0.25)


def test_attended_blocks_by_policy():
  """4 layers x 2 heads; 30 and 3 full blocks, and a budget of 8."""
  at = rows((8 * 30 + 5, 9), (8 * 3 + 7, 9))
  assert blocks().decode(at)[0] == (8 + 3) * 8
  assert blocks("sparse.dense_layers=1").decode(at)[0] == (8 + 3) * 6 + (30 + 3) * 2
  assert blocks("sparse.policy=dense").decode(at)[0] == (30 + 3) * 8
  assert blocks("sparse.policy=psa").decode(at)[0] == (6.5 + 3) * 8
  with pytest.raises(ValueError, match="psa_blocks=0"):
    blocks("sparse.policy=psa", reuse=dataclasses.replace(REUSE, psa_blocks=0.0))


def test_working_sets_grow_by_what_was_not_selected_before():
  """320 blocks, of which 8 are selected: a density far below the one that was measured, so all of its turnover."""
  of, at = blocks("scheduler.working_set_steps=3"), lambda step: rows((8 * 320, step))[0]
  assert of.working_set(at(0)) == of.working_set(at(1)) == 8 * 8
  assert of.working_set(at(2)) == round(8 * 8 * 1.2)
  assert of.working_set(at(3)) == of.working_set(at(300)) == round(8 * 8 * (1.2 + 0.2 * 2**-0.7))
  assert of.working_set(rows((8 * 5, 300))[0]) == 8 * 5  # all that there is


def test_misses_fall_with_steps_and_with_slots():
  def missed(step: int, slots: int, n: int = 3) -> int:
    attended, missed = blocks(slots=slots).decode(rows(*[(8 * 320, step)] * n))
    assert attended == 64 * n
    return missed

  one_step = 3 * 64
  assert missed(1, 10**9) == round(one_step * 0.2)
  assert missed(20, 10**9) == round(one_step * 0.2 * 20**-0.7)
  assert missed(20, one_step) == round(one_step * 0.2)  # slots for one step only: what is older has gone
  assert missed(20, int(one_step * 1.21)) == round(one_step * 0.2 * 2**-0.7)
  assert missed(20, one_step // 2) == round(one_step * (1 - 0.8 / 2))
  assert missed(0, 10**9) == round(one_step * (1 - 8 / 320))  # only the prompt's end is there
  fewer = [missed(50, slots) for slots in (20, 60, 100, 200, 250, 400, 10**9)]
  assert fewer == sorted(fewer, reverse=True) and len(set(fewer)) == len(fewer)
  assert blocks(slots=10**9).decode(rows((8 * 6, 5)))[1] == 0  # all of its blocks are selected, and there
  assert blocks(slots=24).decode(rows((8 * 6, 5)))[1] == 24  # and half of them there
  assert blocks("cache.offload=false", slots=0).decode(rows((8 * 320, 0)))[1] == 0


@pytest.mark.parametrize(
  ("changes", "slots", "loaded"),
  [
    ((), 10**9, 32 - 8),  # what a layer's piece of 256 tokens leaves in slots is the budget
    (("scheduler.prefill=chunked",), 10**9, 0),  # and of a chunk everything
    (("scheduler.prefill=chunked",), 8 * 20, 32 - 20),
    (("scheduler.prefill=chunked", "cache.offload=false", "cache.hbm_bytes=8MiB"), 0, 0),
  ],
)
def test_what_comes_before_a_piece_is_read_where_no_slot_has_it(changes, slots, loaded):
  """32 blocks, of 4 layers x 2 heads."""
  of = blocks("scheduler.chunk_tokens=256", *changes, slots=slots)
  work = PrefillWork("a", 0, np.zeros(100, np.int32), 256, 0, 4, True, Sampling())
  assert of.before_piece(work, 256) == loaded * 4 * 2


def test_a_chunked_prompt_is_in_slots_before_its_first_step():
  chunked = blocks("scheduler.prefill=chunked", "scheduler.chunk_tokens=256")
  assert chunked.decode(rows((8 * 40, 0))) == (8 * 8, 0)
  half = blocks("scheduler.prefill=chunked", "scheduler.chunk_tokens=256", slots=8 * 20)
  assert half.decode(rows((8 * 40, 0))) == (8 * 8, 32)


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_simulates_a_trace_and_refuses_what_is_wrong(tmp_path):
  file, trace, out = tmp_path / "cost.json", tmp_path / "trace.jsonl", tmp_path / "out"
  file.write_text(json.dumps(dataclasses.asdict(cost())))
  requests = [(100, 5), (40_000, 5), (300, 20)]  # the second is beyond the context
  lines = [{"timestamp": 500 * i, "input_length": n, "output_length": m} for i, (n, m) in enumerate(requests)]
  jsonl.write(trace, lines)

  def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    of = [f"--cost={file}", "--set=cache.hbm_bytes=64MiB", "--set=scheduler.max_context=4096", *arguments]
    return start("experiments.simulate", *of)

  done = command(f"--trace={trace}", f"--out={out}")
  assert done.returncode == 1, done.stderr  # one is refused
  told = json.loads(done.stdout.splitlines()[-1])
  assert (told["requests"], told["refused"], told["output_tokens"]) == (2, 1, 25) and told["elapsed_s"] > 1
  made = {row["request_id"]: row for row in map(json.loads, (out / "requests.jsonl").read_text().splitlines())}
  assert {name: row["finish_reason"] for name, row in made.items()} == {
    "trace-0": "length",
    "trace-1": "refused",
    "trace-2": "length",
  }
  assert made["trace-2"]["output_tokens"] == 20 and made["trace-2"]["arrival_s"] == 1.0
  for rate in ("0", "inf"):
    wrong = command(f"--rate={rate}")
    assert wrong.returncode == 2 and f"got {float(rate)}" in wrong.stderr
  drawn = command("--limit=3", "--prompt_tokens=200", "--max_new_tokens=9")
  told = json.loads(drawn.stdout.splitlines()[-1])
  assert told["requests"] == 3 and 150 <= told["prompt_tokens"] <= 600 and 9 <= told["output_tokens"] <= 27
  needles = command("--workload=needle", "--limit=2", "--prompt_tokens=300", "--max_new_tokens=9")
  told = json.loads(needles.stdout.splitlines()[-1])
  assert (told["requests"], told["output_tokens"]) == (2, 18) and 400 < told["prompt_tokens"] <= 600
  other = command("--model=random:tiny-mha")
  assert other.returncode == 2 and "is of random:tiny in float32" in other.stderr


# ---------------------------------------------------------------------------------------------------------- invariants


class Watch:
  """Follows every plan of an engine, and fails on the first that breaks a rule."""

  def __init__(self, conf: EngineConfig, shape: CacheShape, all_items: list[Item]):
    self.conf, self.shape = conf, shape
    self.outputs = {item.id: item.max_new_tokens for item in all_items}
    self.need = {item.id: -(-(len(item.prompt) + item.max_new_tokens) // shape.S) for item in all_items}
    self.prompt_tokens = {item.id: len(item.prompt) for item in all_items}
    self.next_admitted = 0
    self.owner = np.full(shape.M, -1)  # of pool blocks, by number of the request
    self.lanes: dict[int, str] = {}
    self.table: dict[str, np.ndarray] = {}
    self.steps: Counter[str] = Counter()
    self.prefilled: dict[str, int] = {}  # requests that may decode, in order -> decode steps left
    self.paused: dict[str, tuple[int, int]] = {}  # iterations that left it out, and the most that may
    self.sets: dict[str, int] = {}  # measured, as the next plan will know them: results are read one iteration late
    self.measured: dict[str, int] = {}  # in the last iteration
    self.paused_most = 0
    self.full = Counter[str]()  # iterations that reached a bound

  def __call__(self, seen: Observed) -> None:
    plan, result = seen.plan, seen.result
    for name in [name for name, left in self.prefilled.items() if left == 0]:
      self._end(name)
    for admission in plan.admit:
      self._admit(admission.request_id, admission.lane, admission.table)
    self._decode(plan)
    self.sets, self.measured = self.sets | self.measured, result.working_sets
    chunked, cost = self.conf.scheduler.prefill == "chunked", 0
    for work in plan.works:
      cost += len(work.tokens) * (1 if chunked else work.n_layers)
      assert self.lanes[work.lane] == work.request_id
      if work.last:
        self.prefilled[work.request_id] = self.outputs[work.request_id] - 1
    assert cost <= self.conf.prefill_allowance(self.shape.L)
    assert set(result.tokens) == {row.request_id for row in plan.decode} | {w.request_id for w in plan.works if w.last}
    assert result.stats.missed <= result.stats.attended and result.stats.slots_used <= self.shape.P

  def _admit(self, name: str, lane: int, table: np.ndarray) -> None:
    assert name == str(self.next_admitted)  # first come, first served: ids are in order of arrival
    self.next_admitted += 1
    assert lane not in self.lanes and 0 <= lane < self.shape.R
    assert len(table) == self.need[name] and (self.owner[table] == -1).all()
    self.owner[table] = int(name)
    self.lanes[lane], self.table[name] = name, table
    self.full["lanes"] += len(self.lanes) == self.shape.R
    self.full["pool"] += (self.owner >= 0).sum() > 0.9 * self.shape.M

  def _decode(self, plan: Plan) -> None:
    names = [row.request_id for row in plan.decode]
    chosen = set(names)
    assert len(chosen) == len(names) <= self.conf.scheduler.max_batch
    able = [name for name, left in self.prefilled.items() if left]
    assert names == [name for name in able if name in chosen]
    if able:
      assert names[0] == able[0]  # the oldest always runs
    self.full["batch"] += len(names) == self.conf.scheduler.max_batch
    self._slots(plan, able)
    older = 0
    for name in able:  # a pause lowers the steps left of who is older, by one at least
      pauses, bound = self.paused.get(name, (0, older))
      self.paused[name] = pauses + (name not in chosen), bound
      self.paused_most = max(self.paused_most, self.paused[name][0])
      assert self.paused[name][0] <= bound
      older += self.prefilled[name]
    for row in plan.decode:
      assert row.step == self.steps[row.request_id] and self.lanes[row.lane] == row.request_id
      self.steps[row.request_id] += 1
      self.prefilled[row.request_id] -= 1

  def _slots(self, plan: Plan, able: list[str]) -> None:
    if self.conf.scheduler.batch_control == "none":
      return
    selects = [min(row.position // self.shape.S, self.conf.budget_blocks) for row in plan.decode]
    need = [
      self.sets.get(row.request_id, n * self.shape.L * self.shape.K)
      for row, n in zip(plan.decode, selects, strict=True)
    ]
    assert sum(need) <= self.shape.P or len(need) == 1
    self.full["slots"] += len(need) < min(len(able), self.conf.scheduler.max_batch)

  def _end(self, name: str) -> None:
    del self.prefilled[name]
    self.sets.pop(name, None)
    self.owner[self.table.pop(name)] = -1
    del self.lanes[next(lane for lane, of in self.lanes.items() if of == name)]


def simulate(n: int, seed: int, *changes: str) -> Watch:
  """n short requests in bursts and pauses, all rules checked in every iteration and at the end."""
  rng, conf, clock = np.random.default_rng(seed), config(*changes), Virtual()
  prompts, outputs = rng.integers(1, 120, n), 1 + rng.geometric(0.2, n)
  prompts[:: n // 20], outputs[3 :: n // 20] = 440, 60  # some long ones
  all_items = items(prompts.tolist(), outputs.tolist())
  gaps = rng.exponential(0.01, n) * np.where(np.arange(n) // 50 % 2, 4.0, 0.2)
  device = executor(conf, clock)
  watch = Watch(conf, device.shape, all_items)
  engine = Engine(device, clock=clock, observer=watch)
  ended: Counter[str] = Counter()
  served = run.serve(engine, all_items, np.cumsum(gaps), lambda end: ended.update([end.id]))
  assert served.summary.requests == n and not served.refused and not served.failed
  assert ended == Counter(item.id for item in all_items)
  assert served.summary.output_tokens == outputs.sum() == watch.steps.total() + n
  scheduler = engine._scheduler
  assert watch.next_admitted == n and not engine.has_work and not engine._live
  assert scheduler.pool_blocks_in_use == 0 and scheduler._allocator.available == device.shape.M
  assert sorted(scheduler._lanes) == list(range(device.shape.R))
  return watch


@pytest.mark.parametrize(
  "changes, reached",
  [
    ([], {"slots", "lanes"}),
    (["scheduler.prefill=chunked", "scheduler.chunk_tokens=64"], {"slots"}),  # which a prompt waits for too
    (["scheduler.batch_control=none"], {"batch", "lanes"}),
    (["cache.dram_bytes=640KiB", "cache.hbm_bytes=400KB"], {"slots", "pool"}),
  ],
)
def test_rules_hold_in_every_iteration(changes: list[str], reached: set[str]):
  watch = simulate(1500, 0, *changes)
  assert reached <= set(+watch.full), watch.full
  assert watch.paused_most > 1


@pytest.mark.slow
@pytest.mark.soak
def test_rules_hold_for_a_hundred_thousand_requests():
  watch = simulate(100_000, 1)
  assert {"slots", "lanes"} <= set(+watch.full) and watch.paused_most > 1
