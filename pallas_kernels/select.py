"""The k best blocks of every row, exactly and in order."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32

from pallas_kernels import triton

MAX_SORTED = 1 << 14  # keys and ids that one program can sort in registers
MAX_SEARCHED = 1 << 15  # keys that one program can hold in registers
SORTED_VALUES, SEARCHED_VALUES = 256, 1024  # for each warp to hold, while there are warps
LOWEST, HIGHEST = -(1 << 31), (1 << 31) - 1


class Listed(NamedTuple):
  """What the places of a row's scores stand for."""

  tables: Int32[Array, "B N"]  # pool block of every logical block
  n_blocks: Int32[Array, " B"]  # blocks that a row has: what comes after them is none


def select(
  scores: Float32[Array, "B K N"], k: int, listed: Listed | None = None, *, implementation: str = "xla"
) -> tuple[Float32[Array, "B K {k}"], Int32[Array, "B K {k}"]]:
  """The k highest scores of every row, descending; ties to the lowest id.

  Args:
    scores: -inf where a row has no block. NaN is above all else.
    k: at most N.
    listed: what is selected from; without it the ids are.
    implementation: "xla", "triton" or "interpret".

  Returns:
    The scores and their logical ids, or the pool blocks that are `listed` there, -1 for none.

  Raises:
    ValueError: k is not in [1, N].
    NotImplementedError: a kernel was asked for, and a row is too long for one: see `fits`.
  """
  n = scores.shape[-1]
  triton.check(implementation)
  if not 1 <= k <= n:
    raise ValueError(f"{k=} of {n} scores")
  n_padded, k_padded = pl.next_power_of_2(n), pl.next_power_of_2(k)
  if implementation == "xla":
    ranked, ids = jax.lax.top_k(jnp.where(jnp.isnan(scores), jnp.nan, scores), k)  # -NaN is below -inf to XLA
    if listed is None:
      return ranked, ids.astype(jnp.int32)
    blocks = jnp.take_along_axis(listed.tables[:, None], ids, -1)
    return ranked, jnp.where(ids < listed.n_blocks[:, None, None], blocks, -1)

  if not fits(n, k):
    raise NotImplementedError(
      f"{k} best of {n}: a kernel takes {MAX_SORTED} of {MAX_SEARCHED}; use implementation='xla'"
    )
  num_warps = max(1, min(32, max(n_padded // SEARCHED_VALUES, k_padded // SORTED_VALUES)))
  rows, shape = math.prod(scores.shape[:-1]), (*scores.shape[:-1], k)
  ranked, ids = triton.call(
    functools.partial(_kernel, k, scores.shape[1], num_warps, implementation),
    out_shape=(jax.ShapeDtypeStruct((rows, k), jnp.float32), jax.ShapeDtypeStruct((rows, k), jnp.int32)),
    grid=(rows,),
    implementation=implementation,
    num_warps=num_warps,
    name="select",
  )(scores.reshape(rows, n), *(listed or ()))
  return ranked.reshape(shape), ids.reshape(shape)


def fits(n: int, k: int) -> bool:
  """Whether a program's registers hold a row of `n` scores and its `k` best."""
  return pl.next_power_of_2(n) <= MAX_SEARCHED and pl.next_power_of_2(k) <= MAX_SORTED


def _kernel(
  k: int,
  n_heads: int,
  num_warps: int,
  implementation: str,
  scores_ref,  # [B * K, N]
  *refs,  # what is listed, if anything is: tables [B, N] and n_blocks [B]; results [B * K, k]
):
  """One row."""
  *listed_refs, ranked_ref, ids_ref = refs
  row, n = pl.program_id(0), scores_ref.shape[1]
  n_padded, k_padded = pl.next_power_of_2(n), pl.next_power_of_2(k)
  if k_padded < n_padded:
    _write_highest(scores_ref, ids_ref, row, k)
    triton.barrier(implementation)  # every thread sees the ids that others wrote
    at = jnp.arange(k_padded)
    ids = jnp.where(at < k, ids_ref[row, jnp.minimum(at, k - 1)], HIGHEST)
    triton.barrier(implementation)  # and has read them before they are written again
  else:
    ids = jnp.arange(n_padded)
  exists = ids < n
  keys = jnp.where(exists, _key(scores_ref[row, jnp.minimum(ids, n - 1)]), LOWEST)
  keys, ids, rank = _sort(keys, ids, 32 * num_warps)
  if listed_refs:
    tables_ref, n_blocks_ref = listed_refs
    b = jax.lax.div(row, n_heads)
    ids = jnp.where(ids < n_blocks_ref[b], tables_ref[b, jnp.minimum(ids, n - 1)], -1)
  triton.store(ranked_ref.at[row, rank], _score(keys), mask=rank < k)
  triton.store(ids_ref.at[row, rank], ids, mask=rank < k)


def _key(score: jax.Array) -> jax.Array:
  """int32 in the order of the float32; NaN of either sign is above them all, LOWEST below."""
  bits = jax.lax.bitcast_convert_type(score, jnp.int32) & jnp.where(score != score, jnp.int32(HIGHEST), jnp.int32(-1))
  return bits ^ ((bits >> 31) & HIGHEST)


def _score(key: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(key ^ ((key >> 31) & HIGHEST), jnp.float32)


def _write_highest(scores_ref, ids_ref, row: jax.Array, k: int):
  """In a kernel: writes the ids of the k highest scores of a row to `ids_ref[row]`, in any order."""
  n = scores_ref.shape[1]
  i = jnp.arange(pl.next_power_of_2(n))
  keys = jnp.where(i < n, _key(scores_ref[row, jnp.minimum(i, n - 1)]), LOWEST)

  def count(mask):
    return jnp.sum(mask.astype(jnp.int32))

  def halve(bounds):
    """At least k keys are >= low, fewer than k are > high."""
    low, high = bounds
    middle = (low | high) - ((low ^ high) >> 1)  # their mean rounded up; their sum could overflow
    above = count(keys >= middle)
    return jnp.where(above >= k, middle, low), jnp.where(above > k, high, middle - (above < k).astype(jnp.int32))

  bounds = jnp.min(jnp.where(i < n, keys, HIGHEST)), jnp.max(keys)
  kth, _ = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, bounds)  # ends early at exactly k
  higher, equal = keys > kth, keys == kth
  # One scan counts both: those higher in the low half of a word, those equal, lowest ids first, in its high half.
  seen = jnp.cumsum(higher.astype(jnp.int32) + (equal.astype(jnp.int32) << 16))
  nth_equal = count(higher) + jax.lax.shift_right_logical(seen, 16)
  to = jnp.where(higher, seen & 0xFFFF, nth_equal) - 1
  taken = higher | (equal & (to < k))
  triton.store(ids_ref.at[row, jnp.where(taken, to, k)], i, mask=taken)


def _sort(keys: jax.Array, ids: jax.Array, threads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """In a kernel: keys and ids [n] in descending order of key, ties by ascending id, and the rank of every place.

  A bitonic network. Its low bits are compared most often, so a place's low bits of rank are the register, the next ones
  the lane, and the highest the warp.
  """
  n = keys.shape[0]
  threads = min(n, threads)
  held = n // threads  # by a thread
  place = jnp.arange(n)
  rank = place // threads + held * (place & (threads - 1))
  n_bits = n.bit_length() - 1
  held_bits = held.bit_length() - 1

  for stage in range(1, n_bits + 1):
    for bit in reversed(range(stage)):
      stride = 1 << (bit - held_bits) if bit >= held_bits else threads << bit  # in places
      other = lambda x: (jnp.sum(y := x.reshape(-1, 2, stride), 1, keepdims=True) - y).reshape(n)  # noqa: B023, E731
      other_key, other_id = other(keys), other(ids)
      behind = (other_key > keys) | ((other_key == keys) & (other_id < ids))  # the other one comes first
      first = (((rank >> bit) ^ (rank >> stage)) & 1) == 0  # this place is for the one that comes first
      swap = behind == first
      keys, ids = jnp.where(swap, other_key, keys), jnp.where(swap, other_id, ids)
  return keys, ids, rank
