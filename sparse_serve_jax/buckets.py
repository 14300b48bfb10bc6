"""Shape buckets: the one place that decides which program shapes exist, and so how a prompt is cut.

A decode batch is padded to one of `batches` rows and one of `tables` block-table widths. Padding costs little there, a
tenth of a step where two rows of three are padding, so these are coarse. A piece of a prompt is padded to one of
`first_pieces` if it begins its prompt, to one of `later_pieces` if it continues one, and several short prompts together
to `packed`. What begins a prompt comes in as many sizes as MOST_PROGRAMS leaves: from 2k tokens on an octave has three
to eight, equally spaced, so that over prompts of any length padding is 4 to 11 % of them. Programs are compiled on
first use.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sparse_serve_jax.config import EngineConfig

TILE = 128  # of `pallas_kernels.tiles`, which needs JAX: queries that read the same blocks where prefill is sparse
MOST_PROGRAMS = 48  # that a workload of any prompts comes to, log probabilities apart
_SMALL = (512, 1024)  # tokens; below 2k padding is cheap and programs are not
_PACKED = 2048  # tokens, at most: a longer product of matrices is no faster
_PACKED_ROW = 64  # tokens: a pack has room for one prompt in as many
_LEAST_ROWS = 2
_MOST_STEPS, _LEAST_STEPS = 8, 3  # sizes an octave: padding is an eighth at most, an eighth on average at least


class DecodeProgram(NamedTuple):
  """What runs a decode step."""

  rows: int  # padded
  table: int  # blocks that the block tables are looked at for
  sampled: bool = False  # not every row takes its most likely token


class PrefillProgram(NamedTuple):
  """What runs a piece of a prompt, or several short prompts that are packed."""

  tokens: int  # padded
  table: int  # blocks of the table of what comes before the piece; 0: it begins a prompt
  n_layers: int
  static: bool = True  # it runs just so many layers; else at most so many, and the host waits for the device in each
  unstaged: bool = False  # it writes its blocks to the pool itself, although saves are staged
  packed: bool = False
  sampled: bool = False  # of a pack: not every prompt takes its most likely token


Program = DecodeProgram | PrefillProgram


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Sizes ascend. Tokens, unless said otherwise."""

  block_tokens: int
  full: int  # the largest piece of a prompt that is cut
  unit: int  # an eighth of it or so: pieces other than a prompt's last are multiples
  first_pieces: tuple[int, ...]  # of those that begin a prompt
  later_pieces: tuple[int, ...]  # of those that go on with one, or begin it after blocks that it shares
  packed: int  # several prompts together; 0 if there is no room for two blocks in all layers
  tables: tuple[int, ...]  # blocks
  tables_before: tuple[int, ...]  # of `tables`, those that hold what comes before a piece
  batches: tuple[int, ...]  # rows
  n_layers: int
  allowance: int  # what an iteration may prefill: tokens through all layers if `chunked`, else tokens x layers
  chunked: bool
  shares: bool  # whether a prompt may begin after blocks that it shares
  crowded: bool  # whether rows of decode count against what is prefilled, so that a segment may not have room
  late: bool  # whether saves are staged, and land after their programs

  @classmethod
  def of(cls, config: EngineConfig, n_layers: int, max_context: int) -> Buckets:
    """Buckets for requests of up to `max_context` tokens.

    With `cache.prefix` a prompt may begin after any of its blocks, so that what is left of it comes in coarse sizes.
    """
    size, scheduler = config.cache.block_tokens, config.scheduler
    chunked = scheduler.prefill == "chunked"
    allowance, context = config.prefill_allowance(n_layers), _round_up(max_context, size)
    # A sparse piece is cut where a tile of queries ends, so that what tiles read does not depend on how it is cut; but
    # one with less room than a tile beside a full batch is cut anywhere, as it could not go on otherwise.
    beside = scheduler.max_tokens - scheduler.max_batch if chunked and scheduler.max_tokens else allowance
    tile = max(size, TILE)
    if config.sparse.prefills_in_part and min(allowance, beside) >= tile:
      unit = min(-(-allowance // tile // 8), beside // tile) * tile
      full = allowance // unit * unit
    else:
      unit = max(1, allowance // size // 8) * size
      full = 8 * unit if allowance >= 8 * unit else max(1, allowance // size) * size
    blocks, at_once = context // size, full if chunked else allowance // n_layers
    tables = tuple(sorted({min(blocks, max(64, -(-blocks // 8))), blocks}))
    packed = min(_PACKED, at_once, context) // size * size
    unsized = cls(
      block_tokens=size,
      full=full,
      unit=unit,
      first_pieces=(),
      later_pieces=(),
      packed=packed if packed >= 2 * size else 0,
      tables=tables,
      tables_before=(),
      batches=_batches(scheduler.max_batch),
      n_layers=n_layers,
      allowance=full if chunked else allowance,
      chunked=chunked,
      shares=config.cache.prefix,
      crowded=scheduler.max_tokens > 0,
      late=config.cache.save == "staged",
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
    units = range(self.unit, self.full + 1, self.unit)
    # Layer-segmented, only a prompt beyond the allowance is cut, all its pieces full but the last. Chunked, any prompt
    # may begin in what others left of an iteration.
    least_prefix = self.unit if self.chunked else self.full
    cut = [c for c in units if c - self.unit < max_context - least_prefix]
    cut = cut if self.chunked or max_context > self.allowance else []
    if cut and not self.chunked and self.at_once(cut[-1]):  # which is no size of a layer's pieces
      cut = [*cut, self.full]
    largest = min(self.full if self.chunked else _round_up(self.allowance, size), context)
    first = {
      *_sizes(size, largest, steps),
      *(c for c in (units if self.chunked else [self.full]) if cut and c <= context),
    }
    later = {*cut}
    if self.shares:
      least_prefix, later = size, {*_sizes(size, largest, coarse), *(cut if self.chunked else ())}
    return dataclasses.replace(
      self,
      first_pieces=tuple(sorted(first)),
      later_pieces=tuple(sorted(later)),
      tables_before=tuple(n for n in prefixes if n * size >= least_prefix),
    )

  def decode(self, n_rows: int, n_blocks: int, sampled: bool = False) -> DecodeProgram:
    """What runs a step of so many rows, whose longest block table has so many blocks."""
    rows = _fit(self.batches, n_rows, "batch of rows")
    return DecodeProgram(rows, _fit(self._tables_of(rows), n_blocks, "block table of"), sampled)

  def _tables_of(self, rows: int) -> tuple[int, ...]:
    """Widths of block tables in programs of so many rows: between the least and the most one is enough."""
    return self.tables if rows in (self.batches[0], self.batches[-1]) else self.tables[-1:]

  def prefill(self, n_tokens: int, start: int, n_layers: int, rest: int) -> PrefillProgram:
    """What runs so many layers of a piece that begins at `start` of a prompt, and that so many tokens follow.

    After other pieces only a program of all layers knows its number of layers, for the sake of few programs. Full
    pieces are saved by their own program if others follow, which would wait until they have landed, the device idle.
    """
    tokens = self.padded(n_tokens, start, n_layers)
    static = not start or (n_layers == self.n_layers and self.at_once(tokens))
    unstaged = self.late and rest > 0 and tokens == (_up(self.later_pieces, self.full) if start else self.full)
    return PrefillProgram(
      tokens, self._before(start), n_layers if static else self._most_layers(tokens), static, unstaged
    )

  def pack(self, sampled: bool) -> PrefillProgram:
    """What runs several short prompts."""
    return PrefillProgram(self.packed, 0, self.n_layers, packed=True, sampled=sampled)

  def padded(self, n_tokens: int, start: int, n_layers: int) -> int:
    """Tokens that `n_layers` of a piece of `n_tokens` beginning at `start` are padded to."""
    sizes = self.later_pieces if start else self.first_pieces
    if start and n_layers < self.n_layers and not self.crowded:  # programs of all layers run nothing else
      sizes = tuple(n for n in sizes if not self.at_once(n))
    return _fit(sizes, n_tokens, "prompt piece of tokens")

  def _before(self, start: int) -> int:
    """Blocks that the table before a piece which begins at `start` is padded to."""
    return _fit(self.tables_before, start // self.block_tokens, "block table before a piece of") if start else 0

  def in_blocks(self, n_tokens: int) -> int:
    """Tokens that a prompt of `n_tokens` takes in a pack: whole blocks."""
    return _round_up(n_tokens, self.block_tokens)

  def packable(self, n_tokens: int) -> bool:
    """Whether two prompts of so many tokens fit in a pack. None of them is cut unless it must be."""
    return 2 * self.in_blocks(n_tokens) <= self.packed

  def packing_pays(self, lengths: Sequence[int]) -> bool:
    """Whether whole prompts of so many tokens, which a pack holds, take longer one by one."""
    return self.packed < sum(max(_SMALL[0], self.padded(n, 0, self.n_layers)) for n in lengths)

  @property
  def packed_rows(self) -> int:
    """The most prompts in a pack."""
    return max(_LEAST_ROWS, self.packed // _PACKED_ROW)

  def at_once(self, padded: int) -> bool:
    """Whether an iteration has room for all layers of a piece that is padded to so many tokens. Then it runs them all,
    by a program that runs nothing else, unless rows of decode take of its room (`crowded`)."""
    return self.chunked or padded * self.n_layers <= self.allowance

  def cut(
    self, n_tokens: int, cached: int, at: tuple[int, int], left: int, alone: bool, packs: bool
  ) -> tuple[int, int, int]:
    """The next piece of a prompt, and how much of it runs at once.

    Layer-segmented (SparseServe, 3.4): as many layers of the whole prompt as the allowance holds; if not even one,
    token chunks within the layer, all of a layer before the next one (hybrid). Chunked: tokens through all layers.
    A prompt is cut into full pieces, or chunked into multiples of `unit` when others share the iteration. Of a prompt
    whose beginning is in the pool already, the rest counts as the whole. Segments are not cut for the sake of what
    others have left: a prompt waits for others to be packed with, and for the program that knows its number of layers.

    Args:
      n_tokens: of the prompt.
      cached: of these, the first ones that are in the pool already.
      at: the token and the layer that are next.
      left: of the allowance.
      alone: whether nothing else has been prefilled in the iteration.
      packs: whether the prompt may be packed with others, if it is short.

    Returns:
      Tokens, layers and cost, which is of the unit of the allowance; zeros if too little is left.
    """
    (start, layer), none = at, (0, 0, 0)
    rest = n_tokens - start
    if packs and start == layer == 0 and self.packable(rest):
      cost = self.in_blocks(rest) * (1 if self.chunked else self.n_layers)
      if not alone or cost <= left:
        return (rest, self.n_layers, cost) if cost <= left else none
    if self.chunked:
      tokens = rest if rest <= left else left // self.unit * self.unit
      return tokens, self.n_layers, tokens
    whole = n_tokens - cached
    if whole <= self.allowance:
      n_layers, most = self._layers(whole, cached, layer), left // whole
      if n_layers > most:
        n_layers = min(most, 1) if alone else 0
      return (whole, n_layers, whole * n_layers) if n_layers else none
    tokens = min(rest, self.full)
    return (tokens, 1, tokens) if alone or tokens <= left else none

  def _layers(self, n_tokens: int, start: int, first_layer: int) -> int:
    """Layers of the next segment of a piece that is not cut; not if `chunked`."""
    left, padded = self.n_layers - first_layer, self.padded(n_tokens, start, self.n_layers)
    # After other pieces only what is padded counts: a program that does not know its layers has a slab of so many.
    if (padded if start else n_tokens) * self.n_layers <= self.allowance and not first_layer:
      return left
    if start:
      return min(left, self._most_layers(padded))
    n_segments = -(-left // max(self._segments(padded)))
    n_layers = -(-left // n_segments)  # as equal as can be
    return n_layers if n_layers in self._segments(padded) else 1

  def _most_layers(self, padded: int) -> int:
    return max(1, min(self.n_layers, self.allowance // padded))

  def _segments(self, padded: int) -> set[int]:
    """Layers of the segments of a piece that begins its prompt and is padded to so many tokens. Each number is a
    program: so it is one that divides the layers, or two that differ by one if such a one leaves half of the allowance.
    """
    most = self._most_layers(padded)
    divisor = next(n for n in range(most, 0, -1) if self.n_layers % n == 0)
    n_segments = -(-self.n_layers // (divisor if 2 * divisor > most else most))
    return {-(-self.n_layers // n_segments), self.n_layers // n_segments}

  def _depths(self, padded: int) -> list[int]:
    """All numbers of layers that programs of a piece run which begins its prompt."""
    if self.chunked:
      return [self.n_layers]
    least = max((n for n in self.first_pieces if n < padded), default=0) + 1
    at_once = {self.n_layers} if least * self.n_layers <= self.allowance else set()
    return sorted(self._segments(padded) | at_once | ({1} if self.crowded else set()))

  @property
  def measure(self) -> DecodeProgram:
    """The shapes of what measures working sets: for so little work one program is enough."""
    return DecodeProgram(self.batches[-1], self.tables[-1])

  @property
  def most_at_once(self) -> int:
    """Token x layers of the largest piece that one iteration runs, padded."""
    return max(of.tokens * of.n_layers for of in self.programs() if isinstance(of, PrefillProgram))

  @functools.cached_property
  def hidden(self) -> tuple[int, int]:
    """The most pieces of a prompt that there are between two of its segments, and the most tokens one is padded to."""
    prefill = [of for of in self.programs() if isinstance(of, PrefillProgram)]
    sizes = [of.tokens for of in prefill if not of.static or of.n_layers < self.n_layers]
    longest = self.tables[-1] * self.block_tokens
    n = -(-longest // self.full) if longest > self.allowance else 1  # else no prompt is cut
    return (n, max(sizes)) if sizes else (0, 0)

  def hidden_at(self, start: int) -> int:
    """The first token's place among all that are kept, of the piece of a prompt that begins at `start`. Only its last
    piece is not full, so that no two have the same."""
    n, size = self.hidden
    return start // self.full % n * size if n else 0

  @property
  def n_programs(self) -> int:
    """All that an engine can compile unless it tells log probabilities: `programs`, one that measures working sets and
    one that releases blocks and admits requests."""
    return len(self.programs()) + 2

  def programs(self) -> list[Program]:
    """Every decode and prefill program there can be. Those that also tell log probabilities are as many again."""
    longest = self.tables[-1] * self.block_tokens
    return self._programs(self.first_pieces, self.later_pieces, self.packed > 0, longest, self.shares)

  def programs_of(self, prompts: Iterable[int], shared: bool = True) -> list[Program]:
    """Those of `programs` that prompts of so many tokens can come to, whatever runs beside them; unless `shared`, if no
    two of them begin alike.
    """
    prompts = set(prompts)
    cut = [n for n in prompts if self.chunked or n > self.allowance]
    longest = min(max(cut, default=0), self.full)  # of a piece
    whole = {self.padded(n, 0, self.n_layers) for n in prompts - set(cut)} | {
      c for c in self.first_pieces if cut and c <= _up(self.first_pieces, longest)
    }
    shared = shared and self.shares
    if shared:  # what is left of one after its first block, or after more
      longest = max(longest, min(max(prompts, default=0) - self.block_tokens, self.first_pieces[-1]))
    chunks = [c for c in self.later_pieces if longest > 0 and c <= _up(self.later_pieces, longest)]
    shortest = _round_up(min(prompts, default=0), self.block_tokens)
    return self._programs(sorted(whole), chunks, 0 < 2 * shortest <= self.packed, max(cut, default=0), shared)

  def _programs(
    self, whole: Sequence[int], chunks: Sequence[int], packs: bool, longest: int, shared: bool
  ) -> list[Program]:
    """Programs for pieces of these sizes.

    Args:
      whole: sizes of pieces that begin a prompt.
      chunks: of pieces that go on with one.
      packs: whether short prompts come together.
      longest: tokens of the longest prompt that is cut into pieces; 0: none is.
      shared: whether a prompt may begin like another.
    """
    cuts = self.late and longest > self.full  # so that a full piece is followed by another
    least = self.unit if self.chunked else self.full  # of a first piece
    cuts_after = cuts and (shared or longest > least + self.full)  # and is not the first itself
    of_any_depth = self.crowded and not self.chunked  # a segment may have room for fewer layers than all
    widths = [(rows, table) for rows in self.batches for table in self._tables_of(rows)]
    found: list[Program] = [DecodeProgram(*of, sampled) for of in widths for sampled in (False, True)]
    found += [self.pack(sampled) for sampled in (False, True) if packs]
    found += [PrefillProgram(n, 0, n_layers) for n in whole for n_layers in self._depths(n)]
    found += [PrefillProgram(self.full, 0, self.n_layers if self.chunked else 1, unstaged=True)] * cuts
    for n, table in itertools.product(chunks, self.tables_before):
      unstaged = (False, True) if cuts_after and n == _up(chunks, self.full) else (False,)
      for static in (False, True) if of_any_depth and self.at_once(n) else (self.at_once(n),):
        n_layers = self.n_layers if static else self._most_layers(n)
        found += [PrefillProgram(n, table, n_layers, static, own) for own in unstaged]
    return found


def _sizes(size: int, largest: int, steps: int) -> list[int]:
  """Multiples of `size` up to `largest`: from 2048 on so many an octave, equally spaced, below it half of the next."""
  octaves = [2048 << i for i in range(max(0, largest.bit_length() - 11))]
  # Whole 32nds keep long pieces easy to cut into tiles.
  stepped = [_round_up(at + at * i // steps, max(size, at // 32)) for at in octaves for i in range(steps)]
  return sorted({*(s for s in (*(_round_up(s, size) for s in _SMALL), *stepped) if s < largest), largest})


def _batches(most: int) -> tuple[int, ...]:
  """Rows of decode programs: 8, all, and one between with equal ratios. Matrix products want multiples of 8."""
  return tuple(sorted({8, _round_up(math.isqrt(8 * most), 8), _round_up(most, 8)}))


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
