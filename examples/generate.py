"""Questions about long texts, answered by the reference model; then a few samples of one prompt, with probabilities.

python examples/generate.py [MODEL]
"""

from __future__ import annotations

import math
import sys

from sparse_serve_jax import LLM, RequestOutput, SamplingParams, tasks

MEMORY = {"cache.hbm_bytes": "64MiB", "cache.dram_bytes": "256MiB", "scheduler.max_context": 4096}


def main(model: str = "models/reference", *, prompt_tokens: int = 2000) -> list[RequestOutput]:
  llm = LLM(model, config="psa", overrides=MEMORY)

  # Two texts, in one batch. A list of token ids would do as well.
  asked = [tasks.make(name, prompt_tokens, 0, llm.model.tokenizer, split="eval") for name in ("multi_key", "key_value")]
  outputs = llm.generate([of.prompt for of in asked], SamplingParams(max_tokens=24, stop="\n"))
  for of, output in zip(asked, outputs, strict=True):
    print(f"{output.text!r}, right is {of.answers}; {output.usage}, {output.times.total:.2f} s")

  # Three samples of one prompt. Each draws with a seed of its own, so that they can be had again.
  params = SamplingParams(max_tokens=8, n=3, temperature=0.9, top_p=0.95, seed=1, logprobs=0)
  (drawn,) = llm.generate("The lighthouse keeper", params)
  for sample in drawn.samples:
    share = math.exp(sum(token.logprob for token in sample.logprobs or []))
    print(f"{sample.text!r} ends by {sample.finish_reason}, probability {share:.2g}")
  return [*outputs, drawn]


if __name__ == "__main__":
  main(*sys.argv[1:2])
