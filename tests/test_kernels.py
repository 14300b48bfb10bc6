"""Every op against an oracle in plain numpy, written here. What an op must not read is NaN in its inputs, always."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import digest, residency
from pallas_kernels.residency import NEVER, Maps, Proposal
from pallas_kernels.score import box, dot

IMPLEMENTATIONS = ["xla", "interpret", pytest.param("triton", marks=pytest.mark.gpu)]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}  # of the norm of a row
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Shape(NamedTuple):
  G: int
  S: int
  D: int


REAL = {  # query heads per KV head and head dim from each model's config.json; blocks as served
  "lwm-7b": Shape(1, 32, 128),  # LargeWorldModel/LWM-Text-Chat-1M
  "llama3-8b": Shape(4, 32, 128),  # meta-llama/Meta-Llama-3-8B
  "llama-3.2-1b": Shape(4, 32, 64),  # meta-llama/Llama-3.2-1B
  "qwen2.5-7b": Shape(7, 32, 128),  # Qwen/Qwen2.5-7B
}


def assert_rows_close(actual, expected, tolerance: float):
  """Relative norm of the difference along the last axis; a row that is 0 must be 0 exactly."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(actual).all()
  error, size = np.linalg.norm(actual - expected, axis=-1), np.linalg.norm(expected, axis=-1)
  assert (error <= tolerance * size).all(), f"{np.max(error / np.maximum(size, 1e-30))} > {tolerance}"


def assert_same_bits(actual, expected: np.ndarray):
  actual = np.asarray(actual)
  assert actual.shape == expected.shape and actual.dtype == expected.dtype
  assert actual.tobytes() == expected.tobytes()


# -------------------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests(dtype: str):
  keys = np.random.default_rng(0).normal(size=(2, 3, 8, 5)).astype(DTYPES[dtype])
  expected = {name: np.zeros((2, 3, n, 5)) for name, n in (("cuboid_mean", 2), ("min_max", 2), ("mean", 1))}
  for i, j, d in np.ndindex(2, 3, 5):
    column = [float(keys[i, j, s, d]) for s in range(8)]
    centre = (max(column) + min(column)) / 2
    radius = sum(abs(x - centre) for x in column) / 8
    expected["cuboid_mean"][i, j, :, d] = centre + radius, centre - radius
    expected["min_max"][i, j, :, d] = max(column), min(column)
    expected["mean"][i, j, 0, d] = sum(column) / 8
  for name, value in expected.items():
    actual = jax.jit(getattr(digest, name))(keys)
    assert actual.dtype == keys.dtype
    assert_rows_close(actual.astype(jnp.float32), value, {"float32": 1e-6, "bfloat16": 2**-8}[dtype])


# --------------------------------------------------------------------------------------------------- scores and choices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("rule", "n_vectors"), [("box", 2), ("dot", 1)])
def test_score(rule: str, n_vectors: int, reduce: str, dtype: str):
  rng = np.random.default_rng(1)
  B, K, G, D, L, M, N, sinks, window, layer = 4, 2, 3, 16, 2, 40, 9, 1, 2, 1
  n_blocks = np.array([9, 4, 2, 0], np.int32)  # the third row is all sinks and window
  ids = rng.permutation(M)[: B * N].reshape(B, N)
  tables = np.where(np.arange(N) < n_blocks[:, None], ids, -1).astype(np.int32)
  tables[1, 6] = ids[1, 6]  # beyond n_blocks a table may hold anything
  digests = np.full((K, L, M, n_vectors, D), np.nan, DTYPES[dtype])
  for b in range(B):
    for i in range(n_blocks[b]):
      vectors = np.sort(rng.normal(size=(K, n_vectors, D)), axis=1)[:, ::-1]  # upper, lower
      digests[:, layer, tables[b, i]] = vectors
  q = rng.normal(size=(B, K, G, D)).astype(DTYPES[dtype])

  expected = np.full((B, K, N), -np.inf)
  for b, k in np.ndindex(B, K):
    for i in range(n_blocks[b]):
      heads = []
      for g in range(G):
        upper, lower = (digests[k, layer, tables[b, i], e].astype(np.float64) for e in (0, -1))
        head = q[b, k, g].astype(np.float64)
        heads.append(
          sum(max(x * u, x * v) if rule == "box" else x * u for x, u, v in zip(head, upper, lower, strict=True))
        )
      expected[b, k, i] = max(heads) if reduce == "max" else sum(heads) / G
      if i < sinks or i >= n_blocks[b] - window:
        expected[b, k, i] = np.inf

  options = dict(rule={"box": box, "dot": dot}[rule], reduce=reduce, sinks=sinks, window=window)
  actual = jax.jit(functools.partial(kernels.score, **options))(q, digests, np.int32(layer), tables, n_blocks)
  assert actual.dtype == jnp.float32
  assert np.isfinite(expected).any()
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # inputs are exact, products are of float32


def test_score_without_sinks_and_window():
  q, digests = np.ones((1, 1, 1, 2), np.float32), np.arange(8, dtype=np.float32).reshape(1, 1, 4, 1, 2)
  actual = kernels.score(q, digests, 0, np.array([[3, 0, 2]], np.int32), np.array([2], np.int32), rule=dot)
  assert actual.tolist() == [[[13.0, 1.0, -math.inf]]]


@pytest.mark.parametrize("k", [1, 5, 12])
def test_select_breaks_ties_by_the_lowest_id(k: int):
  rng = np.random.default_rng(2)
  scores = rng.integers(-1, 3, size=(3, 2, 12)).astype(np.float32)
  scores[0, :, 7:] = -np.inf
  scores[1, :, [0, 3, 10]] = np.inf
  ranked, actual = (np.asarray(x) for x in kernels.select(scores, k))
  np.testing.assert_array_equal(ranked, np.take_along_axis(np.asarray(scores), actual, -1))
  assert actual.dtype == np.int32
  for b, h in np.ndindex(3, 2):
    assert actual[b, h].tolist() == sorted(range(12), key=lambda i: (-scores[b, h, i], i))[:k]


# ------------------------------------------------------------------------------------------------------------ residency


class Residency:
  """The maps as a dictionary of slots, and exact LRU by sorting."""

  def __init__(self, K: int, L: int, M: int, P: int):
    self.shape = K, L, M, P
    self.held: dict[int, tuple[int, int, int]] = {}  # slot -> (head, layer, block)
    self.stamp = dict.fromkeys(range(P), -1)
    self.selected: dict[tuple[int, int, int], int] = {}

  def propose(self, layers, blocks):
    """`layers` like `blocks` [B, K, n]."""
    where = {key: slot for slot, key in self.held.items()}
    slots, hits = np.full(blocks.shape, -1, np.int32), np.zeros(blocks.shape, bool)
    for b, k, i in np.ndindex(*blocks.shape):
      slot = where.get((k, layers[b, k, i], blocks[b, k, i]))
      if slot is not None:
        slots[b, k, i], hits[b, k, i] = slot, True
    protected = set(slots[hits].tolist())
    victims = sorted(set(self.stamp) - protected, key=lambda slot: (self.stamp[slot], slot))
    for i in range(blocks.shape[2]):  # critical ranks first
      for b, k in np.ndindex(*blocks.shape[:2]):
        if blocks[b, k, i] >= 0 and not hits[b, k, i] and victims:
          slots[b, k, i] = victims.pop(0)
    return slots, hits

  def commit(self, layers, blocks, slots, hits, used, stamps, steps):
    for b, k, i in np.ndindex(*blocks.shape):
      if i < used[b, k] and blocks[b, k, i] >= 0:
        key = (k, int(layers[b, k, i]), int(blocks[b, k, i]))
        self.selected[key] = int(steps[b])
        slot = int(slots[b, k, i])
        if slot >= 0:
          self.stamp[slot] = int(stamps[b, k, i])
          if not hits[b, k, i]:
            self.held[slot] = key

  def release(self, freed):
    for slot, (_, _, block) in list(self.held.items()):
      if block in freed:
        del self.held[slot]
        self.stamp[slot] = -1
    self.selected = {key: step for key, step in self.selected.items() if key[2] not in freed}

  def maps(self) -> Maps:
    K, L, M, P = self.shape
    slot_of, block_of = np.full((K, L, M), -1, np.int32), np.full(P, -1, np.int32)
    for slot, (k, layer, block) in self.held.items():
      slot_of[k, layer, block], block_of[slot] = slot, (k * L + layer) * M + block
    selected = np.full((K, L, M), NEVER, np.int32)
    for key, step in self.selected.items():
      selected[key] = step
    return Maps(slot_of, block_of, np.array([self.stamp[p] for p in range(P)], np.int32), selected)

  def assert_equal(self, maps: Maps):
    for name, actual, expected in zip(Maps._fields, maps, self.maps(), strict=True):
      np.testing.assert_array_equal(actual, expected, err_msg=name)


propose, commit, release = jax.jit(residency.propose), jax.jit(residency.commit), jax.jit(residency.release)


def empty_maps(K: int, L: int, M: int, P: int) -> Maps:
  maps = Residency(K, L, M, P).maps()
  assert (maps.block_of == -1).all() and (maps.last_used == -1).all()
  return maps


def ids(*rows) -> np.ndarray:
  """Blocks [B, 1, n] of one head."""
  return np.array(rows, np.int32)[:, None]


def fill(maps: Maps, blocks, stamp: int, layer: int = 0) -> Maps:
  """Commits all of `blocks` [B, 1, n]."""
  used = np.full(blocks.shape[:2], blocks.shape[2], np.int32)
  return commit(maps, layer, blocks, propose(maps, layer, blocks), used, stamp, np.zeros(len(blocks), np.int32))


def test_victims_are_the_least_recently_used():
  maps = empty_maps(1, 1, 9, 3)
  for stamp, block in enumerate([5, 6, 7, 5]):  # 6 is now the oldest
    maps = fill(maps, ids([block]), stamp)
  assert maps.slot_of[0, 0, [5, 6, 7]].tolist() == [0, 1, 2]
  assert maps.last_used.tolist() == [3, 1, 2]  # a hit is a use
  proposal = propose(maps, 0, ids([1, 2]))
  assert proposal.slot.tolist() == [[[1, 2]]] and not proposal.hit.any()
  maps = fill(maps, ids([1, 2]), stamp=4)
  assert maps.slot_of[0, 0].tolist() == [-1, 1, 2, -1, -1, 0, -1, -1, -1]  # 6 and 7 are evicted
  assert maps.block_of.tolist() == [5, 1, 2]


def test_ties_and_empty_slots_go_by_the_lowest_slot():
  maps = empty_maps(1, 1, 9, 4)
  assert propose(maps, 0, ids([4, 5, 6])).slot.tolist() == [[[0, 1, 2]]]
  maps = fill(maps, ids([4, 5, 6]), stamp=0)
  assert propose(maps, 0, ids([1, 2])).slot.tolist() == [[[3, 0]]]  # the empty one, then the lowest of three equals
  maps = fill(maps, ids([5, -1]), stamp=3)
  assert propose(maps, 0, ids([1, 2])).slot.tolist() == [[[3, 0]]]
  maps = release(maps, np.array([6, -1], np.int32))
  assert propose(maps, 0, ids([1, 2])).slot.tolist() == [[[2, 3]]]


def test_hits_are_never_victims():
  maps = fill(empty_maps(1, 1, 9, 2), ids([4, 5]), stamp=0)
  proposal = propose(maps, 0, ids([1, 2, 4]))  # slot 0 is as old as slot 1, but holds block 4
  assert proposal.slot.tolist() == [[[1, -1, 0]]]
  assert proposal.hit.tolist() == [[[False, False, True]]]
  everything = propose(maps, 0, ids([4, 5, 6]))
  assert everything.slot.tolist() == [[[0, 1, -1]]]


def test_critical_ranks_of_all_rows_get_victims_first():
  maps = empty_maps(1, 1, 20, 3)
  proposal = propose(maps, 0, ids([1, 2, 3], [4, 5, 6]))
  assert proposal.slot.tolist() == [[[0, 2, -1]], [[1, -1, -1]]]


def test_blocks_never_reached_are_not_taken_for_resident():
  maps, blocks = fill(empty_maps(1, 1, 9, 3), ids([7, 8]), stamp=4), ids([1, 8, 2])
  proposal = propose(maps, 0, blocks)
  assert proposal.slot.tolist() == [[[2, 1, 0]]]
  after = commit(maps, 0, blocks, proposal, np.array([[1]], np.int32), 9, np.array([6], np.int32))
  assert after.slot_of[0, 0].tolist() == [-1, 2, -1, -1, -1, -1, -1, 0, 1]  # 7 keeps its slot, 2 has none
  assert after.last_used.tolist() == [4, 4, 9]  # an unread hit is no use
  assert after.last_selected[0, 0, [1, 8, 2]].tolist() == [6, 0, NEVER]


def test_release_forgets_all_layers_and_heads():
  maps = empty_maps(2, 2, 5, 8)
  every = np.broadcast_to(np.array([[[3], [3]]], np.int32), (1, 2, 1))
  for layer in range(2):
    maps = fill(maps, every, stamp=layer, layer=layer)
  maps = fill(maps, np.array([[[1], [2]]], np.int32), stamp=2)
  after = release(maps, np.array([3, -1], np.int32))
  assert (np.asarray(after.slot_of)[:, :, 3] == -1).all() and (np.asarray(after.last_selected)[:, :, 3] == NEVER).all()
  assert after.block_of.tolist() == [-1, -1, -1, -1, 1, 12, -1, -1]
  assert after.last_used.tolist() == [-1, -1, -1, -1, 2, 2, -1, -1]
  assert after.slot_of[0, 0].tolist() == [-1, 4, -1, -1, -1] and after.slot_of[1, 0].tolist() == [-1, -1, 5, -1, -1]


def test_residency_without_slots():
  maps, blocks = empty_maps(2, 1, 6, 0), np.array([[[1, -1], [4, 2]]], np.int32)
  proposal = propose(maps, 0, blocks)
  assert (np.asarray(proposal.slot) == -1).all() and not proposal.hit.any()
  maps = commit(maps, 0, blocks, proposal, np.array([[2, 1]], np.int32), 3, np.array([8], np.int32))
  assert maps.last_selected[:, 0].tolist() == [[NEVER, 8, *[NEVER] * 4], [*[NEVER] * 4, 8, NEVER]]
  maps = release(maps, np.array([1], np.int32))
  assert maps.last_selected[:, 0, 1].tolist() == [NEVER, NEVER]


@pytest.mark.parametrize("P", [1, 5, 200])
def test_residency_against_a_dictionary(P: int):
  """Steps of one layer, calls over all layers at once (ranks are layers) and releases, in random order."""
  rng = np.random.default_rng(P)
  B, K, L, M, n = 3, 2, 2, 24, 4
  model = Residency(K, L, M, P)
  maps = empty_maps(K, L, M, P)
  seen = dict(hits=0, homeless=0, unreached=0)
  for stamp in range(60):
    steps = rng.integers(0, 99, B).astype(np.int32)
    if stamp % 6 == 5:
      freed = np.where(rng.random(3) < 0.7, rng.permutation(M)[:3], -1).astype(np.int32)
      maps = release(maps, freed)
      model.release(set(freed.tolist()))
    elif stamp % 6 == 4:  # one new block a row, the same in all heads and layers
      layer = np.arange(L, dtype=np.int32)[None, None]
      blocks = np.broadcast_to(rng.permutation(M)[:B, None, None].astype(np.int32), (B, K, L)).copy()
      blocks[rng.random(B) < 0.3] = -1
    else:
      layer = np.int32(rng.integers(L))
      blocks = np.stack([rng.permutation(M)[: B * n].reshape(B, n) for _ in range(K)], 1).astype(np.int32)
      blocks[:, :, :] = np.where(rng.random((B, 1, n)) < 0.8, blocks, -1)
    if stamp % 6 != 5:
      proposal = propose(maps, layer, blocks)
      layers = np.broadcast_to(layer, blocks.shape)
      slots, hits = model.propose(layers, blocks)
      np.testing.assert_array_equal(proposal.slot, slots)
      np.testing.assert_array_equal(proposal.hit, hits)
      used = rng.integers(0, blocks.shape[2] + 1, (B, K)).astype(np.int32)
      stamps = np.int32(stamp) * L + layer
      maps = commit(maps, layer, blocks, proposal, used, stamps, steps)
      model.commit(layers, blocks, slots, hits, used, np.broadcast_to(stamps, blocks.shape), steps)
      seen["hits"] += hits.sum()
      seen["homeless"] += ((blocks >= 0) & (slots < 0)).sum()
      seen["unreached"] += (used < blocks.shape[2]).sum()
    model.assert_equal(maps)
  assert seen["unreached"] and (seen["homeless"] or P > 5) and (seen["hits"] or P == 1)


# --------------------------------------------------------------------------------------------------------------- attend


@dataclasses.dataclass
class Row:
  """One row of a case, with its truth: K and V of every block of its list, before any of it is hidden."""

  count: int
  tail_tokens: int
  where: str = "mixed"  # of its blocks: hit, miss, mixed, or homeless (misses that get no slot)
  padding: bool = False


@dataclasses.dataclass
class Case:
  """Inputs of `attend` as everything in it that may be read, apart from where it lies."""

  q: np.ndarray  # [B, K, G, D]
  rows: list[Row]
  kv: np.ndarray  # [B, K, n, 2, S, D], by rank
  tail: np.ndarray  # [B, K, 2, S, D]

  @property
  def scale(self) -> float:
    return self.q.shape[-1] ** -0.5


class Expected(NamedTuple):
  output: np.ndarray  # [B, K, G, D] float64
  lse: np.ndarray  # [B, K, G]
  largest: np.ndarray  # [B, K, G], the largest product
  used: np.ndarray  # [B, K]
  margin: float  # of the closest stop test


def random_case(seed: int, shape: Shape, rows: list[Row], n: int, dtype: str = "float32", K: int = 2) -> Case:
  rng = np.random.default_rng(seed)
  make = lambda *dims, spread=1.0: (spread * rng.normal(size=dims)).astype(DTYPES[dtype])  # noqa: E731
  B, (G, S, D) = len(rows), shape
  # A spread above 1 makes a few tokens carry most of the mass, so that progressive attention does stop.
  return Case(make(B, K, G, D, spread=1.5), rows, make(B, K, n, 2, S, D), make(B, K, 2, S, D))


def expect(case: Case, always: int, group: int, threshold: float | None, swap: bool = False) -> Expected:
  """Attention by loops over float64, and PSA's stop rule by its formula (arXiv 2503.00392, section 2.2)."""
  B, K, G, D = case.q.shape
  k_at, v_at = (1, 0) if swap else (0, 1)
  output, lse = np.zeros((B, K, G, D)), np.full((B, K, G), -np.inf)
  largest, used = np.full((B, K, G), -np.inf), np.zeros((B, K), np.int32)
  margin = np.inf
  for b, k in np.ndindex(B, K):
    row, q = case.rows[b], case.q[b, k].astype(np.float64)
    mass, weighted, smallest = np.zeros(G), np.zeros((G, D)), np.full(G, np.inf)

    def attend_to(keys, values, q=q, mass=mass, weighted=weighted, top=largest[b, k]):
      """Adds to the sums; returns the mass of these keys alone."""
      of_keys = np.zeros(G)
      for g in range(G):
        for key, value in zip(keys, values, strict=True):
          s = case.scale * float(q[g] @ key.astype(np.float64))
          of_keys[g] += math.exp(s)
          weighted[g] += math.exp(s) * value.astype(np.float64)
          top[g] = max(top[g], s)
      mass += of_keys
      return of_keys

    attend_to(case.tail[b, k, k_at, : row.tail_tokens], case.tail[b, k, v_at, : row.tail_tokens])
    for i in range(row.count):
      of_block = attend_to(case.kv[b, k, i, k_at], case.kv[b, k, i, v_at])
      used[b, k] += 1
      if i < always:
        continue
      smallest = np.minimum(smallest, of_block)
      if threshold is not None and (i + 1 - always) % group == 0 and i + 1 < row.count:
        accumulated = mass / (mass + smallest * (row.count - i - 1))
        margin = min(margin, abs(accumulated.min() - threshold))
        if (accumulated > threshold).all():
          break
    if mass.any():
      output[b, k], lse[b, k] = weighted / mass[:, None], np.log(mass)
  return Expected(output, lse, largest, used, margin)


class Laid(NamedTuple):
  """A case in the memories it is read from; all else is NaN."""

  arguments: tuple
  slots_after: np.ndarray


def lay_out(case: Case, used: np.ndarray, seed: int = 0, n_slots: int | None = None) -> Laid:
  """Puts the tokens that may be read into tail, pool and slots at random places, in one layer of two."""
  rng = np.random.default_rng(seed)
  B, K, n, _, S, D = case.kv.shape
  L, layer, R, M = 2, 1, B + 2, B * n + 3
  P = K * B * n + 2 if n_slots is None else n_slots
  nan = functools.partial(np.full, fill_value=np.nan, dtype=case.kv.dtype)
  tail, pool, slots, after = nan((K, L, R, 2, S, D)), nan((K, L, M, 2, S, D)), nan((P, 2, S, D)), nan((P, 2, S, D))
  blocks, slot, hit = (np.zeros((B, K, n), t) for t in (np.int32, np.int32, bool))
  rows = rng.permutation(R)[:B].astype(np.int32)
  rows[[row.padding for row in case.rows]] = R
  free = rng.permutation(P).tolist()
  for k in range(K):
    blocks[:, k] = rng.permutation(M)[: B * n].reshape(B, n)
  for b, k, i in np.ndindex(B, K, n):
    where = case.rows[b].where
    hit[b, k, i] = where == "hit" or (where == "mixed" and rng.random() < 0.5)
    homeless = where == "homeless" or (where == "mixed" and rng.random() < 0.3)
    slot[b, k, i] = free.pop() if P and (hit[b, k, i] or not homeless) else -1
    hit[b, k, i] &= P > 0
    if i < used[b, k]:
      if hit[b, k, i]:
        slots[slot[b, k, i]] = case.kv[b, k, i]
      else:
        pool[k, layer, blocks[b, k, i]] = case.kv[b, k, i]
      if slot[b, k, i] >= 0:
        after[slot[b, k, i]] = case.kv[b, k, i]
  for b, row in enumerate(case.rows):
    if not row.padding:
      tail[:, layer, rows[b], :, : row.tail_tokens] = case.tail[b, :, :, : row.tail_tokens]
  column = lambda name: np.array([getattr(row, name) for row in case.rows], np.int32)  # noqa: E731
  count = np.repeat(column("count")[:, None], K, 1)
  proposal = Proposal(slot, hit)
  arguments = (case.q, tail, rows, column("tail_tokens"), pool, slots, np.int32(layer), blocks, proposal, count)
  return Laid(arguments, after)


@functools.cache
def attend_program(implementation: str, scale: float, always: int, group: int, threshold: float | None):
  options = dict(always=always, group_blocks=group, threshold=threshold, scale=scale, implementation=implementation)
  return jax.jit(functools.partial(kernels.attend, **options))


def check_attend(
  case: Case, implementation: str, always: int, group: int, threshold: float | None, n_slots: int | None = None
) -> Expected:
  expected = expect(case, always, group, threshold)
  assert expected.margin > 2e-6 or threshold == 1, "a stop test of this case is decided by rounding"
  laid = lay_out(case, expected.used, n_slots=n_slots)
  program = attend_program(implementation, case.scale, always, group, threshold)
  partial, used, slots = program(*laid.arguments)
  np.testing.assert_array_equal(used, expected.used)
  assert_same_bits(slots, laid.slots_after)
  assert all(x.dtype == jnp.float32 for x in partial) and used.dtype == jnp.int32
  assert_rows_close(partial.output, expected.output, TOLERANCE[str(case.q.dtype)])
  np.testing.assert_allclose(partial.lse, expected.lse, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(partial.m, expected.largest, rtol=1e-5, atol=1e-5)
  return expected


N = 7
RAGGED = [
  Row(N, 1, "hit"),
  Row(N - 1, 5, "miss"),
  Row(N, 8, "mixed"),
  Row(4, 2, "homeless"),
  Row(3, 0),  # an empty tail: never so in decoding, but part of the op
  Row(2, 7),
  Row(1, 3, "miss"),
  Row(0, 4),
  Row(0, 0, padding=True),
]
ATTEND = {
  "group-1": (Shape(1, 8, 64), "float32", None),
  "group-3": (Shape(3, 16, 32), "float32", 0.7),
  "group-8": (Shape(8, 64, 16), "bfloat16", None),
  "llama3-8b": (REAL["llama3-8b"], "bfloat16", 0.7),
  "llama-3.2-1b": (REAL["llama-3.2-1b"], "float32", 0.7),
  "lwm-7b": (REAL["lwm-7b"], "bfloat16", None),
  "qwen2.5-7b": (REAL["qwen2.5-7b"], "bfloat16", None),
}
ON_CPU = list(ATTEND)[:5]  # the others compile to the same program but for sizes
ATTEND_CASES = [(name, kind) for name in ON_CPU for kind in ("xla", "interpret")] + [
  pytest.param(name, "triton", marks=pytest.mark.gpu) for name in ATTEND
]


@pytest.mark.parametrize(("name", "implementation"), ATTEND_CASES)
def test_attend(name: str, implementation: str):
  """Ragged lists and tails of permuted blocks that hit, miss, or miss and get no slot; to the end or progressively."""
  shape, dtype, threshold = ATTEND[name]
  case = random_case(len(name), shape, RAGGED, N, dtype)
  expected = check_attend(case, implementation, always=2, group=2, threshold=threshold)
  counts = np.array([row.count for row in RAGGED])[:, None]
  assert (expected.used < counts).any() == (threshold is not None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attend_without_slots_to_less_than_always(implementation: str):
  """Lists shorter than sinks and window, and than a group: all of them is read."""
  case = random_case(3, Shape(2, 8, 16), [Row(3, 3, "miss"), Row(1, 8, "miss")], 3)
  expected = check_attend(case, implementation, always=5, group=9, threshold=0.01, n_slots=0)
  assert expected.used.tolist() == [[3, 3], [1, 1]]


def test_swapping_keys_and_values_is_seen():
  """The cases above tell K from V: with the two swapped they give something else, far beyond any tolerance."""
  for name in ON_CPU:
    shape, dtype, _ = ATTEND[name]
    case = random_case(len(name), shape, RAGGED[:6], N, dtype)
    right, swapped = (expect(case, 2, 2, None, swap=swap).output for swap in (False, True))
    assert (np.linalg.norm(right - swapped, axis=-1) > 0.05 * np.linalg.norm(right, axis=-1)).all()


def scored_case(log_mass: list, tail_tokens: list[int] | int, tail_log_mass: list[float] | float = 0.0) -> Case:
  """A case of chosen masses, of one shape so that few programs serve all: 8 rows, 3 query heads, up to 10 blocks of 8.

  Every token of a row's block i scores log_mass[g][i] - log 8 for query head g, or log_mass[i] for all heads.
  """
  B, G, n, S, D = 8, 3, 10, 8, 16
  rng = np.random.default_rng(0)
  kv, tail = (rng.normal(size=(*dims, 2, S, D)).astype(np.float32) for dims in ((B, 1, n), (B, 1)))
  q = np.zeros((B, 1, G, D), np.float32)
  for g in range(G):  # head g looks at channel g alone
    q[:, 0, g, g] = D**0.5
  rows = [Row(0, 0, padding=True) for _ in range(B)]
  for b, of_row in enumerate(log_mass):
    by_head = np.broadcast_to(of_row, (G, np.shape(of_row)[-1]))
    of_tail = np.broadcast_to(tail_log_mass, len(log_mass))[b]
    rows[b] = Row(by_head.shape[1], int(np.broadcast_to(tail_tokens, len(log_mass))[b]))
    for g in range(G):
      kv[b, 0, : by_head.shape[1], 0, :, g] = (by_head[g] - math.log(S))[:, None]
      tail[b, 0, 0, :, g] = of_tail - math.log(S)
  return Case(q, rows, kv, tail)


def stops_at(case: Case, implementation: str, always: int, group: int, threshold: float, n: int) -> list[int]:
  """Blocks used in the first n rows, found right."""
  return check_attend(case, implementation, always, group, threshold).used[:n, 0].tolist()


TINY = -12.0  # log mass of a block after which next to nothing can be left


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("always", "group", "n"), [(0, 1, 6), (2, 2, 10)])
def test_psa_stops_after_every_group(always: int, group: int, n: int, implementation: str):
  """Blocks of equal mass reach 9/10 at most; one of tiny mass says that little is left."""
  stops = [*range(always + group, n, group), n]
  log_mass = np.zeros((len(stops), n))
  for b, stop in enumerate(stops[:-1]):
    log_mass[b, stop - 1] = TINY
  log_mass[-1, :always] = TINY  # sinks and window say nothing about ranked blocks
  assert stops_at(scored_case(list(log_mass), 1), implementation, always, group, 0.92, len(stops)) == stops


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_psa_stops_when_every_query_head_would(implementation: str):
  log_mass = np.zeros((4, 3, 10))  # three heads: a kernel that pads them to four must not ask the fourth
  log_mass[0, :, 3] = TINY
  log_mass[1, :2, 3] = TINY  # the third head is not sure
  log_mass[2, 0, 3], log_mass[2, 1:, 5] = TINY, TINY  # the first is sooner than the others, and stays sure
  log_mass[3, :, 2] = TINY  # seen before the test that comes after the group
  assert stops_at(scored_case(list(log_mass), 1), implementation, 2, 2, 0.92, 4) == [4, 10, 6, 4]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threshold_one_never_stops(implementation: str):
  """The estimate is 1 in float32 from the first block on, so the test must be strict."""
  case = scored_case([[30.0, -30.0, -30.0, -30.0]], 1)
  assert stops_at(case, implementation, 0, 1, 1.0, 1) == [4]
  assert expect(case, 0, 1, 1 - 1e-9).used[0, 0] == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_psa_estimate(implementation: str):
  """P_acc = A / (A + a_min left) lands a 1e-4th above or below the threshold, at each stop test."""
  always, group, n, threshold = 2, 2, 10, 0.92
  rng = np.random.default_rng(5)
  log_masses, stops = [], []
  for stop in range(always + group, n, group):
    for p, then in ((threshold * (1 + 1e-4), stop), (threshold * (1 - 1e-4), min(stop + group, n))):
      log_mass = np.sort(rng.uniform(0.0, 0.2, n))[::-1] + 2.0
      log_mass[:always] = TINY, 1.0
      before = 3 / 8 + np.exp(log_mass[: stop - 1]).sum()  # the tail is 3 tokens of 8, whose masses are 1/8
      log_mass[stop - 1] = math.log((1 - p) * before / (p * (n - stop) - (1 - p)))  # solves the formula for this block
      assert log_mass[stop - 1] < log_mass[always : stop - 1].min()  # it is the smallest so far
      log_masses.append(log_mass)
      stops.append(then)
  # A wrong `left`, or a smallest mass that knows the tail or the first two blocks, would move P by over 1e-3.
  assert stops_at(scored_case(log_masses, 3), implementation, always, group, threshold, len(stops)) == stops


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_psa_counts_the_tail_as_mass_but_not_as_a_block(implementation: str):
  """A heavy tail stops at the first test; a light one, though lighter than any block, does not."""
  case = scored_case([[0.0] * 10] * 4, [8, 1, 8, 1], [9.0, 9.0, TINY, TINY])
  assert stops_at(case, implementation, 2, 2, 0.92, 4) == [4, 4, 10, 10]


# --------------------------------------------------------------------------------------------------------------- copies


def tagged(*dims: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=dims).astype(np.float32)


K, L, M, P, S, D = 2, 3, 11, 9, 8, 16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_load_blocks(implementation: str):
  pool, slots = tagged(K, L, M, 2, S, D), tagged(P, 2, S, D, seed=1)
  blocks = np.array([[[3, -1, 10], [3, 0, 5]], [[-1, 7, 1], [2, -1, -1]]], np.int32)
  slot = np.array([[[8, 4, 0], [1, -1, 2]], [[-1, 3, 7], [6, 5, -1]]], np.int32)
  pool[np.isin(np.arange(M), blocks, invert=True)[None, None] & np.ones((K, L, 1), bool)] = np.nan
  pool[:, [0, 1]] = np.nan
  expected = slots.copy()
  for b, k, i in np.ndindex(*blocks.shape):
    if blocks[b, k, i] >= 0 and slot[b, k, i] >= 0:
      expected[slot[b, k, i]] = pool[k, 2, blocks[b, k, i]]
  actual = jax.jit(functools.partial(kernels.load_blocks, implementation=implementation))(
    pool, slots, np.int32(2), blocks, slot
  )
  assert_same_bits(actual, expected)
  assert not np.isnan(expected).any()


@pytest.mark.parametrize("n_slots", [P, 0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gather_blocks(implementation: str, n_slots: int):
  pool, slots = tagged(K, L, M, 2, S, D), tagged(n_slots, 2, S, D, seed=1)
  blocks = np.array([[3, -1, 10, 0], [9, 2, -1, 5]], np.int32)
  slot = np.array([[8, -1, -1, 0], [-1, 2, -1, -1]], np.int32) if n_slots else np.full((2, 4), -1, np.int32)
  pool[:, [0, 2]] = np.nan
  slots[np.isin(np.arange(n_slots), slot, invert=True)] = np.nan
  for k, i in np.ndindex(2, 4):
    if slot[k, i] >= 0:
      pool[k, 1, blocks[k, i]] = np.nan  # what is in a slot is read there
  actual = jax.jit(functools.partial(kernels.gather_blocks, implementation=implementation))(
    pool, slots, np.int32(1), blocks, slot
  )
  for k, i in np.ndindex(2, 4):
    if blocks[k, i] >= 0:
      wanted = slots[slot[k, i]] if slot[k, i] >= 0 else pool[k, 1, blocks[k, i]]
      assert np.isfinite(wanted).all()
      assert_same_bits(actual[k, i], wanted)


@pytest.mark.parametrize(("layer", "n_layers"), [(0, L), (2, 1)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_store_blocks(implementation: str, layer: int, n_layers: int):
  pool, source = tagged(K, L, M, 2, S, D), tagged(K, n_layers, 5, 2, S, D, seed=1)
  source_ids, blocks = np.array([4, 0, 2, 1], np.int32), np.array([10, -1, 0, 6], np.int32)
  source[:, :, [0, 3]] = np.nan
  expected = pool.copy()
  for k, j, i in np.ndindex(K, n_layers, 4):
    if blocks[i] >= 0:
      expected[k, layer + j, blocks[i]] = source[k, j, source_ids[i]]
  actual = jax.jit(functools.partial(kernels.store_blocks, implementation=implementation))(
    pool, source, np.int32(layer), source_ids, blocks
  )
  assert_same_bits(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_place_blocks(implementation: str):
  slots, source = tagged(P, 2, S, D), tagged(K, 2, 5, 2, S, D, seed=1)
  source_ids = np.array([4, 0, 2], np.int32)
  slot = np.array([[[8, -1, 0], [3, -1, -1]], [[-1, -1, 5], [1, -1, 2]]], np.int32)
  source[:, :, [0, 1, 3]] = np.nan
  expected = slots.copy()
  for k, j, i in np.ndindex(*slot.shape):
    if slot[k, j, i] >= 0:
      expected[slot[k, j, i]] = source[k, j, source_ids[i]]
  program = jax.jit(functools.partial(kernels.place_blocks, implementation=implementation))
  assert_same_bits(program(slots, source, source_ids, slot), expected)
  assert program(slots[:0], source, source_ids, np.full_like(slot, -1)).shape == (0, 2, S, D)


# ------------------------------------------------------------------------------------------------------- merge, prefill


def test_merge():
  """Three sets of keys, one empty, in any order and nesting, give softmax attention over them all."""
  rng = np.random.default_rng(6)
  s, v = 8 * rng.normal(size=(4, 9)), rng.normal(size=(4, 9, 5))
  parts = []
  for cut in (slice(0, 3), slice(3, 3), slice(3, 9)):
    m = s[:, cut].max(-1, initial=-np.inf)
    p = np.exp(s[:, cut] - m[:, None])
    o = np.einsum("bn,bnd->bd", p, v[:, cut])
    parts.append(kernels.Partial(*(np.asarray(x, np.float32) for x in (o, m, p.sum(-1)))))
  weight = np.exp(s)
  expected = (weight[..., None] * v).sum(1) / weight.sum(1)[:, None]
  a, empty, b = parts
  for merged in (
    kernels.merge(kernels.merge(a, empty), b),
    kernels.merge(a, kernels.merge(b, empty)),
    kernels.merge(kernels.merge(empty, b), a),
  ):
    assert_rows_close(merged.output, expected, 1e-5)
    np.testing.assert_allclose(merged.lse, np.log(weight.sum(1)), rtol=1e-5)
    np.testing.assert_allclose(merged.m, s.max(-1), rtol=1e-6)
  nothing = kernels.merge(empty, empty)
  assert (np.asarray(nothing.output) == 0).all() and (np.asarray(nothing.lse) == -np.inf).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix_blocks", [None, 0, 2, 4])
def test_prefill_attention(prefix_blocks: int | None, dtype: str, implementation: str):
  """24 tokens are three tiles of queries. The prefix has room for 4 blocks; every second lies in a slot, not in the
  pool.
  """
  rng = np.random.default_rng(7)
  T, K, G, S, D, L, M, P = 24, 2, 3, 8, 16, 2, 9, 6
  make = lambda *dims: rng.normal(size=dims).astype(DTYPES[dtype])  # noqa: E731
  q, k, v = make(T, K, G, D), make(T, K, D), make(T, K, D)
  pool, slots = (np.full(dims, np.nan, DTYPES[dtype]) for dims in ((K, L, M, 2, S, D), (P, 2, S, D)))
  n_before = S * (prefix_blocks or 0)
  earlier = make(K, prefix_blocks or 0, 2, S, D)
  prefix = None
  if prefix_blocks is not None:
    blocks, slot = np.full((2, K, 4), -1, np.int32)
    prefix = blocks, slot
    free = iter(rng.permutation(P).tolist())
    for head, i in np.ndindex(K, prefix_blocks):
      blocks[head, i] = (3 + 2 * i) % M
      if (head + i) % 2:
        slot[head, i] = next(free)
        slots[slot[head, i]] = earlier[head, i]
      else:
        pool[head, 1, blocks[head, i]] = earlier[head, i]
  expected = np.zeros((T, K, G, D))
  for t, head, g in np.ndindex(T, K, G):
    before = earlier[head].transpose(1, 0, 2, 3).reshape(2, n_before, D)
    keys, values = (np.concatenate([before[i], x[: t + 1, head]]).astype(float) for i, x in enumerate((k, v)))
    p = np.exp(keys @ q[t, head, g].astype(float) * 0.3)
    expected[t, head, g] = p @ values / p.sum()
  attention = jax.jit(functools.partial(kernels.prefill_attention, scale=0.3, implementation=implementation))
  actual = attention(q, k, v, pool, slots, np.int32(1), prefix, np.int32(n_before))
  assert actual.dtype == q.dtype
  assert_rows_close(actual.astype(jnp.float32), expected, TOLERANCE[dtype])
