"""XLA implementations of the ops that have kernels: the oracles of their tests and the path of every run on a CPU.

They read the pool by XLA's gather, so they need it in the memory of the device that computes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.partial import Partial, merge, merge_along

WITHOUT_TESTS = 16  # blocks gathered at a time where no stop test limits it
_HIGHEST = jax.lax.Precision.HIGHEST


def partial_attention(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, scale: float) -> Partial:
  """Attention of q [..., G, D] over k, v [..., T, D] where `valid` [..., T]; what is masked may hold NaN."""
  # bf16 products are exact in float32, so this is what a tensor core accumulates.
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  s = jnp.einsum("...gd,...td->...gt", q, k, precision=_HIGHEST) * scale
  s = jnp.where(valid[..., None, :], s, -jnp.inf)
  m = s.max(-1)
  p = jnp.exp(s - jnp.where(m == -jnp.inf, 0.0, m)[..., None])
  v = jnp.where(valid[..., None], v, 0.0)  # 0 * NaN is NaN
  return Partial(jnp.einsum("...gt,...td->...gd", p, v, precision=_HIGHEST), m, p.sum(-1))


def _read(pool, slots, layer, blocks, slot):
  """Blocks [B, K, n, 2, S, D] from their slots, or from the pool where `slot` is -1."""
  head = jnp.arange(pool.shape[0])[None, :, None]
  from_pool = pool[head, layer, jnp.maximum(blocks, 0)]
  if slots.shape[0] == 0:
    return from_pool
  return jnp.where((slot >= 0)[..., None, None, None], slots[jnp.maximum(slot, 0)], from_pool)


def attend(
  q, tail, rows, tail_tokens, pool, slots, layer, reads, count, *, always, threshold, scale
) -> tuple[Partial, jax.Array, jax.Array]:
  """See `pallas_kernels.attend.attend`."""
  n_rows, n_heads, n = reads.blocks.shape
  n_slots = slots.shape[0]
  log_threshold = math.inf if threshold is None else math.log(threshold)

  head = jnp.arange(n_heads)[None]
  last = tail[head, layer, jnp.clip(rows, 0, tail.shape[2] - 1)[:, None]]  # [B, K, 2, S, D]
  in_tail = jnp.arange(tail.shape[4])[None] < tail_tokens[:, None]
  in_tail = jnp.broadcast_to(in_tail[:, None], (n_rows, n_heads, tail.shape[4]))
  acc = partial_attention(q, last[:, :, 0], last[:, :, 1], in_tail, scale)

  size = min(WITHOUT_TESTS, n) if threshold is None else reads.group
  pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -n % size)))  # noqa: E731
  blocks, all_slots, all_hits = pad(reads.blocks), pad(reads.slot), pad(reads.hit)

  def step(carry):
    """Attends to the next `size` ranks of every (row, head) that has not stopped."""
    start, acc, lse_min, used, stopped, slots = carry
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, 2)  # noqa: E731
    rank = start + jnp.arange(size)[None, None]
    live = (rank < count[..., None]) & ~stopped[..., None]  # [B, K, size]
    slot, hit = cut(all_slots), cut(all_hits)
    kv = _read(pool, slots, layer, cut(blocks), jnp.where(hit, slot, -1))
    valid = jnp.broadcast_to(live[..., None], kv.shape[:3] + kv.shape[4:5])
    by_block = partial_attention(
      q[:, :, None], kv[..., 0, :, :], kv[..., 1, :, :], valid, scale
    )  # o [B, K, size, G, D]
    acc = merge(acc, merge_along(by_block, 2))
    # Masses are kept as logarithms, so that one reference holds for all groups and nothing is rescaled.
    ranked = (live & (rank >= always))[..., None]
    lse_min = jnp.minimum(lse_min, jnp.where(ranked, by_block.lse, jnp.inf).min(2))
    used = used + live.sum(-1, dtype=jnp.int32)
    left = (count - used)[..., None]
    # Before the first ranked block lse_min is infinite, so log P_acc is -inf.
    seen = acc.lse - jnp.logaddexp(acc.lse, lse_min + jnp.log(left))  # log P_acc [B, K, G]
    stopped = stopped | ((left[..., 0] <= 0) | (seen > log_threshold).all(-1))
    if n_slots:
      enters = live & ~hit & (slot >= 0)
      slots = slots.at[jnp.where(enters, slot, n_slots)].set(kv, mode="drop")
    return start + size, acc, lse_min, used, stopped, slots

  def more(carry):
    start, _, _, _, stopped, _ = carry
    return ((start < count) & ~stopped).any()

  lse_min = jnp.full(q.shape[:3], jnp.inf)
  zero = jnp.zeros(q.shape[:2], jnp.int32)
  _, acc, _, used, _, slots = jax.lax.while_loop(more, step, (jnp.int32(0), acc, lse_min, zero, count <= 0, slots))
  return acc, used, slots


def load_blocks(pool, slots, layer, blocks, slot) -> jax.Array:
  """See `pallas_kernels.copy.load_blocks`."""
  head = jnp.arange(pool.shape[0])[None, :, None]
  kv = pool[head, layer, jnp.maximum(blocks, 0)]
  return slots.at[jnp.where((blocks >= 0) & (slot >= 0), slot, slots.shape[0])].set(kv, mode="drop")


def gather_blocks(pool, slots, layer, blocks, slot) -> tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.copy.gather_blocks`."""
  kv = _read(pool, slots, layer, blocks[None], slot[None])[0]
  kv = jnp.where((blocks >= 0)[..., None, None, None], kv, 0).transpose(2, 1, 3, 0, 4)  # [2, n, S, K, D]
  k, v = kv.reshape(2, -1, *kv.shape[3:])
  return k, v


def store_blocks(pool, source, layer, source_ids, blocks) -> jax.Array:
  """See `pallas_kernels.copy.store_blocks`. A loop, since it must not hold a gathered copy of the source."""

  def store_one(i, pool):
    kv = jax.lax.dynamic_slice_in_dim(source, source_ids[i], 1, 2)  # [K, Ls, 1, 2, S, D]
    write = lambda: jax.lax.dynamic_update_slice(pool, kv, (0, layer, blocks[i], 0, 0, 0))  # noqa: E731
    return jax.lax.cond(blocks[i] >= 0, write, lambda: pool)

  return jax.lax.fori_loop(0, blocks.shape[0], store_one, pool)


def place_blocks(slots, source, source_ids, slot) -> jax.Array:
  """See `pallas_kernels.copy.place_blocks`."""

  def place_one(i, slots):
    kv = jax.lax.dynamic_index_in_dim(source, source_ids[i], 2, keepdims=False)  # [K, Ls, 2, S, D]
    to = slot[:, :, i]
    return slots.at[jnp.where(to >= 0, to, slots.shape[0])].set(kv, mode="drop")

  return jax.lax.fori_loop(0, source_ids.shape[0], place_one, slots)


def prefill_attention(q, k, v, prefix, prefix_tokens, *, scale, q_tile: int = 256) -> jax.Array:
  """See `pallas_kernels.prefill.prefill_attention`; the prefix is gathered, keys and values [N * S, K, D], or None."""
  tokens, n_heads, n_group, depth = q.shape
  before = 0
  if prefix is not None:
    before = prefix[0].shape[0]
    k, v = (jnp.concatenate(x) for x in zip(prefix, (k, v), strict=True))
  k, v = (jnp.moveaxis(x, 1, 0) for x in (k, v))  # [K, before + T, D]
  place = jnp.arange(k.shape[1])
  v = jnp.where(((place < prefix_tokens) | (place >= before))[None, :, None], v, 0.0)  # 0 * NaN is NaN
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  tile = math.gcd(tokens, q_tile)

  def one(start):
    queries = jax.lax.dynamic_slice_in_dim(q, start, tile, 0)  # [tile, K, G, D]
    at = (start + jnp.arange(tile))[:, None]
    seen = (place[None] < prefix_tokens) | ((place[None] >= before) & (place[None] - before <= at))  # [tile, T]
    by_head = jnp.moveaxis(queries, 0, 2).reshape(n_heads, n_group * tile, depth)  # rows of one head: G x tile
    s = jnp.einsum("kgd,ktd->kgt", by_head.astype(jnp.float32), k, precision=_HIGHEST) * scale
    p = jax.nn.softmax(jnp.where(jnp.tile(seen, (n_group, 1))[None], s, -jnp.inf), axis=-1)
    o = jnp.einsum("kgt,ktd->kgd", p, v, precision=_HIGHEST)
    return jnp.moveaxis(o.reshape(n_heads, n_group, tile, depth), 2, 0)

  out = jax.lax.map(one, jnp.arange(0, tokens, tile))
  return out.reshape(q.shape).astype(q.dtype)
