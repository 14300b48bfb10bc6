"""Log probabilities beside the tokens of an engine: those of a forward pass over the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.tiny import config, logits_after, prompt_of, tiny_model

N = 6
PROMPT = prompt_of(37, seed=37)


def log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


@pytest.fixture(scope="module")
def executor() -> JaxExecutor:
  return JaxExecutor(config(), tiny_model())


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 5, "seed": 3}])
def test_they_are_those_of_the_model(executor, options):
  """Of what is drawn too: before temperature and cuts. Requests beside it keep their tokens."""
  engine = Engine(executor)
  told = engine.add_request(PROMPT, N, logprobs=3, ignore_eos=True, **options)
  plain = engine.add_request(PROMPT, N, ignore_eos=True, **options)
  engine.run()
  assert told.output_tokens == plain.output_tokens and not plain.logprobs
  assert len(told.logprobs) == len(told.output_tokens) == N
  for i, (token, of) in enumerate(zip(told.output_tokens, told.logprobs, strict=True)):
    expected = log_softmax(logits_after("gqa2", PROMPT + told.output_tokens[:i]))
    assert abs(of.logprob - expected[token]) < 1e-4
    assert list(of.top) == np.argsort(-expected)[:3].tolist()
    np.testing.assert_allclose(list(of.top.values()), np.sort(expected)[::-1][:3], atol=1e-4)


def test_none_of_the_most_likely_need_be_listed(executor):
  engine = Engine(executor)
  request = engine.add_request(PROMPT, N, logprobs=0)
  engine.run()
  assert [of.top for of in request.logprobs] == [{}] * N and all(of.logprob < 0 for of in request.logprobs)


def test_greedy_programs_are_not_touched(executor):
  """What asks for log probabilities has programs of its own, which others do not wait for."""
  engine = Engine(executor)
  before = executor.programs.decode._cache_size()
  engine.add_request(PROMPT, N)
  engine.run()
  engine.add_request(PROMPT, N, logprobs=1)
  engine.run()
  after = executor.programs.decode._cache_size()
  engine.add_request(PROMPT, N)
  engine.run()
  assert executor.programs.decode._cache_size() == after <= before + 2
