"""Text as it is made: whole characters, never taken back, up to a stop string.

python examples/stream.py [MODEL]
"""

from __future__ import annotations

import sys

from sparse_serve_jax import LLM, Detokenizer, SamplingParams
from sparse_serve_jax.serving.request import Request

MEMORY = {"cache.hbm_bytes": "64MiB", "cache.dram_bytes": "256MiB", "scheduler.max_context": 1024}


def main(model: str = "models/reference") -> list[str]:
  llm = LLM(model, overrides=MEMORY)
  prompt, params = "The lighthouse keeper climbs", SamplingParams(max_tokens=40, stop=["\n\n"])

  stream, pieces = llm.stream(prompt, params), list[str]()
  for piece in stream:
    pieces.append(piece)
    print(piece, end="", flush=True)
  print(f"\n{stream.output.finish_reason}, {stream.output.usage}")

  # `generate` hands out tokens of many prompts; a Detokenizer for each makes text of them.
  texts = [Detokenizer(llm.model.tokenizer) for _ in range(2)]

  def on_token(request: Request, token: int) -> None:
    i = int(request.id.removeprefix("text-"))  # the prompt's number
    print(f"{request.id}: {texts[i].push(token)!r}")

  llm.generate([prompt, "Ships pass"], params, on_token=on_token)
  return pieces


if __name__ == "__main__":
  main(*sys.argv[1:2])
