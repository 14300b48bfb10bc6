"""The stop test by rule: op, kernel and replayed steps against loops in float64, and what claims are worth."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as kernels
from pallas_kernels.stop import REST, WHEN, Rest
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.config import SparseConfig, override
from sparse_serve_jax.evaluation import accuracy, replay
from tests.cases import IMPLEMENTATIONS, Shape
from tests.test_kernel_attend import (
  ATTEND,
  ON_CPU,
  RAGGED,
  TAKEN_FOR,
  TINY,
  N,
  Row,
  check_attend,
  expect,
  random_case,
  scored_case,
)
from tests.tiny import config

ROOT = Path(__file__).resolve().parent.parent
RULES = [kernels.StopRule(*names) for names in itertools.product(REST, WHEN)]
# Of every code path that PSA's, which tests/test_kernel_attend.py is about, does not have.
TWO_RULES = [kernels.StopRule("last_group"), kernels.StopRule("last_two_groups", "mean_of_heads")]
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.rest}-{rule.when}")
by_name = lambda f: pytest.mark.parametrize("rest", REST)(pytest.mark.parametrize("when", WHEN)(f))  # noqa: E731


def stops_at(case, implementation: str, threshold: float, rule: kernels.StopRule, n: int) -> list[int]:
  """Blocks attended in the first n rows, found right; two blocks are untested, groups are of two."""
  return check_attend(case, implementation, 2, 2, threshold, rule=rule).attended[:n, 0].tolist()


def test_the_configuration_names_every_rule():
  """The first is the paper's, the default the one that keeps its promise on other models too."""
  for rule in RULES:
    sparse = override(SparseConfig(), [f"rest={rule.rest}", f"stop_when={rule.when}"])
    assert kernels.StopRule(sparse.rest, sparse.stop_when) == rule
  assert RULES[0] == kernels.StopRule("least", "every_head")
  assert kernels.StopRule() == kernels.StopRule(SparseConfig().rest, SparseConfig().stop_when)
  for wrong in dict(rest="last"), dict(when="all"):
    with pytest.raises(ValueError, match=r"(rest='last'|when='all') is none of "):
      kernels.StopRule(**wrong)


# Query heads that a kernel pads and that it does not, both dtypes, blocks small and large; PSA's rule has all shapes.
PROGRESSIVE = ["group-3", "llama-3.2-1b", "large-blocks"]
PROGRESSIVE_CASES = [(name, kind) for name in PROGRESSIVE if name in ON_CPU for kind in ("xla", "interpret")] + [
  pytest.param(name, "triton", marks=pytest.mark.gpu) for name in PROGRESSIVE
]


@pytest.mark.parametrize(("name", "implementation"), PROGRESSIVE_CASES)
@pytest.mark.parametrize("rule", TWO_RULES, ids=lambda rule: f"{rule.rest}-{rule.when}")
def test_attend(name: str, implementation: str, rule: kernels.StopRule):
  """Ragged lists and tails, as PSA's rule is tested."""
  shape, dtype, _ = ATTEND[name]
  case = random_case(len(name), shape, RAGGED, N, dtype)
  expected = check_attend(case, implementation, untested=2, group=2, threshold=0.55, rule=rule)
  lengths = np.array([row.length for row in RAGGED])[:, None]
  assert (expected.attended < lengths).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@by_name
def test_claims_land_beside_the_threshold(implementation: str, when: str, rest: str):
  """A claim a 1e-4th above the threshold stops at each test, and one below it goes on to the next.

  Query heads claim different shares, of which the least or the mean decides; the last is neither.
  """
  rule, threshold, n, (untested, group) = kernels.StopRule(rest, when), 0.92, 10, (2, 2)
  rng = np.random.default_rng(5)
  log_masses, stops = [], []
  for stop in range(untested + group, n, group):
    for p, then in ((threshold * (1 + 1e-4), stop), (threshold * (1 - 1e-4), min(stop + group, n))):
      log_mass = np.repeat(np.sort(rng.uniform(0.0, 0.2, n))[None, ::-1] + 2.0, 3, 0)
      log_mass[:, 1] = TINY
      masses = np.exp(log_mass)
      each = TAKEN_FOR[rule.rest](list(masses[:, untested:stop].T), group)
      claims = p + np.array([0.0, 0.02, 0.03] if when == "every_head" else [-0.02, 0.05, -0.03])
      # The first block makes up the mass that claims the share; the tail is 3 tokens of 8, whose masses are 1/8.
      first = claims / (1 - claims) * each * (n - stop) - 3 / 8 - masses[:, 1:stop].sum(1)
      log_mass[:, 0] = np.log(first)
      log_masses.append(log_mass)
      stops.append(then)
  assert stops_at(scored_case(log_masses, 3), implementation, threshold, rule, len(stops)) == stops


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@by_rule
def test_masses_in_any_order(implementation: str, rule: kernels.StopRule):
  """Query heads with masses of their own, the heaviest block anywhere: each rule stops where no other does."""
  rng, threshold = np.random.default_rng(3), 0.8
  case = scored_case([2 * rng.normal(size=(3, n)) for n in (10, 10, 10, 10, 9, 7, 3, 1)], [8, 1, 3, 5, 8, 1, 8, 2])
  stops = stops_at(case, implementation, threshold, rule, 8)
  for other in RULES:
    assert (expect(case, 2, 2, threshold, other).attended[:, 0].tolist() == stops) == (other == rule)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_rule_of_the_docs(implementation: str, monkeypatch: pytest.MonkeyPatch):
  """Added from outside, and served with; op and kernel stop where its definition says, and where no other rule does."""
  monkeypatch.chdir(ROOT)
  for table in REST, TAKEN_FOR:
    monkeypatch.setitem(table, "heaviest", None)
  (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "psa.md").read_text(), re.M | re.S)
  assert len(example.splitlines()) <= 15
  exec(compile(example, "docs/psa.md", "exec"), found := {})
  assert found["llm"].engine.config.sparse.rest == "heaviest"
  TAKEN_FOR["heaviest"] = lambda masses, group: np.max(
    [np.mean(masses[i : i + group], 0) for i in range(0, len(masses), group)], 0
  )
  rng, threshold = np.random.default_rng(3), 0.8
  case = scored_case([2 * rng.normal(size=(3, n)) for n in (10, 10, 10, 10, 9, 7)], [8, 1, 3, 5, 8, 1])
  stops = stops_at(case, implementation, threshold, kernels.StopRule("heaviest"), 6)
  assert all(expect(case, 2, 2, threshold, other).attended[:, 0].tolist() != stops for other in RULES)


def test_a_rule_that_is_defined_anew_is_another(monkeypatch: pytest.MonkeyPatch):
  """Programs that are kept for rules are not those of the one that had its name."""
  before = kernels.StopRule("last_group")
  monkeypatch.setitem(REST, "last_group", dataclasses.replace(REST["last_group"]))
  assert kernels.StopRule("last_group") == before
  monkeypatch.setitem(REST, "last_group", dataclasses.replace(REST["last_group"], taken=REST["least"].taken))
  assert kernels.StopRule("last_group") != before


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rest", ["last_group", "last_two_groups"])
def test_the_heaviest_block_of_a_group_may_come_last(implementation: str, rest: str):
  """Its mean is 10.5, of 1 and 20.1. If what came before were not made relative to it, that would be 20.1."""
  case = scored_case([[0.0, 0.0, 0.0, 3.0, *[0.0] * 6], [0.0, 0.0, 3.0, *[0.0] * 7]], 8)
  assert stops_at(case, implementation, 0.2, kernels.StopRule(rest), 2) == [4, 4]
  later = [[0.0, 0.0, 3.0, 3.0, *last, *[0.0] * 4] for last in ([3.0, 5.0], [5.0, 3.0])]  # a group that is not certain
  assert stops_at(scored_case(3 * later, 8), implementation, 0.3, kernels.StopRule(rest), 6) == [6] * 6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rule_keeps_nothing_of_what_is_untested(implementation: str, monkeypatch: pytest.MonkeyPatch):
  """This one takes an unread block for three times as heavy from the second ranked group on."""

  def taken(before, group, seen):
    return jnp.where(before == jnp.inf, 1.0, 3.0) * jnp.exp2(group - seen), seen

  monkeypatch.setitem(REST, "wary", Rest("", "mean", taken))
  monkeypatch.setitem(TAKEN_FOR, "wary", lambda masses, n: (1 if len(masses) == n else 3) * np.mean(masses[-n:], 0))
  case = random_case(3, Shape(2, 8, 16), [Row(20, 3)] * 4, 20, K=1)
  expected = check_attend(case, implementation, 4, 2, 0.25, rule=kernels.StopRule("wary"))
  assert expected.attended.min() == 6 < expected.attended.max() < 20


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@by_rule
def test_threshold_one_never_stops(implementation: str, rule: kernels.StopRule):
  """Claims are 1 in float32, some because the mass of a group is 0 beside what has been read."""
  case = scored_case([[40.0, -30.0, *[-80.0] * 8], [80.0, 80.0, -30.0, -30.0, *[-80.0] * 4]], [8, 1])
  assert stops_at(case, implementation, 1.0, rule, 2) == [10, 8]
  assert stops_at(case, implementation, 0.999, rule, 2) == [4, 4]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_light_block_does_not_deceive_a_mean(implementation: str):
  """In the first row what comes after it is heavy, in the second light. Each rule's claim holds in the second; PSA's
  rule takes the first row for the second.
  """
  log_masses = [[0.0, 0.0, 0.0, TINY, *[heavy] * 6] for heavy in (0.0, -6.0)]
  threshold, stops, true = 0.82, {}, {}
  for rest in REST:
    stops[rest] = stops_at(scored_case(log_masses, 8), implementation, threshold, kernels.StopRule(rest), 2)
    shares = [
      (1 + np.exp(of[:n]).sum()) / (1 + np.exp(of).sum()) for of, n in zip(log_masses, stops[rest], strict=True)
    ]
    true[rest] = [share >= threshold for share in shares]
  assert stops == {"least": [4, 4], "last_group": [10, 6], "last_two_groups": [10, 8]}
  assert true == {"least": [False, True], "last_group": [True, True], "last_two_groups": [True, True]}


@by_rule
def test_claims_at_the_ends_of_float32(rule: kernels.StopRule):
  """Before a ranked group nothing is claimed; with nothing left everything is; and no mass is too large or small."""
  inf = jnp.float32(jnp.inf)

  def claim(before, group, seen, left):
    share, _ = rule.claim(*(jnp.float32(x) for x in (before, group, seen, left)))
    return float(share)

  assert claim(inf, inf, 3.0, 5) == 0 and claim(inf, inf, 3.0, 0) == 1 and claim(1.0, 0.0, 3.0, 0) == 1
  assert claim(inf, 900.0, -900.0, 2) == 0 and claim(inf, -900.0, 900.0, 1 << 20) == 1
  assert claim(inf, -inf, 0.0, 7) == 1  # a group whose mass is 0 beside what has been read
  assert claim(-inf, -inf, 0.0, 7) == 1
  assert claim(inf, 900.0, 901.0, 2) == pytest.approx(0.5)
  masses = jnp.log2(jnp.array([[1.0, 8.0], [4.0, 2.0], [jnp.nan, jnp.nan], [jnp.nan, jnp.nan]]))
  group = rule.of_group(masses[:2], jnp.array([True, True]))
  np.testing.assert_allclose(2.0**group, [1, 2] if rule.rest == "least" else [2.5, 5], rtol=1e-6)
  hidden = rule.of_group(masses, jnp.array([True, True, False, False]))  # the end of a list, of which nothing is left
  np.testing.assert_allclose(2.0**hidden, [1, 2] if rule.rest == "least" else [1.25, 2.5], rtol=1e-6)
  assert float(rule.of_group(masses, jnp.zeros(4, bool))[0]) == (math.inf if rule.rest == "least" else -math.inf)
  padded = jnp.array([0.9, 0.6, 0.6, 0.6])
  assert bool(rule.passes(padded, 0.7, 2)) == (rule.when == "mean_of_heads")
  assert not bool(rule.passes(padded, 0.75, 2))


class Masses:
  """Steps whose blocks have lognormal masses, ranked by these with an error, and what `replay` makes of them."""

  def __init__(self, seed: int, n_steps: int, n_blocks: int, noise: float, n_heads: int = 2, n_group: int = 3):
    rng, shape = np.random.default_rng(seed), (n_steps, n_heads, n_group, n_blocks)
    log_mass = 2 * rng.normal(size=(n_steps, n_heads, 1, n_blocks)) + 0.5 * rng.normal(size=shape)
    tail = rng.normal(size=shape[:3])
    self.count = rng.integers(0, n_blocks + 1, shape[:2]).astype(np.int32)
    self.count[: n_steps // 2] = n_blocks
    exists = np.arange(n_blocks) < self.count[:, :, None]
    scores = np.where(exists, log_mass.mean(2) + noise * rng.normal(size=exists.shape), -np.inf)
    self.ids = np.argsort(-scores, -1)
    log_mass = np.where(exists[:, :, None], log_mass, -np.inf)
    whole = np.logaddexp(np.logaddexp.reduce(log_mass, -1), tail)
    self.tail, self.log_mass = (tail - whole).astype(np.float32), (log_mass - whole[..., None]).astype(np.float32)
    self.group, self.untested = 4, 4

  def stop(self, rule: kernels.StopRule, threshold: float) -> list[np.ndarray]:
    """Blocks read [n, K], the share claimed there and the true one [n, K, G]."""
    program = replay._Program(get_method("mean"), "mean", self.group, 8, rule=rule)
    ranked = replay._Ranked(jnp.asarray(self.ids), jnp.asarray(self.count), None)
    run = jax.jit(functools.partial(replay._stop, program))
    used, claimed, _ = run(threshold, self.untested, ranked, self.log_mass, self.tail)
    read = np.argsort(self.ids, -1) < np.asarray(used)[..., None]
    true = np.exp(self.tail) + np.where(read[:, :, None], np.exp(self.log_mass), 0).sum(-1)
    return [np.asarray(used), np.asarray(claimed), true]

  def expected(self, rule: kernels.StopRule, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Blocks read, and the share claimed there, by loops."""
    used, claimed = np.zeros_like(self.count), np.ones(self.tail.shape)
    for at in np.ndindex(*self.count.shape):
      n = self.count[at]
      masses = np.exp(self.log_mass[at].astype(float))[:, self.ids[at]].T  # [N, G]
      for end in range(self.group, n + self.group, self.group):
        used[at] = min(end, n)
        if end >= n or end <= self.untested:
          continue
        seen = np.exp(self.tail[at].astype(float)) + masses[:end].sum(0)
        claims = seen / (seen + (n - end) * TAKEN_FOR[rule.rest](list(masses[self.untested : end]), self.group))
        if (claims.min() if rule.when == "every_head" else claims.mean()) > threshold:
          claimed[at] = claims
          break
    return used, claimed


@pytest.mark.parametrize("threshold", [0.6, 0.9, 1.0])
@by_rule
def test_replayed_stops_are_those_of_the_definition(rule: kernels.StopRule, threshold: float):
  """Whole groups and not, few blocks and none."""
  masses = Masses(1, 40, 30, noise=1.0)
  used, claimed, _ = masses.stop(rule, threshold)
  expected_used, expected_claims = masses.expected(rule, threshold)
  np.testing.assert_array_equal(used, expected_used)
  np.testing.assert_allclose(claimed, expected_claims, rtol=1e-4)
  assert (used < masses.count).any() == (threshold < 1)


def test_a_threshold_that_means_what_it_says():
  """Of a ranking with errors, PSA's claim breaks its promise in a third of the stops, the mean of two groups seldom."""
  masses, broken, mass = Masses(2, 400, 120, noise=1.5, n_heads=1, n_group=1), {}, {}
  for rest in REST:
    used, _, true = masses.stop(kernels.StopRule(rest), 0.9)
    stopped = used < masses.count
    assert stopped.mean() > 0.5
    broken[rest], mass[rest] = (true[stopped] < 0.9).mean(), true.mean()
  assert broken["least"] > 0.3 and broken["last_two_groups"] < 0.05
  assert broken["least"] > broken["last_group"] > broken["last_two_groups"]
  assert mass["least"] < mass["last_group"] < mass["last_two_groups"]


def test_what_is_told_of_stops():
  """Two steps of two KV heads with two query heads each, one of four blocks that exist in the third pair's step."""
  conf = config("sparse.policy=psa", "sparse.threshold=0.9", block_tokens=8)
  cfg = accuracy.ModelConfig(
    vocab_size=8, d_model=8, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=8, max_context=64, dtype="float32"
  )
  batch = accuracy.Instances(np.zeros((1, 64), np.int32), np.array([32], np.int32), np.ones((1, 2), bool))
  blocks = np.array([[[[2, 4]], [[3, 3]]]])  # of 4: three stops
  mass = np.array([[[[[0.95, 0.88], [1.0, 1.0]]], [[[0.5, 0.8], [0.9, 0.99]]]]], np.float32)
  claimed = np.array([[[[[0.97, 0.93], [1.0, 1.0]]], [[[0.95, 0.95], [0.91, 0.95]]]]], np.float32)
  found = replay.Replay(
    np.zeros((1, 2)), np.ones((1, 2), bool), np.ones((1, 2)), blocks, mass, 0 * mass, claimed, claimed - mass, None
  )
  model = accuracy.Model(cfg, None, accuracy.Tokenizer, (), "none")  # pyright: ignore
  told = {}
  for when in WHEN:
    case = accuracy.Case("psa", 0.9, override(conf, [f"sparse.stop_when={when}"]))
    of = accuracy.summary(model, case, batch, found)
    told[when] = [int(of[key][0]) for key in ("pairs", "stopped", "short", "stops", "broken")]
    np.testing.assert_allclose(of["claimed"], (0.97 + 0.93 + 0.95 + 0.95 + 0.91 + 0.95) / 6, rtol=1e-6)
    np.testing.assert_allclose(of["true"], (0.95 + 0.88 + 0.5 + 0.8 + 0.9 + 0.99) / 6, rtol=1e-6)
  # 0.88 breaks the promise of the first stop, though not that of its heads' mean, which is 0.915.
  assert told == {"every_head": [8, 6, 3, 3, 2], "mean_of_heads": [8, 6, 3, 3, 1]}
