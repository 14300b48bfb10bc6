"""Generated text of given lengths, for what is measured in time only: those of a trace, all the same, or drawn.

Every output has its length too: a request goes on after the model's EOS tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_serve_jax.tasks import text as texts
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.config import WorkloadConfig
from sparse_serve_jax.workloads.item import Item, Refused, Source, check_room
from sparse_serve_jax.workloads.traces import HASH_TOKENS, read_trace


class Lengths(NamedTuple):
  """What a workload of trace or text asks for."""

  prompt_tokens: np.ndarray  # int64 [requests]
  output_tokens: np.ndarray  # int64 [requests]
  hash_ids: Sequence[np.ndarray] | None = None  # of each prompt's blocks of HASH_TOKENS, if the trace has them


def lengths(config: WorkloadConfig) -> Lengths:
  """The lengths of a workload's requests, and which of their prompts begin alike.

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
    return Lengths(prompts, outputs)
  config.refuse("shortest")
  if not config.path:
    raise ValueError("a workload of trace needs path, the file of the trace")
  trace = read_trace(config.path)
  both = ((trace.prompt_tokens, config.prompt_tokens), (trace.output_tokens, config.max_new_tokens))
  prompts, outputs = (np.minimum(n, most or n)[: config.limit or None] for n, most in both)
  return Lengths(prompts, outputs, trace.hash_ids)


def read(config: WorkloadConfig) -> Source:
  """A request for each of `lengths`: a piece of one long text after the request's number, so that no two prompts begin
  alike. Where a trace has ids of blocks, a piece after each of these.

  Raises:
    ValueError: as `lengths` does.
  """
  asked = lengths(config)

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    check_room(int(asked.prompt_tokens.min()), max_request_tokens)
    longest = int(asked.prompt_tokens.max()) if asked.hash_ids is None else HASH_TOKENS
    stream = _stream(np.random.default_rng(config.seed), 2 * longest, tokenizer)
    special = np.array(tokenizer.encode(""), np.int32)

    def piece(number: int, n: int) -> np.ndarray:
      begin = np.random.default_rng((config.seed, number)).integers(len(stream) - n + 1)
      head = np.array(tokenizer.encode(f"{number}: ", add_special_tokens=False), np.int32)
      return np.concatenate([head, stream[begin : begin + n]])[:n]

    made: list[Item | Refused] = []
    for i, (n_prompt, n_output) in enumerate(zip(asked.prompt_tokens, asked.output_tokens, strict=True)):
      numbers, size = ([i], n_prompt) if asked.hash_ids is None else (asked.hash_ids[i], HASH_TOKENS)
      numbers = numbers[: -(-n_prompt // size)]  # of a prompt that is cut
      prompt = np.concatenate([special, *(piece(int(number), int(size)) for number in numbers)])[:n_prompt]
      made.append(Item(f"{config.source}-{i}", prompt, int(n_output), {"ignore_eos": True}))
    return made

  return items


def _stream(rng: np.random.Generator, n: int, tokenizer: Tokenizer) -> np.ndarray:
  """Text of n tokens, int32 [n]."""
  ids: list[int] = []
  while len(ids) < n:  # once, where a word is a token or more
    ids += tokenizer.encode(texts.document(rng, n), add_special_tokens=False)
  return np.array(ids[:n], np.int32)
