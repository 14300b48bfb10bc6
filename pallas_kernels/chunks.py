"""Lists of any lengths, cut into chunks of equal size: one program attends to each, and a second kernel merges a list's
partial results. Both work out anew, from the lists' lengths, which chunk is of which list.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Int32

from pallas_kernels import triton
from pallas_kernels.partial import Partial

HIT_PROGRAMS = 512  # for the hits of all lists, if these are long enough: fill every SM several times over
MISS_PROGRAMS = 64  # for all misses, at most: keep PCIe busy and leave most SMs alone
CHUNK_BLOCKS = 4  # of a list, for each of the programs that its hits are cut for; fewer are not worth it
MERGED = 16  # partial results that are merged at a time


def most_chunks(n_lists: int, n: int) -> int:
  """Of so many lists of up to `n` blocks. The last chunk of each may be shorter than the others."""
  return min(HIT_PROGRAMS + n_lists, n_lists * -(-n // CHUNK_BLOCKS))


def n_hits(hits, length, b: jax.Array, k: jax.Array, has_slots: bool) -> jax.Array:
  """Blocks of lists that are read in chunks, by refs [B, K, 1] and [B, K]: where there are no slots, all."""
  return jnp.minimum(hits[b, k, 0], length[b, k]) if has_slots else length[b, k]


class Cut(NamedTuple):
  """Chunks of lists, those of the first list first. Each list has one at least, which has the tail too."""

  ends: jax.Array  # [n], n_lists or more: chunks of each list and of those before it
  size: jax.Array  # blocks of a chunk

  @classmethod
  def of(cls, hits, length, has_slots: bool) -> Cut:
    """By refs [B, K, 1] and [B, K]."""
    n_lists = length.shape[0] * length.shape[1]
    i = jnp.arange(pl.next_power_of_2(n_lists))
    real, at = i < n_lists, jnp.minimum(i, n_lists - 1)
    b, k = jax.lax.div(at, length.shape[1]), jax.lax.rem(at, length.shape[1])
    n = jnp.where(real, n_hits(hits, length, b, k, has_slots), 0)
    size = jnp.maximum(CHUNK_BLOCKS, jax.lax.div(jnp.sum(n) + (HIT_PROGRAMS - 1), HIT_PROGRAMS))
    return cls(jnp.cumsum(jnp.where(real, jnp.maximum(1, jax.lax.div(n + (size - 1), size)), 0)), size)

  def find(self, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which list a chunk is of, and which of the list's it is."""
    before = self.ends <= chunk
    return jnp.sum(before.astype(jnp.int32)), chunk - jnp.max(jnp.where(before, self.ends, 0))

  def chunks(self, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first chunk of a list, and the first beyond them."""
    at = jnp.arange(self.ends.shape[0])
    return jnp.max(jnp.where(at < i, self.ends, 0)), jnp.max(jnp.where(at == i, self.ends, 0))


def merge_chunks(
  parts: Partial,
  shape: tuple[int, ...],
  hits: Int32[jax.Array, "B K 1"],
  length: Int32[jax.Array, "B K"],
  chunks: int,
  implementation: str,
) -> Partial:
  """The partial results of lists, [B, K, G, D] = `shape`, from [parts, G, D]: those of at most so many chunks, then one
  of each list's misses, if there are more parts than chunks."""
  *of_head, depth = shape
  of_query = jax.ShapeDtypeStruct(tuple(of_head), jnp.float32)
  o, m, l = triton.call(
    functools.partial(_merge, chunks, parts.m.shape[0] > chunks),
    out_shape=(jax.ShapeDtypeStruct((*of_head, depth), jnp.float32), of_query, of_query),
    grid=(shape[0] * shape[1],),
    implementation=implementation,
    name="merge_chunks",
  )(hits, length, *parts)
  return Partial(o, m, l)


def _merge(chunks: int, misses: bool, hits, length, o_parts, m_parts, l_parts, o_ref, m_ref, l_ref) -> None:
  """A list: its chunks, and its misses if they are a part of their own."""
  n_heads, n_group, depth = o_ref.shape[1:]
  i = pl.program_id(0)
  first, end = Cut.of(hits, length, misses).chunks(i)
  head = jnp.minimum(jnp.arange(pl.next_power_of_2(n_group)), n_group - 1)
  n = end - first + int(misses)

  def body(j, acc):
    nth = j * MERGED + jnp.arange(MERGED)
    part = jnp.where(first + nth < end, first + nth, jnp.where(nth < n, chunks + i, first))
    at = part[:, None], head[None]
    m = jnp.where((nth < n)[:, None], m_parts[at], -jnp.inf)
    top = jnp.maximum(acc.m, m.max(0))
    reference = jnp.where(top == -jnp.inf, 0.0, top)
    old, new = jnp.exp(acc.m - reference), jnp.exp(m - reference[None])
    o = acc.o * old[:, None] + jnp.sum(o_parts[at] * new[:, :, None], 0)
    return Partial(o, top, acc.l * old + jnp.sum(l_parts[at] * new, 0))

  nothing = jnp.zeros(head.shape)
  zero = Partial(jnp.zeros((*head.shape, depth)), nothing - jnp.inf, nothing)
  acc = jax.lax.fori_loop(0, jax.lax.div(n + (MERGED - 1), MERGED), body, zero)
  at = jax.lax.div(i, n_heads), jax.lax.rem(i, n_heads), head
  o_ref[at], m_ref[at], l_ref[at] = acc.o, acc.m, acc.l
