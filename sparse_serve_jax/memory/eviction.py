"""Which slot is given up first, by a policy, and for whom, by zones.

A policy is one function of the maps and the first stamp of a step. It gives every slot a key, int32 [P]; once a step
slots are sorted by it, and those with the smallest keys go first, ties to the lowest slot. A slot that the step has
used, or is about to read, is never given up, whatever its key. To add one:

  EVICTIONS["lowest_slot"] = lambda maps, since: jnp.arange(maps.block_of.shape[0], dtype=jnp.int32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

import pallas_kernels as kernels

Zones = Literal["shared", "layer", "lane"]  # whose slots a block may take: anybody's, its layer's, its request's


class Turn(NamedTuple):
  """What of a step's victims is still to be given."""

  zones: Zones
  victims: kernels.Victims
  given: Int32[Array, "*any"]  # how many of them are gone: of each zone [Z]; with one zone, of any shape, the sum
  free: kernels.Free | None = None  # the slots that progressive lists take

  @property
  def n_zones(self) -> int:
    return self.victims.slots.shape[0]

  def zone(self, layer: Int32[Array, "*n"], lanes: Int32[Array, " B"]) -> Int32[Array, "rows ranks"]:
    """That of lists of these lanes, R for padding; of one layer or of one for each rank."""
    if self.n_zones == 1:
      return jnp.zeros((1, 1), jnp.int32)
    return jnp.reshape(layer, (1, -1)) if self.zones == "layer" else jnp.minimum(lanes, self.n_zones - 1)[:, None]

  def at(self, layer: Int32[Array, ""], lanes: Int32[Array, " B"]) -> Turn:
    """For lists of one layer."""
    if self.n_zones == 1:
      return self
    zone = self.zone(layer, lanes)[:, 0]
    free = self.free and self.free._replace(zone=zone)
    return self._replace(victims=self.victims._replace(zone=zone), free=free)

  def by_zone(self, counts: Int32[Array, "B K"]) -> Int32[Array, "*any"]:
    """Counts of the lists that this turn is `at`, as `given` has them."""
    zone = self.victims.zone
    if zone is None:
      return counts
    counts = counts.sum(1) if zone.shape[0] > 1 else jnp.reshape(counts.sum(), 1)
    return jnp.zeros(self.n_zones, jnp.int32).at[zone].add(counts)


Eviction = Callable[[kernels.Maps, Int32[Array, ""]], Int32[Array, " P"]]

EVICTIONS: dict[str, Eviction] = {
  "fifo": kernels.since_entry,  # first in, first out, however often it was used
  "lru": kernels.ages,  # least recently used, empty slots before all others (SparseServe, PSA)
}
