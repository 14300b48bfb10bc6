"""Replayed decode steps are the engine's: the same tokens from the same blocks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import StopRule
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.evaluation import replay as replays
from sparse_serve_jax.evaluation.accuracy import TOLERANCE
from tests.tiny import config, new_engine, often, prompt_of, tiny_model

S, N_NEW, LENGTHS = 8, 20, (150, 93, 201)
POLICIES = {
  "dense": ["sparse.policy=dense"],
  "topk": ["sparse.policy=topk", "sparse.token_budget=48"],
  "topk, first layer dense": ["sparse.policy=topk", "sparse.token_budget=48", "sparse.dense_layers=1"],
  "min-max, best head": ["sparse.token_budget=56", "sparse.method=min_max", "sparse.group_reduce=max"],
  "psa": ["sparse.policy=psa", "sparse.threshold=0.6", "sparse.group_blocks=2"],
  "psa, last two groups": [
    *("sparse.policy=psa", "sparse.threshold=0.55", "sparse.group_blocks=2", "sparse.rest=last_two_groups"),
  ],
  "psa, last group, mean of heads": [
    *("sparse.policy=psa", "sparse.threshold=0.6", "sparse.group_blocks=2", "sparse.rest=last_group"),
    "sparse.stop_when=mean_of_heads",
  ],
  "top-p within a budget": ["sparse.token_budget=96", "sparse.method=top_p"],
  "psa of mean": ["sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=4", "sparse.method=mean"],
}


def replayed(
  shape: str, conf, sequences: list[list[int]], starts: list[int], n: int, claims: str = "rule"
) -> replays.Replay:
  model, width = tiny_model(shape), 256
  tokens = np.zeros((len(sequences), width), np.int32)
  for row, ids in zip(tokens, sequences, strict=True):
    row[: len(ids)] = ids
  dense = replays.prefill(model.config, model.params, tokens)
  start = np.array(starts, np.int32)
  return replays.replay(model.config, model.params, conf, dense, start, n, claims=claims)


@pytest.mark.parametrize(
  "policy",
  often(
    POLICIES,
    *("topk, first layer dense", "min-max, best head"),
    *("psa, last two groups", "psa, last group, mean of heads", "psa of mean", "top-p within a budget"),
  ),
)
def test_the_engines_tokens_and_blocks(policy: str):
  """A step's input is the token before, so n new tokens are n - 1 steps after the prefill."""
  shape = "mha-qknorm" if policy == "psa of mean" else "gqa2"
  conf = config(*POLICIES[policy], "cache.hbm_bytes=8MiB", block_tokens=S)
  engine = new_engine(conf, tiny_model(shape))
  requests = [engine.add_request(prompt_of(n, n), N_NEW) for n in LENGTHS]
  engine.run()
  sequences = [[*prompt_of(n, n), *request.output_tokens] for n, request in zip(LENGTHS, requests, strict=True)]
  found = replayed(shape, conf, sequences, list(LENGTHS), N_NEW - 1)
  assert np.asarray(found.right).all()
  assert int(found.blocks.sum()) == engine.usage.blocks_attended
  assert (np.asarray(found.selected).sum(-1) == np.asarray(found.blocks)).all()
  mass = np.asarray(found.mass)
  assert (mass > 0).all() and (mass < 1 + 1e-5).all()
  if policy == "dense":
    np.testing.assert_allclose(mass, 1, rtol=1e-5)
  else:
    assert mass.min() < 0.95


class Attention:
  """A layer of 8 steps over 192 keys in bunches around a centre a block, so that a bound can be near and a stop early.

  `spread` is that of a bunch, `sharpness` scales the logits.
  """

  def __init__(self, seed: int, spread: float, sharpness: float, dtype=jnp.float32):
    rng, (n, n_heads, n_group, depth, n_tokens) = np.random.default_rng(seed), (8, 2, 2, 16, 192)
    centres = np.repeat(rng.normal(size=(n_tokens // S, n_heads, depth)), S, 0)
    self.keys = jnp.asarray(centres + spread * rng.normal(size=(n_tokens, n_heads, depth)), dtype)
    self.values = jnp.asarray(rng.normal(size=self.keys.shape), dtype)
    self.q = jnp.asarray(sharpness * rng.normal(size=(n, n_heads, n_group, depth)), dtype)
    self.positions = jnp.arange(n_tokens - n, n_tokens, dtype=jnp.int32)

  def run(
    self, threshold: float, *changes: str, method: str = "min_max", claims: str = "certified"
  ) -> list[np.ndarray]:
    """Blocks read, mass, error, estimate, excess; selected."""
    conf = config("sparse.policy=psa", f"sparse.threshold={threshold}", *changes, block_tokens=S)
    program = replays._Program(get_method(method), "mean", 2, S, claims, StopRule(conf.sparse.rest))
    setting = replays._Setting.of(conf)
    at = self.q, self.keys, self.values, self.positions
    return [np.asarray(x) for x in replays._attend(program, setting, jnp.int32(0), *at)[1]]


@given(
  seed=st.integers(0, 1 << 30),
  spread=st.sampled_from([0.0, 0.01, 0.3, 3.0]),
  sharpness=st.sampled_from([0.1, 2.0, 30.0, 300.0]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_the_certified_share_is_a_lower_bound(seed: int, spread: float, sharpness: float, dtype):
  """Also in bf16: a block's largest and smallest keys are keys, so that their digest is exact in the keys' dtype."""
  used, mass, _, estimate, excess, selected = Attention(seed, spread, sharpness, dtype).run(0.8)
  assert excess.max() <= TOLERANCE
  assert (estimate <= mass + TOLERANCE).all()
  n_blocks = (np.arange(184, 192) // S)[:, None]
  assert ((estimate > 0.8 - 1e-6).all(-1) | (used == n_blocks)).all()
  assert (selected.sum(-1) == used).all()


def test_a_bound_reads_more_than_the_estimate_and_less_than_all():
  attention = Attention(0, spread=0.05, sharpness=3.0)
  certified, estimated = attention.run(0.9), attention.run(0.9, "sparse.rest=least", claims="rule")
  assert estimated[0].mean() < certified[0].mean() < 20  # of 23 or 24
  assert certified[1].min() > 0.9 > estimated[1].min()


def test_a_certified_stop_leaves_out_no_window():
  used, _, _, estimate, *_ = Attention(0, spread=0.05, sharpness=3.0).run(
    0.01, "sparse.sink_tokens=8", "sparse.window_tokens=48"
  )
  assert used.min() == 8 and estimate.min() > 0.01  # 1 + 6 blocks, in groups of two


def test_the_error_of_a_heads_output():
  """Against softmax in numpy, over all that a query may see and over what was selected with the tail."""
  attention = Attention(0, spread=0.3, sharpness=2.0)
  error, selected = (attention.run(0.6, claims="rule")[i] for i in (2, 5))
  keys, values, q = (np.asarray(x, np.float64) for x in (attention.keys, attention.values, attention.q))
  for step, position in enumerate(np.asarray(attention.positions)):
    tail = np.arange(len(keys)) >= position // S * S
    for head, one in np.ndindex(q.shape[1:3]):
      seen = np.repeat(selected[step, head], S) | tail
      outputs = []
      for which in (seen, np.ones_like(seen)):
        which = which & (np.arange(len(keys)) <= position)
        p = np.exp(keys[which, head] @ q[step, head, one] * 16**-0.5)
        outputs.append(p / p.sum() @ values[which, head])
      o, dense = outputs
      expected = np.linalg.norm(o - dense) / np.linalg.norm(dense)
      np.testing.assert_allclose(error[step, head, one], expected, rtol=2e-3, atol=2e-5)
  assert error.max() > 0.05
  assert attention.run(1.0, claims="rule")[2].max() < 1e-6  # nothing is left out


def test_a_stop_that_knows_the_true_mass():
  """It stops after the first group of two at which every head has the share."""
  attention, small = Attention(1, spread=0.3, sharpness=2.0), ("sparse.sink_tokens=8", "sparse.window_tokens=8")
  used, mass, _, estimate, excess, _ = attention.run(0.8, *small, claims="true")
  left = used < (np.arange(184, 192) // S)[:, None]
  assert left.any() and (mass.min(-1)[left] > 0.8).all()
  np.testing.assert_allclose(excess, 0, atol=TOLERANCE)
  np.testing.assert_allclose(estimate, mass, atol=TOLERANCE)
  later = np.unique(used[left & (used > 2)])  # than sink and window
  assert later.size > 0
  for n in later:
    before = attention.run(1.0, *small, f"sparse.token_budget={S * (n - 2)}", "sparse.policy=topk", claims="rule")[1]
    assert before[left & (used == n)].min(-1).max() <= 0.8 + TOLERANCE
  with pytest.raises(ValueError, match="claims='truth' is none of rule, certified, true"):
    replayed("gqa2", config("sparse.policy=psa", block_tokens=S), [prompt_of(99, 0)], [50], 9, claims="truth")


def test_a_wrong_bound_is_noticed():
  """The product with the mean key is below the mean product, and so is its exponential: it bounds from below."""
  excess = Attention(0, spread=0.3, sharpness=3.0).run(0.9, method="mean")[4]
  assert (excess > TOLERANCE).mean() > 0.9


def test_no_violation_in_a_model():
  conf = config("sparse.policy=psa", "sparse.threshold=0.6", "sparse.method=min_max", block_tokens=S)
  found = replayed("gqa4-bias", conf, [prompt_of(n, n) for n in (230, 201)], [150, 140], 60, claims="certified")
  assert np.asarray(found.excess).max() <= TOLERANCE and np.asarray(found.mass).min() > 0.6
  with pytest.raises(ValueError, match="needs the bound that min_max digests give, not cuboid_mean"):
    replayed("gqa2", config("sparse.policy=psa", block_tokens=S), [prompt_of(99, 0)], [50], 9, claims="certified")
