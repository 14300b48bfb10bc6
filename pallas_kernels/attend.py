"""Attention of one decode step: every selected block is read where it lies, a slot in HBM or the pool in host memory.

Blocks that miss are copied into the slots proposed for them in the same pass. With a threshold this is progressive
sparse attention (PSA, arXiv 2503.00392, section 2.2): blocks come in descending order of score, and a (row, KV head)
stops once the estimated share of attention mass P_acc = A / (A + a_min * left) exceeds the threshold for every query
head of the group. A is the mass so far, a_min the smallest mass of a ranked block so far, `left` the number of blocks
not yet read. The tail and the first `always` blocks count in A but never in a_min: they are not ranked by score. The
test is strict: a threshold of 1 never stops.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import reference, triton
from pallas_kernels.partial import Partial
from pallas_kernels.residency import Proposal


def attend(
  q: jax.Array,
  tail: jax.Array,
  rows: jax.Array,
  tail_tokens: jax.Array,
  pool: jax.Array,
  slots: jax.Array,
  layer: jax.Array,
  blocks: jax.Array,
  proposal: Proposal,
  count: jax.Array,
  *,
  always: int,
  group_blocks: int,
  threshold: float | None,
  scale: float,
  implementation: str = "xla",
) -> tuple[Partial, jax.Array, jax.Array]:
  """Attends to a row's tail and to the first blocks of its list.

  Args:
    q: [B, K, G, D].
    tail: [K, L, R, 2, S, D], unfinished blocks of resident requests.
    rows: [B] int32, where each row's tail lies; values beyond R are padding and need `tail_tokens` 0.
    tail_tokens: [B] int32, tokens of the tail to attend to.
    pool: [K, L, M, 2, S, D], every finished block; host memory when offloading.
    slots: [P, 2, S, D]; P may be 0.
    layer: scalar int32.
    blocks: [B, K, n] int32, DRAM blocks, most critical first; entries at and beyond `count` are not read.
    proposal: slot and hit of each block, from `residency.propose`.
    count: [B, K] int32, at most n.
    always: the first blocks of a list that are read without a stop test (sinks and window).
    group_blocks: blocks between two stop tests, if there are any.
    threshold: epsilon of PSA in (0, 1], or None to read all `count` blocks.
    scale: multiplies the dot products.
    implementation: "xla", "triton" or "interpret".

  Returns:
    Partial of [B, K, G, D]; blocks used [B, K] int32; `slots` with the used misses in their slots, in place when
    donated.
  """
  options = dict(always=always, group_blocks=group_blocks, threshold=threshold, scale=scale)
  if implementation == "xla":
    return reference.attend(q, tail, rows, tail_tokens, pool, slots, layer, blocks, proposal, count, **options)
  return _attend_kernel(
    q,
    tail,
    rows,
    tail_tokens,
    pool,
    slots,
    layer,
    blocks,
    proposal,
    count,
    **options,
    interpret=implementation == "interpret",
  )


def _attend_kernel(
  q,
  tail,
  rows,
  tail_tokens,
  pool,
  slots,
  layer,
  blocks,
  proposal,
  count,
  *,
  always,
  group_blocks,
  threshold,
  scale,
  interpret,
):
  n_rows, n_heads, n_group, depth = q.shape
  padded = pl.next_power_of_2(n_group)  # Triton's blocks are powers of two
  q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - n_group), (0, 0)))
  block_tokens = tail.shape[4]
  log_threshold = math.inf if threshold is None else math.log(threshold)
  has_slots = slots.shape[0] > 0
  held = slots if has_slots else jnp.zeros((1, *slots.shape[1:]), slots.dtype)

  def kernel(
    layer_ref, rows_ref, tail_tokens_ref, blocks_ref, slot_ref, hit_ref, count_ref, q_ref, tail_ref, pool_ref, *refs
  ):
    o_ref, m_ref, l_ref, used_ref, slots_ref = refs[-5:]
    b, k = pl.program_id(0), pl.program_id(1)
    layer, n = layer_ref[0], count_ref[b, k]
    queries = q_ref[b, k].astype(jnp.float32)  # [G, D]

    def read(i):
      """K and V [S, D] of the list's i-th block; copies it into its slot if it missed."""
      slot, hit, block = slot_ref[b, k, i], hit_ref[b, k, i] != 0, blocks_ref[b, k, i]
      kv = jax.lax.cond(
        hit,
        lambda: (slots_ref[slot, 0], slots_ref[slot, 1]),
        lambda: (pool_ref[k, layer, block, 0], pool_ref[k, layer, block, 1]),
      )

      @pl.when(jnp.logical_not(hit) & (slot >= 0))
      def _():
        slots_ref[slot, 0] = kv[0]
        slots_ref[slot, 1] = kv[1]

      return kv

    def mass(keys, valid):
      s = jnp.sum(queries[:, None, :] * keys.astype(jnp.float32)[None], -1) * scale  # [G, S]
      return jnp.where(valid[None], s, -jnp.inf)

    def update(acc, s, values, valid):
      o, m, l = acc
      m_new = jnp.maximum(m, s.max(-1))
      ref = jnp.where(m_new == -jnp.inf, 0.0, m_new)
      p, old = jnp.exp(s - ref[:, None]), jnp.exp(m - ref)
      values = jnp.where(valid[:, None], values.astype(jnp.float32), 0.0)
      o = o * old[:, None] + jnp.sum(p[:, :, None] * values[None], 1)
      return o, m_new, l * old + p.sum(-1)

    row = jnp.minimum(rows_ref[b], tail_ref.shape[2] - 1)
    in_tail = jnp.arange(block_tokens) < tail_tokens_ref[b]
    acc = (jnp.zeros((padded, depth)), jnp.full((padded,), -jnp.inf), jnp.zeros((padded,)))
    acc = update(acc, mass(tail_ref[k, layer, row, 0], in_tail), tail_ref[k, layer, row, 1], in_tail)
    every = jnp.full((block_tokens,), True)
    padding = jnp.arange(padded) >= n_group  # heads that have no vote in the stop test

    def body(state):
      i, _, lse_min, acc = state
      keys, values = read(i)
      s = mass(keys, every)
      acc = update(acc, s, values, every)
      top = s.max(-1)
      lse = top + jnp.log(jnp.exp(s - top[:, None]).sum(-1))
      lse_min = jnp.where(i >= always, jnp.minimum(lse_min, lse), lse_min)
      left = (n - i - 1).astype(jnp.float32)
      seen, unseen = acc[1] + jnp.log(acc[2]), lse_min + jnp.log(left)
      high, low = jnp.maximum(seen, unseen), jnp.minimum(seen, unseen)
      log_p = seen - (high + jnp.log(1.0 + jnp.exp(low - high)))
      enough = jnp.min(jnp.where((log_p > log_threshold) | padding, 1, 0)) == 1
      at_test = (i >= always) & ((i - always + 1) % group_blocks == 0)
      return i + 1, at_test & enough, lse_min, acc

    state = (jnp.int32(0), jnp.bool_(False), jnp.full((padded,), jnp.inf), acc)
    used, _, _, (o, m, l) = jax.lax.while_loop(lambda s: (s[0] < n) & jnp.logical_not(s[1]), body, state)
    o_ref[b, k], m_ref[b, k], l_ref[b, k], used_ref[b, k] = o, m, l, used

  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  o, m, l, used, held = triton.call(
    kernel,
    out_shape=(
      f32(n_rows, n_heads, padded, depth),
      f32(n_rows, n_heads, padded),
      f32(n_rows, n_heads, padded),
      jax.ShapeDtypeStruct((n_rows, n_heads), jnp.int32),
      jax.ShapeDtypeStruct(held.shape, held.dtype),
    ),
    grid=(n_rows, n_heads),
    input_output_aliases={10: 4},
    interpret=interpret,
    name="attend",
  )(
    jnp.reshape(layer, 1),
    rows,
    tail_tokens,
    blocks,
    proposal.slot,
    proposal.hit.astype(jnp.int32),
    count,
    q,
    tail,
    pool,
    held,
  )
  return Partial(o[:, :, :n_group], m[:, :, :n_group], l[:, :, :n_group]), used, held if has_slots else slots
