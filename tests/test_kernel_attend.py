"""Attention of a decode step against loops in float64. What it must not read is NaN in its inputs, always."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels import chunks
from pallas_kernels.residency import Located
from tests.cases import DTYPES, IMPLEMENTATIONS, REAL, TOLERANCE, Shape, assert_rows_close, assert_same_bits


@dataclasses.dataclass
class Row:
  """One row of a case, with its truth: K and V of every block of its list, before any of it is hidden."""

  length: int
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
  attended: np.ndarray  # [B, K]
  margin: float  # of the closest stop test


def random_case(seed: int, shape: Shape, rows: list[Row], n: int, dtype: str = "float32", K: int = 2) -> Case:
  rng = np.random.default_rng(seed)
  make = lambda *dims, spread=1.0: (spread * rng.normal(size=dims)).astype(DTYPES[dtype])  # noqa: E731
  B, (G, S, D) = len(rows), shape
  # A spread above 1 makes a few tokens carry most of the mass, so that progressive attention does stop.
  return Case(make(B, K, G, D, spread=1.5), rows, make(B, K, n, 2, S, D), make(B, K, 2, S, D))


PSA = kernels.StopRule("least")  # the paper's


# sparse.rest -> the mass of an unread block, when ranked blocks of these masses [n, G] have been read, in whole groups.
TAKEN_FOR = {
  "least": lambda masses, group: np.min(masses, 0),
  "last_group": lambda masses, group: np.mean(masses[-group:], 0),
  "last_two_groups": lambda masses, group: np.mean(masses[-2 * group :], 0),
}


def expect(
  case: Case,
  untested: int,
  group: int,
  threshold: float | None,
  rule: kernels.StopRule = PSA,
  swap: bool = False,
) -> Expected:
  """Attention by loops over float64, and the stop test by its formula (arXiv 2503.00392, section 2.2)."""
  B, K, G, D = case.q.shape
  k_at, v_at = (1, 0) if swap else (0, 1)
  output, lse = np.zeros((B, K, G, D)), np.full((B, K, G), -np.inf)
  largest, attended = np.full((B, K, G), -np.inf), np.zeros((B, K), np.int32)
  margin = np.inf
  for b, k in np.ndindex(B, K):
    row, q = case.rows[b], case.q[b, k].astype(np.float64)
    mass, weighted = np.zeros(G), np.zeros((G, D))
    ranked: list[np.ndarray] = []

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
    for i in range(row.length):
      of_block = attend_to(case.kv[b, k, i, k_at], case.kv[b, k, i, v_at])
      attended[b, k] += 1
      if i < untested:
        continue
      ranked.append(of_block)
      if threshold is not None and len(ranked) % group == 0 and i + 1 < row.length:
        claims = mass / (mass + TAKEN_FOR[rule.rest](ranked, group) * (row.length - i - 1))
        claim = claims.min() if rule.when == "every_head" else claims.mean()
        margin = min(margin, abs(claim - threshold))
        if claim > threshold:
          break
    if mass.any():
      output[b, k], lse[b, k] = weighted / mass[:, None], np.log(mass)
  return Expected(output, lse, largest, attended, margin)


class Laid(NamedTuple):
  """A case in the memories it is read from; all else is NaN."""

  arguments: tuple
  slots_after: np.ndarray


def lay_out(case: Case, attended: np.ndarray, group: int, seed: int = 0, n_slots: int | None = None) -> Laid:
  """Puts the tokens that may be read into tail, pool and slots at random places, in one layer of two.

  Within each `group` of a list, what is in slots comes first.
  """
  rng = np.random.default_rng(seed)
  B, K, n, _, S, D = case.kv.shape
  L, layer, R, M = 2, 1, B + 2, B * n + 3
  P = K * B * n + 2 if n_slots is None else n_slots
  nan = functools.partial(np.full, fill_value=np.nan, dtype=case.kv.dtype)
  tail, pool, slots, after = nan((K, L, R, 2, S, D)), nan((K, L, M, 2, S, D)), nan((P, 2, S, D)), nan((P, 2, S, D))
  blocks, slot, hit = (np.zeros((B, K, n), t) for t in (np.int32, np.int32, bool))
  lanes = rng.permutation(R)[:B].astype(np.int32)
  lanes[[row.padding for row in case.rows]] = R
  free = rng.permutation(P).tolist()
  for k in range(K):
    blocks[:, k] = rng.permutation(M)[: B * n].reshape(B, n)
  for b, k, i in np.ndindex(B, K, n):
    where = case.rows[b].where
    hit[b, k, i] = where == "hit" or (where == "mixed" and rng.random() < 0.5)
    homeless = where == "homeless" or (where == "mixed" and rng.random() < 0.3)
    slot[b, k, i] = free.pop() if P and (hit[b, k, i] or not homeless) else -1
    hit[b, k, i] &= P > 0
    if i >= case.rows[b].length:  # as `Selector.select` gives them
      blocks[b, k, i], slot[b, k, i], hit[b, k, i] = -1, -1, False
    if i < attended[b, k]:
      if hit[b, k, i]:
        slots[slot[b, k, i]] = case.kv[b, k, i]
      else:
        pool[k, layer, blocks[b, k, i]] = case.kv[b, k, i]
      if slot[b, k, i] >= 0:
        after[slot[b, k, i]] = case.kv[b, k, i]
  for b, row in enumerate(case.rows):
    if not row.padding:
      tail[:, layer, lanes[b], :, : row.tail_tokens] = case.tail[b, :, :, : row.tail_tokens]
  column = lambda name: np.array([getattr(row, name) for row in case.rows], np.int32)  # noqa: E731
  length = np.repeat(column("length")[:, None], K, 1)
  hits = np.zeros((B, K, -(-n // group)), np.int32)
  for b, k, j in np.ndindex(*hits.shape):
    ranks = np.arange(j * group, min(n, (j + 1) * group))
    order = ranks[np.argsort(~hit[b, k, ranks], kind="stable")]
    blocks[b, k, ranks], slot[b, k, ranks] = blocks[b, k, order], slot[b, k, order]
    hit[b, k, ranks], hits[b, k, j] = hit[b, k, order], hit[b, k, ranks].sum()
  located = Located(blocks, np.where(hit, slot, -1), np.where(hit, -1, slot), hits, length)
  tails = kernels.Tails(tail, lanes, column("tail_tokens"))
  return Laid((case.q, tails, pool, slots, np.int32(layer), located), after)


@functools.cache
def attend_program(implementation: str, untested: int, rule: kernels.StopRule = PSA):
  """attend(threshold or None, its arguments): one program serves all thresholds."""

  def run(threshold, *arguments):
    stop = None if threshold is None else kernels.Stop(threshold, untested, rule)
    return kernels.attend(*arguments, stop=stop, implementation=implementation)

  return jax.jit(run)


def check_attend(
  case: Case,
  implementation: str,
  untested: int,
  group: int,
  threshold: float | None,
  n_slots: int | None = None,
  rule: kernels.StopRule = PSA,
) -> Expected:
  expected = expect(case, untested, group, threshold, rule)
  assert expected.margin > 2e-6 or threshold == 1, "a stop test of this case is decided by rounding"
  n = case.kv.shape[2]
  laid = lay_out(case, expected.attended, n if threshold is None else min(group, n), n_slots=n_slots)
  partial, attended, slots = attend_program(implementation, untested, rule)(threshold, *laid.arguments)
  np.testing.assert_array_equal(attended, expected.attended)
  assert_same_bits(slots, laid.slots_after)
  assert all(x.dtype == jnp.float32 for x in partial) and attended.dtype == jnp.int32
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
  "float32": (REAL["llama3-8b"], "float32", 0.7),
  "small-blocks": (Shape(2, 16, 64), "bfloat16", 0.7),
  "large-blocks": (Shape(8, 64, 128), "bfloat16", 0.7),
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
  expected = check_attend(case, implementation, untested=2, group=2, threshold=threshold)
  lengths = np.array([row.length for row in RAGGED])[:, None]
  assert (expected.attended < lengths).any() == (threshold is not None)


@pytest.mark.parametrize("threshold", [0.01, None])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attend_without_slots_to_less_than_untested(implementation: str, threshold: float | None):
  """Lists shorter than sinks and window, which are one group: all of them is read."""
  case = random_case(3, Shape(2, 8, 16), [Row(3, 3, "miss"), Row(1, 8, "miss")], 3)
  expected = check_attend(case, implementation, untested=8, group=8, threshold=threshold, n_slots=0)
  assert expected.attended.tolist() == [[3, 3], [1, 1]]


@pytest.mark.parametrize("n_slots", [None, 0])
@pytest.mark.parametrize("programs", [512, 7])  # 512: a list has more chunks than are merged at a time
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attend_cuts_long_lists(implementation: str, programs: int, n_slots: int | None, monkeypatch):
  """Lists of any lengths are cut into chunks of one size; some programs have nothing to do."""
  monkeypatch.setattr(chunks, "HIT_PROGRAMS", programs)
  depth = 16 if programs == 512 else 32  # programs are compiled by shapes
  rows = [Row(78, 2), Row(80, 8, "hit"), Row(37, 1, "miss"), Row(5, 3, "hit"), Row(1, 0, "hit"), Row(0, 3)]
  check_attend(random_case(4, Shape(2, 8, depth), rows, 80, K=1), implementation, 0, 80, None, n_slots)


@pytest.mark.parametrize("n_slots", [None, 0])
@pytest.mark.parametrize("seed", range(4))
def test_attend_cuts_any_lists(seed: int, n_slots: int | None, monkeypatch):
  """Random lists, as many as are no power of two; few programs, small chunks, and few parts merged at a time."""
  rng = np.random.default_rng(seed)
  for name, value in dict(HIT_PROGRAMS=2 + 3 * seed, CHUNK_BLOCKS=1 + seed % 2, MERGED=2).items():
    monkeypatch.setattr(chunks, name, value)
  monkeypatch.setattr(chunks, "MISS_PROGRAMS", 4)
  n = 20 + seed  # programs are compiled by shapes
  where = ("hit", "miss", "mixed", "homeless")
  rows = [Row(int(rng.integers(n + 1)), int(rng.integers(9)), str(rng.choice(where))) for _ in range(3)]
  rows += [Row(0, 0, padding=True), Row(n, 3)]
  check_attend(random_case(seed, Shape(5, 8, 16), rows, n, K=3), "interpret", 0, n, None, n_slots)


@pytest.mark.parametrize("n_slots", [None, 0])
@pytest.mark.parametrize(("untested", "rule"), [(0, PSA), (4, kernels.StopRule()), (8, kernels.StopRule("last_group"))])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_attend_cuts_what_is_certain(
  implementation: str, untested: int, rule: kernels.StopRule, n_slots: int | None, monkeypatch
):
  """Several programs for the hits of a group, and a program with the misses of several groups. Some lists end before
  what is certain does, some at its end, and some go on."""
  monkeypatch.setattr(chunks, "CHUNK_BLOCKS", 1)
  monkeypatch.setattr(chunks, "MISS_PROGRAMS", 4)
  n = 30  # programs are compiled by shapes
  rows = [Row(n, 2), Row(untested + 4, 8, "hit"), Row(untested + 3, 1, "miss"), Row(5, 3), Row(1, 0, "hit"), Row(0, 3)]
  rows += [Row(n - 1, 4, "homeless"), Row(0, 0, padding=True)]
  case = random_case(9, Shape(3, 8, 16), rows, n, K=3)
  expected = check_attend(case, implementation, untested, 4, 0.6, n_slots, rule)
  assert (expected.attended[0] > untested + 4).any() and (expected.attended[0] < n).any()


@pytest.mark.gpu
def test_blocks_beyond_4_gib():
  """The last block of a pool in host memory, and the last slots, at offsets that 32 bits do not hold."""
  n = (4 << 30) // (16 << 10) + 5000  # blocks of 16 KiB
  case = random_case(8, REAL["llama3-8b"], [Row(2, 3)], 2, "bfloat16", K=1)
  host = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
  pool = jax.device_put(np.zeros((1, 1, n, *case.kv.shape[3:]), case.kv.dtype), host)
  store = functools.partial(kernels.store_blocks, implementation="triton")
  store = jax.jit(store, donate_argnums=0, out_shardings=host)
  pool = store(pool, case.kv[:, :, None, 1], np.int32(0), np.zeros(1, np.int32), np.array([n - 1], np.int32))
  fill = jax.jit(lambda kv: jnp.zeros((n, *kv.shape), kv.dtype).at[n - 1].set(kv))
  blocks, slot, place = (np.array([[ids]], np.int32) for ids in ([0, n - 1], [n - 1, -1], [-1, n - 2]))
  located = Located(blocks, slot, place, np.ones((1, 1, 1), np.int32), np.full((1, 1), 2, np.int32))
  tails = kernels.Tails(case.tail[:, :, None].swapaxes(0, 1), np.zeros(1, np.int32), np.array([3], np.int32))
  program = attend_program("triton", 0)
  partial, _, slots = program(None, case.q, tails, pool, fill(case.kv[0, 0, 0]), np.int32(0), located)
  assert_rows_close(partial.output, expect(case, 0, 2, None).output, TOLERANCE["bfloat16"])
  assert_same_bits(slots[n - 2], case.kv[0, 0, 1])


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


def stops_at(case: Case, implementation: str, untested: int, group: int, threshold: float, n: int) -> list[int]:
  """Blocks attended in the first n rows, found right."""
  return check_attend(case, implementation, untested, group, threshold).attended[:n, 0].tolist()


TINY = -12.0  # log mass of a block after which next to nothing can be left


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("untested", "group", "n"), [(0, 1, 6), (2, 2, 10)])
def test_psa_stops_after_every_group(untested: int, group: int, n: int, implementation: str):
  """Blocks of equal mass reach 9/10 at most; one of tiny mass says that little is left."""
  stops = [*range(untested + group, n, group), n]
  log_mass = np.zeros((len(stops), n))
  for b, stop in enumerate(stops[:-1]):
    log_mass[b, stop - 1] = TINY
  log_mass[-1, :untested] = TINY  # sinks and window say nothing about ranked blocks
  assert stops_at(scored_case(list(log_mass), 1), implementation, untested, group, 0.92, len(stops)) == stops


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
  assert expect(case, 0, 1, 1 - 1e-9).attended[0, 0] == 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_psa_estimate(implementation: str):
  """P_acc = A / (A + a_min left) lands a 1e-4th above or below the threshold, at each stop test."""
  untested, group, n, threshold = 2, 2, 10, 0.92
  rng = np.random.default_rng(5)
  log_masses, stops = [], []
  for stop in range(untested + group, n, group):
    for p, then in ((threshold * (1 + 1e-4), stop), (threshold * (1 - 1e-4), min(stop + group, n))):
      log_mass = np.sort(rng.uniform(0.0, 0.2, n))[::-1] + 2.0
      log_mass[:untested] = TINY, 1.0
      before = 3 / 8 + np.exp(log_mass[: stop - 1]).sum()  # the tail is 3 tokens of 8, whose masses are 1/8
      log_mass[stop - 1] = math.log((1 - p) * before / (p * (n - stop) - (1 - p)))  # solves the formula for this block
      assert log_mass[stop - 1] < log_mass[untested : stop - 1].min()  # it is the smallest so far
      log_masses.append(log_mass)
      stops.append(then)
  # A wrong `left`, or a smallest mass that knows the tail or the first two blocks, would move P by over 1e-3.
  assert stops_at(scored_case(log_masses, 3), implementation, untested, group, threshold, len(stops)) == stops


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_psa_counts_the_tail_as_mass_but_not_as_a_block(implementation: str):
  """A heavy tail stops at the first test; a light one, though lighter than any block, does not."""
  case = scored_case([[0.0] * 10] * 4, [8, 1, 8, 1], [9.0, 9.0, TINY, TINY])
  assert stops_at(case, implementation, 2, 2, 0.92, 4) == [4, 4, 10, 10]


def test_groups_must_fit_the_stop_test():
  case = random_case(0, Shape(1, 8, 16), [Row(4, 1)], 4)
  for untested, group, threshold, message in (
    (0, 2, None, "one group"),
    (3, 2, 0.9, "untested=3 blocks are not whole groups of 2"),
  ):
    laid = lay_out(case, np.full((1, 2), 4), group)
    with pytest.raises(ValueError, match=message):
      attend_program("xla", untested)(threshold, *laid.arguments)


@pytest.mark.parametrize(("threshold", "untested"), [(0.0, 2), (1.5, 2), (math.nan, 2), (0.9, -1)])
def test_a_stop_test_that_means_nothing(threshold: float, untested: int):
  with pytest.raises(ValueError, match=r"threshold=.* is not in \(0, 1\]|untested=-1 blocks"):
    kernels.Stop(threshold, untested)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_lists_have_blocks(threshold: float | None, implementation: str):
  case = random_case(0, Shape(1, 8, 16), [Row(4, 1)], 4)
  *arguments, located = lay_out(case, np.full((1, 2), 4), 4).arguments
  none = located._replace(**{name: getattr(located, name)[..., :0] for name in ("blocks", "slot", "place")})
  with pytest.raises(ValueError, match="lists of 0 blocks"):
    attend_program(implementation, 0)(threshold, *arguments, none)
