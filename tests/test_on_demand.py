"""Pool blocks on demand: who is preempted, what is computed again, and that no token depends on it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.config import SchedulerConfig, override
from sparse_serve_jax.serving import scheduler as scheduler_room
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.metrics import summarize
from sparse_serve_jax.serving.plan import Sampling
from sparse_serve_jax.serving.request import State
from sparse_serve_jax.serving.scheduler import Scheduler
from sparse_serve_jax.serving.timeline import Timeline
from tests.fake_engine import SHAPE, Ticks, continuation, fake_engine, fake_executor
from tests.test_scheduler import S, advance, config, names, request, result, shape_of


@pytest.fixture(autouse=True, scope="module")
def little_grace():
  """One block is left for each request that decodes: pools are small here."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scheduler_room, "GRACE_BLOCKS", 1)
    yield


ON_DEMAND = SchedulerConfig(reserve="on_demand", batch_control="none")


def scheduler_of(*sizes: tuple[str, int, int], scheduler: SchedulerConfig = ON_DEMAND, **shape) -> Scheduler:
  """With requests of these names, prompt and output tokens, over whole blocks."""
  made = Scheduler(config(scheduler, policy="dense"), shape_of(**shape))
  for name, n_prompt, n_output in sizes:
    made.add(request(name, n_prompt, n_output))
  return made


# ---------------------------------------------------------------------------------------------------------- admission


def test_a_request_is_admitted_with_the_blocks_of_its_prompt_and_one_more():
  scheduler = scheduler_of(("a", 2 * S, 5 * S), ("b", 2 * S + 3, 5 * S), ("c", 2 * S, 1))
  assert [len(of.table) for of in scheduler.schedule(0.0).admit] == [3, 3, 3]
  assert scheduler.pool_blocks_in_use == 9


@pytest.mark.parametrize("grace", [1, 4])
def test_blocks_are_left_for_each_that_decodes(grace: int, monkeypatch: pytest.MonkeyPatch):
  """a and b take 2 each, b only if the pool still has those for a; c takes 2 more, if it has those for both."""
  monkeypatch.setattr(scheduler_room, "GRACE_BLOCKS", grace)
  for n_blocks, admitted in ((3 + grace, 1), (4 + grace, 2), (5 + 2 * grace, 2), (6 + 2 * grace, 3)):
    scheduler = scheduler_of(("a", S, 9), ("b", S, 9), ("c", S, 9), M=n_blocks)
    assert len(scheduler.schedule(0.0).admit) == admitted


def test_a_request_that_never_fits_alone_is_refused_as_ever():
  with pytest.raises(ValueError, match="only 40 tokens would fit"):
    scheduler_of(("a", 38, 3), M=5)


# ----------------------------------------------------------------------------------------------------------- preemption


def test_the_youngest_goes_and_is_the_next_in_line():
  """Each has two blocks of a pool of 8 and needs a third one in its 16th step; d comes too late for all of it."""
  scheduler = scheduler_of(("a", S, 40), ("b", S, 40), ("c", S, 40), M=8)
  advance(scheduler)
  scheduler.add(request("d", S, 2))
  plans = [advance(scheduler) for _ in range(17)]
  assert [names(plan) for plan in plans] == [["a", "b", "c"]] * 15 + [["a", "b"]] * 2
  assert [plan.preempt for plan in plans] == [()] * 15 + [("c",), ()]
  assert [each.id for each in scheduler._waiting] == ["c", "d"]


def test_an_older_one_takes_the_blocks_of_the_youngest_an_iteration_later():
  """b takes the last block in its 12th step; a needs a third one in its 16th."""
  scheduler = scheduler_of(("a", S, 20), ("b", S // 2, 20), M=4)
  plans = [advance(scheduler) for _ in range(18)]
  rows = [names(plan) for plan in plans]
  assert rows == [[], *[["a", "b"]] * 15, [], ["a"]]
  assert plans[16].preempt == ("b",) and plans[16].release.size == 2
  assert plans[17].decode[0].fills in plans[16].release.tolist()


def test_several_keep_their_order_and_come_back_oldest_first():
  scheduler = scheduler_of(*((name, S, 60) for name in "abcd"), M=11, R=4)
  requests = {each.request.id: each.request for each in scheduler._decoding} or {r.id: r for r in scheduler._waiting}
  order, preempted = [], []
  for _ in range(400):
    if not scheduler.has_work:
      break
    plan = advance(scheduler)
    preempted += plan.preempt
    order += [admission.request_id for admission in plan.admit]
    residents = [r.request.id for r in scheduler._decoding] + [r.id for r in scheduler._waiting]
    assert residents == sorted(residents)
    assert sum(each.pool_blocks for each in requests.values()) == scheduler.pool_blocks_in_use  # none is shared
  assert order[:4] == ["a", "b", "c", "d"] and "a" not in preempted and {"c", "d"} <= {*preempted}
  assert [requests[name].preemptions for name in "abcd"] == [preempted.count(name) for name in "abcd"]
  assert all(len(each.output_tokens) == 60 for each in requests.values())
  assert scheduler.pool_blocks_in_use == 0 and scheduler._allocator.available == 11


def test_a_prompt_that_is_being_prefilled_goes_first_and_begins_anew():
  chunked = dataclasses.replace(ON_DEMAND, prefill="chunked", chunk_tokens=S)
  scheduler = scheduler_of(("a", 2 * S - 3, 40), scheduler=chunked, M=10)
  advance(scheduler), advance(scheduler)
  scheduler.add(late := request("b", 5 * S, 4))
  advance(scheduler)
  scheduler._decoding[0].table = scheduler._decoding[0].table[:1]  # as if it had none for what it writes now
  scheduler._allocator.allocate(scheduler._allocator.available)
  plans = [advance(scheduler) for _ in range(3)]
  assert plans[0].prefill and not plans[0].preempt  # the tail has room yet
  assert plans[1].preempt == ("b",) and late.state is State.WAITING and late.lost_tokens == 2 * S
  assert not plans[1].prefill and not plans[1].decode and names(plans[2]) == ["a"]


def test_who_was_preempted_waits_for_its_results():
  scheduler = scheduler_of(("a", S, 40))
  first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
  scheduler._preempt(scheduler._decoding[0])
  assert [work.request_id for work in scheduler.schedule(0.0).works] == []
  scheduler.update(result(first, 20), 0.0)
  assert [work.request_id for work in scheduler.schedule(0.0).works] == []
  scheduler.update(result(second, 21), 0.0)
  assert [work.tokens.tolist() for work in scheduler.schedule(0.0).works] == [[*range(S), 20, 21]]


def test_what_was_drawn_before_is_prefilled_or_given_again():
  """dense: all of it is prefilled. topk attends to 9 blocks of the prompt: beyond, steps are made again."""
  for policy, n_prefilled in (("dense", S + 17), ("topk", S), ("psa", S)):
    sparse = dict(policy=policy, token_budget=3 * S) if policy == "topk" else dict(policy=policy)
    scheduler = Scheduler(config(ON_DEMAND, **sparse), shape_of())
    scheduler.add(each := request("a", S, 40))
    for token in range(20, 37):
      advance(scheduler, token)
    scheduler._preempt(scheduler._decoding[0])
    plan = advance(scheduler, 37)
    prefilled = plan.works[0].tokens.tolist()
    n_prefilled = 4 * S if policy == "topk" else n_prefilled
    assert prefilled == [*range(S), *range(20, 37)][:n_prefilled], policy
    given = [advance(scheduler, 38).decode[0].token for _ in range(20)]
    left = list(range(20, 37))[n_prefilled - S :]
    assert given == left + [-1] * (20 - len(left)), policy
    drawn = [37, *[38] * 20] if not left else [38] * (21 - len(left))  # the last one made again draws
    assert each.output_tokens == [*range(20, 37), *drawn]


def test_a_failed_device_takes_nothing_from_who_was_preempted():
  """b waits with 16 tokens when a is lost, and goes on; its last one was on its way and is drawn again."""
  engine, executor = fake_engine(ON_DEMAND, M=4)
  a, b = (engine.add_request([1] * n, 20, request_id=name, ignore_eos=True) for name, n in (("a", S), ("b", S // 2)))
  while not b.preemptions:
    engine.step()
  n = len(b.output_tokens)
  good, executor.execute = executor.execute, lambda plan: 1 // 0
  engine.step()
  executor.execute = good
  engine.run()
  assert (a.finish_reason, b.finish_reason) == ("error", "length") and 14 <= n < 20
  assert b.output_tokens == continuation([1] * (S // 2), 20)
  assert engine._scheduler.pool_blocks_in_use == 0


@pytest.mark.parametrize("when", [0, 1, 2])
def test_who_was_preempted_may_be_cancelled_or_stop(when: int):
  """Cancelled `when` steps later; or by a stop token that was on its way."""
  engine, _ = fake_engine(ON_DEMAND, M=4)
  a, b = (engine.add_request([1] * n, 20, request_id=name, ignore_eos=True) for name, n in (("a", S), ("b", S // 2)))
  while not b.preemptions:
    engine.step()
  if when:
    for _ in range(when):
      engine.step()
    assert b.state is State.WAITING and engine.cancel("b")
  else:
    b.stop_token_ids = frozenset(range(97))
  engine.run()
  assert (a.finish_reason, b.finish_reason) == ("length", "cancelled" if when else "stop")
  assert a.output_tokens == continuation([1] * S, 20) and not engine._scheduler._waiting
  assert b.output_tokens == continuation([1] * (S // 2), len(b.output_tokens)) and b.preemptions == 1
  assert engine._scheduler.pool_blocks_in_use == 0


def test_what_is_told_of_a_preemption():
  """b has a token when it loses KV of 15 tokens, and computes it again when a has ended."""
  seen = Timeline(SHAPE)
  executor = fake_executor(ON_DEMAND, M=4)
  executor.config = override(executor.config, ["sparse.policy=dense", "cache.prefix=false"])
  engine = Engine(executor, clock=Ticks(), observer=seen.observe)
  a, b = (engine.add_request([1] * n, 20, request_id=name, ignore_eos=True) for name, n in (("a", S), ("b", S // 2)))
  ended = engine.run()
  for each in ended:
    seen.add(each)
  summary = summarize(ended, engine.usage)
  assert (a.preemptions, b.preemptions, summary.preemptions) == (0, 1, 1)
  assert b.lost_tokens == b.recomputed_tokens == summary.recomputed_tokens == S // 2 + 15
  assert len(b.token_times) == len(b.output_tokens) == 20 and b.first_token_time == b.token_times[0]
  events = seen.to_dict()["traceEvents"]
  assert [e["args"]["preempted"] for e in events if "preempted" in e.get("args", {})].count(1) == 1
  phases = [e["name"] for e in events if e.get("args", {}).get("request") == "b"]
  assert phases == ["waiting", "prefill", "decode", "waiting", "prefill", "decode"]


# -------------------------------------------------------------------------------------------------------- whole engines


@st.composite
def workloads(draw):
  scheduler = SchedulerConfig(
    reserve="on_demand",
    max_batch=draw(st.integers(2, 6)),
    prefill=draw(st.sampled_from(["layer_segmented", "chunked"])),
    chunk_tokens=S * draw(st.integers(1, 4)),
    max_inject_tokens=draw(st.integers(8, 160) | st.just(8)),
    batch_control=draw(st.sampled_from(["working_set", "none"])),
    working_set_steps=draw(st.integers(1, 4)),
  )
  n_prompt = st.integers(1, 24) | st.integers(40, 48)
  sizes = st.tuples(n_prompt, st.integers(1, 40) | st.integers(25, 40), st.integers(0, 9) | st.just(0))
  sizes = draw(st.lists(sizes, min_size=3, max_size=9))
  policy = draw(st.sampled_from(["dense", "topk", "psa"]))
  return scheduler, policy, draw(st.booleans()), draw(st.integers(8, 12)), sizes, draw(st.integers(0, 2**16))


@given(workloads())
def test_tokens_are_those_of_a_large_pool(workload):
  """Whatever is preempted, callers get each token once, and nothing is held at the end."""
  scheduler, policy, prefix, n_blocks, sizes, seed = workload
  rng = np.random.default_rng(seed)
  executor = fake_executor(scheduler, M=n_blocks)
  executor.config = override(executor.config, [f"sparse.policy={policy}", f"cache.prefix={str(prefix).lower()}"])
  engine = Engine(executor, clock=Ticks())
  heard: dict[str, list[int]] = {}
  requests, arrivals = [], sorted(enumerate(sizes), key=lambda each: each[1][2])
  for step in range(4000):
    while arrivals and arrivals[0][1][2] <= step:
      i, (n_prompt, n_output, _) = arrivals.pop(0)
      n_output = min(n_output, SHAPE.max_context - n_prompt)
      prompt = np.repeat(rng.integers(0, 3), n_prompt)  # many begin alike
      options = {"temperature": float(i % 2), "seed": i, "stop_token_ids": [5, 6], "min_tokens": min(4, n_output)}
      tell = lambda of, token: heard.setdefault(of.id, []).append(token)  # noqa: E731
      requests.append(engine.add_request(prompt, n_output, request_id=str(i), on_token=tell, **options))
    if not engine.has_work and not arrivals:
      break
    if step == 20 and requests:
      engine.cancel(requests[seed % len(requests)].id)
    engine.step()
  assert all(each.ended for each in requests)
  for each in requests:
    sampling = Sampling(temperature=each.sampling.temperature, seed=each.sampling.seed)
    stops = each.stop_token_ids
    expected = continuation(each.prompt.tolist(), each.max_new_tokens, sampling, stops, each.min_tokens)
    n = len(each.output_tokens) if each.finish_reason == "cancelled" else len(expected)
    assert each.output_tokens == heard.get(each.id, []) == expected[:n]
    assert len(each.token_times) == n
  assert engine._scheduler.pool_blocks_in_use == 0 and engine._scheduler._allocator.available == n_blocks
  assert sorted(engine._scheduler._lanes) == list(range(SHAPE.R))
