"""Eviction policies: which slot is given up first.

A policy is one function of the maps and the first stamp of a step. It gives every slot a key, int32 [P]; once a step
slots are sorted by it, and those with the smallest keys go first, ties to the lowest slot. A slot that the step has
used, or is about to read, is never given up, whatever its key. To add one:

  EVICTIONS["lowest_slot"] = lambda maps, since: jnp.arange(maps.block_of.shape[0], dtype=jnp.int32)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Int32

import pallas_kernels as kernels


class Turn(NamedTuple):
  """What of a step's victims is still to be given."""

  victims: kernels.Victims
  given: Int32[Array, "*any"]  # its sum is how many of them are gone


Eviction = Callable[[kernels.Maps, Int32[Array, ""]], Int32[Array, " P"]]

EVICTIONS: dict[str, Eviction] = {
  "lru": kernels.ages,  # least recently used, empty slots before all others (SparseServe, PSA)
}
