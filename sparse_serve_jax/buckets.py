"""Shape buckets: the one place that decides which program shapes exist, and so how a prompt is cut.

A decode batch is padded to one of `batches` rows and one of `tables` block-table widths; padding there costs little, so
these are coarse. A piece of a prompt is padded to one of `whole` tokens if it begins its prompt, to one of `chunks` if
it continues one. Above 2k tokens a prompt is at most 12.5 % longer than what it holds. Programs are compiled on first
use.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from sparse_serve_jax.config import EngineConfig

_SMALL = (512, 1024)  # tokens; below 2k padding is cheap and programs are not


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Sizes ascend. Tokens, unless said otherwise."""

  block_tokens: int
  full: int  # the largest piece of a prompt that is cut
  unit: int  # an eighth of it: pieces other than a prompt's last are multiples
  least_prefix: int  # what the shortest first piece of a prompt that is cut holds
  whole: tuple[int, ...]
  chunks: tuple[int, ...]
  tables: tuple[int, ...]  # blocks
  batches: tuple[int, ...]  # rows
  n_layers: int
  allowance: int  # what an iteration may prefill: tokens through all layers if `chunked`, token x layers otherwise
  chunked: bool
  resumes: bool  # whether a prompt may begin after blocks that it shares

  @classmethod
  def of(cls, config: EngineConfig, n_layers: int, max_context: int) -> Buckets:
    """Buckets for requests of up to `max_context` tokens.

    With `cache.prefix` a prompt may begin after any of its blocks, so that what is left of it comes with any prefix,
    and in coarse sizes.
    """
    size, scheduler = config.cache.block_tokens, config.scheduler
    chunked = scheduler.prefill == "chunked"
    allowance, context = config.prefill_allowance(n_layers), _round_up(max_context, size)
    eighth = max(1, allowance // size // 8)  # blocks
    unit = eighth * size
    full = 8 * unit if allowance >= 8 * unit else max(1, allowance // size) * size

    eighths = list(range(unit, full + 1, unit))
    # Layer-segmented, only a prompt beyond the allowance is cut, all its pieces full but the last. Chunked, any prompt
    # may begin in what others left of an iteration.
    least_prefix = unit if chunked else full
    whole = _geometric(size, min(full if chunked else _round_up(allowance, size), context))
    chunks = [c for c in eighths if c - unit < max_context - least_prefix] if chunked or max_context > allowance else []
    if chunks:
      whole = sorted({*whole, *(c for c in (eighths if chunked else [full]) if c <= context)})
    if config.cache.prefix:
      chunks, least_prefix = sorted({*chunks, *_coarse(size, whole[-1])}), size
    blocks = context // size
    return cls(
      block_tokens=size,
      full=full,
      unit=unit,
      least_prefix=least_prefix,
      whole=tuple(whole),
      chunks=tuple(chunks),
      tables=tuple(sorted({min(blocks, max(64, -(-blocks // 8))), blocks})),
      batches=tuple(sorted({8, _round_up(scheduler.max_batch, 8)})),  # matrix products want multiples of 8
      n_layers=n_layers,
      allowance=allowance,
      chunked=chunked,
      resumes=config.cache.prefix,
    )

  def piece(self, n_tokens: int, start: int) -> int:
    """Tokens that a piece of `n_tokens` beginning at `start` is padded to."""
    return _fit(self.chunks if start else self.whole, n_tokens, "prompt piece of tokens")

  def table(self, n_blocks: int) -> int:
    return _fit(self.tables, n_blocks, "block table of")

  def batch(self, n_rows: int) -> int:
    return _fit(self.batches, n_rows, "batch of rows")

  def layers(self, padded: int, start: int) -> int:
    """The most layers that one iteration runs of a piece which begins at `start` and is padded to so many tokens."""
    if self.chunked:
      return self.n_layers
    sizes = self.chunks if start else self.whole
    least = max((n for n in sizes if n < padded), default=0) + 1
    return max(1, min(self.n_layers, self.allowance // least))

  @property
  def most_at_once(self) -> int:
    """Token x layers of the largest piece that one iteration runs, padded."""
    pieces = [(n, start) for start, sizes in enumerate((self.whole, self.chunks)) for n in sizes]
    return max(n * self.layers(n, start) for n, start in pieces)

  def programs(self) -> list[tuple[str, int, int]]:
    """Every decode and prefill program there can be: name, rows or tokens, table width. Those that also tell log
    probabilities are as many again.
    """
    return self._programs(self.whole, self.chunks)

  def programs_of(self, prompts: Iterable[int], shared: bool = True) -> list[tuple[str, int, int]]:
    """Those of `programs` that prompts of so many tokens can come to, whatever runs beside them; unless `shared`, if no
    two of them begin alike.
    """
    prompts = set(prompts)
    cut = [n for n in prompts if self.chunked or n > self.allowance]
    longest = min(max(cut, default=0), self.full)  # of a piece
    whole = {self.piece(n, 0) for n in prompts - set(cut)} | {
      c for c in self.whole if cut and c <= _up(self.whole, longest)
    }
    if self.resumes and shared:  # what is left of one after its first block, or after more
      longest = max(longest, min(max(prompts, default=0) - self.block_tokens, self.whole[-1]))
    return self._programs(sorted(whole), [c for c in self.chunks if longest > 0 and c <= _up(self.chunks, longest)])

  def _programs(self, whole: Sequence[int], chunks: Sequence[int]) -> list[tuple[str, int, int]]:
    kinds = ("decode", "sampled decode")  # every row takes its most likely token, or not
    decode = list(itertools.product(kinds, self.batches, self.tables))
    begin = [("prefill", c, 0) for c in whole]
    prefixes = [n for n in self.tables if n * self.block_tokens >= self.least_prefix]
    resume = [("prefill", c, n) for c, n in itertools.product(chunks, prefixes)]
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


def _coarse(size: int, largest: int) -> list[int]:
  """Sizes up to `largest`, each at most twice and from 2048 on at most 3/2 of the one before, as `_geometric`."""
  octaves = [2048 << i for i in range(max(0, largest.bit_length() - 11))]
  sizes = {_round_up(s, size) for s in (*_SMALL, *octaves, *(3 * s // 2 for s in octaves)) if s < largest}
  return sorted({*sizes, largest})


def _round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def _up(sizes: Sequence[int], n: int) -> int:
  """The smallest size of at least n, or the largest there is."""
  return next((size for size in sizes if size >= n), sizes[-1] if sizes else 0)


def _fit(sizes: tuple[int, ...], n: int, what: str) -> int:
  i = bisect.bisect_left(sizes, n)
  if i == len(sizes):
    raise ValueError(f"{what} {n} exceeds the largest bucket, {sizes[-1] if sizes else 0}")
  return sizes[i]
