"""Generated tasks as prompts to serve: those that the reference model was trained on."""

from __future__ import annotations

import numpy as np

from sparse_serve_jax import tasks
from sparse_serve_jax.tokenizing import Tokenizer
from sparse_serve_jax.workloads.config import WorkloadConfig
from sparse_serve_jax.workloads.item import Item, Refused, Source, check_room

MOST = 1 << 20  # prompts of a seed


def read(config: WorkloadConfig) -> Source:
  """`config.limit` instances of `config.tasks` in turns, by default of single_text.

  Raises:
    ValueError: a task that there is not, or a number of prompts or tokens that is not given.
  """
  config.refuse("path", "chat_template", "strict", "shortest")
  if not (0 < config.limit <= MOST and config.prompt_tokens > 0):
    raise ValueError(
      f"needle takes limit, 1 to {MOST} prompts, and prompt_tokens, got limit={config.limit} and "
      f"prompt_tokens={config.prompt_tokens}"
    )
  names = config.tasks or ("single_text",)
  if unknown := [name for name in names if name not in tasks.TASKS]:
    raise ValueError(f"there is no task {unknown[0]!r}, only {sorted(tasks.TASKS)}")

  def items(tokenizer: Tokenizer, max_request_tokens: int) -> list[Item | Refused]:
    check_room(config.prompt_tokens, max_request_tokens)
    return [_item(config, names[i % len(names)], i, tokenizer) for i in range(config.limit)]

  return items


def _item(config: WorkloadConfig, task: str, i: int, tokenizer: Tokenizer) -> Item:
  made = tasks.make(task, config.prompt_tokens, config.seed * MOST + i, tokenizer, split="eval")

  def judge(answer: str) -> float:
    return tasks.TASKS[task].score(answer, made)

  return Item(
    f"needle-{i}",
    np.array(tokenizer.encode(made.prompt), np.int32),
    config.max_new_tokens or made.max_new_tokens,
    judge=judge,
    about={"task": task, "answers": list(made.answers)},
    answer_tokens=len(tokenizer.encode(made.completion, add_special_tokens=False)),
  )
