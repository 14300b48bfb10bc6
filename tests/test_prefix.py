"""Blocks that several prompts share: the index against a dictionary model, and plans by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sparse_serve_jax.attention.methods import METHODS
from sparse_serve_jax.buckets import Buckets
from sparse_serve_jax.config import EngineConfig, SchedulerConfig, override
from sparse_serve_jax.memory.allocator import BlockAllocator
from sparse_serve_jax.memory.prefix import PrefixIndex, begin_alike, hash_chain
from sparse_serve_jax.serving.plan import Plan, StepResult
from sparse_serve_jax.serving.request import Request, State
from sparse_serve_jax.serving.scheduler import WHOLE_BUDGET, Scheduler
from tests import test_scheduler
from tests.test_scheduler import S, pieces, request, result, shape_of

N_BLOCKS, SIZE = 7, 2

# ----------------------------------------------------------------------------------------------------------- the chain


def test_a_chain_tells_tokens_their_places_and_salts_apart():
  tokens = np.arange(20, dtype=np.int32)
  chain = hash_chain(tokens, 8)
  assert len(chain) == 2 and chain[:1] == hash_chain(tokens[:8], 8)
  assert hash_chain(tokens[8:16], 8)[0] not in chain
  assert not {*chain} & {*hash_chain(tokens, 8, "a")} and hash_chain(tokens, 8, "a") != hash_chain(tokens, 8, "")
  assert hash_chain(tokens[:7], 8) == []
  long = np.concatenate([tokens, tokens])
  assert hash_chain(long[16:], 8, before=chain) == hash_chain(long, 8)


# ------------------------------------------------------------------------------------------------------- the allocator


def test_a_shared_block_is_free_when_its_last_owner_frees_it():
  allocator = BlockAllocator(4)
  blocks = allocator.allocate(3)
  assert blocks is not None
  allocator.share(blocks[:2])
  allocator.free(blocks, after=0)
  assert allocator.take_release().tolist() == blocks[2:].tolist() and allocator.in_use == 2
  with pytest.raises(ValueError, match=r"blocks \[2\] are freed but have no owner"):
    allocator.free(blocks[2:], after=0)
  with pytest.raises(ValueError, match=r"blocks \[2\] are shared but have no owner"):
    allocator.share(blocks[1:])
  with pytest.raises(ValueError, match=r"blocks \[2\] are to be kept but have no owner"):
    allocator.keep(blocks[1:])
  allocator.free(blocks[:2], after=0)
  assert sorted(allocator.take_release()) == sorted(blocks[:2]) and allocator.available == 4


def test_what_nobody_owns_any_more_is_told_once():
  """Unless somebody owns it again, or it is not kept."""
  allocator = BlockAllocator(6)
  blocks = allocator.allocate(5)
  assert blocks is not None
  allocator.keep(blocks[:4])
  allocator.share(blocks[:1])
  allocator.free(blocks, after=0)
  allocator.share(blocks[3:4])
  assert allocator.take_idle().tolist() == blocks[1:3].tolist() and not allocator.take_idle().size
  allocator.free([blocks[0], blocks[3]], after=0)
  assert allocator.take_idle().tolist() == blocks[[0, 3]].tolist()


def test_idle_blocks_pass_both_gates_before_they_are_given_out():
  allocator = BlockAllocator(3)
  kept = allocator.allocate(2)
  assert kept is not None
  allocator.keep(kept)
  allocator.free(kept, after=1)
  assert (allocator.idle, allocator.available, allocator.in_use, allocator.release_due) == (2, 1, 0, False)
  assert allocator.allocate(2) is None  # iteration 1 still runs
  allocator.complete(1)
  assert allocator.available == 3
  assert allocator.allocate(3, shared=kept[:1]) is None  # of three blocks one is to be shared
  assert allocator.idle == 2
  made = allocator.allocate(2, shared=kept[:1])
  assert made is not None and made.tolist() == [2, kept[1]]
  assert allocator.take_release().tolist() == [kept[1]] and not allocator.release_due
  assert (allocator.idle, allocator.available, allocator.in_use) == (0, 0, 3)


# Chains are tuples of symbols, each of which stands for the tokens of a block.
Chain = tuple[int, ...]
PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple)


def hashed(chain: Chain) -> list[bytes]:
  return hash_chain(np.repeat(np.array(chain, np.int32), SIZE), SIZE)


@dataclasses.dataclass
class Block:
  """What the model knows of one. It is free when nothing else is said."""

  owners: int = 0
  chain: Chain | None = None  # it is found by
  idle: int | None = None  # the iteration after which it is nobody's
  leaving: int | None = None  # the same of one on its way back
  released: bool = False


class PrefixMachine(RuleBasedStateMachine):
  """Requests come with chains, share what there is, enter what they have, and leave."""

  def __init__(self):
    super().__init__()
    self.allocator = BlockAllocator(N_BLOCKS)
    self.index = PrefixIndex(self.allocator)
    self.blocks = [Block() for _ in range(N_BLOCKS)]
    self.lru: list[int] = []
    self.requests: dict[int, tuple[Chain, list[int]]] = {}
    self.dispatched = self.completed = self.counter = 0

  def known(self, chain: Chain) -> list[int]:
    where = {block.chain: i for i, block in enumerate(self.blocks) if block.chain}
    found = []
    for n in range(1, len(chain) + 1):
      if chain[:n] not in where:
        break
      found.append(where[chain[:n]])
    return found

  def free_blocks(self) -> set[int]:
    for block in self.blocks:
      if block.leaving is not None and block.released and block.leaving <= self.completed:
        block.leaving, block.released = None, False
    return {i for i, b in enumerate(self.blocks) if not b.owners and b.idle is None and b.leaving is None}

  @rule(chain=PATHS, more=st.integers(1, 3))
  def start(self, chain, more):
    shared = self.known(chain)
    assert self.index.find(hashed(chain)).tolist() == shared
    n, free = len(chain) - len(shared) + more, self.free_blocks()
    ready = [i for i in self.lru if (self.blocks[i].idle or 0) <= self.completed and i not in shared]
    made = self.allocator.allocate(n, self.index.find(hashed(chain)))
    if n > len(free) + len(ready):
      assert made is None
      return
    assert made is not None
    evicted = ready[: max(0, n - len(free))]
    assert len(set(made.tolist())) == n and set(made.tolist()) - free == set(evicted)
    for i in evicted:
      self.blocks[i] = Block()
    for i in made.tolist():
      self.blocks[i].owners = 1
    for i in shared:
      self.blocks[i].owners, self.blocks[i].idle = self.blocks[i].owners + 1, None
    self.lru = [i for i in self.lru if self.blocks[i].idle is not None]
    self.counter += 1
    self.requests[self.counter] = chain, [*shared, *made.tolist()]
    self.dispatch(evicted)

  @precondition(lambda self: self.requests)
  @rule(data=st.data())
  def enter(self, data):
    """What it has computed may be found, by the chains that nobody has."""
    chain, blocks = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
    known = {block.chain for block in self.blocks}
    entered = []
    for n in range(1, len(chain) + 1):
      if chain[:n] not in known:
        self.blocks[blocks[n - 1]].chain = chain[:n]
        entered.append(blocks[n - 1])
    assert self.index.enter(hashed(chain), np.array(blocks, np.int32)).tolist() == entered

  @precondition(lambda self: self.requests)
  @rule(data=st.data(), poisoned=st.booleans())
  def finish(self, data, poisoned):
    chain, blocks = self.requests.pop(data.draw(st.sampled_from(sorted(self.requests))))
    if poisoned:
      self.index.leave(np.array(blocks[1:], np.int32))
      for i in blocks[1:]:
        self.blocks[i].chain = None
    self.index.free(hashed(chain), np.array(blocks, np.int32), after=self.dispatched)
    for i in reversed(blocks):
      block = self.blocks[i]
      block.owners -= 1
      if not block.owners and block.chain:
        block.idle = self.dispatched
        self.lru.append(i)
      elif not block.owners:
        block.leaving = self.dispatched
    for i in reversed(self.known(chain)):  # used by this request, or the same as what it has
      if self.blocks[i].idle is not None:
        self.blocks[i].idle = self.dispatched
        self.lru.remove(i)
        self.lru.append(i)

  @rule()
  def dispatch(self, reused=()):
    due = {i for i, block in enumerate(self.blocks) if block.leaving is not None and not block.released}
    taken = self.allocator.take_release().tolist()
    assert len(taken) == len(set(taken)) and set(taken) == due | set(reused)
    for i in due:
      self.blocks[i].released = True
    self.dispatched += 1

  @precondition(lambda self: self.completed < self.dispatched)
  @rule()
  def complete(self):
    self.completed += 1
    self.allocator.complete(self.completed)

  @invariant()
  def counters_agree(self):
    ready = [i for i in self.lru if (self.blocks[i].idle or 0) <= self.completed]
    assert self.allocator.available == len(self.free_blocks()) + len(ready)
    assert self.allocator.in_use == sum(block.owners > 0 for block in self.blocks)
    assert self.allocator.idle == len(self.lru) == sum(block.idle is not None for block in self.blocks)
    assert len(self.index) == sum(block.chain is not None for block in self.blocks)

  @invariant()
  def ends_go_before_beginnings(self):
    for at, i in enumerate(self.lru):
      before = self.known((self.blocks[i].chain or ())[:-1])
      assert not set(before) & set(self.lru[:at])

  def teardown(self):
    for name in list(self.requests):
      chain, blocks = self.requests.pop(name)
      self.index.free(hashed(chain), np.array(blocks, np.int32), after=self.dispatched)
    self.allocator.take_release()
    while self.completed < self.dispatched:
      self.completed += 1
      self.allocator.complete(self.completed)
    assert self.allocator.available == N_BLOCKS and self.allocator.in_use == 0


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = settings(stateful_step_count=40)


# -------------------------------------------------------------------------------------------------------------- plans


def config(scheduler: SchedulerConfig | None = None, *assignments: str, **sparse) -> EngineConfig:
  return override(test_scheduler.config(scheduler, **sparse), ["cache.prefix=true", *assignments])


def run(scheduler: Scheduler, token: int = 1, until: int = 400) -> list[Plan]:
  """Plans, whose results are taken at once, until all have ended."""
  plans = []
  while scheduler.has_work and len(plans) < until:
    plans.append(scheduler.schedule(0.0))
    if not plans[-1].empty:
      scheduler.update(result(plans[-1], token), 0.0)
  assert not scheduler.has_work
  return plans


def serve(scheduler: Scheduler, *requests: Request) -> None:
  """One after the other."""
  for each in requests:
    scheduler.add(each)
    run(scheduler)


@pytest.mark.parametrize(
  ("scheduler", "expected"),
  [
    # 40 of 64 tokens are left: all layers at once, layer by layer, in chunks of a layer, in chunks of all layers
    (SchedulerConfig(max_inject_tokens=3 * 256), [(24, 40, 0, 3, True)]),
    (SchedulerConfig(max_inject_tokens=45), [(24, 40, layer, 1, layer == 2) for layer in range(3)]),
    (
      SchedulerConfig(max_inject_tokens=3 * S),
      [(start, n, layer, 1, start > 24 and layer == 2) for layer in range(3) for start, n in ((24, 24), (48, 16))],
    ),
    (SchedulerConfig(prefill="chunked", chunk_tokens=4 * S), [(24, 32, 0, 3, False), (56, 8, 0, 3, True)]),
  ],
)
def test_a_piece_begins_after_what_is_shared_and_has_a_program(scheduler: SchedulerConfig, expected):
  engine_config, shape = config(scheduler), shape_of()
  made = Scheduler(engine_config, shape)
  made.add(request("first", 3 * S, 1))
  tables = {of.request_id: of.table for plan in run(made) for of in plan.admit}
  made.add(later := request("a", 64))
  plans = run(made)
  assert [piece[1:] for plan in plans for piece in pieces(plan)] == expected
  (admission,) = (of for plan in plans for of in plan.admit)
  assert admission.table[:3].tolist() == tables["first"][:3].tolist()
  assert not set(admission.table[3:].tolist()) & set(tables["first"][:3].tolist())
  assert later.cached_tokens == 24
  buckets = Buckets.of(engine_config, shape.L, shape.max_context)
  programs = set(buckets.programs())
  for piece in [piece for plan in plans for piece in plan.prefill]:
    assert piece.program in programs & {*buckets.programs_of([64])}


def test_the_last_token_is_never_cached():
  """Its logits are needed: a prompt that is known to its end begins a block earlier."""
  scheduler = Scheduler(config(), shape_of())
  serve(scheduler, request("first", 72))
  scheduler.add(request("a", 64))
  assert pieces(scheduler.schedule(0.0)) == [("a", 56, 8, 0, 3, True)]


def test_samples_of_a_prompt_share_it_in_one_plan_and_nobody_is_passed():
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=1000)), shape_of())
  for name in ("a", "b", "c"):
    scheduler.add(request(name, 21))
  scheduler.add(request("other", 10))
  plan = scheduler.schedule(0.0)
  assert [(name, start, n) for name, start, n, *_ in pieces(plan)] == [
    ("a", 0, 21), ("b", 16, 5), ("c", 16, 5), ("other", 8, 2),
  ]  # fmt: skip
  assert [of.request_id for of in plan.admit] == ["a", "b", "c", "other"]
  assert scheduler.pool_blocks_in_use == 4 + 2 + 2 + 1


def test_where_saves_are_staged_the_next_waits_until_they_have_landed():
  scheduler = Scheduler(config(None, "cache.save=staged"), shape_of())
  first, second, third = (request(name, 21) for name in "abc")
  for each in (first, second, third):
    scheduler.add(each)
  plan = scheduler.schedule(0.0)
  assert pieces(plan) == [("a", 0, 21, 0, 3, True)]
  scheduler.update(dataclasses.replace(result(plan), landed=0), 0.0)
  waits = scheduler.schedule(0.0)
  assert waits.await_saves and not pieces(waits)
  scheduler.update(dataclasses.replace(result(waits), landed=2), 0.0)
  plan = scheduler.schedule(0.0)
  assert pieces(plan) == [("b", 16, 5, 0, 3, True), ("c", 16, 5, 0, 3, True)]  # they save nothing that is shared


def test_salts_are_apart():
  scheduler = Scheduler(config(), shape_of())
  asked = [dataclasses.replace(request(f"{i}", 40), cache_salt=salt) for i, salt in enumerate((None, "x", "y", "x"))]
  serve(scheduler, *asked)
  assert [each.cached_tokens for each in asked] == [0, 0, 0, 32]


def test_less_than_a_sixteenth_is_not_worth_it():
  scheduler = Scheduler(config(), shape_of())
  serve(scheduler, request("first", 9), just := request("just", 16 * S), request("again", 10))
  assert just.cached_tokens == S
  scheduler = Scheduler(config(), shape_of())
  serve(scheduler, request("first", 9), less := request("less", 16 * S + 1))
  assert less.cached_tokens == 0


@pytest.mark.parametrize("n", [16 * S, 16 * S + 1])
def test_whether_prompts_begin_alike_is_what_the_scheduler_finds(n: int):
  first, other = np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32) + 1
  alike = np.concatenate([first[:S], other[S:]])
  assert begin_alike([first, alike], S) == begin_alike([other, alike, first], S) == (n == 16 * S)
  assert not begin_alike([first, other], S) and begin_alike([first, first], S) and not begin_alike([first[:S]] * 2, S)


@pytest.mark.parametrize(("policy", "expected"), [("dense", 40), ("topk", 24), ("psa", 8)])
def test_output_is_shared_as_far_as_its_steps_attended_to_everything(policy: str, expected: int):
  """30 tokens of output after 15 of a prompt; top-k of two blocks reads everything up to token 24."""
  sparse = {"policy": policy, "token_budget": 2 * S, "sink_tokens": S, "window_tokens": S}
  scheduler = Scheduler(config(**sparse), shape_of())
  serve(scheduler, first := request("first", 15, 30))
  follow = np.array([*first.prompt, *first.output_tokens, 5, 5, 5], np.int32)
  serve(scheduler, second := Request("second", follow, 2, 0.0))
  assert second.cached_tokens == expected


def test_no_output_is_shared_where_a_method_may_leave_out_what_the_budget_has_room_for():
  """Top-p reads as few blocks as hold its share."""
  scheduler = Scheduler(config(method="top_p"), shape_of())
  serve(scheduler, first := request("first", 15, 30))
  follow = np.array([*first.prompt, *first.output_tokens, 5], np.int32)
  serve(scheduler, second := Request("second", follow, 2, 0.0))
  assert second.cached_tokens == S


def test_methods_of_which_output_is_shared_attend_to_all_that_fits():
  assert {name for name, method in METHODS.items() if method.budget is None} >= WHOLE_BUDGET


def test_the_last_output_token_and_what_follows_a_stop_are_not_shared():
  """No step has had them as input, or one that does not count."""
  for n_output, token in ((9, 1), (30, test_scheduler.STOP)):
    scheduler = Scheduler(config(), shape_of())
    first = request("first", 15, n_output)
    scheduler.add(first)
    while not first.ended:
      plan = scheduler.schedule(0.0)
      scheduler.update(result(plan, token if len(first.output_tokens) == 8 else 1), 0.0)
    run(scheduler)
    known = np.array([*first.prompt, *first.output_tokens, *[1] * 30], np.int32)[: len(first.prompt) + 9]
    serve(scheduler, second := Request("second", np.append(known, [1] * 9).astype(np.int32), 2, 0.0))
    assert second.cached_tokens == 16  # 15 + 9 tokens would be three blocks


def test_blocks_of_what_was_not_finite_are_not_found():
  scheduler = Scheduler(config(), shape_of())
  serve(scheduler, request("good", 16, 1))
  scheduler.add(bad := request("bad", 40))
  plan = scheduler.schedule(0.0)
  scheduler.update(StepResult({}, {}, result(plan).stats, not_finite=frozenset({"bad"})), 0.0)
  assert bad.state is State.FAILED
  serve(scheduler, later := request("later", 40))
  assert later.cached_tokens == 16


def test_nor_those_of_one_that_was_cancelled_before_that_was_known():
  scheduler = Scheduler(config(), shape_of())
  scheduler.add(bad := request("bad", 40))
  plan = scheduler.schedule(0.0)
  scheduler.cancel(bad, 0.0)
  scheduler.update(StepResult({}, {}, result(plan).stats, not_finite=frozenset({"bad"})), 0.0)
  serve(scheduler, later := request("later", 40))
  assert later.cached_tokens == 0


@pytest.mark.parametrize("cancelled", [False, True])
def test_nor_by_the_blocks_of_one_that_shared_them_before_that_was_known(cancelled: bool):
  """Its prefill goes on when the first one's logits are read; its own are not finite either."""
  scheduler = Scheduler(config(SchedulerConfig(max_inject_tokens=50)), shape_of())
  bad, second = request("bad", 40, 1), request("second", 72)
  scheduler.add(bad)
  plans = [scheduler.schedule(0.0) for _ in range(3)]
  scheduler.add(second)
  plans += [scheduler.schedule(0.0) for _ in range(2)]
  for plan in plans[:3]:
    scheduler.update(dataclasses.replace(result(plan), not_finite=frozenset({"bad"})), 0.0)
  assert bad.state is State.FAILED and second.cached_tokens == 40
  plans.append(scheduler.schedule(0.0))
  assert second.state is State.DECODING
  if cancelled:
    scheduler.cancel(second, 0.0)
  for plan in plans[3:]:
    scheduler.update(dataclasses.replace(result(plan), not_finite=frozenset({"second"})), 0.0)
  run(scheduler)
  serve(scheduler, later := request("later", 72))
  assert later.cached_tokens == 0


def test_the_least_recently_used_gives_way_its_end_first():
  """Of ten blocks a and b keep three and three; c wants six, so that two of a go."""
  scheduler = Scheduler(config(), shape_of(M=10))
  a, b, c = (Request(name, np.full(n, n, np.int32), 1, 0.0) for name, n in (("a", 24), ("b", 25), ("c", 40)))
  serve(scheduler, a, b)
  assert scheduler._allocator.available == 10 and scheduler.pool_blocks_in_use == 0
  scheduler.add(c)
  plan = scheduler.schedule(0.0)
  assert len(plan.release) == 2 and set(plan.release.tolist()) < set(plan.admit[0].table.tolist())
  scheduler.update(result(plan), 0.0)
  run(scheduler)
  assert [len(scheduler._prefix.find(hash_chain(of.prompt, S))) for of in (a, b, c)] == [1, 3, 5]


def test_a_request_waits_for_others_that_run_and_never_for_the_cache():
  """The pool is full of what is kept: the largest request there can be is admitted at once, over its own prefix."""
  scheduler = Scheduler(config(), shape_of(M=8))
  serve(scheduler, request("a", 40), *(Request(f"{i}", np.full(20, i, np.int32), 1, 0.0) for i in range(4)))
  scheduler.add(largest := request("b", 63, 1))
  assert len(scheduler.schedule(0.0).admit) == 1 and largest.state is State.DECODING


def test_a_request_that_has_ended_keeps_no_hashes():
  scheduler = Scheduler(config(), shape_of(R=1))
  done, lost, cancelled = requests = [request(name, 40) for name in "abc"]
  serve(scheduler, done)
  scheduler.add(lost)
  scheduler.add(cancelled)
  scheduler.schedule(0.0)
  assert lost.chain and cancelled.chain
  scheduler.cancel(cancelled, 0.0)
  scheduler.lose(RuntimeError("gone"), 0.0)
  assert all(each.ended and not each.chain for each in requests)


def test_without_the_cache_nothing_is_shared_or_kept():
  scheduler = Scheduler(config(None, "cache.prefix=false"), shape_of())
  serve(scheduler, request("a", 40), second := request("b", 40))
  assert second.cached_tokens == 0 and scheduler._allocator.idle == 0 and not second.chain
