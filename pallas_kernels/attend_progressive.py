"""Progressive lists, in two kernels.

The first groups of a list, up to and with the first that is ranked, are always read (`Stop.always_read`): the test
cannot pass before. So the first kernel reads them in parallel, hits by many programs, misses by a few that start first.
In the second one program for each list merges these partial results, as split-K decoding does, makes the test, and
reads group by group until it passes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import chunks
from pallas_kernels.attend_program import Acc, List, PartialRefs, Program, Refs, launch, misses_first, partial_shapes
from pallas_kernels.free import Free
from pallas_kernels.partial import Partial
from pallas_kernels.stop import Stop, StopRule

MAX_SPLITS = 16  # programs for the hits of a group: the loop that merges them is unrolled


@dataclasses.dataclass(frozen=True)
class Grid:
  """The groups of lists that are always read, and the programs that read them.

  A unit is one group of one list. Units are ordered by group, then by list: misses are mostly in the last groups, so
  every program of misses has some.
  """

  n_lists: int
  groups: int  # of a list
  size: int  # blocks of a group
  splits: int  # programs for the hits of a unit
  has_slots: bool

  @classmethod
  def of(cls, n_lists: int, n: int, size: int, stop: Stop, has_slots: bool) -> Grid:
    """For lists of up to `n` blocks. Where there are more units than programs are wanted, each has one program."""
    groups = -(-min(n, stop.always_read(size)) // size)
    splits = min(chunks.HIT_PROGRAMS // (n_lists * groups), size // chunks.CHUNK_BLOCKS, MAX_SPLITS)
    return cls(n_lists, groups, size, max(1, splits), has_slots)

  @property
  def units(self) -> int:
    return self.n_lists * self.groups

  @property
  def miss_programs(self) -> int:
    return min(chunks.MISS_PROGRAMS, self.units) if self.has_slots else 0

  @property
  def programs(self) -> int:
    return self.miss_programs + self.units * self.splits

  def part(self, unit: jax.Array | int, of_unit: jax.Array | int) -> Any:
    """Where a partial result is: of each unit one for each split, then one of its misses."""
    return unit * (self.splits + self.has_slots) + of_unit

  def bounds(self, refs: Refs, of: List, group: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First rank of a group, its first miss, and its end."""
    first = group * self.size
    end = jnp.maximum(first, jnp.minimum(first + self.size, refs.length[of.b, of.k]))
    n_hits = refs.n_hits[of.b, of.k, group] if self.has_slots else self.size
    return first, jnp.minimum(first + n_hits, end), end


class _PartRefs(NamedTuple):
  """Partial results of the units, logarithms to base 2."""

  of: PartialRefs
  group: Any  # [parts, G], as `Acc.group`

  def write(self, program: Program, part: jax.Array, acc: Acc) -> None:
    at = part, program.of_head
    self.of.o[at], self.of.m[at], self.of.l[at], self.group[at] = acc

  def join(self, program: Program, part: jax.Array, there: jax.Array | bool, acc: Acc) -> Acc:
    """`acc` merged with a part. One that is not `there` adds nothing, but must be finite: 0 * inf is NaN."""
    at = part, program.of_head
    m = jnp.where(there, self.of.m[at], -jnp.inf)
    top = jnp.maximum(acc.m, m)
    reference = jnp.where(top == -jnp.inf, 0.0, top)
    old, new = jnp.exp2(acc.m - reference), jnp.exp2(m - reference)
    mass, group = self.of.l[at] * new, acc.group * old + self.of.l[at] * new
    if program.least:
      group = jnp.minimum(acc.group, jnp.where(there, self.group[at], jnp.inf))
    return Acc(acc.o * old[:, None] + self.of.o[at] * new[:, None], top, acc.l * old + mass, group)


def _always_read(grid: Grid, rule: StopRule, refs: Refs, queue, _, out) -> None:
  """The first programs have all the misses, the others part of a unit's hits each."""
  program, parts = Program(refs, grid.has_slots, rule), _PartRefs(PartialRefs(*out[:3]), out[3])

  def open_unit(unit) -> tuple[List, tuple]:
    of = program.open(jax.lax.rem(unit, grid.n_lists))
    return of, grid.bounds(refs, of, jax.lax.div(unit, grid.n_lists))

  def read_misses(unit) -> None:
    of, (_, first, end) = open_unit(unit)

    @pl.when(first < end)
    def _():
      acc = program.read_misses(of, first, end, program.zero, queue, pl.next_power_of_2(grid.size))
      parts.write(program, grid.part(unit, grid.splits), acc)

  def read_hits(at) -> None:
    unit, split = jax.lax.div(at, grid.splits), jax.lax.rem(at, grid.splits)
    of, (first, end, _) = open_unit(unit)
    share = jax.lax.div(end - first + (grid.splits - 1), grid.splits)
    first = jnp.minimum(first + split * share, end)
    acc = program.read_hits(of, first, jnp.minimum(first + share, end), program.zero)
    parts.write(program, grid.part(unit, split), acc)

  misses_first(grid.miss_programs, grid.units, read_misses, read_hits)


def _until_stop(grid: Grid, untested: int, rule: StopRule, refs: Refs, queue, more, out) -> None:
  """A list: what has been read of it, then group by group, with the stop test between."""
  (threshold, *of_parts, group), (*to, attended, known), i = more, out, pl.program_id(0)
  program, parts = Program(refs, grid.has_slots, rule), _PartRefs(PartialRefs(*of_parts), group)
  stop, of, size = Stop(threshold[0], untested, rule), program.open(i), grid.size
  n, n_heads = refs.length[of.b, of.k], refs.q.shape[2]

  def join_group(g, acc):
    unit, (_, middle, end) = g * grid.n_lists + i, grid.bounds(refs, of, g)
    acc = acc._replace(group=program.no_group())
    for split in range(grid.splits):
      acc = parts.join(program, grid.part(unit, split), True, acc)
    if grid.has_slots:
      # Where nothing missed, nothing has been written for it: the first part is read in its place, and does not count.
      missed = middle < end
      acc = parts.join(program, grid.part(unit, grid.splits * missed.astype(jnp.int32)), missed, acc)
    return acc

  def test(kept, acc: Acc, start, end):
    masses = acc.group if program.least else acc.m + (jnp.log2(acc.group) - math.log2(size))
    seen, left = acc.m + jnp.log2(acc.l), (n - end).astype(jnp.float32)
    enough, kept = stop.after(kept, masses, start, seen, left, n_heads)
    return jnp.where(enough, end, n), kept

  def read_group(state):
    start, _, kept, o, m, l = state
    _, middle, end = grid.bounds(refs, of, jax.lax.div(start, size))
    acc = program.read_hits(of, start, middle, Acc(o, m, l, program.no_group()))
    if grid.has_slots:
      acc = program.read_misses(of, middle, end, acc, queue, pl.next_power_of_2(size))
    limit, kept = test(kept, acc, start, end)
    return end, limit, kept, acc.o, acc.m, acc.l

  acc = jax.lax.fori_loop(0, grid.groups, join_group, program.read_tail(of, program.zero, True))
  end = jnp.minimum(grid.groups * size, n)
  # One test for all these groups: those before the last are not ranked, and of them a stop test keeps nothing.
  limit, kept = test(program.infinite, acc, jnp.int32((grid.groups - 1) * size), end)
  end, limit, kept, o, m, l = jax.lax.while_loop(
    lambda state: state[0] < state[1], read_group, (end, limit, kept, acc.o, acc.m, acc.l)
  )
  program.close(PartialRefs(*to), i, Acc(o, m, l, program.no_group()))
  # Triton's compiler fails on a loop of which a result is not used (3.6: RemoveLayoutConversions).
  attended[of.b, of.k], known[of.b, of.k, program.of_head] = jnp.minimum(end, limit), kept


def attend_progressively(
  operands: Refs, stop: Stop, size: int, free: Free | None, has_slots: bool, implementation: str
) -> tuple[Partial, jax.Array, Refs, Free | None]:
  """Attends to lists until the stop test of each passes.

  Args:
    operands: arrays.
    stop: the test.
    size: blocks of a group.
    free: what misses take slots from; None: their places are the lists'.
    has_slots: whether there are slots; without, `operands.slots` is one that nothing reads.
    implementation: "triton" or "interpret".

  Returns:
    Partial of [B, K, G, D]; blocks attended [B, K]; the operands with what is written of them; what is left of `free`.
  """
  (n_rows, n_heads, n_group, depth), n = operands.q.shape, operands.blocks.shape[2]
  grid = Grid.of(n_rows * n_heads, n, size, stop, has_slots)
  parts = partial_shapes(grid.part(grid.units, 0), n_group, depth)
  first = functools.partial(_always_read, grid, stop.rule)
  shapes = *parts, parts[1]
  parts, operands, free = launch(first, operands, (), shapes, grid.programs, implementation, "attend_always", free)

  then = functools.partial(_until_stop, grid, stop.untested, stop.rule)
  more = jnp.asarray(stop.threshold, jnp.float32).reshape(1), *parts
  attended, known = (
    jax.ShapeDtypeStruct(dims, dtype)
    for dims, dtype in (((n_rows, n_heads), jnp.int32), (operands.q.shape[:3], jnp.float32))
  )
  shapes = *partial_shapes(grid.n_lists, n_group, depth), attended, known
  (o, m, l, attended, _), operands, free = launch(
    then, operands, more, shapes, grid.n_lists, implementation, "attend_until_stop", free
  )
  partial = Partial(*(x.reshape(*operands.q.shape[:3], *x.shape[2:]) for x in (o, m, l)))
  return partial, attended, operands, free
