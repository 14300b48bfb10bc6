"""Replayed decode steps are the engine's: the same tokens from the same blocks."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.evaluation import methods
from sparse_serve_jax.evaluation import replay as replays
from tests.tiny import config, new_engine, prompt_of, tiny_model

assert "top_p" in methods.METHODS  # by importing it
S, N_NEW, LENGTHS = 8, 20, (150, 93, 201)
POLICIES = {
  "dense": ["sparse.policy=dense"],
  "topk": ["sparse.policy=topk", "sparse.token_budget=48"],
  "topk, first layer dense": ["sparse.policy=topk", "sparse.token_budget=48", "sparse.dense_layers=1"],
  "min-max, best head": ["sparse.token_budget=56", "sparse.method=min_max", "sparse.group_reduce=max"],
  "psa": ["sparse.policy=psa", "sparse.threshold=0.6", "sparse.group_blocks=2"],
  "top-p within a budget": ["sparse.token_budget=96", "sparse.method=top_p"],
  "psa of mean": ["sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=4", "sparse.method=mean"],
}


def replayed(shape: str, conf, sequences: list[list[int]], starts: list[int], n: int) -> replays.Replay:
  model, width = tiny_model(shape), 256
  tokens = np.zeros((len(sequences), width), np.int32)
  for row, ids in zip(tokens, sequences, strict=True):
    row[: len(ids)] = ids
  dense = replays.prefill(model.config, model.params, tokens)
  program, setting = replays.Program.of(conf), replays.Setting.of(conf)
  return replays.replay(model.config, program, model.params, setting, dense, tokens, np.array(starts, np.int32), n)


@pytest.mark.parametrize("policy", POLICIES)
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
