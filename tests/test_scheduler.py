"""The scheduler: plans by hand. Whole runs are in test_scheduler_runs.py."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.config import CacheConfig, EngineConfig, SchedulerConfig, SparseConfig
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Plan, StepResult, StepStats
from sparse_serve_jax.serving.request import Request, State
from sparse_serve_jax.serving.scheduler import Scheduler

S = 8
STOP = 7


def config(scheduler: SchedulerConfig | None = None, **sparse) -> EngineConfig:
  defaults = {"token_budget": 8 * S, "sink_tokens": S, "window_tokens": S}
  return EngineConfig(
    cache=CacheConfig(block_tokens=S, prefix=False),  # prompts are alike: tests/test_prefix.py shares them
    sparse=SparseConfig(**{**defaults, **sparse}),
    scheduler=scheduler or SchedulerConfig(),
  )


def shape_of(**changes) -> CacheShape:
  default = dict(K=2, L=3, M=64, P=1000, R=8, S=S, D=4, E=2, dtype="float32", offload=True, max_context=256)
  sizes = default | {"slab_tokens": 0} | changes
  return CacheShape(**(sizes | {"max_context": min(sizes["max_context"], sizes["M"] * S)}))


def request(name: str, n_prompt: int, n_output: int = 4) -> Request:
  return Request(
    name, np.arange(n_prompt, dtype=np.int32), n_output, arrival_time=0.0, stop_token_ids=frozenset({STOP})
  )


def result(plan: Plan, token: int = 1, working_sets: dict[str, int] | None = None) -> StepResult:
  names = [row.request_id for row in plan.decode] + [work.request_id for work in plan.works if work.last]
  return StepResult(
    dict.fromkeys(names, token), working_sets or {row.request_id: 0 for row in plan.measure}, StepStats()
  )


def pieces(plan: Plan) -> list[tuple[str, int, int, int, int, bool]]:
  return [(w.request_id, w.start, len(w.tokens), w.first_layer, w.n_layers, w.last) for w in plan.works]


def advance(scheduler: Scheduler, token: int = 1) -> Plan:
  """Plans an iteration and takes its result at once."""
  plan = scheduler.schedule(0.0)
  scheduler.update(result(plan, token), 0.0)
  return plan


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
  ("n_prompt", "n_output", "message"),
  [
    (0, 4, "prompt is empty"),
    (4, 0, "max_new_tokens must be at least 1, got 0"),
    (250, 7, r"250 prompt \+ 7 output tokens = 257, but only 256 tokens would fit"),
  ],
)
def test_check_refuses_with_numbers(n_prompt, n_output, message):
  with pytest.raises(ValueError, match=message):
    Scheduler(config(), shape_of()).add(request("a", n_prompt, n_output))


def test_the_pool_bounds_a_request_too_and_the_bound_itself_fits():
  scheduler = Scheduler(config(), shape_of(M=5))
  with pytest.raises(ValueError, match="only 40 tokens would fit"):
    scheduler.add(request("a", 38, 3))
  scheduler.add(request("b", 38, 2))
  assert len(scheduler.schedule(0.0).admit[0].table) == 5


# ------------------------------------------------------------------------------------------------------------- prefill


def test_segments_of_layers_and_short_prompts_share_an_iteration():
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=50)), shape_of())
  for name, n_prompt in [("a", 20), ("b", 10), ("c", 6), ("d", 7)]:
    scheduler.add(request(name, n_prompt))
  # One layer more would be 60. A program that is padded to 48 runs one of them.
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 20, layer, 1, False) for layer in range(2)]
  # a's last layer leaves 30, which is b whole
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 20, 2, 1, True), ("b", 0, 10, 0, 3, True)]
  assert pieces(scheduler.schedule(0.0)) == [("c", 0, 6, 0, 3, True), ("d", 0, 7, 0, 3, True)]


def test_a_prompt_that_does_not_fit_the_rest_is_not_admitted_early():
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=50)), shape_of())
  scheduler.add(request("a", 15))
  scheduler.add(late := request("b", 20))
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 15, 0, 3, True)]
  assert late.state is State.WAITING
  assert pieces(scheduler.schedule(0.0)) == [("b", 0, 20, layer, 1, False) for layer in range(2)]


def test_hybrid_chunks_within_a_layer():
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=2 * S + 3)), shape_of(L=2))
  scheduler.add(request("a", 5 * S + 1))
  plans = [pieces(scheduler.schedule(0.0)) for _ in range(6)]
  assert plans == [
    [("a", 0, 16, 0, 1, False)],
    [("a", 16, 16, 0, 1, False)],
    [("a", 32, 9, 0, 1, False)],
    [("a", 0, 16, 1, 1, False)],
    [("a", 16, 16, 1, 1, False)],
    [("a", 32, 9, 1, 1, True)],
  ]


def test_hybrid_chunks_are_multiples_of_eight_blocks_and_fill_the_allowance():
  # 19 blocks an iteration: chunks of 16, and the last block of a layer fits beside one
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=19 * S)), shape_of(L=2, max_context=512))
  scheduler.add(request("a", 33 * S))
  sizes = [[work[2] for work in pieces(scheduler.schedule(0.0))] for _ in range(5)]
  assert sizes == [[16 * S], [16 * S, S], [16 * S], [16 * S, S], []]


def test_one_block_is_the_smallest_piece():
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=1)), shape_of(L=1))
  scheduler.add(request("a", S + 2))
  assert [pieces(scheduler.schedule(0.0)) for _ in range(2)] == [[("a", 0, S, 0, 1, False)], [("a", S, 2, 0, 1, True)]]


def test_allowance_by_default_is_2048_tokens_through_all_layers():
  scheduler = Scheduler(config(), shape_of(max_context=8192, M=2048))
  scheduler.add(request("a", 2049))
  scheduler.add(request("b", 2047))
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 2049, 0, 2, False)]
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 2049, 2, 1, True)]
  assert pieces(scheduler.schedule(0.0)) == [("b", 0, 2047, 0, 3, True)]  # all layers at once, or it waits


@pytest.mark.parametrize(("n_prompt", "n_layers"), [(2050, [2, 1]), (3000, [2, 1]), (3073, [1, 1, 1])])
def test_a_segment_is_not_cut_for_what_others_left(n_prompt: int, n_layers: list[int]):
  """6144 token x layers an iteration. All of its segments together are as few as that permits."""
  scheduler = Scheduler(config(), shape_of(max_context=8192, M=2048))
  scheduler.add(request("a", 1024))
  scheduler.add(request("b", n_prompt))
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 1024, 0, 3, True)]
  works = [pieces(scheduler.schedule(0.0)) for _ in n_layers]
  assert [[work[4] for work in of] for of in works] == [[n] for n in n_layers]


def test_chunked_goes_through_all_layers_and_shares_the_rest():
  scheduler = Scheduler(config(SchedulerConfig(prefill="chunked", chunk_tokens=4 * S)), shape_of())
  scheduler.add(request("a", 5 * S + 1))
  scheduler.add(request("b", 9 * S))
  assert pieces(scheduler.schedule(0.0)) == [("a", 0, 32, 0, 3, False)]
  assert pieces(scheduler.schedule(0.0)) == [("a", 32, 9, 0, 3, True), ("b", 0, 16, 0, 3, False)]
  assert pieces(scheduler.schedule(0.0)) == [("b", 16, 32, 0, 3, False)]
  assert pieces(scheduler.schedule(0.0)) == [("b", 48, 24, 0, 3, True)]


def test_a_chunk_gets_the_tokens_that_decode_rows_leave():
  chunked = SchedulerConfig(prefill="chunked", chunk_tokens=4 * S, max_tokens=4 * S + 1, working_set_steps=99)
  scheduler = Scheduler(config(chunked), shape_of())
  scheduler.add(request("a", 2 * S, 9))
  scheduler.add(request("b", 2 * S, 3))
  scheduler.schedule(0.0)
  scheduler.add(request("c", 10 * S))
  plans = [scheduler.schedule(0.0) for _ in range(3)]
  assert [names(plan) for plan in plans] == [["a", "b"], ["a", "b"], ["a"]]
  assert [pieces(plan)[0][1:3] for plan in plans] == [(0, 3 * S), (3 * S, 3 * S), (6 * S, 4 * S)]


def test_a_segment_costs_its_share_of_the_layers():
  # 20 tokens beside 4 rows are 60 token x layers. One layer of 31 tokens is 11 tokens, one of 29 is 10
  scheduler = Scheduler(config(SchedulerConfig(max_batch=4, max_tokens=24)), shape_of())
  for name, n_prompt in [("a", 31), ("b", 29), ("c", 61)]:
    scheduler.add(request(name, n_prompt, 1))
  plans = [pieces(advance(scheduler)) for _ in range(5)]
  assert plans == [
    [("a", 0, 31, 0, 1, False)],
    [("a", 0, 31, 1, 1, False)],
    [("a", 0, 31, 2, 1, True), ("b", 0, 29, 0, 1, False)],
    [("b", 0, 29, layer, 1, layer == 2) for layer in (1, 2)],
    [("c", 0, 56, 0, 1, False)],  # beyond 60 a layer is cut
  ]


def test_max_tokens_bounds_decode_rows_and_the_first_in_line_waits_for_them():
  scheduler = Scheduler(config(SchedulerConfig(max_tokens=S, max_batch=16)), shape_of(R=16, L=1))
  for i in range(S + 1):
    scheduler.add(request(f"{i}", 1, 3))
  planned = [advance(scheduler) for _ in range(6)]
  assert [len(plan.decode) for plan in planned] == [0, 8, 8, 0, 1, 1]
  assert [len(plan.works) for plan in planned] == [8, 0, 0, 1, 0, 0]


def test_a_chunked_prompt_needs_slots_for_all_its_chunks_and_waits_for_older_requests():
  # a: 2 blocks x 6, or one more from its 8th step on; b: 4 blocks x 6 a chunk
  chunked = SchedulerConfig(prefill="chunked", chunk_tokens=4 * S, working_set_steps=99)
  scheduler = Scheduler(config(chunked), shape_of(P=12 + 24 + 23))
  scheduler.add(request("a", 2 * S, 4))
  advance(scheduler)
  scheduler.add(request("b", 10 * S, 4))
  plans = [advance(scheduler) for _ in range(6)]
  assert [names(plan) for plan in plans] == [["a"], ["a"], ["a"], [], [], ["b"]]
  assert [[piece[1:3] for piece in pieces(plan)] for plan in plans] == [
    [(0, 4 * S)], [], [], [(4 * S, 4 * S)], [(8 * S, 2 * S)], [],
  ]  # fmt: skip  # alone it runs beyond the slots there are: 60 > 59


def test_two_chunked_prompts_of_one_iteration_share_the_slots():
  chunked = SchedulerConfig(prefill="chunked", chunk_tokens=4 * S)
  for slots, expected in [(24, ["a", "b"]), (23, ["a"])]:
    scheduler = Scheduler(config(chunked), shape_of(P=slots))
    for name in ("a", "b"):
      scheduler.add(request(name, 2 * S))
    assert [work.request_id for work in scheduler.schedule(0.0).works] == expected


@pytest.mark.parametrize(("control", "prefill"), [("none", "chunked"), ("working_set", "layer_segmented")])
def test_prefill_that_needs_no_slots_or_is_not_controlled_is_not_limited(control, prefill):
  settings = SchedulerConfig(prefill=prefill, chunk_tokens=4 * S, batch_control=control)
  scheduler = Scheduler(config(settings), shape_of(P=1))
  decoding(scheduler, {"a": 2 * S})
  scheduler.add(request("b", 10 * S))
  assert len(scheduler.schedule(0.0).works) == 1


# ----------------------------------------------------------------------------------------------------------- admission


def test_nobody_passes_the_head_that_waits_for_blocks():
  scheduler = Scheduler(config(), shape_of(M=6))
  first, head, small = request("a", 29, 3), request("b", 28, 4), request("c", 2, 2)
  for each in (first, head, small):
    scheduler.add(each)
  assert [work.request_id for work in advance(scheduler).works] == ["a"]
  assert (head.state, small.state) == (State.WAITING, State.WAITING)  # 4 + 4 > 6 though 4 + 1 would fit
  advance(scheduler), advance(scheduler)
  assert first.state is State.FINISHED
  released = advance(scheduler)  # a's blocks come free with this plan, so are given out by the next one
  assert released.release.size == 4 and not released.prefill
  assert [work.request_id for work in advance(scheduler).works] == ["b", "c"]  # 4 + 1 blocks


def test_blocks_wait_for_the_last_plan_that_held_them_but_lanes_do_not():
  scheduler = Scheduler(config(), shape_of(M=2, R=1))
  scheduler.add(request("a", 8, 8))
  scheduler.add(request("b", 8, 8))
  first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
  scheduler.update(result(first, STOP), 0.0)  # a ends while the second plan still holds its table
  third = scheduler.schedule(0.0)
  assert third.release.tolist() == first.admit[0].table.tolist() and not third.prefill
  scheduler.update(result(second), 0.0)
  assert [work.request_id for work in scheduler.schedule(0.0).works] == ["b"]


def test_a_lane_is_waited_for():
  scheduler = Scheduler(config(), shape_of(R=1))
  scheduler.add(request("a", 4, 1))
  scheduler.add(request("b", 4, 1))
  assert len(advance(scheduler).works) == 1
  assert [work.request_id for work in advance(scheduler).works] == ["b"]


# -------------------------------------------------------------------------------------------------------------- decode


def test_positions_and_steps_are_counted_ahead_of_results():
  scheduler = Scheduler(config(), shape_of())
  scheduler.add(request("a", 6, 3))
  plans = [scheduler.schedule(0.0) for _ in range(4)]
  assert [[(row.position, row.step) for row in plan.decode] for plan in plans] == [[], [(6, 0)], [(7, 1)], []]
  assert plans[3].empty
  assert [plan.iteration for plan in plans[:3]] == [1, 2, 3]
  assert [[len(admission.table) for admission in plan.admit] for plan in plans] == [[2], [], [], []]


def test_an_empty_plan_takes_no_number():
  scheduler = Scheduler(config(), shape_of())
  assert scheduler.schedule(0.0).empty
  assert not scheduler.has_work
  scheduler.add(request("a", 6, 3))
  assert scheduler.schedule(0.0).iteration == 1


def test_a_late_stop_token_drops_the_token_planned_since():
  scheduler = Scheduler(config(), shape_of())
  scheduler.add(a := request("a", 6, 9))
  first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
  scheduler.update(result(first, 3), 1.0)
  third = scheduler.schedule(0.0)
  received = scheduler.update(result(second, STOP), 2.0)
  assert (received.tokens, received.ended) == ([], [a])
  assert (a.output_tokens, a.finish_reason, a.finish_time) == ([3], "stop", 2.0)
  fourth = scheduler.schedule(0.0)
  assert fourth.release.size == 2 and not fourth.decode
  assert scheduler.update(result(third, 5), 3.0) == ([], [])
  assert a.output_tokens == [3] and a.token_times == [1.0]


def decoding(scheduler: Scheduler, sizes: dict[str, int], n_output: int = 40) -> None:
  """Brings requests of these prompt lengths to where they decode."""
  for name, n_prompt in sizes.items():
    scheduler.add(request(name, n_prompt, n_output))
  plan = advance(scheduler)
  assert len(plan.works) == len(sizes)


def names(plan: Plan) -> list[str]:
  return [row.request_id for row in plan.decode]


def test_algorithm_1_has_no_break():
  # without history: full blocks x 3 layers x 2 heads = 24, 48, 12, 12; the budget is 8 blocks
  scheduler = Scheduler(config(), shape_of(P=48))
  decoding(scheduler, {"a": 32, "b": 64, "c": 16, "d": 16})
  assert names(scheduler.schedule(0.0)) == ["a", "c", "d"]


@pytest.mark.parametrize(
  ("sparse", "fits"),
  [
    ({}, 96),  # two with 10 full blocks, of which 8 fit the budget; 3 layers, 2 heads
    ({"policy": "psa"}, 120),
    ({"policy": "dense"}, 120),
    ({"dense_layers": 1}, 104),  # (10 + 8 + 8) x 2 heads each
  ],
)
def test_working_set_without_history(sparse, fits):
  for slots, expected in [(fits, ["a", "b"]), (fits - 1, ["a"])]:
    scheduler = Scheduler(config(**sparse), shape_of(P=slots))
    decoding(scheduler, {"a": 81, "b": 81})
    assert names(scheduler.schedule(0.0)) == expected


def test_the_oldest_runs_whatever_its_working_set():
  scheduler = Scheduler(config(), shape_of(P=1))
  decoding(scheduler, {"a": 64, "b": 64})
  assert names(scheduler.schedule(0.0)) == ["a"]


@pytest.mark.parametrize(("control", "slots"), [("none", 1), ("working_set", 0)])
def test_without_control_or_offload_all_run(control, slots):
  scheduler = Scheduler(config(SchedulerConfig(batch_control=control, working_set_steps=1)), shape_of(P=slots))
  decoding(scheduler, {"a": 64, "b": 64})
  plan = scheduler.schedule(0.0)
  assert names(plan) == ["a", "b"] and not plan.measure


def test_max_batch_takes_the_oldest():
  scheduler = Scheduler(config(SchedulerConfig(max_batch=2)), shape_of(P=48))
  decoding(scheduler, {"a": 32, "b": 64, "c": 16})
  assert names(scheduler.schedule(0.0)) == ["a"]  # b does not fit; c stands behind the first two


def test_working_sets_are_asked_for_every_w_steps_and_used_when_they_come():
  scheduler = Scheduler(config(SchedulerConfig(working_set_steps=3)), shape_of(P=50))
  decoding(scheduler, {"a": 32, "b": 64})  # 24 and 48: b pauses
  asked = []
  for _ in range(8):
    plan = scheduler.schedule(0.0)
    asked.append([(row.request_id, row.step) for row in plan.measure])
    scheduler.update(result(plan, working_sets={row.request_id: 2 for row in plan.measure}), 0.0)
    if plan.iteration > 5:
      assert names(plan) == ["a", "b"]  # 2 + 48
    else:
      assert names(plan) == ["a"]
  assert asked == [[], [], [], [("a", 3)], [], [], [("a", 6)], [("b", 3)]]


def test_the_last_step_is_not_measured():
  scheduler = Scheduler(config(SchedulerConfig(working_set_steps=3)), shape_of())
  decoding(scheduler, {"a": 16, "b": 16}, n_output=5)
  scheduler.add(request("c", 16, 6))
  asked = [[row.request_id for row in scheduler.schedule(0.0).measure] for _ in range(6)]
  assert asked == [[], [], [], [], ["c"], []]  # four steps are too few: the fourth would be measured and is the last


# -------------------------------------------------------------------------------------------------------- cancellation


def test_cancel_in_every_state_gives_everything_back():
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=20)), shape_of(M=6, R=2))
  running, partly, waiting = request("a", 6, 9), request("b", 20, 4), request("c", 4, 4)
  for each in (running, partly, waiting):
    scheduler.add(each)
  plan = scheduler.schedule(0.0)
  second = scheduler.schedule(0.0)
  assert [r.state for r in (running, partly, waiting)] == [State.DECODING, State.PREFILLING, State.WAITING]
  for each in (waiting, partly, running):
    scheduler.cancel(each, 5.0)
    assert (each.state, each.finish_reason, each.finish_time) == (State.CANCELLED, "cancelled", 5.0)
  assert scheduler.update(result(plan), 6.0) == ([], []) and running.output_tokens == []
  third = scheduler.schedule(0.0)
  assert third.release.size == 2 + 3 and not third.decode and not third.prefill
  scheduler.update(result(second), 0.0)
  scheduler.add(request("d", 40, 8))  # all 6 blocks
  assert len(scheduler.schedule(0.0).works) == 1
  scheduler.update(result(third), 0.0)
