"""A conversation of several turns, and two conversations at once.

  python examples/chat.py [MODEL]

Give it a model with a chat template; without one it runs a model of random weights, whose answers are noise.
"""

from __future__ import annotations

import sys

from sparse_serve_jax import LLM, SamplingParams

MEMORY = {"cache.hbm_bytes": "64MiB", "cache.dram_bytes": "256MiB", "scheduler.max_context": 1024}


def main(model: str = "random:tiny") -> list[dict[str, str]]:
  llm = LLM(model, overrides=MEMORY)
  params = SamplingParams(max_tokens=40, temperature=0.7)

  messages = [{"role": "system", "content": "You answer in one sentence."}]
  for question in ("Why is the sky blue?", "And at sunset?"):
    messages.append({"role": "user", "content": question})
    output = llm.chat(messages, params)
    messages.append({"role": "assistant", "content": output.text})
    print(f"{question}\n  {output.text!r}")

  # A list of conversations runs in one batch and gives a list of outputs.
  questions = ("What is a heron?", "What is a pier?")
  for output in llm.chat([[{"role": "user", "content": question}] for question in questions], params):
    print(f"  {output.text!r}")
  return messages


if __name__ == "__main__":
  main(*sys.argv[1:2])
