"""An audit of one row in one layer of a decode step: what share of the attention mass its lists held when they stopped.

The layer notes what the row asked for and how much mass was read. After all layers the whole list is read, each block
where it lies. Nothing is moved and no token depends on it. A step with an audit is a program of its own: a branch in
one would make the host wait.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

import pallas_kernels as kernels
from sparse_serve_jax.attention.decode import Counts, DecodeAttention, Rows
from sparse_serve_jax.memory.kv_cache import Hot


class AuditAt(NamedTuple):
  """Which stops are audited: those of a layer's KV heads for one row of the batch."""

  row: Any  # int32 scalars: numpy's before they go to a program
  layer: Any


class Audit(NamedTuple):
  """What an audit found."""

  share: Float32[Array, "K G"]  # of each query head's attention mass, the tail included: what was read of the whole
  unread: Int32[Array, " K"]  # full blocks that the lists left out


class Stopped(NamedTuple):
  """What the audited row's lists came to in the audited layer."""

  at: AuditAt
  q: Float[Array, "K G D"]
  lse: Float32[Array, "K G"]  # log of the mass that was read
  attended: Int32[Array, " K"]  # full blocks

  @classmethod
  def nowhere(cls, at: AuditAt, n_group: int, hot: Hot) -> Stopped:
    """Before the audited layer, with `n_group` query heads a KV head."""
    n_heads, depth = hot.tail.shape[0], hot.tail.shape[-1]
    zero = jnp.zeros((n_heads, n_group), jnp.float32)
    return cls(at, jnp.zeros((n_heads, n_group, depth), hot.tail.dtype), zero, jnp.zeros(n_heads, jnp.int32))

  def noted(self, layer: jax.Array, q: jax.Array, partial: kernels.Partial, counts: Counts) -> Stopped:
    """The same, or of this layer if it is the audited one; q and partial [B, K, G, D] are of all rows."""
    row, here = self.at.row, layer == self.at.layer
    now = Stopped(self.at, q[row], partial.lse[row], counts.attended[row])
    return jax.tree.map(lambda new, old: jnp.where(here, new, old), now, self)


def audit(
  attention: DecodeAttention, stopped: Stopped, pool: Float[Array, "K L M 2 S D"], hot: Hot, rows: Rows
) -> tuple[Audit, Hot]:
  """Reads the whole list of the audited row and layer, after the step has saved its tails; the row's still stands."""
  (at, q, lse, attended), on = stopped, attention.implementation
  row, selector = Rows(*(jax.lax.dynamic_slice_in_dim(x, at.row, 1) for x in rows[:5])), attention.dense.selector
  blocks, length = selector.select(q[None], hot, at.layer, selector.lists_of(row, q.shape[0]), on)
  located = kernels.find(hot.maps, at.layer, blocks, length, implementation=on)  # no miss has a place: none is kept
  tails = kernels.Tails(hot.tail, row.lanes, row.tail_tokens)
  whole, _, slots = kernels.attend(q[None], tails, pool, hot.slots, at.layer, located, implementation=on)
  share = jnp.minimum(jnp.exp(lse - whole.lse[0]), 1.0)  # rounded, it may be a bit more
  return Audit(share, row.n_blocks - attended), hot.replace(slots=slots)
