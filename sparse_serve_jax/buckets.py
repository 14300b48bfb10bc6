"""Shape buckets: the one place that decides which program shapes exist.

A prompt piece is padded to one of `pieces`; a decode batch to one of `batches` rows and one of `tables` block-table
widths. Above 2k tokens a piece is at most 12.5 % longer than what it holds; few rows and narrow tables cost a decode
step little, so those buckets are coarse. Programs are compiled on first use.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools

from sparse_serve_jax.config import EngineConfig

_SMALL = (512, 1024)  # tokens; below 2k padding is cheap and programs are not


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Ascending sizes. `whole` pieces begin their prompt; `chunks` continue one and also take a prefix table width."""

  block_tokens: int
  whole: tuple[int, ...]  # tokens
  chunks: tuple[int, ...]  # tokens
  tables: tuple[int, ...]  # blocks
  batches: tuple[int, ...]  # rows

  @classmethod
  def of(cls, config: EngineConfig, n_layers: int, max_context: int) -> Buckets:
    """Buckets for requests of up to `max_context` tokens."""
    size, scheduler = config.cache.block_tokens, config.scheduler
    context = _round_up(max_context, size)
    piece = min(_round_up(config.prefill_allowance(n_layers), size), context)
    # A longer prompt comes in full pieces and a remainder. Eighths of a piece pad it by an eighth at most.
    eighths = sorted({_round_up(piece * i // 8, size) for i in range(1, 9)})
    rest = context - piece  # the most that can follow a full piece
    chunks = [c for i, c in enumerate(eighths) if i == 0 or eighths[i - 1] < rest] if rest else []
    blocks = context // size
    return cls(
      block_tokens=size,
      whole=tuple(eighths if chunks and scheduler.prefill == "chunked" else _geometric(size, piece)),
      chunks=tuple(chunks),
      tables=tuple(sorted({min(blocks, max(64, -(-blocks // 8))), blocks})),
      batches=tuple(sorted({min(8, scheduler.max_batch), scheduler.max_batch})),
    )

  def piece(self, n_tokens: int, start: int) -> int:
    """Tokens that a piece of `n_tokens` beginning at `start` is padded to."""
    return _fit(self.chunks if start else self.whole, n_tokens, "prompt piece of tokens")

  def table(self, n_blocks: int) -> int:
    return _fit(self.tables, n_blocks, "block table of")

  def batch(self, n_rows: int) -> int:
    return _fit(self.batches, n_rows, "batch of rows")

  def programs(self) -> list[tuple]:
    """Every decode and prefill program there can be."""
    decode = [("decode", b, n) for b, n in itertools.product(self.batches, self.tables)]
    begin = [("prefill", c, 0) for c in self.whole]
    # A prefix holds at least one full piece, which the scheduler may have rounded down by an eighth.
    prefixes = [n for n in self.tables if self.chunks and n * self.block_tokens * 8 >= self.chunks[-1] * 7]
    resume = [("prefill", c, n) for c, n in itertools.product(self.chunks, prefixes)]
    return decode + begin + resume


def _geometric(size: int, largest: int) -> list[int]:
  """Sizes up to `largest`, each from 2048 on at most 9/8 of the one before, multiples of the block size."""
  sizes = [_round_up(s, size) for s in _SMALL if s < largest]
  at = 2048
  while at < largest:
    sizes.append(_round_up(at, size))
    step = max(size, 1 << (at.bit_length() - 7))  # a divisor that keeps long pieces easy to cut into tiles
    at = max(at + step, (at + at // 8) // step * step)
  return [*sizes, largest]


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _fit(sizes: tuple[int, ...], n: int, what: str) -> int:
  i = bisect.bisect_left(sizes, n)
  if i == len(sizes):
    raise ValueError(f"{what} {n} exceeds the largest bucket, {sizes[-1] if sizes else 0}")
  return sizes[i]
