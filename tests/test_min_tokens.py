"""A request's first tokens are no stop tokens: the tokens are those of an oracle without a cache, whose logits lose
them.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax.models.sampling import sample
from sparse_serve_jax.serving.plan import Plan
from tests.tiny import config, greedy, logits_after, new_engine, prompt_of, tiny_model

N = 10
PROMPTS = [prompt_of(n, seed=n) for n in (150, 37, 96, 7)]
TEMPERATURE, TOP_P, SEED = 1.5, 0.9, 11
CPU_AND_GPU = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])


def oracle(prompt: list[int], stops: list[int], min_tokens: int, temperature: float = 0.0) -> list[int]:
  """What comes before the first stop token."""
  ids = list(prompt)
  while len(ids) < len(prompt) + N:
    logits = logits_after("gqa2", ids)
    if len(ids) - len(prompt) < min_tokens:
      logits[stops] = -np.inf
    token = drawn(logits, len(ids)) if temperature else int(logits.argmax())
    if token in stops:
      break
    ids.append(token)
  return ids[len(prompt) :]


def drawn(logits: np.ndarray, position: int) -> int:
  row = np.full(1, TEMPERATURE, np.float32), np.full(1, TOP_P, np.float32), np.full(1, SEED, np.uint32)
  row = *row, np.zeros(1, np.int32), np.zeros(1, np.float32)
  return int(sample(jnp.asarray(logits[None]), jnp.full(1, position), *map(jnp.asarray, row))[0])


def likely(prompt: list[int], n: int) -> list[int]:
  """The n most likely first tokens."""
  return np.argsort(-logits_after("gqa2", prompt))[:n].tolist()


@CPU_AND_GPU
@pytest.mark.parametrize(
  "pieces",
  [
    "scheduler.max_inject_tokens=0",  # whole prompts
    "scheduler.max_inject_tokens=160",  # one layer of the longest prompt an iteration
    "scheduler.max_inject_tokens=16",  # not even one: chunks within a layer
    "scheduler.prefill=chunked",
  ],
)
def test_the_first_token_is_the_best_that_does_not_stop(device, pieces):
  """Whatever the pieces of the prompt; and every decode step is the greedy program's."""
  plans: list[Plan] = []
  conf = config(pieces, "scheduler.chunk_tokens=16")
  engine = new_engine(conf, tiny_model(), observer=lambda seen: plans.append(seen.plan))
  banned = [likely(prompt, n) for prompt, n in zip(PROMPTS, (1, 2, 3, 8), strict=True)]
  requests = [engine.add_request(p, N, stop_token_ids=b, min_tokens=1) for p, b in zip(PROMPTS, banned, strict=True)]
  stopped = engine.add_request(PROMPTS[1], N, stop_token_ids=banned[1])
  engine.run()
  for prompt, stops, request in zip(PROMPTS, banned, requests, strict=True):
    assert request.output_tokens == oracle(prompt, stops, 1)
    assert request.output_tokens[0] == likely(prompt, len(stops) + 1)[-1]
  assert (stopped.output_tokens, stopped.finish_reason) == ([], "stop")
  assert all(row.sampling.plain for plan in plans for row in plan.decode)


@CPU_AND_GPU
@pytest.mark.parametrize("min_tokens", [1, 4, N])
@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE])
def test_so_many_tokens_before_a_stop(device, min_tokens, temperature):
  """Greedy or drawn, beside rows that ban nothing. The stop tokens are what would come without them."""
  engine = new_engine(config(), tiny_model())
  banned = [sorted({*oracle(prompt, [], 0, temperature)[:8]}) for prompt in PROMPTS]
  options = {"temperature": temperature, "top_p": TOP_P, "seed": SEED}
  requests = []
  for prompt, stops in zip(PROMPTS, banned, strict=True):
    requests.append(engine.add_request(prompt, N, stop_token_ids=stops, min_tokens=min_tokens, **options))
    requests.append(engine.add_request(prompt, N))
  engine.run()
  for prompt, stops, request, other in zip(PROMPTS, banned, requests[::2], requests[1::2], strict=True):
    expected = oracle(prompt, stops, min_tokens, temperature)
    assert request.output_tokens == expected and min_tokens <= len(expected)
    assert not {*expected[:min_tokens]} & {*stops}
    assert other.output_tokens == greedy("gqa2", tuple(prompt), N)
