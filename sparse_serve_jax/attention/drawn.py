"""Selections that are drawn, for benchmarks of random weights: as reused from step to step as a trained model's.

The selections of random weights hardly overlap, so all that is cached for them is useless; a trained model's come back.
Here scores are replaced by numbers that do not depend on what the model computes, but on where it is: the layer, the KV
head, the block in its request's own order, the request (its length before the first decode step) and the position. The
real scores are still made where a table is ranked, so a step costs what it costs without, and somewhat more.

Who imports this module may name the methods `held:A` and `replay:FILES`, a trace, or one of a budget and one of PSA.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from sparse_serve_jax.attention.decode import Rows
from sparse_serve_jax.attention.methods import MAKERS, METHODS, Method
from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.mesh import AXIS


class Where(NamedTuple):
  """Rows of a decode step in a layer. Of two requests of equal length the selections are equal, block ids apart."""

  layer: Int32[Array, ""]
  heads: Int32[Array, " K"]  # KV heads, counted over all devices
  start: Int32[Array, " B"]  # tokens before the request's first decode step
  position: Int32[Array, " B"]
  block_tokens: int  # S
  n_blocks: int  # N, width of the tables


Drawn = Callable[[Where], Float32[Array, "B K N"]]


def held(share: float) -> Drawn:
  """Scores of a standard normal part that a block keeps, and `share` times one that each position draws anew."""

  def scores(at: Where) -> jax.Array:
    of_block = _hash(*_cells(at), jnp.arange(at.n_blocks)[None, None])
    return _normal(of_block) + share * _normal(_hash(of_block, at.position[:, None, None]))

  return scores


def replay(trace: Trace, *, ends: bool = False) -> Drawn:
  """Scores of 1 to 2 for the blocks that a trace selects, of 0 to 1 for all others, fixed for a block.

  Its layers and heads repeat; a repetition, and a request of another length, takes the trace's next request. Its blocks
  are spread evenly over those before the first decode step (if these are fewer, so many of the trace's stand for all);
  later ones are the same in both. Its steps go forth and back: reversed ones are reused alike.

  If lists end where those of the trace did, all others have -1; a request of another length reads as many blocks.
  """
  n_requests, n, n_layers, n_heads, width = trace.selected.shape
  packed, lengths = np.packbits(trace.selected, -1), trace.lengths // trace.block_tokens

  def scores(at: Where) -> jax.Array:
    heads, start = at.heads[None, :, None], at.start[:, None, None]
    request = (start + at.layer // n_layers + heads // n_heads) % n_requests  # [B, K, 1]
    before, recorded = jnp.maximum(start // at.block_tokens, 1), jnp.asarray(lengths, jnp.int32)[request]
    block = jnp.arange(at.n_blocks)[None, None]
    of_trace = -(-block * recorded // before)  # the first that falls on the block or later
    there = (of_trace < recorded) & (of_trace * before // recorded == block)
    of_trace = jnp.where(block < before, of_trace, recorded + block - before)
    there = (there | (block >= before)) & (of_trace < width)
    turn = jnp.abs(at.position - at.start) % max(1, 2 * n - 2)
    step = jnp.minimum(turn, jnp.abs(2 * n - 2 - turn))[:, None, None]
    of_trace = jnp.where(there, of_trace, 0)
    bits = jnp.asarray(packed)[request, step, at.layer % n_layers, heads % n_heads, of_trace // 8]
    selected = (bits >> (7 - of_trace % 8).astype(jnp.uint8)) & 1
    selected, of_block = there & (selected > 0), _uniform(_hash(*_cells(at), block))
    return jnp.where(selected, 1 + of_block, -1.0 if ends else of_block)

  return scores


@functools.cache  # an engine's programs are found by what it returns
def _held(given: str, policy: str) -> Method:
  try:
    share = float(given)
  except ValueError:
    share = math.nan
  if not 0 <= share < math.inf:
    raise ValueError(f"A of held:A must be a number, 0 or more, not {given!r}")
  if policy == "psa":
    raise _no_mass(f"held:{given}")
  return drawing(held(share))


@functools.cache
def _replay(given: str, policy: str) -> Method:
  traces = [Trace.load(file) for file in given.split(",")]
  of = {trace.policy == "psa": trace for trace in traces}
  if len(of) < len(traces):
    raise ValueError(f"replay:FILES takes one trace of a budget and one of PSA, not {given!r}: two of a kind")
  ends = policy == "psa"
  if ends and ends not in of:
    raise _no_mass(f"replay:{given}")
  return drawing(replay(of.get(ends, traces[0]), ends=ends), ends=ends)


def _no_mass(name: str) -> ValueError:
  return ValueError(
    f"sparse.policy='psa' stops by attention mass, which random weights spread evenly: sparse.method={name!r} must "
    "replay a trace of PSA (sparse-serve accuracy --parts=selections --thresholds=0.9 records one)"
  )


def drawing(drawn: Drawn, *, ends: bool = False) -> Method:
  """The default method, whose scores in decode steps are replaced where a block is neither forced nor absent.

  Args:
    drawn: the scores.
    ends: lists end before the blocks whose scores are negative.
  """

  def instead(scores: jax.Array, layer: jax.Array, rows: Rows, block_tokens: int) -> jax.Array:
    n_heads, n_blocks = scores.shape[1:]
    heads = jax.lax.axis_index(AXIS) * n_heads + jnp.arange(n_heads, dtype=jnp.int32)
    position = rows.n_blocks * block_tokens + rows.tail_tokens - 1
    at = Where(layer, heads, position - rows.steps, position, block_tokens, n_blocks)
    return jnp.where(jnp.isfinite(scores), drawn(at), scores)

  def budget(ranked: jax.Array, length: jax.Array) -> jax.Array:
    return jnp.minimum((ranked >= 0).sum(-1, dtype=jnp.int32), length)

  return dataclasses.replace(METHODS["cuboid_mean"], instead=instead, budget=budget if ends else None)


MAKERS |= {"held": _held, "replay": _replay}


def _cells(at: Where) -> tuple[jax.Array, jax.Array, jax.Array]:
  return at.layer, at.heads[None, :, None], at.start[:, None, None]


def _hash(*parts: jax.Array) -> UInt32[Array, "B K N"]:
  """32 bits that look random; each part goes through the finalizer of MurmurHash3."""
  bits = jnp.uint32(0x9E3779B9)
  for part in parts:
    bits = bits * np.uint32(0x01000193) ^ part.astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
  return bits


def _uniform(bits: jax.Array) -> jax.Array:
  """In (0, 1); of 23 bits, so that none is rounded to 1."""
  return ((bits >> 9).astype(jnp.float32) + 0.5) * np.float32(2**-23)


def _normal(bits: jax.Array) -> jax.Array:
  return jax.lax.erf_inv(2 * _uniform(bits) - 1) * np.float32(2**0.5)
