"""Training sequences, each a pure function of a seed: text, generated tasks, and two kinds of exercise in token ids.

A task's context is asked about as often as there is room for: one answer to 16k tokens would teach next to nothing. Of
the exercises a sixth of the tokens and more are answers, so that a model finds the circuits of retrieval early:

  repeat   random tokens in runs, each run again at a later place: copy what followed the last time
  recall   keys and values of random tokens; then the keys again in another order: give the value of each; or the whole
           list once more. A key is of few distinct tokens, so that its last token or two do not tell it, and the same
           tokens follow every key and every value, as marks do in a list
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sparse_serve_jax import processes, tasks
from sparse_serve_jax.models.tokenizer import Tokenizer
from sparse_serve_jax.tasks import text
from sparse_serve_jax.training.config import Sources, TrainConfig

SOURCES = tuple(field.name for field in dataclasses.fields(Sources))
# The answer of a task weighs as much as this share of its sequence's tokens: else a short answer to a long prompt would
# hardly count. A token of it weighs max(1, ANSWER_SHARE n_tokens / n_answer).
ANSWER_SHARE = 0.2
MAX_MORE_SHARE = 0.3  # share of a sequence that is kept for further questions
MIN_MORE_TOKENS = 64  # a question with its answer mostly takes 25 to 40
LIST_SHARE = 0.25  # of what is recalled


class Batch(NamedTuple):
  """Sequences of one length; the weights are those of the tokens that are predicted, tokens[:, 1:]."""

  tokens: np.ndarray  # [B, T + 1] int32
  weights: np.ndarray  # [B, T] float32
  sources: np.ndarray  # [B] int32, indices of SOURCES


def sequence(
  config: TrainConfig, tokenizer: Tokenizer, n_tokens: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
  """Tokens int32 [n_tokens + 1] and weights float32 [n_tokens] of one sequence, padded with weight 0; its source."""
  shares = np.array(dataclasses.astuple(config.sources))
  index = int(rng.choice(len(SOURCES), p=shares / shares.sum()))
  source = SOURCES[index]
  n = n_tokens + 1
  if source in ("repeat", "recall"):
    ids, answer = (_repeat if source == "repeat" else _recall)(rng, n, tokenizer.vocab_size)
  elif source == "text":
    ids = tokenizer.encode(text.document(rng, n))  # a word is a token or more
    ids, answer = np.array(ids[:n]), np.zeros(min(n, len(ids)), bool)
  else:
    ids, answer = _task(rng, n, tokenizer)
  tokens, weights = np.zeros(n, np.int32), np.zeros(n, np.float32)
  tokens[: len(ids)] = ids
  # Random tokens that nothing foretells teach nothing.
  weights[: len(ids)] = np.where(answer, 1.0, 0.0 if source in ("repeat", "recall") else config.context_weight)
  if source == "tasks":
    weights[: len(ids)][answer] *= max(1.0, ANSWER_SHARE * n_tokens / answer.sum())
  return tokens, weights[1:], index


def _repeat(rng: np.random.Generator, n: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """Runs of 8 to 64 random tokens, in random order twice over; all of a second run but its first token is an answer."""
  lengths, total = [], 0
  while total < n // 2:
    lengths.append(min(int(rng.integers(8, 65)), max(2, n // 4)))
    total += lengths[-1]
  runs = [rng.integers(0, vocab, size) for size in lengths]
  order = [*range(len(runs)), *rng.permutation(len(runs))]
  known = [np.arange(len(runs[i])) * (place >= len(runs)) > 0 for place, i in enumerate(order)]
  return np.concatenate([runs[i] for i in order])[:n], np.concatenate(known)[:n]


def _recall(rng: np.random.Generator, n: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of a key and a value, each of 1 to 6 tokens in this sequence; then all of them in the same or another order.

  Up to three tokens, the same in all pairs, follow the key, and others the value.
  """
  n_key, n_value = rng.integers(1, 7, 2).tolist()
  after_key, after_value = (rng.integers(0, vocab, size) for size in rng.integers(0, 4, 2))
  start = n_key + len(after_key)  # of the value
  width = start + n_value + len(after_value)
  n_pairs = max(1, n // 2 // width)
  alphabet = rng.permutation(vocab)
  if n_key == 1:
    n_pairs = min(n_pairs, vocab)
    keys = alphabet[:n_pairs, None]
  else:
    few = alphabet[: max(8, int(2 * n_pairs ** (1 / n_key)))]
    keys = rng.permutation(np.unique(few[rng.integers(len(few), size=(n_pairs, n_key))], axis=0))
    n_pairs = len(keys)

  def each(tokens):
    return np.broadcast_to(tokens, (n_pairs, len(tokens)))

  values = rng.integers(0, vocab, (n_pairs, n_value))
  pairs = np.concatenate([keys, each(after_key), values, each(after_value)], 1)
  known = np.zeros((2, n_pairs, width), bool)
  if rng.random() < LIST_SHARE:
    order = np.arange(n_pairs)
    known[1], known[1, 0, :n_key] = True, False
  else:
    order = rng.permutation(n_pairs)
    known[1, :, start : start + n_value] = True
  return np.concatenate([pairs.ravel(), pairs[order].ravel()])[:n], known.ravel()[:n]


def _task(rng: np.random.Generator, n: int, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
  """A generated task, and as many more questions about its context as n tokens hold."""
  last: ValueError | None = None
  room = int(rng.uniform(0, MAX_MORE_SHARE) * n)
  room = room if room >= MIN_MORE_TOKENS else 0
  for name in rng.permutation(sorted(tasks.TASKS)):
    make = functools.partial(tasks.make, name, seed=int(rng.integers(1 << 31)), tokenizer=tokenizer, split="train")
    try:  # a question with its answer takes ten tokens or more
      instance = make(n - room, n_more=room // 10)
      if room and not instance.more:
        instance = make(n)
    except ValueError as error:  # it takes more tokens
      last = error
      continue
    ids, n_prompt = instance.encode(tokenizer)
    answer = [i >= n_prompt for i in range(len(ids))]
    for question, completion in instance.more:
      asked, answered = (tokenizer.encode(part, add_special_tokens=False) for part in (question, completion))
      if len(ids) + len(asked) + len(answered) > n:
        break
      ids += asked + answered
      answer += [False] * len(asked) + [True] * len(answered)
    return np.array(ids), np.array(answer)
  raise ValueError(f"no task fits {n} tokens") from last


def batch(config: TrainConfig, tokenizer: Tokenizer, step: int) -> Batch:
  """The sequences of a step: a function of configuration, tokenizer and step alone."""
  stage = config.stage_of(step)
  made = [
    sequence(config, tokenizer, stage.tokens, np.random.default_rng([config.seed, step, i]))
    for i in range(stage.sequences)
  ]
  tokens, weights, sources = zip(*made, strict=True)
  return Batch(np.stack(tokens), np.stack(weights), np.array(sources, np.int32))


def batches(config: TrainConfig, tokenizer: Tokenizer, first_step: int, workers: int) -> Iterator[Batch]:
  """The batches of all steps from `first_step` on, made by so many processes ahead of their use; 0: in this one."""
  return processes.ahead(functools.partial(batch, config, tokenizer), range(first_step, config.steps), workers)
