"""A selection method of one's own: which blocks a decode step attends to, beside the method of the paper.

  python examples/selection_method.py [MODEL]

docs/extending.md says what a method has to keep. `sparse-serve accuracy --methods=NAME` measures one that is in the
source of the package.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from sparse_serve_jax import LLM, SamplingParams, tasks
from sparse_serve_jax.attention.methods import METHODS, Method

MEMORY = {"cache.hbm_bytes": "64MiB", "cache.dram_bytes": "256MiB", "scheduler.max_context": 4096}


def two_means(keys: jax.Array) -> jax.Array:
  """Digests [..., 2, D] of blocks: the mean key of each half of their S keys [..., S, D]."""
  halves = keys.reshape(*keys.shape[:-2], 2, keys.shape[-2] // 2, keys.shape[-1])
  return halves.mean(-2)


def better_half(q: jax.Array, digests: jax.Array) -> jax.Array:
  """Scores [..., G, N] of N blocks by the better of their halves: queries [..., G, D], digests [..., N, 2, D]."""
  return jnp.einsum("...gd,...ned->...gne", q, digests).max(-1)


METHODS["better_half"] = Method(vectors=2, summarize=two_means, score=better_half)


def main(model: str = "models/reference", *, prompt_tokens: int = 2000, instances: int = 4) -> dict[str, float]:
  """The share of questions that each method answers within a budget of 16 blocks of 32 tokens."""
  right: dict[str, float] = {}
  for method in ("cuboid_mean", "better_half"):
    overrides = MEMORY | {"sparse.method": method, "sparse.token_budget": 512}
    llm = LLM(model, config="sparse_serve", overrides=overrides)
    asked = [
      tasks.make("key_value", prompt_tokens, seed, llm.model.tokenizer, split="eval") for seed in range(instances)
    ]
    outputs = llm.generate([of.prompt for of in asked], SamplingParams(max_tokens=24))
    scores = [tasks.TASKS[of.task].score(output.text, of) for of, output in zip(asked, outputs, strict=True)]
    right[method] = sum(scores) / len(scores)
    print(f"{method}: {right[method]:.0%} right")
  return right


if __name__ == "__main__":
  main(*sys.argv[1:2])
