"""Progressive lists, in two kernels.

No stop test leaves out the first groups of a list, up to the first that is ranked (`Stop.certain`). These are read as a
list is that is read whole: hits by many programs, misses by a few that are first in line. Then one program for each
list merges what they give, makes the test, and goes on group by group as long as it does not pass.
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
from pallas_kernels.free import Free
from pallas_kernels.partial import Partial
from pallas_kernels.reading import Acc, List, PartialRefs, Program, Refs, call, partial_shapes, split_refs
from pallas_kernels.stop import Stop, StopRule


@dataclasses.dataclass(frozen=True)
class Cut:
  """The groups of lists that are certain to be read, and the programs that read them."""

  n_lists: int
  groups: int  # of a list
  size: int  # blocks of a group
  splits: int  # programs for the hits of a group
  miss_programs: int  # for the misses of all groups; 0 without slots, where nothing misses

  @classmethod
  def of(cls, n_lists: int, n: int, size: int, stop: Stop, has_slots: bool) -> Cut:
    """For lists of up to `n` blocks."""
    groups = -(-min(n, stop.certain(size)) // size)
    units = n_lists * groups
    splits = max(1, min(chunks.HIT_PROGRAMS // units, size // chunks.CHUNK_BLOCKS))
    return cls(n_lists, groups, size, splits, min(chunks.MISS_PROGRAMS, units) if has_slots else 0)

  @property
  def units(self) -> int:
    """Groups of all lists."""
    return self.n_lists * self.groups

  @property
  def programs(self) -> int:
    return self.miss_programs + self.units * self.splits

  @property
  def parts(self) -> int:
    """Partial results: of each group one for each split, then one of its misses."""
    return self.units * (self.splits + (self.miss_programs > 0))

  def part(self, unit: jax.Array, of_unit: jax.Array | int) -> jax.Array:
    return unit * (self.splits + (self.miss_programs > 0)) + of_unit

  def ranks(self, refs: Refs, of: List, group: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a group of a list: its first block, its first miss, and its end."""
    first = group * self.size
    end = jnp.maximum(first, jnp.minimum(first + self.size, refs.length[of.b, of.k]))
    if not self.miss_programs:
      return first, end, end
    return first, jnp.minimum(first + refs.n_hits[of.b, of.k, group], end), end


class _PartRefs(NamedTuple):
  """Parts of the groups that are certain, logarithms to base 2."""

  of: PartialRefs
  group: Any  # [parts, G], as `Acc.group`

  def write(self, program: Program, part: jax.Array, acc: Acc) -> None:
    at = part, program.of_head
    self.of.o[at], self.of.m[at], self.of.l[at], self.group[at] = acc

  def join(self, program: Program, part: jax.Array, there: jax.Array | bool, acc: Acc) -> Acc:
    """`acc` with a part, which counts if it is `there`, and is finite at least if it is not."""
    at = part, program.of_head
    m = jnp.where(there, self.of.m[at], -jnp.inf)
    top = jnp.maximum(acc.m, m)
    reference = jnp.where(top == -jnp.inf, 0.0, top)
    old, new = jnp.exp2(acc.m - reference), jnp.exp2(m - reference)
    mass, group = self.of.l[at] * new, acc.group * old + self.of.l[at] * new
    if program.least:
      group = jnp.minimum(acc.group, jnp.where(there, self.group[at], jnp.inf))
    return Acc(acc.o * old[:, None] + self.of.o[at] * new[:, None], top, acc.l * old + mass, group)


def _certain(cut: Cut, rule: StopRule, *refs) -> None:
  """The first programs have all the misses, the others part of a group's hits each."""
  inputs, queue, (*out, slots) = split_refs(refs, 5)
  refs, parts = Refs(*inputs)._replace(slots=slots), _PartRefs(PartialRefs(*out[:3]), out[3])
  program, me = Program(refs, rule), pl.program_id(0)

  def open_group(unit) -> tuple[List, tuple]:
    of = program.open(jax.lax.div(unit, cut.groups))
    return of, cut.ranks(refs, of, jax.lax.rem(unit, cut.groups))

  def read_hits(at) -> None:
    unit, split = jax.lax.div(at, cut.splits), jax.lax.rem(at, cut.splits)
    of, (first, end, _) = open_group(unit)
    share = jax.lax.div(end - first + (cut.splits - 1), cut.splits)
    first = jnp.minimum(first + split * share, end)
    read = program.read_hits if cut.miss_programs else program.read_pool
    parts.write(program, cut.part(unit, split), read(of, first, jnp.minimum(first + share, end), program.zero))

  if not cut.miss_programs:
    return read_hits(me)

  @pl.when(me < cut.miss_programs)
  def _():
    """The misses of every `miss_programs`-th group."""

    def body(j, _):
      unit = me + j * cut.miss_programs
      of, (_, first, end) = open_group(unit)

      @pl.when(first < end)
      def _():
        place = queue.take(of, first, end, pl.next_power_of_2(cut.size)) if queue else None
        parts.write(program, cut.part(unit, cut.splits), program.read_misses(of, first, end, program.zero, place))

    left = cut.units - me
    jax.lax.fori_loop(0, jax.lax.div(left + (cut.miss_programs - 1), cut.miss_programs), body, None)

  @pl.when(me >= cut.miss_programs)
  def _():
    read_hits(me - cut.miss_programs)


def _go_on(cut: Cut, untested: int, rule: StopRule, *refs) -> None:
  """A list: what is certain, then group by group, with the stop test between. Misses take slots if there is a queue."""
  (*inputs, threshold, o, m, l, group), queue, (*out, attended, known_ref, slots) = split_refs(refs, 6, n_more=5)
  refs, parts = Refs(*inputs)._replace(slots=slots), _PartRefs(PartialRefs(o, m, l), group)
  program, stop, i = Program(refs, rule), Stop(threshold[0], untested, rule), pl.program_id(0)
  of, size, n_heads = program.open(i), cut.size, refs.q.shape[2]
  n = refs.length[of.b, of.k]

  def join_group(g, acc):
    unit, (_, middle, end) = i * cut.groups + g, cut.ranks(refs, of, g)
    acc = acc._replace(group=program.no_group())
    for split in range(cut.splits):
      acc = parts.join(program, cut.part(unit, split), True, acc)
    if cut.miss_programs:  # which have written nothing where nothing missed
      missed = middle < end
      acc = parts.join(program, cut.part(unit, cut.splits * missed.astype(jnp.int32)), missed, acc)
    return acc

  def test(known, acc: Acc, start, end):
    masses = acc.group if program.least else acc.m + (jnp.log2(acc.group) - math.log2(size))
    seen, left = acc.m + jnp.log2(acc.l), (n - end).astype(jnp.float32)
    enough, known = stop.after(known, masses, start, seen, left, n_heads)
    return jnp.where(enough, end, n), known

  def read_group(state):
    start, _, known, o, m, l = state
    end, acc = jnp.minimum(start + size, n), Acc(o, m, l, program.no_group())
    if cut.miss_programs:
      middle = jnp.minimum(start + refs.n_hits[of.b, of.k, jax.lax.div(start, size)], end)
      acc = program.read_hits(of, start, middle, acc)
      place = queue.take(of, middle, end, pl.next_power_of_2(size)) if queue else None
      acc = program.read_misses(of, middle, end, acc, place)
    else:
      acc = program.read_pool(of, start, end, acc)
    until, known = test(known, acc, start, end)
    return end, until, known, acc.o, acc.m, acc.l

  acc = jax.lax.fori_loop(0, cut.groups, join_group, program.read_tail(of, program.zero, True))
  end = jnp.minimum(cut.groups * size, n)
  until, known = test(program.infinite, acc, jnp.int32((cut.groups - 1) * size), end)
  end, until, known, o, m, l = jax.lax.while_loop(
    lambda state: state[0] < state[1], read_group, (end, until, known, acc.o, acc.m, acc.l)
  )
  program.close(PartialRefs(*out), i, Acc(o, m, l, program.no_group()))
  # Triton's compiler fails on a loop of which a result is not used (3.6: RemoveLayoutConversions).
  attended[of.b, of.k], known_ref[of.b, of.k, program.of_head] = jnp.minimum(end, until), known


def attend_progressively(
  operands: Refs, stop: Stop, size: int, free: Free | None, has_slots: bool, implementation: str
):
  """Attends to lists until the stop test of each passes.

  Args:
    operands: arrays.
    stop: the test.
    size: blocks of a group.
    free: what misses take slots from; None: their places are the lists'.
    has_slots: whether the slots are any.
    implementation: "triton" or "interpret".

  Returns:
    Partial of [B, K, G, D]; blocks attended [B, K]; the operands with what is written of them; what is left of `free`.
  """
  (n_rows, n_heads, n_group, depth), n = operands.q.shape, operands.blocks.shape[2]
  cut = Cut.of(n_rows * n_heads, n, size, stop, has_slots)
  parts = partial_shapes(cut.parts, n_group, depth)
  shapes = (*parts, parts[1])
  certain = functools.partial(_certain, cut, stop.rule)
  parts, operands, free = call(certain, operands, (), shapes, cut.programs, implementation, "attend_certain", free)

  go_on = functools.partial(_go_on, cut, stop.untested, stop.rule)
  threshold = jnp.asarray(stop.threshold, jnp.float32).reshape(1)
  attended, known = jax.ShapeDtypeStruct((n_rows, n_heads), jnp.int32), (n_rows, n_heads, n_group)
  shapes = *partial_shapes(cut.n_lists, n_group, depth), attended, jax.ShapeDtypeStruct(known, jnp.float32)
  more = threshold, *parts
  (o, m, l, attended, _), operands, free = call(
    go_on, operands, more, shapes, cut.n_lists, implementation, "attend_rest", free
  )
  partial = Partial(*(x.reshape(*operands.q.shape[:3], *x.shape[2:]) for x in (o, m, l)))
  return partial, attended, operands, free
