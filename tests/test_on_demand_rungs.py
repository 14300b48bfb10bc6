"""Pool blocks on demand on every rung of the ladder: float32 tokens are those of blocks in reserve."""

from __future__ import annotations

import pytest

from sparse_serve_jax.config import EngineConfig, override
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.serving import scheduler
from tests.tiny import check_nothing_is_held, config, new_engine, prompt_of, tiny_model

N = 40  # output tokens: five blocks of 8
PROMPTS = [prompt_of(n, seed=n) for n in (60, 41, 50, 20)]
RUNGS = {
  "dense": ["sparse.policy=dense", "cache.offload=false", "scheduler.prefill=chunked", "scheduler.chunk_tokens=64"],
  "sparse": ["sparse.token_budget=40", "cache.offload=false"],
  "sparse_serve": ["sparse.token_budget=40", "cache.save=staged", "scheduler.max_inject_tokens=64"],
  "psa": ["sparse.policy=psa", "sparse.threshold=0.8", "sparse.group_blocks=2"],
}


def with_pool(conf: EngineConfig, n_blocks: int) -> EngineConfig:
  """With so many blocks in the pool."""
  cfg = tiny_model().config
  key = "dram_bytes" if conf.cache.offload else "hbm_bytes"
  low, high = 1, 1 << 22
  while low < high:
    middle = (low + high) // 2
    try:
      n = CacheShape.of(cfg, override(conf, [f"cache.{key}={middle}"]), 2).M
    except ValueError:
      n = 0
    low, high = (middle + 1, high) if n < n_blocks else (low, middle)
  return override(conf, [f"cache.{key}={low}"])


@pytest.mark.parametrize("rung", RUNGS)
def test_tokens_and_logprobs_are_those_of_blocks_in_reserve(rung: str, monkeypatch: pytest.MonkeyPatch):
  """Greedy and drawn ones, each handed out once."""
  monkeypatch.setattr(scheduler, "GRACE_BLOCKS", 1)  # the pool is small
  full = with_pool(config("scheduler.batch_control=none", "scheduler.max_context=104", *RUNGS[rung]), 30)

  def served(of: EngineConfig):
    engine = new_engine(of, tiny_model())
    heard: list[list[int]] = [[] for _ in PROMPTS]
    requests = [
      engine.add_request(
        prompt, N, temperature=float(i == 1), seed=7, logprobs=1, on_token=lambda _, token, i=i: heard[i].append(token)
      )
      for i, prompt in enumerate(PROMPTS)
    ]
    engine.run()
    assert heard == [each.output_tokens for each in requests]
    check_nothing_is_held(engine)
    return requests

  roomy, pressed = served(full), served(override(full, ["scheduler.reserve=on_demand"]))
  assert [each.output_tokens for each in pressed] == [each.output_tokens for each in roomy]
  for one, other in zip(pressed, roomy, strict=True):
    assert [t.logprob for t in one.logprobs] == pytest.approx([t.logprob for t in other.logprobs], abs=1e-4)
  assert sum(each.preemptions for each in pressed) >= 2 and not any(each.preemptions for each in roomy)
