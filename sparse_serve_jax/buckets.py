"""Shape buckets: the one place that decides which program shapes exist, and so how a prompt is cut.

A decode batch is padded to one of `batches` rows and one of `tables` block-table widths; padding there costs little, so
these are coarse. A piece of a prompt is padded to one of `whole` tokens if it begins its prompt, to one of `chunks` if
it continues one, and several short prompts together to one of `packs`. What begins a prompt comes in as many sizes as
MOST_PROGRAMS leaves: from 2k tokens on an octave has three to eight, equally spaced, so that over prompts of any length
padding is 4 to 11 % of them. Programs are compiled on first use.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from sparse_serve_jax.config import EngineConfig

MOST_PROGRAMS = 48  # that a workload of any prompts comes to, log probabilities apart
_SMALL = (512, 1024)  # tokens; below 2k padding is cheap and programs are not
_PACKS = (512, 1024, 2048)  # tokens; a longer product of matrices is no faster
_PACKED_TOKENS = 64  # of a pack: it has room for one prompt in as many
_LEAST_ROWS = 2
_MOST_STEPS, _LEAST_STEPS = 8, 3  # sizes an octave: padding is an eighth at most, an eighth on average at least


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Sizes ascend. Tokens, unless said otherwise."""

  block_tokens: int
  full: int  # the largest piece of a prompt that is cut
  unit: int  # an eighth of it: pieces other than a prompt's last are multiples
  whole: tuple[int, ...]
  chunks: tuple[int, ...]
  packs: tuple[int, ...]  # none if there is no room for two blocks in all layers
  tables: tuple[int, ...]  # blocks
  prefixes: tuple[int, ...]  # of `tables`, those that hold what comes before a piece
  batches: tuple[int, ...]  # rows
  n_layers: int
  allowance: int  # what an iteration may prefill: tokens through all layers if `chunked`, token x layers otherwise
  chunked: bool
  resumes: bool  # whether a prompt may begin after blocks that it shares

  @classmethod
  def of(cls, config: EngineConfig, n_layers: int, max_context: int) -> Buckets:
    """Buckets for requests of up to `max_context` tokens.

    With `cache.prefix` a prompt may begin after any of its blocks, so that what is left of it comes in coarse sizes.
    """
    size, scheduler = config.cache.block_tokens, config.scheduler
    chunked = scheduler.prefill == "chunked"
    allowance, context = config.prefill_allowance(n_layers), _round_up(max_context, size)
    unit = max(1, allowance // size // 8) * size
    full = 8 * unit if allowance >= 8 * unit else max(1, allowance // size) * size
    blocks, at_once = context // size, full if chunked else allowance // n_layers
    tables = tuple(sorted({min(blocks, max(64, -(-blocks // 8))), blocks}))
    unsized = cls(
      block_tokens=size,
      full=full,
      unit=unit,
      whole=(),
      chunks=(),
      packs=_packs(size, min(at_once, context)),
      tables=tables,
      prefixes=(),
      batches=tuple(sorted({8, _round_up(scheduler.max_batch, 8)})),  # matrix products want multiples of 8
      n_layers=n_layers,
      allowance=allowance,
      chunked=chunked,
      resumes=config.cache.prefix,
    )
    # What comes before a chunk is brought into slots with each, for which a narrow table is worth some programs.
    widths = (tables, tables[-1:]) if chunked else (tables[-1:],)
    finer_first = itertools.product(widths, (2, 1), range(_MOST_STEPS, _LEAST_STEPS - 1, -1))
    candidates = (unsized._sized(max_context, *of) for of in finer_first)
    return next(
      (c for c in candidates if c.n_programs <= MOST_PROGRAMS), unsized._sized(max_context, tables[-1:], 1, 1)
    )

  def _sized(self, max_context: int, prefixes: tuple[int, ...], coarse: int, steps: int) -> Buckets:
    """With pieces of so many sizes an octave: `steps` of those that begin a prompt, `coarse` of those after blocks that
    are shared."""
    size, context = self.block_tokens, _round_up(max_context, self.block_tokens)
    eighths = range(self.unit, self.full + 1, self.unit)
    # Layer-segmented, only a prompt beyond the allowance is cut, all its pieces full but the last. Chunked, any prompt
    # may begin in what others left of an iteration.
    least_prefix = self.unit if self.chunked else self.full
    cut = [c for c in eighths if c - self.unit < max_context - least_prefix]
    cut = cut if self.chunked or max_context > self.allowance else []
    largest = min(self.full if self.chunked else _round_up(self.allowance, size), context)
    whole = {
      *_sizes(size, largest, steps),
      *(c for c in (eighths if self.chunked else [self.full]) if cut and c <= context),
    }
    chunks = cut
    if self.resumes:
      least_prefix, chunks = size, {*_sizes(size, largest, coarse), *(cut if self.chunked else ())}
    return dataclasses.replace(
      self,
      whole=tuple(sorted(whole)),
      chunks=tuple(sorted(chunks)),
      prefixes=tuple(n for n in prefixes if n * size >= least_prefix),
    )

  def piece(self, n_tokens: int, start: int) -> int:
    """Tokens that a piece of `n_tokens` beginning at `start` is padded to."""
    return _fit(self.chunks if start else self.whole, n_tokens, "prompt piece of tokens")

  def pack(self, lengths: Sequence[int]) -> int:
    """Tokens that whole prompts of so many tokens are padded to, together."""
    room = _PACKED_TOKENS * len(lengths) if len(lengths) > _LEAST_ROWS else 0
    return _fit(self.packs, max(room, sum(map(self.begun, lengths))), "packed prompts of tokens")

  def begun(self, n_tokens: int) -> int:
    """Tokens that a prompt of `n_tokens` takes in a pack: whole blocks."""
    return _round_up(n_tokens, self.block_tokens)

  def short(self, n_tokens: int) -> bool:
    """Whether two prompts of so many tokens fit in a pack. None of them is cut unless it must be."""
    return 2 * self.begun(n_tokens) <= max(self.packs, default=0)

  def table(self, n_blocks: int) -> int:
    """Blocks that a table of `n_blocks` is padded to."""
    return _fit(self.tables, n_blocks, "block table of")

  def prefix(self, start: int) -> int:
    """Blocks that the table before a piece which begins at `start` is padded to."""
    return _fit(self.prefixes, start // self.block_tokens, "block table before a piece of") if start else 0

  def batch(self, n_rows: int) -> int:
    return _fit(self.batches, n_rows, "batch of rows")

  def at_once(self, padded: int) -> bool:
    """Whether an iteration has room for all layers of a piece that is padded to so many tokens. Then it runs them all,
    by a program that runs nothing else."""
    return self.chunked or padded * self.n_layers <= self.allowance

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
    return max(max(n * self.layers(n, start) for n, start in pieces), max(self.packs, default=0) * self.n_layers)

  @property
  def n_programs(self) -> int:
    """All that an engine can compile unless it tells log probabilities: `programs`, those that measure working sets,
    one that admits a request and one that releases blocks."""
    return len(self.programs()) + len(self.batches) * len(self.tables) + 2

  def programs(self) -> list[tuple[str, int, int]]:
    """Every decode and prefill program there can be: name, rows or tokens, table width. Those that also tell log
    probabilities are as many again.
    """
    return self._programs(self.whole, self.chunks, self.packs)

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
    chunks = [c for c in self.chunks if longest > 0 and c <= _up(self.chunks, longest)]
    shortest = _round_up(min(prompts, default=0), self.block_tokens)
    packs = [
      c for c in self.packs if shortest and 2 * shortest <= self.packs[-1] and c >= _up(self.packs, 2 * shortest)
    ]
    return self._programs(sorted(whole), chunks, packs)

  def _programs(self, whole: Sequence[int], chunks: Sequence[int], packs: Sequence[int]) -> list[tuple[str, int, int]]:
    kinds = ("decode", "sampled decode")  # every row takes its most likely token, or not
    decode = list(itertools.product(kinds, self.batches, self.tables))
    begin = [("prefill", c, 0) for c in whole] + [("packed prefill", c, 0) for c in packs]
    resume = [("prefill", c, n) for c, n in itertools.product(chunks, self.prefixes)]
    return decode + begin + resume


def pack_rows(padded: int) -> int:
  """The most prompts in a pack that is padded to so many tokens."""
  return max(_LEAST_ROWS, padded // _PACKED_TOKENS)


def _packs(size: int, at_once: int) -> tuple[int, ...]:
  """Sizes of packs, of at most `at_once` tokens."""
  largest = min(_PACKS[-1], at_once) // size * size
  return tuple(sorted({*(_round_up(c, size) for c in _PACKS if c < largest), largest})) if largest >= 2 * size else ()


def _sizes(size: int, largest: int, steps: int) -> list[int]:
  """Multiples of `size` up to `largest`: from 2048 on so many an octave, equally spaced, below it half of the next."""
  octaves = [2048 << i for i in range(max(0, largest.bit_length() - 11))]
  # Whole 32nds keep long pieces easy to cut into tiles.
  stepped = [_round_up(at + at * i // steps, max(size, at // 32)) for at in octaves for i in range(steps)]
  return sorted({*(s for s in (*(_round_up(s, size) for s in _SMALL), *stepped) if s < largest), largest})


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
