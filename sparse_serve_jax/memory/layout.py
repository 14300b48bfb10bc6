"""How a block lies in memory: the one place that knows how many bytes it takes."""

from __future__ import annotations

import dataclasses

ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class BlockLayout:
  """A block: one KV head's K and V of `tokens` tokens in one layer, [2, S, D], contiguous."""

  tokens: int  # S
  depth: int  # D
  dtype: str

  @property
  def shape(self) -> tuple[int, int, int]:
    return 2, self.tokens, self.depth

  @property
  def vector_bytes(self) -> int:
    """Of one key, one value, or one vector of a digest."""
    return self.depth * ITEM_BYTES[self.dtype]

  @property
  def bytes(self) -> int:
    return 2 * self.tokens * self.vector_bytes
