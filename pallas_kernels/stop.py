"""When a progressive list ends: the stop test of PSA (arXiv 2503.00392, section 2.2), and others that differ in a term.

After each group of a list a query head claims a share of the attention mass, A / (A + a left). A is the mass that has
been read, `left` the number of blocks that have not, and `a` the mass that each of these is taken for. Rules differ in
`a` (`REST`) and in whose claims count (`WHEN`).

Only ranked blocks say what is still to come: the tail and the first `untested` blocks (sinks and window, rounded up to
whole groups) count in A but never in `a`, since they are read wherever they rank and are often the heaviest of all.
So nothing is claimed before a ranked group has been read, and the last two groups are one after the first.

Logarithms are to base 2, and +inf is the mass of a group that says nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

LOG2_E = math.log2(math.e)


def _least_so_far(before: jax.Array, group: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
  least = jnp.minimum(before, group)
  return jnp.exp2(least - seen), least


def _last_group(before: jax.Array, group: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
  del before
  return jnp.exp2(group - seen), group


def _last_two_groups(before: jax.Array, group: jax.Array, seen: jax.Array) -> tuple[jax.Array, jax.Array]:
  each = jnp.exp2(group - seen)
  return jnp.where(before == jnp.inf, each, 0.5 * (each + jnp.exp2(before - seen))), group


@dataclasses.dataclass(frozen=True)
class Rest:
  """What the mass of an unread block is taken for. To try an own one, add it to `REST`: kernels call it too.

  Attributes:
    about: a sentence.
    of: what it looks at of a group: the "least" mass of its blocks, or their "mean".
    taken: what it kept after the last ranked group (+inf before the first), the log of this group's least or mean mass,
      and that of all the mass read so far -> the mass of an unread block as a part of what has been read, and what it
      keeps. Functions of scalars and powers of two alone.
  """

  about: str
  of: Literal["least", "mean"]
  taken: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


REST = {
  "least": Rest("the least mass of a ranked block so far, PSA's rule", "least", _least_so_far),
  "last_group": Rest("the mean mass of a block of the last group", "mean", _last_group),
  "last_two_groups": Rest("the mean mass of a block of the last two groups", "mean", _last_two_groups),
}
WHEN = {  # what must exceed the threshold
  "every_head": "the claim of each query head of a KV head",
  "mean_of_heads": "the mean of their claims",
}


@dataclasses.dataclass(frozen=True)
class StopRule:
  """How a claim is made of masses, and a decision of claims. A name that there is not is a ValueError."""

  rest: str = "last_two_groups"  # a name in REST
  when: str = "every_head"  # a name in WHEN
  entry: Rest = dataclasses.field(
    init=False, repr=False
  )  # what REST says now: programs are kept by it, not by its name

  def __post_init__(self):
    for name, value, known in (("rest", self.rest, REST), ("when", self.when, WHEN)):
      if value not in known:
        raise ValueError(f"a stop rule's {name}={value!r} is none of {', '.join(known)}")
    object.__setattr__(self, "entry", REST[self.rest])

  @property
  def least(self) -> bool:
    """Whether it looks at the least mass of a group's blocks, not at their mean."""
    return self.entry.of == "least"

  def of_group(self, masses: Float[Array, "... size G"], read: Bool[Array, "... size"]) -> Float32[Array, "... G"]:
    """Log of the least or the mean mass of a group's blocks, as `claim` wants it, from logs `masses`; all that there is
    of a group has been `read`."""
    here = read[..., None]
    if self.least:
      return jnp.where(here, masses, jnp.inf).min(-2)
    masses = jnp.where(here, masses, -jnp.inf)
    top = masses.max(-2)
    top = jnp.where(top == -jnp.inf, 0.0, top)  # -inf - -inf would be NaN
    return top + jnp.log2(jnp.exp2(masses - top[..., None, :]).sum(-2)) - math.log2(masses.shape[-2])

  def claim(self, before: jax.Array, group: jax.Array, seen: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is claimed after a group.

    Args:
      before: what the last call returned, +inf before the first.
      group: `of_group` of this group.
      seen: log of the mass that has been read, this group included.
      left: blocks not yet read, float32.

    Returns:
      The share, in [0, 1], and what the next call needs.
    """
    each, kept = self.entry.taken(before, group, seen)
    return 1.0 / (1.0 + jnp.where(left > 0, each * left, 0.0)), kept

  def passes(self, claims: jax.Array, threshold: jax.Array | float, n_heads: int) -> jax.Array:
    """Whether claims [..., >= n_heads] suffice; those beyond n_heads, which pad, are copies of others. Strict: a claim
    is at most 1, so a threshold of 1 is never passed.
    """
    if self.when == "every_head":
      return (claims > threshold).astype(jnp.int32).min(-1) == 1
    real = jax.lax.broadcasted_iota(jnp.int32, claims.shape, claims.ndim - 1) < n_heads
    return jnp.where(real, claims, 0.0).sum(-1) / n_heads > threshold


@dataclasses.dataclass(frozen=True)
class Stop:
  """A stop test, made after each group of a list. A threshold that is not in (0, 1], or untested blocks below 0, are a
  ValueError."""

  threshold: float | Float32[Array, ""]  # epsilon, in (0, 1]; an array where one program serves many of them
  untested: int  # the first blocks of a list, read without a test (sinks and window); whole groups
  rule: StopRule = StopRule()

  def __post_init__(self):
    if not isinstance(self.threshold, jax.Array) and not 0 < self.threshold <= 1:
      raise ValueError(f"threshold={self.threshold} is not in (0, 1]")
    if self.untested < 0:
      raise ValueError(f"untested={self.untested} blocks")

  def always_read(self, size: int) -> int:
    """Blocks of a list that are read whatever they weigh: those untested, and the first ranked group of `size`, as
    nothing is claimed without it."""
    return self.untested + size

  def after(
    self, before: jax.Array, group: jax.Array, start: jax.Array, seen: jax.Array, left: jax.Array, n_heads: int
  ) -> tuple[jax.Array, jax.Array]:
    """Whether to stop after a group, and what the next call needs: `claim`, then `passes`. Before the first ranked one
    nothing is claimed, and nothing kept.

    Args:
      before: as of `claim`.
      group: as of `claim`, whether it is ranked or not.
      start: the block of the list that the group began with.
      seen: as of `claim`.
      left: as of `claim`.
      n_heads: query heads whose claims count.
    """
    ranked = start >= self.untested
    claims, known = self.rule.claim(before, group, seen, left)
    claims, known = jnp.where(ranked, claims, 0.0), jnp.where(ranked, known, jnp.inf)
    return self.rule.passes(claims, self.threshold, n_heads), known
