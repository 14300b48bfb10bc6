"""Generated text of given lengths, for what is measured in time only: those of a trace, all the same, or drawn.

Every output has its length too: a request goes on after the model's EOS tokens.
"""

from __future__ import annotations

import math

import numpy as np

from sparse_serve_jax.tasks import text as texts
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.config import WorkloadConfig
from sparse_serve_jax.workloads.item import Item, Refused, Source
from sparse_serve_jax.workloads.traces import read_trace


def lengths(config: WorkloadConfig) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of the prompts and of the outputs that a workload of trace or text asks for, int64 [requests] each.

  Raises:
    ValueError: a field that the source does not have, one that it needs, or a trace that cannot be read.
  """
  config.refuse("tasks", "chat_template")
  if config.source == "text":
    config.refuse("path")
    asked = (config.limit, config.prompt_tokens, config.max_new_tokens)
    if not all(asked):
      raise ValueError(f"text takes limit, prompt_tokens and max_new_tokens, 1 or more each, got {asked}")
    rng, ends = np.random.default_rng(config.seed), (config.prompt_tokens, config.max_new_tokens)
    prompts, outputs = (rng.integers(math.ceil(n * config.shortest), n, config.limit, endpoint=True) for n in ends)
    return prompts, outputs
  config.refuse("shortest")
  if not config.path:
    raise ValueError("a workload of trace needs path, the file of the trace")
  trace = read_trace(config.path)
  both = ((trace.prompt_tokens, config.prompt_tokens), (trace.output_tokens, config.max_new_tokens))
  prompts, outputs = (np.minimum(n, most or n)[: config.limit or None] for n, most in both)
  return prompts, outputs


def read(config: WorkloadConfig) -> Source:
  """A request for each of `lengths`: its number, so that no two prompts begin alike, and a piece of one long text.

  Raises:
    ValueError: as `lengths` does.
  """
  prompts, outputs = lengths(config)

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    rng = np.random.default_rng(config.seed)
    stream = _stream(rng, 2 * int(prompts.max()), tokenizer)
    begins = rng.integers(len(stream) - prompts + 1).tolist()
    special = tokenizer.encode("")
    made: list[Item | Refused] = []
    for i, (begin, n_prompt, n_output) in enumerate(zip(begins, prompts.tolist(), outputs.tolist(), strict=True)):
      head = np.array(special + tokenizer.encode(f"{i}: ", add_special_tokens=False), np.int32)
      prompt = np.concatenate([head, stream[begin : begin + n_prompt]])[:n_prompt]
      made.append(Item(f"{config.source}-{i}", prompt, n_output, {"ignore_eos": True}))
    return made

  return items


def _stream(rng: np.random.Generator, n: int, tokenizer: Tokenizer) -> np.ndarray:
  """Text of n tokens, int32 [n]."""
  ids: list[int] = []
  while len(ids) < n:  # once, where a word is a token or more
    ids += tokenizer.encode(texts.document(rng, n), add_special_tokens=False)
  return np.array(ids[:n], np.int32)
