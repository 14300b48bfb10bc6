"""Attention of one decode step: every selected block is read where it lies, a slot in HBM or the pool in host memory.

Blocks that miss are copied into slots in the same pass, those proposed for them or, in `attend_and_take`, the next that
are free. With a stop test (`pallas_kernels.stop`) this is progressive sparse attention (PSA, arXiv 2503.00392, section
2.2): groups of blocks come in descending order of score, and a (row, KV head) stops after a group once the test passes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from pallas_kernels import chunks, triton
from pallas_kernels.attend_program import PartialRefs, Program, Refs, launch, misses_first, partial_shapes
from pallas_kernels.attend_progressive import attend_progressively
from pallas_kernels.attend_xla import attend_xla
from pallas_kernels.chunks import Cut, merge_chunks, most_chunks, n_hits
from pallas_kernels.free import Free
from pallas_kernels.partial import Partial
from pallas_kernels.residency import Located
from pallas_kernels.stop import Stop


class Tails(NamedTuple):
  """The unfinished last blocks, and which of them each row of the batch has."""

  kv: Float[Array, "K L R 2 S D"]  # of all resident requests
  lanes: Int32[Array, " B"]  # which request; R and beyond is padding, whose `tokens` is 0
  tokens: Int32[Array, " B"]  # tokens of the tail to attend to


def attend(
  q: Float[Array, "B K G D"],
  tails: Tails,
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  located: Located,
  stop: Stop | None = None,
  *,
  implementation: str = "xla",
) -> tuple[Partial, Int32[Array, "B K"], Float[Array, "P 2 S D"]]:
  """Attends to a row's tail and to the first blocks of its list. Products are scaled by D ** -0.5.

  Args:
    q: the queries.
    tails: where each row's tail lies.
    pool: every finished block; host memory when offloading.
    slots: P may be 0: every block is then read from the pool.
    layer: of the pool and the tails.
    located: the lists and where their blocks lie, from `residency`: one group for a list that is read whole, by
      `propose`, groups in descending order of score for a progressive one, by `find`. What lies beyond a list's length
      is not read.
    stop: when a progressive list ends; the test is made between groups. None: lists are read whole.
    implementation: "xla", "triton" or "interpret".

  Returns:
    Partial of [B, K, G, D]; how many blocks were attended, the first ones of each list; `slots` with those of them in
    it that missed and have a place, in place when donated.

  Raises:
    ValueError: lists have no blocks, or are not grouped as `stop` needs it.
    NotImplementedError: a kernel was asked for and S or D is not a power of two.
  """
  _check(tails, located, stop, implementation)
  run = attend_xla if implementation == "xla" else functools.partial(_attend_kernel, implementation)
  return run(q, tails, pool, slots, layer, located, (stop, None))[:3]


class Taking(NamedTuple):
  """How progressive lists are read whose misses take slots when they are read."""

  stop: Stop
  free: Free | None  # with the zone of the lists, if there are several; None without slots


class Taken(NamedTuple):
  """What `attend_and_take` leaves."""

  partial: Partial
  attended: Int32[Array, "B K"]  # the first so many blocks of each list have been read
  slots: Float[Array, "P 2 S D"]
  located: Located  # with the places that misses took
  free: Free | None  # what is left


def attend_and_take(
  q: Float[Array, "B K G D"],
  tails: Tails,
  pool: Float[Array, "K L M 2 S D"],
  slots: Float[Array, "P 2 S D"],
  layer: Int32[Array, ""] | int,
  located: Located,
  taking: Taking,
  *,
  implementation: str = "xla",
) -> Taken:
  """`attend` to progressive lists of `residency.find`: a miss that is read takes the next free slot of its zone.

  Which slot that is depends on who comes first; which slots are taken does not.
  """
  stop, free = taking
  _check(tails, located, stop, implementation)
  if slots.shape[0] == 0 or free is None:
    return Taken(*attend(q, tails, pool, slots, layer, located, stop, implementation=implementation), located, free)
  run = attend_xla if implementation == "xla" else functools.partial(_attend_kernel, implementation)
  partial, attended, slots, place, taken = run(q, tails, pool, slots, layer, located, taking)
  return Taken(partial, attended, slots, located._replace(place=place), free._replace(taken=taken))


def _check(tails: Tails, located: Located, stop: Stop | None, implementation: str) -> None:
  triton.check(implementation, S=tails.kv.shape[4], D=tails.kv.shape[5])
  n_groups = located.n_hits.shape[-1]
  if located.blocks.shape[-1] == 0:
    raise ValueError("lists of 0 blocks")
  if stop is None and n_groups != 1:
    raise ValueError(f"a list that is read whole is one group of blocks, not {n_groups}")
  if stop is not None and n_groups > 1 and stop.untested % located.group:
    raise ValueError(f"untested={stop.untested} blocks are not whole groups of {located.group}")


@dataclasses.dataclass(frozen=True)
class Tiling:
  """How lists that are read whole are cut into programs.

  They are of any lengths, so their hits are cut into chunks of equal size, whichever list they are of
  (`pallas_kernels.chunks`), a program for each. Misses are the work of `miss_programs`, few and first in line, so that
  PCIe is busy from the start without filling the SMs.
  """

  chunks: int  # at most
  miss_programs: int
  has_slots: bool

  @classmethod
  def of(cls, n_lists: int, n: int, has_slots: bool) -> Tiling:
    """For `n_lists` = B x K lists of up to `n` blocks."""
    return cls(most_chunks(n_lists, n), min(chunks.MISS_PROGRAMS, n_lists) if has_slots else 0, has_slots)

  @property
  def programs(self) -> int:
    return self.miss_programs + self.chunks

  def parts(self, n_lists: int) -> int:
    """Partial results: one of each chunk, then one of each list's misses."""
    return self.chunks + (n_lists if self.has_slots else 0)


def _whole(tiling: Tiling, refs: Refs, _queue, _more, out) -> None:
  """Lists that are read whole: the first programs have all the misses, the others a chunk of the hits each."""
  program, to, has_slots = Program(refs, tiling.has_slots), PartialRefs(*out), tiling.has_slots

  def read_misses(i) -> None:
    of = program.open(i)
    misses = refs.n_hits[of.b, of.k, 0], refs.length[of.b, of.k]
    program.close(to, tiling.chunks + i, program.read_misses(of, *misses, program.zero))

  def read_hits(chunk) -> None:
    cut = Cut.of(refs.n_hits, refs.length, has_slots)
    i, part = cut.find(chunk)

    @pl.when(i < refs.n_lists)
    def _():
      of, first = program.open(i), part * cut.size
      end = jnp.minimum(first + cut.size, n_hits(refs.n_hits, refs.length, of.b, of.k, has_slots))
      program.close(to, chunk, program.read_hits(of, first, end, program.read_tail(of, program.zero, part == 0)))

  misses_first(tiling.miss_programs, refs.n_lists, read_misses, read_hits)


def _attend_whole(operands: Refs, has_slots: bool, implementation: str) -> tuple[Partial, jax.Array, Refs, None]:
  """Attends to whole lists: a partial result, blocks attended [B, K], and the operands with what is written of them."""
  (n_rows, n_heads, n_group, depth), n = operands.q.shape, operands.blocks.shape[2]
  tiling = Tiling.of(n_rows * n_heads, n, has_slots)
  shapes, kernel = partial_shapes(tiling.parts(n_rows * n_heads), n_group, depth), functools.partial(_whole, tiling)
  parts, operands, _ = launch(kernel, operands, (), shapes, tiling.programs, implementation, "attend")
  partial = merge_chunks(
    Partial(*parts), operands.q.shape, operands.n_hits, operands.length, tiling.chunks, implementation
  )
  return partial, operands.length, operands, None


def _attend_kernel(
  implementation, q, tails: Tails, pool, slots, layer, located: Located, taking
) -> tuple[Partial, Any, Any, Any, Any]:
  """Runs the kernels. Returns partial, attended, slots, places, and how many slots have been taken, None without a
  queue."""
  (stop, free), has_slots = taking, slots.shape[0] > 0
  held = slots if has_slots else jnp.zeros((1, *slots.shape[1:]), slots.dtype)
  operands = Refs(jnp.reshape(layer, 1), tails.lanes, tails.tokens, *located, q, tails.kv, pool, held)
  if stop is None:
    partial, attended, operands, free = _attend_whole(operands, has_slots, implementation)
  else:
    partial, attended, operands, free = attend_progressively(
      operands, stop, located.group, free, has_slots, implementation
    )
  return partial, attended, operands.slots if has_slots else slots, operands.place, free and free.taken
