"""Where prompts lie in a piece."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


class Packed(NamedTuple):
  """Prompts that lie in one piece, one after the other; or one alone, of which some may come before the piece."""

  begins: Int32[Array, " B"]  # multiples of S that ascend from 0 on; C where there is no prompt
  n_tokens: Int32[Array, " B"]  # 0 where there is no prompt

  def row(self, at: Int32[Array, " C"]) -> Int32[Array, " C"]:
    """Of which prompt, or behind which, the tokens `at` these places of the piece are."""
    return (at[:, None] >= self.begins[None]).sum(1, dtype=jnp.int32) - 1

  def nth(self, at: Int32[Array, " C"]) -> Int32[Array, " C"]:
    """How many tokens of their prompt come before those `at` these places in the piece."""
    return at - self.begins[self.row(at)]

  def own(self, at: Int32[Array, " C"]) -> Bool[Array, " C"]:
    """Whether those `at` these places are of a prompt."""
    return self.nth(at) < self.n_tokens[self.row(at)]

  def blocks(
    self,
    tables: Int32[Array, "R N"],
    lanes: Int32[Array, " B"],
    start: Int32[Array, ""],
    n: int,
    size: int,
    n_newest: int,
  ) -> tuple[Int32[Array, "B n"], Bool[Array, " n"]]:
    """The piece's blocks in the pool, prompt by prompt, -1 for others; and which are the newest of theirs.

    Args:
      tables: of all lanes.
      lanes: of the prompts.
      start: tokens of the prompt before the piece.
      n: blocks of the piece; one that is not full is none of them.
      size: S.
      n_newest: of each prompt.
    """
    at = size * jnp.arange(n)
    row, nth = self.row(at), self.nth(at) // size
    n_full = self.n_tokens[row] // size
    blocks = jnp.where(nth < n_full, tables.at[lanes[row], start // size + nth].get(mode="clip"), -1)
    of_row = row[None] == jnp.arange(self.begins.shape[0])[:, None]
    return jnp.where(of_row, blocks, -1), nth >= n_full - n_newest
