"""Who runs in an iteration: decode first, chosen by working set, then prefill within an allowance.

No device in here. `schedule` makes the plan of the next iteration, `update` takes the result of the oldest one that is
still out. A plan is made before the result of the previous one is known, so progress is counted when it is planned:
lengths are known ahead, and a stop token found late costs one planned token that is thrown away.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections import deque
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.buckets import TILE, Buckets
from sparse_serve_jax.config import EngineConfig
from sparse_serve_jax.memory.allocator import BlockAllocator
from sparse_serve_jax.memory.prefix import PrefixIndex, hash_chain, is_worth
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving.plan import Admission, DecodeRow, Plan, PrefillCall, PrefillWork, StepResult
from sparse_serve_jax.serving.request import Request, State
from sparse_serve_jax.serving.resident import Resident, Room

GRACE_BLOCKS = 4  # of the pool, that an admission on demand leaves for each request that decodes
# Methods (`attention.methods`) that attend to everything as long as the budget has room for it.
WHOLE_BUDGET = frozenset({"cuboid_mean", "min_max", "mean", "representatives", "random"})


class _Planned(NamedTuple):
  """What the result of a plan that is out is for."""

  iteration: int
  sampled: list[Resident]
  measured: list[Resident]


class Received(NamedTuple):
  """What a result brought to the requests."""

  tokens: list[tuple[Request, int]]  # output tokens, oldest request first
  ended: list[Request]


class Scheduler:
  """First come, first served, in admission, prefill and decode alike.

  A request is admitted when the first piece of its prefill is planned. It then takes a lane and the pool blocks of its
  prompt and all its output, and keeps them until it ends; the head of the queue waits for them and is never passed.
  At most one prompt is partly prefilled at any time.

  With `reserve` "on_demand" it takes the blocks of its prompt and one more, and others with the steps that fill them.
  Where there is none, the youngest lose lane and blocks and are next in line again, in their order: who is older never
  waits for who is younger, so every request ends. What is lost of their KV is made again before they go on: by a
  prefill as far as that makes what their decode steps made, beyond by the same steps with the tokens that they had.

  Batch control is Algorithm 1 of SparseServe (arXiv 2509.24626). The requests of an iteration are asked in the order of
  their arrival: those that decode, oldest first, then the prompt that is prefilled, which is younger than all of them.
  R_max is `max_batch`, T_max `max_tokens`, M_avl the slots, which hold the sum of the working sets. Who does not fit
  pauses and keeps everything. The first that is asked always runs, whatever its size, so where a request pauses an
  older one makes a step:

  - a decoding request pauses for at most as many iterations as older requests had steps left when it could first run;
  - a prompt that is next in line and has its lane and blocks waits for at most as many, of all that decode then.

  With `cache.prefix` a prompt shares the full blocks in which it begins like another with the same salt, and its
  prefill begins after them; its last token is always computed, as its logits are needed. Shared are

  - blocks of a prompt, from the plan on that ends its prefill: programs run in order, so the next in line, which may be
    a sample of the same prompt, shares them in that very plan. Where saves are staged they land later than that, and
    the next in line waits until those that it shares have: until then the older request cannot decode either.
  - blocks of its output, when it has ended, as far as its decode steps attended to everything: what a prefill makes, so
    that no token depends on who shares what;
  - none of a request whose logits were not finite;
  - of a prompt whose queries do not read all before them, whole tiles of queries alone: it is cut into tiles from where
    its prefill begins, and what these read depends on where they begin. Nor is more of an output shared than such
    queries read all of.

  Nobody is passed for the sake of a prefix, and none is used that is not worth it (`prefix.is_worth`). Blocks that
  nobody has any more are kept until a request needs room, which so waits for others that run, and never for the cache.

  The paper leaves the unit of T_max open. Here it is the work of so many tokens through the whole model: a decode row
  is one token, a piece of a prompt that runs through some of the layers its tokens x layers / L, rounded up.
  """

  def __init__(self, config: EngineConfig, shape: CacheShape):
    """Makes a scheduler of what there is of lanes, blocks and slots."""
    self._sparse, self._config, self._budget_blocks = config.sparse, config.scheduler, config.budget_blocks
    self._buckets = Buckets.of(config, shape.L, shape.max_context)
    self._shape = shape
    # Tokens of a request up to which decode steps attend to all that comes before them.
    fits = (config.budget_blocks + 1) * shape.S if config.sparse.method in WHOLE_BUDGET else 0
    exact = {"dense": sys.maxsize, "topk": fits, "psa": 0}
    # Tokens of a prompt up to which every query of it reads all before it: it may be packed, and begin anywhere.
    always = (config.sink_blocks + config.window_blocks) * shape.S
    self._whole_tokens = always if config.sparse.prefills_in_part else sys.maxsize
    self._exact_tokens = min(exact[config.sparse.policy], self._whole_tokens)
    self._tile_blocks = TILE // shape.S
    self._on_demand = config.scheduler.reserve == "on_demand"
    self._waiting: deque[Request] = deque()
    self._iteration = 0  # the last one planned
    self._clear()

  def _clear(self) -> None:
    """Nothing is resident."""
    self._allocator = BlockAllocator(self._shape.M, completed=self._iteration)
    self._prefix = PrefixIndex(self._allocator)
    self._written_in = np.zeros(self._shape.M, np.int64)  # of blocks of the index: the iteration that saves them
    self._lanes = list(range(self._shape.R - 1, -1, -1))  # free ones; the last one is taken first
    self._prefilling: Resident | None = None
    self._decoding: list[Resident] = []  # oldest first
    self._admitted: list[Resident] = []  # since the last plan
    self._preempted: list[str] = []  # likewise: ids of requests
    self._short = 0  # blocks that those that decode ask for in vain
    self._in_flight: deque[_Planned] = deque()
    self._landed = self._iteration  # of which, and of all before, saves are known to have landed

  @property
  def has_work(self) -> bool:
    """Whether a request has not ended, a result is out, or freed blocks have still to be released."""
    return bool(self._waiting or self._prefilling or self._decoding or self._in_flight or self._allocator.release_due)

  @property
  def pool_blocks_in_use(self) -> int:
    return self._allocator.in_use

  @property
  def pool_blocks_kept(self) -> int:
    return self._allocator.idle

  def check(self, request: Request) -> None:
    """Raises ValueError if the request could never run."""
    n_prompt, n_output = len(request.prompt), request.max_new_tokens
    if not n_prompt:
      raise ValueError("the prompt is empty, at least one token is needed")
    if n_output < 1:
      raise ValueError(f"max_new_tokens must be at least 1, got {n_output}")
    limit = self._shape.max_context
    if n_prompt + n_output > limit:
      raise ValueError(
        f"{n_prompt} prompt + {n_output} output tokens = {n_prompt + n_output}, but only {limit} tokens would fit (the "
        f"context, or the pool of {self._shape.M} blocks of {self._shape.S})"
      )

  def add(self, request: Request) -> None:
    """Queues a request that `check` accepts."""
    self.check(request)
    if self._buckets.shares:
      request.chain = hash_chain(request.prompt, self._shape.S, request.cache_salt)
    self._waiting.append(request)

  def schedule(self, now: float) -> Plan:
    """Plans the next iteration. An empty plan is not to be dispatched and takes no iteration number."""
    slots = self._shape.P if self._controlled else sys.maxsize
    room = Room(self._config.max_tokens or sys.maxsize, slots)
    running = self._choose_decode(room)
    measured = [resident for resident in running if self._measure_due(resident)]
    for resident in measured:
      resident.measured_at = resident.steps
    asked = {resident.request.id for resident in measured}
    decode = tuple(self._step(resident) for resident in running)
    prefill, prefilled = self._plan_prefill(room, now)
    plan = Plan(
      iteration=self._iteration + 1,
      release=self._allocator.take_release(),
      admit=tuple(Admission(r.request.id, r.lane, r.table) for r in self._admitted),
      prefill=prefill,
      decode=decode,
      measure=tuple(row for row in decode if row.request_id in asked),
      preempt=tuple(self._preempted),
    )
    self._admitted, self._preempted = [], []
    if plan.empty and self.has_work and not self._in_flight and self._landed < self._iteration:
      plan = dataclasses.replace(plan, await_saves=True)
    if not plan.empty:
      plan = dataclasses.replace(plan, idle=self._allocator.take_idle() if self._shape.P else plan.idle)
      self._iteration = plan.iteration
      self._in_flight.append(_Planned(plan.iteration, running + prefilled, measured))
    return plan

  def update(self, result: StepResult, now: float) -> Received:
    """Takes the result of the oldest plan that is out. Tokens of requests that have ended since are dropped."""
    flight = self._in_flight.popleft()
    landed = flight.iteration if result.landed is None else result.landed
    for iteration in range(self._landed + 1, landed + 1):  # until then blocks of theirs may still be written
      self._allocator.complete(iteration)
    self._landed = max(self._landed, landed)
    received = Received([], [])
    for resident in flight.measured:
      resident.working_set, resident.measured = result.working_sets[resident.request.id], True
    for resident in flight.sampled:
      request, had = resident.request, resident.read < len(resident.request.output_tokens)
      resident.read += 1
      if request.id in result.not_finite:
        self._prefix.leave(resident.table[resident.first // self._shape.S :])
      if request.ended:
        continue
      if request.id in result.not_finite:
        n = len(request.prompt) + len(request.output_tokens)
        request.fail(FloatingPointError(f"logits after {n} tokens are not finite"), now)
      elif not had and request.receive(token := result.tokens[request.id], now):
        received.tokens.append((request, token))
      if request.ended:
        received.ended.append(request)
        if request in self._waiting:  # preempted since
          self._waiting.remove(request)
        else:
          self._decoding.remove(resident)
          self._free(resident)
    return received

  def lose(self, error: Exception, now: float) -> list[Request]:
    """Ends every request that holds something on the devices, where all is lost. Those that wait are untouched."""
    residents = [*self._decoding, *([self._prefilling] if self._prefilling else [])]
    for resident in residents:
      resident.request.fail(error, now)
      resident.request.chain = []
    self._clear()
    return [resident.request for resident in residents]

  def cancel(self, request: Request, now: float, reason: str = "cancelled") -> None:
    """Ends a request that has not ended. Tokens of it that are still on the device are dropped."""
    if request.state is State.WAITING:
      self._waiting.remove(request)
      request.chain = []
    elif self._prefilling and self._prefilling.request is request:
      self._free(self._prefilling)
      self._prefilling = None
    else:
      resident = next(r for r in self._decoding if r.request is request)
      self._decoding.remove(resident)
      self._free(resident)
    request.end(reason, now)

  def _free(self, resident: Resident) -> None:
    """Gives back the lane, at once since device programs run in order, and the blocks, by the allocator's rule."""
    self._lanes.append(resident.lane)
    chain, request = resident.request.chain, resident.request
    if self._buckets.shares and resident.layer == self._shape.L and request.state is not State.FAILED:
      # The last output token may not have been the input of a step.
      n = min(resident.position, len(request.prompt) + len(request.output_tokens) - 1, self._exact_tokens)
      chain = self._enter(resident, request.tokens[len(chain) * self._shape.S : n])
    self._prefix.free(chain, resident.table, after=self._iteration)
    request.chain = []  # which take some room, and requests are kept

  def _enter(self, resident: Resident, more: np.ndarray) -> list[bytes]:
    """Others may share the full blocks that were prefilled, and those of `more` tokens, int32, after them.
    What it shares itself is found already, or has left as not finite.
    """
    chain, own = hash_chain(more, self._shape.S, before=resident.request.chain), resident.first // self._shape.S
    self._written_in[self._prefix.enter(chain[own:], resident.table[own:])] = resident.prefilled_in
    return chain

  # ---------------------------------------------------------------------------------------------------------- decode

  def _choose_decode(self, room: Room) -> list[Resident]:
    """The oldest requests, as many as R_max and T_max allow, less those whose working set does not fit any more. There
    is no break, so a later one may pass. Who pauses keeps its working set as it was measured last too.
    """
    most = min(self._config.max_batch, room.tokens)
    candidates = [r for r in self._decoding if r.steps_left and self._in_pool(r)][:most]
    self._short = 0
    return [r for r in candidates if self._grow(r) and room.take(1, self._working_set(r))]

  def _grow(self, resident: Resident) -> bool:
    """Whether it holds the pool block that its next step fills, if that fills one. Where there is none, requests are
    preempted, youngest first, until enough blocks are on their way back; it may be one of them.
    """
    if resident.request.state is not State.DECODING:  # preempted for an older one
      return False
    if (resident.position + 1) // self._shape.S <= len(resident.table):
      return True
    block = self._allocator.allocate(1)
    if block is not None:
      resident.table = np.append(resident.table, block)
      resident.request.pool_blocks = len(resident.table)
      return True
    self._short += 1
    ending = sum(len(r.table) for r in self._decoding if not r.steps_left)
    while self._short > self._allocator.returning + ending:
      youngest = self._prefilling or next(r for r in reversed(self._decoding) if r.steps_left)
      if youngest is self._decoding[0]:
        break
      self._preempt(youngest)
      if youngest is resident:
        self._short -= 1
        break
    return False

  def _preempt(self, resident: Resident) -> None:
    """Takes lane and blocks from a request, which becomes the next in line."""
    request = resident.request
    if resident is self._prefilling:
      self._prefilling = None
    else:
      self._decoding.remove(resident)
    request.preemptions += 1
    request.lost_tokens = resident.computed(self._shape.L, self._buckets.chunked)
    self._free(resident)
    request.state, request.pool_blocks = State.WAITING, 0
    self._waiting.appendleft(request)
    self._preempted.append(request.id)

  def _in_pool(self, resident: Resident) -> bool:
    """Whether a program that is planned now finds in the pool what has been prefilled."""
    return not self._buckets.late or resident.prefilled_in <= self._landed

  @property
  def _controlled(self) -> bool:
    return self._config.batch_control == "working_set" and self._shape.P > 0

  def _working_set(self, resident: Resident) -> int:
    """Slots that a decode step of it wants; 0 where nothing is limited by them."""
    if not self._controlled:
      return 0
    if resident.working_set is None:
      resident.working_set = self._selected(resident)
    return resident.working_set

  def _selected(self, resident: Resident) -> int:
    """Blocks of all layers and heads that a step can select: its need without history (open in the paper)."""
    full = resident.position // self._shape.S
    selected = min(full, self._budget_blocks) if self._sparse.policy == "topk" else full
    dense_layers = min(self._sparse.dense_layers, self._shape.L)
    return (dense_layers * full + (self._shape.L - dense_layers) * selected) * self._shape.K

  def _step(self, resident: Resident) -> DecodeRow:
    size = self._shape.S
    row = DecodeRow(
      request_id=resident.request.id,
      lane=resident.lane,
      position=resident.position,
      step=resident.steps,
      sampling=resident.request.sampling_of(resident.steps + 1),
      fills=int(resident.table[resident.position // size]) if (resident.position + 1) % size == 0 else -1,
      token=resident.again,
    )
    resident.step()
    return row

  def _measure_due(self, resident: Resident) -> bool:
    """Once in w steps, seen before the step about to be planned, unless that is the last one."""
    due = resident.steps - resident.measured_at >= self._config.working_set_steps
    return self._controlled and due and resident.steps_left > 1

  # --------------------------------------------------------------------------------------------------------- prefill

  def _plan_prefill(self, room: Room, now: float) -> tuple[tuple[PrefillCall, ...], list[Resident]]:
    """Returns pieces of prompts, oldest first, while allowance and room last, and the requests whose prompts end.

    The allowance counts token x layers when layer-segmented and tokens when chunked. Only a single piece of one block
    in one layer may exceed it. A piece waits until those before it, in its layers, are in the pool.
    """
    left, n_all = self._buckets.allowance, self._shape.L
    of_token = 1 if self._buckets.chunked else n_all  # allowance that a token of the room is worth
    pieces: list[PrefillCall] = []
    ended = []
    while left > 0:
      resident = self._prefilling or self._next_in_line()
      if resident is None or (self._buckets.late and resident.read_from > self._landed):
        break
      packs = len(resident.tokens) <= self._whole_tokens
      at, n = (resident.start, resident.layer), min(left, room.tokens * of_token)
      cut = self._buckets.cut(len(resident.tokens), resident.first, at, n, alone=not pieces, packs=packs)
      n_tokens, n_layers, cost = cut
      tokens = -(-n_tokens * n_layers // n_all)
      if not tokens or not room.take(tokens, self._pinned(resident, n_tokens)):
        break
      if resident is not self._prefilling and not self._admit(resident, now):
        break
      pieces.append(self._advance(resident, n_tokens, n_layers))
      left -= cost
      ends = pieces[-1].works[0].last
      self._prefilling = None if ends else resident
      if ends:
        ended.append(resident)
        self._decoding.append(resident)
        resident.request.state = State.DECODING
    return self._packed(pieces), ended

  def _packed(self, pieces: list[PrefillCall]) -> tuple[PrefillCall, ...]:
    """The pieces; whole prompts that follow each other are packed, as many as fit, where that pays."""
    groups: list[list[PrefillCall]] = []
    room = rows = 0
    for piece in pieces:
      (work,) = piece.works
      tokens, may = self._buckets.in_blocks(len(work.tokens)), work.whole and len(work.tokens) <= self._whole_tokens
      if not (may and tokens <= room and rows):
        groups.append([])
        room, rows = (self._buckets.packed, self._buckets.packed_rows) if may else (0, 0)
      groups[-1].append(piece)
      room, rows = room - tokens, rows - 1
    for group in groups:
      works = tuple(work for piece in group for work in piece.works)
      if len(group) > 1 and self._buckets.packing_pays([len(work.tokens) for work in works]):
        group[:] = [PrefillCall(self._buckets.pack(not all(work.sampling.plain for work in works)), works)]
    return tuple(itertools.chain(*groups))

  def _pinned(self, at: Resident, n_tokens: int) -> int:
    """The working set of a piece of a prompt: slots that it needs.

    Layer-segmented it is one layer's KV (SparseServe, 3.3), which lies in the slab outside the slots. Chunked it is the
    KV of all chunks before this one in all layers; and this one's, which enters slots while those are read.
    """
    if not self._buckets.chunked:
      return 0
    return (at.start + n_tokens) // self._shape.S * self._shape.L * self._shape.K

  def _next_in_line(self) -> Resident | None:
    """The head of the queue, as it would be admitted: it has no lane yet, and only the blocks that it shares. None if
    there is no lane for it, or its turn has not come.
    """
    if not (self._waiting and self._lanes):
      return None
    request, size = self._waiting[0], self._shape.S
    out = request.preemptions and any(of.request is request for flight in self._in_flight for of in flight.sampled)
    if self._short or out:  # tokens that it was to have before it was preempted are not known yet
      return None
    # Output tokens whose decode steps did not attend to everything are decoded again, others prefilled.
    tokens = request.tokens[: max(len(request.prompt), self._exact_tokens)] if request.preemptions else request.prompt
    if self._buckets.shares and not request.chain:
      request.chain = hash_chain(tokens, size, request.cache_salt)
    blocks = self._prefix.find(request.chain[: (len(tokens) - 1) // size])
    if len(tokens) > self._whole_tokens:
      blocks = blocks[: len(blocks) // self._tile_blocks * self._tile_blocks]
    if not is_worth(len(blocks) * size, len(tokens)):
      blocks = blocks[:0]
    if self._buckets.late and (self._written_in[blocks] > self._landed).any():
      return None
    first = len(blocks) * size
    return Resident(request, lane=-1, table=blocks, tokens=tokens, first=first, start=first)

  def _admit(self, resident: Resident, now: float) -> bool:
    """Gives the head of the queue a lane, of which there is one, and its blocks. Whether there were enough."""
    request, shared = resident.request, resident.table
    n_blocks, left = -(-(len(request.prompt) + request.max_new_tokens) // self._shape.S), 0
    if self._on_demand:
      n_blocks, left = min(n_blocks, len(resident.tokens) // self._shape.S + 1), GRACE_BLOCKS * len(self._decoding)
    own = self._allocator.allocate(n_blocks - len(shared), shared, left)
    if own is None:
      return False
    self._waiting.popleft()
    request.state = State.PREFILLING
    if request.scheduled_time is None:
      request.scheduled_time, request.cached_tokens = now, resident.first
    request.recomputed_tokens += max(0, request.lost_tokens - resident.first)
    resident.lane, resident.table = self._lanes.pop(), np.concatenate([shared, own])
    request.pool_blocks = len(resident.table)
    self._admitted.append(resident)
    return True

  def _advance(self, resident: Resident, n_tokens: int, n_layers: int) -> PrefillCall:
    """Makes the piece and moves on: along the prompt, and at its end to the next layers."""
    request, start, layer = resident.request, resident.start, resident.layer
    program = self._buckets.prefill(n_tokens, start, n_layers, rest=len(resident.tokens) - start - n_tokens)
    if not program.unstaged:
      resident.prefilled_in = resident.read_from = self._iteration + 1
    resident.start += n_tokens
    if resident.start == len(resident.tokens):
      resident.start, resident.layer, resident.read_from = resident.first, layer + n_layers, 0
    if resident.layer == self._shape.L:
      self._enter(resident, np.zeros(0, np.int32))
    tokens, last = resident.tokens[start : start + n_tokens], resident.layer == self._shape.L
    sampling = request.sampling_of(resident.steps)
    work = PrefillWork(request.id, resident.lane, tokens, start, layer, n_layers, last, sampling)
    return PrefillCall(program, (work,))
