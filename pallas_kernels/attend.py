"""Attention of one decode step: every selected block is read where it lies, a slot in HBM or the pool in host memory.

Blocks that miss are copied into the slots proposed for them in the same pass. With a threshold this is progressive
sparse attention (PSA, arXiv 2503.00392, section 2.2): groups of blocks come in descending order of score, and a
(row, KV head) stops after a group once the estimated share of attention mass P_acc = A / (A + a_min * left) exceeds
the threshold for every query head. A is the mass so far, a_min the smallest mass of a ranked block so far, `left` the
number of blocks not yet read. The tail and the first `untested` blocks (sinks and window, rounded up to whole groups)
count in A but never in a_min. The test is strict: a threshold of 1 never stops.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import triton
from pallas_kernels.copy import read_blocks
from pallas_kernels.partial import Partial, merge, merge_along, partial_attention
from pallas_kernels.residency import Located

LOG2_E = math.log2(math.e)
LEAST_HEADS = 16  # rows of the smallest matrix product of a tensor core; fewer query heads are padded with copies
HIT_PROGRAMS = 512  # for the hits of all lists, if these are long enough: fill every SM several times over
SPLIT_BLOCKS = 4  # of a list, for each of the programs that its hits are split over; shorter splits are not worth it
MISS_PROGRAMS = 64  # at most: keep PCIe busy and leave most SMs alone
WARP_BYTES = 8 << 10  # of a block, keys and values, for each warp; from 2 to 8 warps


class Tails(NamedTuple):
  """The unfinished last blocks, and which of them each row of the batch has."""

  kv: jax.Array  # [K, L, R, 2, S, D], of all resident requests
  lanes: jax.Array  # [B] int32, which request; R and beyond is padding, whose `tokens` is 0
  tokens: jax.Array  # [B] int32, tokens of the tail to attend to


@dataclasses.dataclass(frozen=True)
class Stop:
  """PSA's stop test, made after each group of a list."""

  threshold: float  # epsilon, in (0, 1]
  untested: int  # the first blocks of a list, read without a test (sinks and window); whole groups

  def __post_init__(self):
    if not 0 < self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold} is not in (0, 1]")
    if self.untested < 0:
      raise ValueError(f"untested={self.untested} blocks")


def attend(
  q: jax.Array,
  tails: Tails,
  pool: jax.Array,
  slots: jax.Array,
  layer: jax.Array,
  located: Located,
  stop: Stop | None = None,
  *,
  implementation: str = "xla",
) -> tuple[Partial, jax.Array, jax.Array]:
  """Attends to a row's tail and to the first blocks of its list. Products are scaled by D ** -0.5.

  Args:
    q: [B, K, G, D].
    tails: where each row's tail lies.
    pool: [K, L, M, 2, S, D], every finished block; host memory when offloading.
    slots: [P, 2, S, D]; P may be 0: every block is then read from the pool.
    layer: scalar int32.
    located: the lists and where their blocks lie, from `residency.propose`: one group for a list that is read whole,
      groups in descending order of score for a progressive one. What lies beyond a list's length is not read.
    stop: when a progressive list ends; the test is made between groups, of propose(group=...). None: lists are read
      whole.
    implementation: "xla", "triton" or "interpret".

  Returns:
    Partial of [B, K, G, D]; how many blocks were attended [B, K] int32, the first ones; `slots` with those of them in
    it that missed and have a place, in place when donated.

  Raises:
    ValueError: lists have no blocks, or are not grouped as `stop` needs it.
    NotImplementedError: a kernel was asked for and S or D is not a power of two.
  """
  triton.check(implementation, S=tails.kv.shape[4], D=tails.kv.shape[5])
  n_groups = located.n_hits.shape[-1]
  if located.blocks.shape[-1] == 0:
    raise ValueError("lists of 0 blocks")
  if stop is None and n_groups != 1:
    raise ValueError(f"a list that is read whole is one group of blocks, not {n_groups}")
  if stop is not None and n_groups > 1 and stop.untested % located.group:
    raise ValueError(f"untested={stop.untested} blocks are not whole groups of {located.group}")
  if implementation == "xla":
    return _attend_xla(q, tails, pool, slots, layer, located, stop)
  return _attend_kernel(q, tails, pool, slots, layer, located, stop, implementation)


WITHOUT_TESTS = 16  # blocks that XLA gathers at a time where no stop test limits it


def _attend_xla(q, tails, pool, slots, layer, located, stop) -> tuple[Partial, jax.Array, jax.Array]:
  n_rows, n_heads, n = located.blocks.shape
  n_slots, length = slots.shape[0], located.length
  log_threshold, untested = (math.inf, 0) if stop is None else (math.log(stop.threshold), stop.untested)
  scale = q.shape[-1] ** -0.5

  head = jnp.arange(n_heads)[None]
  n_lanes, block_tokens = tails.kv.shape[2], tails.kv.shape[4]
  last = tails.kv[head, layer, jnp.clip(tails.lanes, 0, n_lanes - 1)[:, None]]  # [B, K, 2, S, D]
  in_tail = jnp.arange(block_tokens)[None] < tails.tokens[:, None]
  in_tail = jnp.broadcast_to(in_tail[:, None], (n_rows, n_heads, block_tokens))
  acc = partial_attention(q, last[:, :, 0], last[:, :, 1], in_tail, scale)

  size = min(WITHOUT_TESTS, n) if stop is None else located.group
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -n % size)), constant_values=-1)  # noqa: E731
  blocks, all_slots, all_places = pad(located.blocks), pad(located.slot), pad(located.place)

  def step(carry):
    """Attends to the next `size` ranks of every (row, head) that has not stopped."""
    start, acc, lse_min, attended, stopped, slots = carry
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 2)  # noqa: E731
    rank = start + jnp.arange(size)[None, None]
    live = (rank < length[..., None]) & ~stopped[..., None]  # [B, K, size]
    kv = read_blocks(pool, slots, layer, cut(blocks), cut(all_slots))
    valid = jnp.broadcast_to(live[..., None], kv.shape[:3] + kv.shape[4:5])
    by_block = partial_attention(
      q[:, :, None], kv[..., 0, :, :], kv[..., 1, :, :], valid, scale
    )  # o [B, K, size, G, D]
    acc = merge(acc, merge_along(by_block, 2))
    # Masses are kept as logarithms, so that one reference holds for all groups and nothing is rescaled.
    ranked = (live & (rank >= untested))[..., None]
    lse_min = jnp.minimum(lse_min, jnp.where(ranked, by_block.lse, jnp.inf).min(2))
    attended = attended + live.sum(-1, dtype=jnp.int32)
    left = (length - attended)[..., None]
    # Before the first ranked block lse_min is infinite, so log P_acc is -inf; with none left as well, NaN: no test
    # passes, and `left` alone says stop.
    seen = acc.lse - jnp.logaddexp(acc.lse, lse_min + jnp.log(left))  # log P_acc [B, K, G]
    stopped = stopped | ((left[..., 0] <= 0) | (seen > log_threshold).all(-1))
    if n_slots:
      place = cut(all_places)
      slots = slots.at[jnp.where(live & (place >= 0), place, n_slots)].set(kv, mode="drop")
    return start + size, acc, lse_min, attended, stopped, slots

  def more(carry):
    start, _, _, _, stopped, _ = carry
    return ((start < length) & ~stopped).any()

  lse_min = jnp.full(q.shape[:3], jnp.inf)
  zero = jnp.zeros(q.shape[:2], jnp.int32)
  start = jnp.int32(0), acc, lse_min, zero, length <= 0, slots
  _, acc, _, attended, _, slots = jax.lax.while_loop(more, step, start)
  return acc, attended, slots


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How the work is cut into programs.

  A (row, KV head) of a list that is read whole is cut into `splits` programs for its hits; its misses are the work of
  one of `miss_programs`, few and first in line, so that PCIe is busy from the start without filling the SMs. A block is
  two loads, keys and values: with 5 stages two blocks are on their way while one is multiplied.
  """

  splits: int
  miss_programs: int
  num_warps: int
  num_stages: int = 5

  @classmethod
  def of(cls, n_lists: int, n: int, block_bytes: int, has_slots: bool, progressive: bool) -> Tiling:
    """For `n_lists` = B x K lists of up to `n` blocks."""
    num_warps = min(8, max(2, block_bytes // WARP_BYTES))
    if progressive:  # each stop test needs all blocks before it
      return cls(splits=1, miss_programs=0, num_warps=num_warps)
    splits = max(1, min(-(-HIT_PROGRAMS // n_lists), -(-n // SPLIT_BLOCKS)))
    return cls(splits=splits, miss_programs=min(MISS_PROGRAMS, n_lists) if has_slots else 0, num_warps=num_warps)

  def grid(self, n_lists: int) -> int:
    return self.miss_programs + n_lists * self.splits


def _attend_kernel(q, tails, pool, slots, layer, located, stop, implementation):
  n_rows, n_heads, n_group, depth = q.shape
  block_tokens, n_lists = tails.kv.shape[4], n_rows * n_heads
  progressive, has_slots, scale = stop is not None, slots.shape[0] > 0, depth**-0.5
  log2_threshold, untested = (math.log2(stop.threshold), stop.untested) if progressive else (math.inf, 0)
  block_bytes = math.prod(pool.shape[3:]) * pool.dtype.itemsize
  tiling = Tiling.of(n_lists, located.blocks.shape[2], block_bytes, has_slots, progressive)
  parts = tiling.splits + (tiling.miss_programs > 0)
  heads = max(LEAST_HEADS, pl.next_power_of_2(n_group))
  held = slots if has_slots else jnp.zeros((1, *slots.shape[1:]), slots.dtype)

  def kernel(
    layer_ref, lanes_ref, tokens_ref, blocks_ref, slot_ref, place_ref, n_hits_ref, length_ref, q_ref, tail_ref, *refs
  ):
    pool_ref, _, o_ref, m_ref, l_ref, attended_ref, smallest_ref, slots_ref = refs  # `held` is slots_ref: one memory
    layer = layer_ref[0]
    of_head = jnp.minimum(jnp.arange(heads), n_group - 1)  # the last head stands in for those that pad
    zero = (jnp.zeros((heads, depth)), jnp.full((heads,), -jnp.inf), jnp.zeros((heads,)), jnp.full((heads,), jnp.inf))

    def of_list(i):
      """What a program does for list `i`: (b, k) and three loops over ranks [from, to) of it, each acc -> acc."""
      b, k = jax.lax.div(i, n_heads), jax.lax.rem(i, n_heads)
      queries = q_ref[b, k, of_head]  # [G, D]

      def update(acc, keys, values, ranked, valid=None):
        """One block, keys and values [S, D], into o [G, D], m, l and the smallest mass [G], logarithms to base 2."""
        o, m, l, smallest = acc
        s = triton.dot(queries, keys, trans_b=True) * (scale * LOG2_E)  # [G, S]
        if valid is not None:
          s = jnp.where(valid[None], s, -jnp.inf)
          values = jnp.where(valid[:, None], values, jnp.zeros_like(values))  # 0 * NaN is NaN
        top = jnp.maximum(m, s.max(1))
        p, old = jnp.exp2(s - top[:, None]), jnp.exp2(m - top)
        mass = p.sum(1)
        if progressive:
          smallest = jnp.where(ranked, jnp.minimum(smallest, top + jnp.log2(mass)), smallest)
        o = o * old[:, None] + triton.dot(p.astype(values.dtype), values)
        return o, top, l * old + mass, smallest

      def read_tail(acc, wanted):
        lane = jnp.minimum(lanes_ref[b], tail_ref.shape[2] - 1)
        n = tokens_ref[b]

        def body(_, acc):
          keys, values = tail_ref[k, layer, lane, 0], tail_ref[k, layer, lane, 1]
          return update(acc, keys, values, False, jnp.arange(block_tokens) < n)

        return jax.lax.fori_loop(0, (wanted & (n > 0)).astype(jnp.int32), body, acc)

      def read_hits(first, end, acc, ranked=False):
        def body(i, acc):
          if has_slots:
            at = slot_ref[b, k, i]
            return update(acc, slots_ref[at, 0], slots_ref[at, 1], ranked)
          block = blocks_ref[b, k, i]
          return update(acc, pool_ref[k, layer, block, 0], pool_ref[k, layer, block, 1], ranked)

        return jax.lax.fori_loop(first, end, body, acc)

      def read_misses(first, end, acc, ranked=False):
        def body(i, acc):
          block, to = blocks_ref[b, k, i], place_ref[b, k, i]

          def read(half):  # one half at a time takes fewer registers
            x = pool_ref[k, layer, block, half]
            triton.store(slots_ref.at[jnp.maximum(to, 0), jnp.int32(half)], x, mask=jnp.broadcast_to(to >= 0, x.shape))
            return x

          return update(acc, read(0), read(1), ranked)

        return jax.lax.fori_loop(first, end, body, acc)

      return b, k, read_tail, read_hits, read_misses

    def store(b, k, part, acc):
      o_ref[part, b, k, of_head], m_ref[part, b, k, of_head] = acc[0], acc[1] * (1 / LOG2_E)
      l_ref[part, b, k, of_head] = acc[2]

    def hits_program(i):
      """Part `i mod splits` of the hits of a list; the first part has the tail too."""
      part, i = jax.lax.rem(i, tiling.splits), jax.lax.div(i, tiling.splits)
      b, k, read_tail, read_hits, _ = of_list(i)
      hits = jnp.minimum(n_hits_ref[b, k, 0], length_ref[b, k]) if has_slots else length_ref[b, k]
      share = jax.lax.div(hits + (tiling.splits - 1), tiling.splits)
      first = part * share
      acc = read_hits(first, jnp.minimum(first + share, hits), read_tail(zero, part == 0))
      store(b, k, part, acc)

    def misses_program(program):
      """The misses of every `miss_programs`-th list."""

      def body(j, _):
        b, k, _, _, read_misses = of_list(program + j * tiling.miss_programs)
        store(b, k, tiling.splits, read_misses(n_hits_ref[b, k, 0], length_ref[b, k], zero))

      left = n_lists - program
      jax.lax.fori_loop(0, jax.lax.div(left + (tiling.miss_programs - 1), tiling.miss_programs), body, None)

    def progressive_program(i):
      b, k, read_tail, read_hits, read_misses = of_list(i)
      n, group = length_ref[b, k], located.group

      def body(state):
        i, _, acc = state
        stop, ranked = jnp.minimum(i + group, n), i >= untested
        middle = jnp.minimum(i + n_hits_ref[b, k, jax.lax.div(i, group)], stop) if has_slots else stop
        acc = read_hits(i, middle, acc, ranked)
        acc = read_misses(middle, stop, acc, ranked) if has_slots else acc
        _, m, l, smallest = acc
        seen, unseen = m + jnp.log2(l), smallest + jnp.log2((n - stop).astype(jnp.float32))
        high, low = jnp.maximum(seen, unseen), jnp.minimum(seen, unseen)
        log2_p = seen - (high + jnp.log2(1.0 + jnp.exp2(low - high)))
        # NaN, of an infinite `smallest` and none left, is not above the threshold; `stop` is then n anyway.
        enough = jnp.min((log2_p > log2_threshold).astype(jnp.int32))
        return stop, jnp.where(enough == 1, stop, n), acc

      i, end, acc = jax.lax.while_loop(
        lambda state: state[0] < state[1], body, (jnp.int32(0), n, read_tail(zero, True))
      )
      store(b, k, 0, acc)
      # Triton's compiler fails on a loop of which a result is not used (3.6: RemoveLayoutConversions).
      attended_ref[b, k], smallest_ref[b, k, of_head] = jnp.minimum(i, end), acc[3]

    program = pl.program_id(0)
    if progressive:
      progressive_program(program)
    elif tiling.miss_programs:
      pl.when(program < tiling.miss_programs)(lambda: misses_program(program))
      pl.when(program >= tiling.miss_programs)(lambda: hits_program(program - tiling.miss_programs))
    else:
      hits_program(program)

  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  o, m, l, attended, _, held = triton.call(
    kernel,
    out_shape=(
      f32(parts, n_rows, n_heads, n_group, depth),
      f32(parts, n_rows, n_heads, n_group),
      f32(parts, n_rows, n_heads, n_group),
      jax.ShapeDtypeStruct((n_rows, n_heads), jnp.int32),
      f32(n_rows, n_heads, n_group),
      jax.ShapeDtypeStruct(held.shape, held.dtype),
    ),
    grid=(tiling.grid(n_lists),),
    input_output_aliases={11: 5},  # `held`, the last operand, is the last result
    implementation=implementation,
    num_warps=tiling.num_warps,
    num_stages=tiling.num_stages,
    name="attend",
  )(jnp.reshape(layer, 1), tails.lanes, tails.tokens, *located, q, tails.kv, pool, held)
  # Part by part, so that XLA makes one elementwise kernel of it.
  partial = functools.reduce(merge, (Partial(o[i], m[i], l[i]) for i in range(parts)))
  return partial, attended if progressive else located.length, held if has_slots else slots
