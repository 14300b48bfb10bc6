"""The engine over a device whose tokens can be computed by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.config import SchedulerConfig
from sparse_serve_jax.sampling_params import SamplingParams
from sparse_serve_jax.serving.metrics import request_metrics
from sparse_serve_jax.serving.plan import MAX_BANNED, Observed, Plan, Sampling, StepResult
from sparse_serve_jax.serving.request import Request, State
from tests.fake_engine import EOS, VOCAB, FakeModel, S, continuation, fake_engine, next_token


def test_tokens_are_those_of_the_model():
  engine, executor = fake_engine()
  prompts = [[5, 1, 2], [9] * 8, list(range(30))]
  added = [engine.add_request(prompt, max_new_tokens=n) for prompt, n in zip(prompts, (7, 1, 12), strict=True)]
  ended = engine.run()
  assert [request.id for request in ended] == [added[i].id for i in (1, 0, 2)]
  for request, prompt in zip(added, prompts, strict=True):
    assert request.output_tokens == continuation(prompt, request.max_new_tokens)
    assert (request.state, request.finish_reason) == (State.FINISHED, "length")
  assert not engine.has_work and engine.run() == []
  assert executor.most_outstanding == 2  # the one just dispatched and the one whose result is read next


def test_sampling_is_passed_on():
  engine, _ = fake_engine()
  request = engine.add_request([1, 2, 3], 5, temperature=0.5, top_p=0.9, seed=11)
  engine.run()
  assert request.sampling == Sampling(0.5, 0.9, 11)
  assert request.output_tokens == continuation([1, 2, 3], 5, request.sampling) != continuation([1, 2, 3], 5)


def test_a_stop_token_ends_and_is_not_output():
  prompt = [3, 4, 5]
  full = continuation(prompt, 9)
  assert full[4] not in full[:4]
  engine, executor = fake_engine()
  request = engine.add_request(prompt, 9, stop_token_ids=[full[4]])
  engine.run()
  assert (request.output_tokens, request.finish_reason) == (full[:4], "stop")
  decoded = sum(row.request_id == request.id for plan in executor.plans for row in plan.decode)
  assert decoded == 4 + 1  # one was planned before the stop token was read


def test_eos_stops_unless_ignored():
  prompt = next([a, b] for a in range(EOS) for b in range(EOS) if continuation([a, b], 3)[1] == 44)
  tokens = continuation(prompt, 3)
  for ignore, expected, reason in [(False, tokens[:1], "stop"), (True, tokens, "length")]:
    engine, _ = fake_engine(model=FakeModel(eos_token_ids=(44,)))
    request = engine.add_request(prompt, 3, ignore_eos=ignore)
    engine.run()
    assert (request.output_tokens, request.finish_reason) == (expected, reason)


def test_a_first_token_that_stops():
  engine, _ = fake_engine()
  request = engine.add_request([3, 4], 9, stop_token_ids=[next_token([3, 4])])
  assert engine.run() == [request]
  assert (request.output_tokens, request.finish_reason, request.token_times) == ([], "stop", [])
  assert request.first_token_time is not None


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 5, 9])
def test_no_stop_token_comes_before_min_tokens(min_tokens):
  """The first three tokens would be stop tokens, of which the model's EOS is one."""
  stops = [7, 18, 29, 41, 50, 66, 80, 95]
  stopped = lambda prompt, n: len(continuation(prompt, n + 1, stops=stops, min_tokens=n)) == n  # noqa: E731
  prompt = next(p for p in map(list, itertools.product(range(EOS), repeat=2)) if all(stopped(p, n) for n in range(3)))
  expected = continuation(prompt, 9, stops=stops, min_tokens=min_tokens)
  engine, executor = fake_engine(model=FakeModel(eos_token_ids=(stops[0],)))
  request = engine.add_request(prompt, 9, stop_token_ids=stops[1:], min_tokens=min_tokens)
  other = engine.add_request(prompt, 9)
  engine.run()
  assert request.output_tokens == expected and len(expected) >= min_tokens
  assert other.output_tokens == continuation(prompt, 9, stops=[stops[0]])
  rows = [row for plan in executor.plans for row in plan.decode if row.request_id == request.id]
  assert [row.step for row in rows if not row.sampling.plain] == list(range(min_tokens - 1))


def test_what_min_tokens_bans():
  """Stop tokens that can come, and so neither an EOS that is ignored nor an id beyond the vocabulary."""
  engine, executor = fake_engine(model=FakeModel(eos_token_ids=(44,)))
  many = [*range(MAX_BANNED - 1), -1, VOCAB, 2**40]
  added = [
    engine.add_request([1], 3, stop_token_ids=many, min_tokens=2),
    engine.add_request([1], 3, stop_token_ids=[7], min_tokens=2, ignore_eos=True),
    engine.add_request([1], 3, min_tokens=2, ignore_eos=True),
    engine.add_request([1], 3, stop_token_ids=range(50)),
  ]
  engine.run()
  banned = [{*range(MAX_BANNED - 1), 44}, {7}, set(), set()]
  for request, first in zip(added, banned, strict=True):
    works = [work for plan in executor.plans for work in plan.works if work.request_id == request.id]
    rows = [row for plan in executor.plans for row in plan.decode if row.request_id == request.id]
    assert [set(work.sampling.banned) for work in works] == [first]
    assert [set(row.sampling.banned) for row in rows] == [first, set()][: len(rows)]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"prompt": []}, "prompt is empty"),
    (
      {"prompt": [1, VOCAB, -1]},
      f"2 token ids are outside the vocabulary of {VOCAB}, the first is {VOCAB} at position 1",
    ),
    ({"prompt": [-1]}, "the first is -1 at position 0"),
    ({"prompt": [1.5]}, r"a list of token ids, got \[1.5\]"),
    ({"prompt": [[1]]}, r"a list of token ids, got \[\[1\]\]"),
    ({"prompt": [1] * 60, "max_new_tokens": 5}, "65, but only 64 tokens would fit"),
    (
      {"prompt": [1], "max_new_tokens": 3.0},
      "max_new_tokens must be an integer of at least 1 and below 2\\*\\*31, got 3.0",
    ),
    (
      {"prompt": [1], "max_new_tokens": 0},
      "max_new_tokens must be an integer of at least 1 and below 2\\*\\*31, got 0",
    ),
    ({"prompt": [1], "temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
    ({"prompt": [1], "temperature": float("nan")}, "got nan"),
    ({"prompt": [1], "top_p": 0}, "top_p must be above 0 and at most 1, got 0"),
    ({"prompt": [1], "min_tokens": -1}, "^min_tokens must be an integer of at least 0 and below 2\\*\\*31, got -1"),
    ({"prompt": [], "request_id": "b"}, "^request 'b': the prompt is empty, at least one token is needed"),
    ({"prompt": [1], "min_tokens": 4}, "at most max_tokens=3, got 4"),
    ({"prompt": [1], "top_q": 4}, "there is no sampling parameter 'top_q'; the nearest is 'top_"),
    ({"prompt": [1], "stop": "x"}, "stop and n are for LLM.generate"),
    ({"prompt": [1], "params": SamplingParams()}, "give params or single options, got both"),
    ({"prompt": [1], "min_tokens": 1.0}, "got 1.0"),
    (
      {"prompt": [1], "min_tokens": 1, "stop_token_ids": range(MAX_BANNED)},
      f"min_tokens=1 takes at most {MAX_BANNED} stop tokens, the model's EOS tokens included, got {MAX_BANNED + 1}",
    ),
    ({"prompt": [1], "seed": -1}, "seed must be an integer of at least 0"),
    ({"prompt": [1], "request_id": "a"}, "'a': a request of this name has not ended yet"),
  ],
)
def test_bad_input_leaves_others_untouched(arguments, message):
  engine, _ = fake_engine()
  good = engine.add_request([1, 2], 3, request_id="a")
  with pytest.raises(ValueError, match=message):
    engine.add_request(**{"max_new_tokens": 3, **arguments})
  assert engine.run() == [good] and good.output_tokens == continuation([1, 2], 3)


def test_a_name_may_be_used_again_while_the_old_ones_last_token_is_out():
  engine, _ = fake_engine()
  prompt = [3, 4, 5]
  stop = continuation(prompt, 3)[2]
  engine.add_request(prompt, 9, stop_token_ids=[stop], request_id="a")
  while not (ended := engine.step()):
    pass
  again = engine.add_request([8, 8], 4, request_id="a")  # one decode row of the old one still runs
  assert engine.run() == [again]
  assert ended[0].output_tokens == continuation(prompt, 2) and again.output_tokens == continuation([8, 8], 4)


def test_automatic_names_avoid_those_in_use():
  engine, _ = fake_engine()
  named = [engine.add_request([i], 3, request_id=f"request-{i}") for i in (1, 0, 3)]
  others = [engine.add_request([10 + i], 3) for i in range(3)]
  assert len({request.id for request in named + others}) == 6
  engine.run()
  assert engine.add_request([7], 3).id not in {request.id for request in others}
  for request in named + others:
    assert request.output_tokens == continuation(request.prompt.tolist(), 3)


def test_streaming_and_event_times():
  engine, _ = fake_engine()
  seen: list[tuple[str, int]] = []
  a, b = (
    engine.add_request([i], 4, on_token=lambda r, t: seen.append((r.id, t)), request_id=n)
    for i, n in [(1, "a"), (2, "b")]
  )
  engine.run()
  assert seen == [
    *itertools.chain.from_iterable(
      zip([("a", t) for t in a.output_tokens], [("b", t) for t in b.output_tokens], strict=True)
    )
  ]
  assert a.scheduled_time is not None and a.finish_time is not None
  times = [a.arrival_time, a.scheduled_time, *a.token_times]
  assert times == sorted(set(times)) and a.first_token_time == a.token_times[0] and a.finish_time == a.token_times[-1]


def test_a_callback_that_raises_costs_its_own_request_only():
  engine, _ = fake_engine()
  seen = []

  def broken(request: Request, token: int) -> None:
    if len(request.output_tokens) == 2:
      raise RuntimeError("gone")

  a = engine.add_request([1], 5, on_token=broken)
  b = engine.add_request([2], 5, on_token=lambda request, token: seen.append(token))
  assert engine.run() == [a, b]
  assert (a.state, a.output_tokens) == (State.CANCELLED, continuation([1], 2)) and isinstance(a.error, RuntimeError)
  assert b.output_tokens == seen == continuation([2], 5) and b.error is None


def test_a_callback_that_raises_on_the_last_token_leaves_it_finished():
  engine, _ = fake_engine()

  def broken(request: Request, token: int) -> None:
    raise RuntimeError("gone")

  a = engine.add_request([1], 1, on_token=broken)
  assert engine.run() == [a]
  assert (a.finish_reason, a.output_tokens) == ("length", continuation([1], 1)) and isinstance(a.error, RuntimeError)


def test_callbacks_may_cancel_and_add():
  engine, _ = fake_engine()
  later = []

  def first(request: Request, token: int) -> None:
    engine.cancel("b")
    if not later:
      later.append(engine.add_request([7, 7], 2))

  called = []
  a = engine.add_request([1], 3, on_token=first)
  b = engine.add_request([2], 3, request_id="b", on_token=lambda request, token: called.append(token))
  assert engine.run() == [b, a, *later]
  assert b.state is State.CANCELLED and called == []  # it was cancelled before its callback's turn
  assert a.output_tokens == continuation([1], 3) and later[0].output_tokens == continuation([7, 7], 2)


def test_cancel_in_the_middle_of_a_prompt():
  engine, _ = fake_engine(SchedulerConfig(max_inject_tokens=12))
  engine.add_request([1, 2], 9, request_id="running")
  engine.add_request([1] * 12, 9, request_id="partly")
  engine.add_request([1, 2], 9, request_id="waiting")
  engine.step(), engine.step()
  ids = ["running", "partly", "waiting"]
  assert [engine.cancel(name) for name in [*ids, "running", "never"]] == [True, True, True, False, False]
  assert [request.id for request in engine.run()] == ids
  assert not engine.has_work


def test_usage_is_counted():
  engine, executor = fake_engine(SchedulerConfig(max_batch=2))
  for _ in range(3):
    engine.add_request([1] * 8, 4)
  engine.run()
  usage = engine.usage
  assert usage.blocks_attended == 4 * 3 * 3 and usage.blocks_loaded == 3 * 3 and usage.hbm_hit_rate == 0.75
  assert usage.blocks_saved == usage.iterations == len(executor.plans)
  assert usage.peak_hbm_kv_bytes == executor.shape.fixed_bytes + 2 * 256  # at most two rows decode
  assert usage.peak_dram_kv_bytes == 3 * 2 * 2 * 2 * 256  # requests, their blocks, layers, heads, bytes


def test_the_observer_sees_every_plan_with_its_result_in_order():
  seen: list[Observed] = []
  delivered = []  # output tokens that requests had when their plan was observed

  def observer(one: Observed) -> None:
    seen.append(one)
    delivered.extend(requests[name].output_tokens[-1] == token for name, token in one.result.tokens.items())

  engine, executor = fake_engine(SchedulerConfig(max_inject_tokens=24, working_set_steps=2), observer=observer)
  requests = {r.id: r for r in [engine.add_request([3] * n, 6) for n in (4, 20, 9)]}
  engine.run()
  assert [id(plan) for plan, *_ in seen] == [id(plan) for plan in executor.plans]
  assert [plan.iteration for plan, *_ in seen] == list(range(1, len(seen) + 1))
  for plan, result, planned, dispatched, done, pool_blocks in seen:
    assert planned < dispatched < done and 0 <= pool_blocks <= executor.shape.M
    ends = [work.request_id for work in plan.works if work.last]
    assert sorted(result.tokens) == sorted([*ends, *(row.request_id for row in plan.decode)])
    assert set(result.working_sets) == {row.request_id for row in plan.measure}
    assert result.stats.attended == 4 * len(plan.decode)
  assert delivered == [True] * 3 * 6


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_read_that_is_interrupted_is_made_again(at):
  """By the next step; every request gets all its tokens, once."""
  seen: dict[str, list[int]] = {"a": [], "b": []}
  engine, executor = fake_engine(SchedulerConfig(max_inject_tokens=24))
  prompts = {"a": [4] * 5, "b": [6] * 20}
  for name, prompt in prompts.items():
    engine.add_request(prompt, 6, request_id=name, on_token=lambda r, token: seen[r.id].append(token))
  execute, reads = executor.execute, itertools.count(1)

  def failing(plan: Plan) -> StepResult:
    if next(reads) == at:
      raise KeyboardInterrupt
    return execute(plan)

  executor.execute = failing
  with pytest.raises(KeyboardInterrupt):
    engine.run()
  assert not engine.failed
  ended = engine.run()
  assert sorted(request.id for request in ended) == ["a", "b"]
  for request in ended:
    assert request.output_tokens == seen[request.id] == continuation(prompts[request.id], 6)
  assert engine.usage.iterations == len(executor.plans) and not engine.has_work


def test_metrics_of_a_request_cancelled_before_admission():
  engine, _ = fake_engine(R=1)
  engine.add_request([1, 2], 9)
  waiting = engine.add_request([3], 9, request_id="waiting")
  engine.step(), engine.step()
  engine.cancel("waiting")
  assert waiting in engine.step() and waiting.finish_time is not None
  total = waiting.finish_time - waiting.arrival_time
  assert total > 0
  assert request_metrics(waiting) == {
    "ttft_s": None,
    "tbt_mean_s": None,
    "scheduling_delay_s": None,
    "total_s": total,
  }


@st.composite
def situations(draw):
  scheduler = SchedulerConfig(
    max_batch=draw(st.integers(1, 4)),
    prefill=draw(st.sampled_from(["layer_segmented", "chunked"])),
    chunk_tokens=S * draw(st.integers(1, 4)),
    max_inject_tokens=draw(st.integers(1, 80)),
    working_set_steps=draw(st.integers(1, 4)),
  )
  changes = {
    "M": draw(st.integers(5, 12)),
    "P": draw(st.sampled_from([0, 1, 12, 40])),
    "R": draw(st.integers(1, 4)),
    "L": draw(st.integers(1, 3)),
  }
  prompt = st.lists(st.integers(0, EOS), min_size=1, max_size=28)
  n_tokens = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.just(0) | st.integers(0, n)))
  wanted = st.tuples(prompt, n_tokens, st.integers(0, 12), st.none() | st.integers(0, 12))
  return (
    scheduler,
    changes,
    draw(st.lists(wanted, min_size=1, max_size=7)),
    draw(st.sets(st.integers(0, EOS - 1), max_size=MAX_BANNED - 1)),
  )


@given(situations())
def test_neighbours_never_change_a_requests_tokens(situation):
  scheduler, changes, wanted, stops = situation
  engine, _ = fake_engine(scheduler, **changes)
  ended: list[Request] = []
  requests: dict[int, Request] = {}
  for now in range(2000):
    for i, (prompt, (n, least), arrival, cancel) in enumerate(wanted):
      if arrival == now:
        options = {"stop_token_ids": sorted(stops), "min_tokens": least, "request_id": str(i)}
        requests[i] = engine.add_request(prompt, n, **options)
      if i in requests and cancel is not None and cancel + arrival == now:
        engine.cancel(str(i))
    ended += engine.step()
    if len(requests) == len(wanted) and not engine.has_work:
      break
  assert sorted(request.id for request in ended) == sorted(map(str, requests))
  for i, (prompt, (n, least), _, cancel) in enumerate(wanted):
    expected = continuation(prompt, n, stops=stops, min_tokens=least)
    if requests[i].state is State.CANCELLED:
      assert cancel is not None and requests[i].output_tokens == expected[: len(requests[i].output_tokens)]
    else:
      assert requests[i].output_tokens == expected
