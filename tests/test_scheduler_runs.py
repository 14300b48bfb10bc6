"""Whole runs of the scheduler, drawn at random: what holds in every iteration and when all has ended."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.config import EngineConfig, SchedulerConfig, override
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Plan
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.serving.scheduler import Scheduler
from tests.test_scheduler import S, config, request, result, shape_of


class Watch:
  """Follows the plans of a run as a device would meet them, and fails on the first that breaks a rule."""

  def __init__(self, engine_config: EngineConfig, shape: CacheShape):
    self.config, self.shape = engine_config, shape
    self.requests: dict[str, Request] = {}
    self.admitted: list[str] = []
    self.done: dict[str, dict[tuple[int, int], bool]] = {}  # per request: (layer, block of tokens) prefilled
    self.steps: dict[str, int] = {}
    self.prefilled: set[str] = set()
    self.tables: dict[str, tuple[int, ...]] = {}  # of requests that have not ended
    self.dirty: set[int] = set()  # blocks of ended requests whose release has not been seen, kept ones too
    self.holds: dict[int, int] = {}  # block -> which block of a prompt it holds: prompts are all alike
    self.shared: dict[str, tuple[int, ...]] = {}  # of requests whose first piece has not been seen
    self.available = 0  # blocks, before a plan
    self.in_flight: deque[set[int]] = deque()  # blocks in tables of plans that have not completed
    self.pauses: dict[str, tuple[int, int]] = {}  # plans that left it out, and the most there may be
    self.waits: dict[str, tuple[int, int]] = {}  # the same of a prompt that was next in line
    self.sizes: dict[str, int] = {}  # working sets that were measured
    self.iteration = 0

  def plan(self, plan: Plan) -> None:
    self.iteration += 1
    assert plan.iteration == self.iteration
    live = {block for table in self.tables.values() for block in table}
    released = plan.release.tolist()
    assert len(set(released)) == len(released) and set(released) <= self.dirty and not set(released) & live
    self._wait(plan)
    self.dirty -= set(released)  # to be had from the next plan on
    assert {admission.request_id for admission in plan.admit} <= {work.request_id for work in plan.works}
    for admission in plan.admit:
      self._admit(admission.request_id, tuple(admission.table.tolist()))
    self._room(plan)
    self._decode(plan)  # before prefill: what ends its prompt now decodes from the next plan on
    self._prefill(plan)
    held = [self.tables[of.request_id] for of in (*plan.decode, *plan.works)]
    self.in_flight.append({block for table in held for block in table})

  def _wait(self, plan: Plan) -> None:
    """A prompt that could run waits only where an older request makes a step, so for no more steps than these have."""
    partly = [name for name in self.tables if name not in self.prefilled]
    waiting = [name for name, each in self.requests.items() if not each.ended and name not in self.admitted]
    taken = self.dirty | {block for table in [*self.tables.values(), *self.in_flight] for block in table}
    room = self.available if self.config.cache.prefix else self.shape.M - len(taken)
    free = len(self.tables) < self.shape.R and room >= self.shape.N
    for name in (partly or (waiting if free else []))[:1]:
      older = sum(self.left(other) for other in self.tables if other != name)
      waits, bound = self.waits.setdefault(name, (0, older))
      waited = all(work.request_id != name for work in plan.works)
      self.waits[name] = waits + waited, bound
      assert self.waits[name][0] <= bound
      assert plan.decode or not waited

  def _room(self, plan: Plan) -> None:
    """What was chosen fits tokens and slots; the oldest may exceed the slots, and then no other needs one."""
    scheduler, L = self.config.scheduler, self.shape.L
    tokens = len(plan.decode) + sum(-(-len(work.tokens) * work.n_layers // L) for work in plan.works)
    assert tokens <= (scheduler.max_tokens or tokens)
    if scheduler.batch_control == "none" or not self.shape.P:
      return
    cold = lambda row: min(row.position // S, self.config.budget_blocks) * L * self.shape.K  # noqa: E731
    needs = [self.sizes.get(row.request_id, cold(row)) for row in plan.decode]
    if scheduler.prefill == "chunked":
      needs += [(work.start + len(work.tokens)) // S * L * self.shape.K for work in plan.works]
    assert sum(needs) <= self.shape.P or not any(needs[1:])

  def _decode(self, plan: Plan) -> None:
    names = [row.request_id for row in plan.decode]
    assert len(set(names)) == len(names) <= self.config.scheduler.max_batch
    assert names == sorted(names, key=self.admitted.index)
    assert set(names) <= self.prefilled
    able = [name for name in self.admitted if name in self.prefilled and name in self.tables and self.left(name)]
    if able:
      assert names[0] == able[0]
    for name in able:
      older = sum(self.left(other) for other in able[: able.index(name)])
      pauses, bound = self.pauses.setdefault(name, (0, older))
      self.pauses[name] = (pauses + (name not in names), bound)
      assert self.pauses[name][0] <= bound
    for row in plan.decode:
      request = self.requests[row.request_id]
      assert row.step == self.steps[row.request_id] and row.position == len(request.prompt) + row.step
      assert row.step < request.max_new_tokens - 1
      self.steps[row.request_id] += 1
    assert {row.request_id for row in plan.measure} <= set(names)

  def left(self, name: str) -> int:
    return self.requests[name].max_new_tokens - 1 - self.steps[name]

  def _prefill(self, plan: Plan) -> None:
    cost = 0
    for work in plan.works:
      name, prompt = work.request_id, self.requests[work.request_id].prompt
      assert work.start % S == 0 and len(work.tokens)
      assert all(self.holds.get(block) == i for i, block in enumerate(self.shared.pop(name, ())))
      assert work.tokens.tolist() == prompt[work.start : work.start + len(work.tokens)].tolist()
      end = work.start + len(work.tokens)
      assert end == len(prompt) or end % S == 0
      for layer in range(work.first_layer, work.first_layer + work.n_layers):
        for block in range(work.start // S, -(-end // S)):
          done = self.done[name]
          assert (layer, block) not in done
          assert layer == 0 or (layer - 1, block) in done
          assert block == 0 or (layer, block - 1) in done
          done[layer, block] = True
      whole = len(self.done[name]) == self.shape.L * -(-len(prompt) // S)
      assert work.last == whole
      if whole:
        self.prefilled.add(name)
        full = self.tables[name][: len(prompt) // S]
        self.holds |= {block: i for i, block in enumerate(full)}
      cost += len(work.tokens) * (1 if self.config.scheduler.prefill == "chunked" else work.n_layers)
    unfinished = {name for name in self.tables if name not in self.prefilled}
    assert len(unfinished) <= 1
    settings_ = self.config.scheduler
    allowance = settings_.max_inject_tokens if settings_.prefill == "layer_segmented" else settings_.chunk_tokens
    smallest = all(len(work.tokens) <= S and work.n_layers == 1 for work in plan.works)
    assert cost <= allowance or (len(plan.works) == 1 and smallest)

  def _admit(self, name: str, table: tuple[int, ...]) -> None:
    request = self.requests[name]
    assert len(set(table)) == len(table) == -(-(len(request.prompt) + request.max_new_tokens) // S)
    taken = {block for other in self.tables.values() for block in other} | self.dirty
    for held in self.in_flight:
      taken |= held - {block for other in self.tables.values() for block in other}
    n_shared = request.cached_tokens // S
    assert n_shared * S == request.cached_tokens < len(request.prompt)
    self.shared[name] = table[:n_shared]
    self.dirty -= set(table[:n_shared])
    assert not set(table[n_shared:]) & taken
    assert all(0 <= block < self.shape.M for block in table)
    for block in table[n_shared:]:
      self.holds.pop(block, None)
    self.admitted.append(name)
    self.tables[name], self.steps[name] = table, 0
    self.done[name] = {(layer, block): True for layer in range(self.shape.L) for block in range(n_shared)}
    assert len(self.tables) <= self.shape.R

  def ended(self, name: str) -> None:
    left = set(self.tables.pop(name, ()))
    self.dirty |= left - {block for table in self.tables.values() for block in table}


@st.composite
def runs(draw):
  n_layers = draw(st.integers(1, 4))
  prefill = draw(st.sampled_from(["layer_segmented", "chunked"]))
  scheduler = SchedulerConfig(
    max_batch=draw(st.integers(1, 4)),
    prefill=prefill,
    chunk_tokens=S * draw(st.integers(1, 6)),
    max_inject_tokens=draw(st.integers(1, 160)),
    max_tokens=draw(st.just(0) | st.integers(S, 60)),
    batch_control=draw(st.sampled_from(["working_set", "working_set", "none"])),
    working_set_steps=draw(st.integers(1, 4)),
  )
  limits = shape_of(
    M=draw(st.integers(4, 24)),
    P=draw(st.sampled_from([0, 1, 30, 60, 200])),
    R=draw(st.integers(1, 5)),
    max_context=draw(st.integers(30, 110)),
    L=n_layers,
  )
  shape = st.tuples(st.integers(1, 80), st.integers(1, 20), st.integers(0, 15))
  wanted = draw(st.lists(shape, min_size=1, max_size=8))  # prompt and output tokens, iteration of arrival
  cancels = draw(st.dictionaries(st.integers(0, 7), st.integers(0, 30), max_size=2))
  engine_config = override(config(scheduler), [f"cache.prefix={str(draw(st.booleans())).lower()}"])
  return engine_config, limits, wanted, cancels, draw(st.integers(0, 2**16)), draw(st.integers(0, 2))


@given(runs())
def test_whole_runs(run):
  engine_config, limits, wanted, cancels, seed, depth = run
  rng = np.random.default_rng(seed)
  scheduler, watch = Scheduler(engine_config, limits), Watch(engine_config, limits)
  outcome: dict[str, str] = {}
  out: deque[Plan] = deque()
  arrivals = sorted(enumerate(wanted), key=lambda each: (each[1][2], each[0]))
  queued: list[str] = []
  for now in range(3000):
    while arrivals and arrivals[0][1][2] <= now:
      i, (n_prompt, n_output, _) = arrivals.pop(0)
      each = request(str(i), n_prompt, n_output)
      try:
        scheduler.add(each)
      except ValueError:
        assert n_prompt + n_output > limits.max_context
        outcome[each.id] = "refused"
        continue
      watch.requests[each.id] = each
      queued.append(each.id)
    for i, when in cancels.items():
      each = watch.requests.get(str(i))
      if when == now and each and not each.ended:
        scheduler.cancel(each, now)
        watch.ended(each.id)
        outcome[each.id] = "cancelled"
    watch.available = scheduler._allocator.available
    plan = scheduler.schedule(now)
    if not plan.empty:
      watch.plan(plan)
      out.append(plan)
    if out and (len(out) > depth or plan.empty):
      oldest = out.popleft()
      watch.in_flight.popleft()
      sets = {row.request_id: int(rng.integers(0, 80)) for row in oldest.measure}
      step = result(oldest, working_sets=sets)
      watch.sizes |= sets
      tokens = {name: int(rng.integers(0, 30)) for name in step.tokens}
      for each in scheduler.update(dataclasses.replace(step, tokens=tokens), now).ended:
        assert each.id not in outcome
        outcome[each.id] = "finished"
        watch.ended(each.id)
        assert each.finish_reason == ("length" if len(each.output_tokens) == each.max_new_tokens else "stop")
    if not arrivals and not scheduler.has_work:
      break
  assert not out and len(outcome) == len(wanted), "a request never ended"
  assert watch.admitted == [name for name in queued if name in watch.admitted]
  assert not watch.tables and watch.dirty == {*scheduler._allocator._idle} and scheduler.pool_blocks_in_use == 0
  assert engine_config.cache.prefix or not watch.dirty
  # what was freed can be had again: a request as large as the pool allows is admitted in the first plan
  n_tokens = scheduler._shape.max_context
  scheduler.add(request("all", n_tokens - 1, 1))
  assert len(scheduler.schedule(0.0).works) >= 1


class Late:
  """Blocks that are written beside the programs of prefills, until it is known that they have landed."""

  def __init__(self):
    self.tables: dict[str, list[int]] = {}
    self.writing: dict[tuple[str, int], int] = {}  # (request, start of a piece) -> the iteration of its newest layers
    self.landed = 0

  def plan(self, plan: Plan) -> None:
    late = {name for (name, _), iteration in self.writing.items() if iteration > self.landed}
    written = {
      block
      for (name, start), iteration in self.writing.items()
      if iteration > self.landed
      for block in self.tables[name][start // S :]
    }
    assert not written & {row.fills for row in plan.decode}
    for admission in plan.admit:
      assert not written & set(admission.table.tolist())
      self.tables[admission.request_id] = admission.table.tolist()
    assert not late & {row.request_id for row in plan.decode}
    for program, work in ((piece.program, work) for piece in plan.prefill for work in piece.works):
      before = [at for (name, start), at in self.writing.items() if name == work.request_id and start < work.start]
      assert all(at <= self.landed for at in before)
      if not program.unstaged:
        self.writing[work.request_id, work.start] = plan.iteration


@given(runs(), st.sampled_from(["full", "on_demand"]))
def test_whole_runs_of_saves_that_land_late(run, reserve):
  """No block is read or given out again before it has landed, and nobody waits for ever."""
  engine_config, limits, wanted, cancels, seed, depth = run
  engine_config = override(engine_config, ["cache.save=staged", f"scheduler.reserve={reserve}"])
  rng, scheduler, late = np.random.default_rng(seed), Scheduler(engine_config, limits), Late()
  requests = {str(i): request(str(i), n, out) for i, (n, out, _) in enumerate(wanted)}
  arrivals = {name: wanted[int(name)][2] for name, each in requests.items() if n_tokens(each) <= limits.max_context}
  out: deque[Plan] = deque()
  added: dict[str, Request] = {}
  last = request("all", scheduler._shape.max_context - 1, 1)
  arrivals["all"], requests["all"] = 40, last
  for now in range(6000):
    for name in [name for name, at in arrivals.items() if at <= now]:
      del arrivals[name]
      added[name] = requests[name]
      scheduler.add(added[name])
    for i, when in cancels.items():
      if when == now and (each := added.get(str(i))) and not each.ended:
        scheduler.cancel(each, now)
    plan = scheduler.schedule(now)
    if not plan.empty:
      late.plan(plan)
      out.append(plan)
    if out and (len(out) > depth or plan.empty):
      oldest = out.popleft()
      late.landed = oldest.iteration if oldest.await_saves else int(rng.integers(late.landed, oldest.iteration + 1))
      step = result(oldest, working_sets={row.request_id: int(rng.integers(0, 80)) for row in oldest.measure})
      tokens = {name: int(rng.integers(0, 30)) for name in step.tokens}
      scheduler.update(dataclasses.replace(step, tokens=tokens, landed=late.landed), now)
    if not arrivals and not scheduler.has_work:
      break
  assert last.ended and scheduler.pool_blocks_in_use == 0 and not out


def n_tokens(of: Request) -> int:
  return len(of.prompt) + of.max_new_tokens
