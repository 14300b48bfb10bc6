"""Logits that are not finite end their own request, and leave no trace for those that use its memory later."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sparse_serve_jax.models import Model
from tests.tiny import config, greedy, new_engine, prompt_of, tiny_model, with_slots

BAD = 95  # a token whose embedding is NaN


def poisoned_model() -> Model:
  model = tiny_model()
  embed = np.array(model.params["embed"])
  embed[BAD] = np.nan
  return dataclasses.replace(model, params=model.params | {"embed": embed})


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("policy", ["topk", "psa"])
def test_a_bad_prompt_among_good_ones(device, policy):
  """Few slots and few pool blocks, so that a bad request's blocks, slots and lane are soon used by good ones."""
  conf = config(f"sparse.policy={policy}", "sparse.threshold=1.0", "cache.dram_bytes=256KiB", "cache.lanes=3")
  engine = new_engine(with_slots(conf, 24, tiny_model()), poisoned_model())
  good = [[token % BAD for token in prompt_of(n, seed=n)] for n in (61, 40, 70, 33, 52, 47)]
  requests = []
  for i, prompt in enumerate(good):
    requests.append(engine.add_request(prompt, 12))
    bad = [*prompt_of(30 + i, seed=i), BAD, 1, 2]
    requests.append(engine.add_request(bad, 12, temperature=0.7 * (i % 2)))
  engine.run()
  for request in requests[1::2]:
    assert request.finish_reason == "error" and isinstance(request.error, FloatingPointError)
    assert request.output_tokens == []
  for request, prompt in zip(requests[::2], good, strict=True):
    expected = greedy("gqa2", tuple(prompt), 12)
    bad_at = expected.index(BAD) + 1 if BAD in expected else 12  # it may say the bad token itself
    assert request.output_tokens == expected[:bad_at]
    assert request.finish_reason == ("length" if bad_at == 12 else "error")


def test_weights_that_are_not_finite_end_every_request_at_once():
  model = tiny_model()
  down = np.array(model.params["layers"]["w_down"])
  down[1, 3, 4] = np.nan
  layers = model.params["layers"] | {"w_down": down}
  engine = new_engine(config(), dataclasses.replace(model, params=model.params | {"layers": layers}))
  requests = [engine.add_request(prompt_of(20, seed=i), 8) for i in range(3)]
  engine.run()
  assert [(request.finish_reason, request.output_tokens) for request in requests] == [("error", [])] * 3
  assert str(requests[0].error) == "logits after 20 tokens are not finite"
