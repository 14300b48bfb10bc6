"""Progressive lists that are read in rounds, with the stop test between two calls of `attend` and not inside of one.

Same blocks, masses and test as `attend(stop=...)`. A round knows every block's mass by giving each a list of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attend import Tails, attend
from pallas_kernels.partial import Partial, merge, merge_along
from pallas_kernels.residency import Located
from pallas_kernels.stop import LOG2_E, Stop


class _Progress(NamedTuple):
  """How far lists have been read."""

  acc: Partial  # [B, K, G, D], over the tail and what has been read
  known: Float32[Array, "B K G"]  # what the stop test keeps of the groups before
  read: Int32[Array, "B K"]  # blocks
  stopped: Bool[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Rounds:
  """A loop over groups of lists, which on a GPU asks the host after each whether to go on."""

  size: int  # blocks of a group
  stop: Stop

  def read(
    self, tail: Partial, blocks: Int32[Array, "B K n"], length: Int32[Array, "B K"], read: Callable, state: Any
  ) -> tuple[Partial, Any]:
    """Reads lists until all have stopped.

    Args:
      tail: what they begin with, [B, K, G, D].
      blocks: in descending order of score, -1 beyond `length`.
      length: of each list.
      read: (blocks [B, K, size], length, state) -> (a partial result for each block, [B, K, size, G, D]; state). Lists
        that have stopped have no blocks.
      state: passed on from one round to the next.

    Returns:
      The partial result, and the last state.
    """
    size, n = min(self.size, blocks.shape[2]), blocks.shape[2]
    padded = jnp.pad(blocks, ((0, 0), (0, 0), (0, -n % size)), constant_values=-1)

    def go_on(carry):
      start, progress, state = carry
      n = jnp.where(progress.stopped, 0, jnp.clip(length - start, 0, size))
      group = jax.lax.dynamic_slice_in_dim(padded, start, size, 2)
      group = jnp.where(jnp.arange(size)[None, None] < n[..., None], group, -1)
      by_block, state = read(group, n, state)
      return start + size, self._after(progress, by_block, n, length), state

    progress = _Progress(tail, jnp.full_like(tail.m, jnp.inf), jnp.zeros_like(length), length <= 0)
    carry = jnp.int32(0), progress, state
    _, progress, state = jax.lax.while_loop(lambda carry: ~carry[1].stopped.all(), go_on, carry)
    return progress.acc, state

  def _after(self, before: _Progress, by_block: Partial, n: jax.Array, length: jax.Array) -> _Progress:
    """When a round has read `n` more blocks of each list."""
    read_now = jnp.arange(by_block.m.shape[2])[None, None] < n[..., None]
    group = self.stop.rule.of_group(by_block.lse * LOG2_E, read_now)
    acc, read = merge(before.acc, merge_along(by_block, 2)), before.read + n
    left = (length - read)[..., None].astype(jnp.float32)
    start, n_heads = before.read[..., None], acc.m.shape[-1]
    enough, known = self.stop.after(before.known, group, start, acc.lse * LOG2_E, left, n_heads)
    return _Progress(acc, known, read, before.stopped | (length <= read) | enough)


def attend_to_tail(q, tails: Tails, pool, slots, layer, *, implementation: str = "xla"):
  """`attend` to nothing but the tail: its partial result, and `slots`."""
  none = jnp.full((*q.shape[:2], 1), -1, jnp.int32)
  nothing = jnp.zeros(q.shape[:2], jnp.int32)
  located = Located(none, none, none, nothing[..., None], nothing)
  partial, _, slots = attend(q, tails, pool, slots, layer, located, implementation=implementation)
  return partial, slots


def attend_by_block(
  q: Float[Array, "B K G D"],
  tails: Tails,
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  located: Located,
  *,
  implementation: str = "xla",
) -> tuple[Partial, Float[Array, "P 2 S D"]]:
  """`attend` to lists of one group, without tails: a partial result for each block, [B, K, n, G, D], and `slots`."""
  n_rows, n_heads, n = located.blocks.shape

  def each(x):
    return jnp.moveaxis(x, 2, 1).reshape(n_rows * n, n_heads, 1)

  exists = jnp.arange(n)[None, None] < located.length[..., None]
  blocks, slot, place, length = (
    each(x) for x in (located.blocks, located.slot, located.place, exists.astype(jnp.int32))
  )
  lists = Located(blocks, slot, place, (slot >= 0).astype(jnp.int32), length[..., 0])
  lanes = jnp.repeat(tails.lanes, n)
  partial, _, slots = attend(
    jnp.repeat(q, n, 0),
    Tails(tails.kv, lanes, jnp.zeros_like(lanes)),
    pool,
    slots,
    layer,
    lists,
    implementation=implementation,
  )
  by_row = (jnp.moveaxis(x.reshape(n_rows, n, *x.shape[1:]), 1, 2) for x in partial)
  return Partial(*by_row), slots
