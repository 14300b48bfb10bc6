"""Tasks that need the whole of a long context, generated: the families of RULER (arXiv 2404.06654) and a few more.

A model can be trained on them (`split="train"`) and then measured (`split="eval"`): the two never share a seed. What is
asked for stands at a depth uniform over the context.

text, content -> families -> TASKS: ordinary text and what is hidden in it; contexts and questions; instances and scores
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import re
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np

from sparse_serve_jax.tasks import content, families
from sparse_serve_jax.tasks import text as texts
from sparse_serve_jax.tasks.families import Asked, Draft, Family
from sparse_serve_jax.tokenizing import Encoder


@dataclasses.dataclass(frozen=True)
class Instance:
  """One prompt and what to answer."""

  task: str
  prompt: str
  completion: str  # what a perfect model writes after the prompt; ends with a newline, where generation may stop
  answers: tuple[str, ...]  # the values that are scored
  depths: tuple[float, ...]  # where in the context each needle begins, in [0, 1]; empty where the answer has no place
  n_tokens: int  # of prompt and completion together
  max_new_tokens: int  # of the completion
  more: tuple[tuple[str, str], ...] = ()  # what comes after the completion: further questions, each with its completion

  @property
  def text(self) -> str:
    """Prompt and completion."""
    return self.prompt + self.completion

  def encode(self, tokenizer: Encoder) -> tuple[list[int], int]:
    """By `tokenizer`: the tokens of `text`, and with how many of them those of the prompt alone agree.

    The completion is not encoded by itself: some tokenizers write a space before whatever they are given.
    """
    whole, alone = tokenizer.encode(self.text), tokenizer.encode(self.prompt)
    differ = (i for i, (ours, other) in enumerate(zip(whole, alone, strict=False)) if ours != other)
    return whole, next(differ, min(len(whole), len(alone)))


@dataclasses.dataclass(frozen=True)
class Task:
  """A family of instances. Accuracies are reported by `group`."""

  name: str
  group: Literal["retrieval", "global", "long_output"]
  family: Family
  score: Callable[[str, Instance], float]  # of a prediction: 1 is perfect, 0 is wrong or empty
  min_units: int = 1


def make(
  task: str,
  length: int,
  seed: int,
  tokenizer: Encoder,
  *,
  split: Literal["train", "eval"],
  text: texts.Text = texts.sentences,
  n_more: int = 0,
) -> Instance:
  """Makes an instance. What is made depends on nothing but the arguments.

  Args:
    task: a name in TASKS.
    length: tokens of prompt and completion together, at most; no more is left than 2 % or one unit of the content (a
      sentence, a line).
    seed: not negative.
    tokenizer: measures lengths, special tokens included.
    split: "train" or "eval", which share no instance.
    text: makes the ordinary text between needles.
    n_more: further questions about the same context, at most; they are beyond `length`, and some tasks have none.

  Raises:
    ValueError: no such task or split, a negative seed, or a length that even the smallest instance exceeds.
  """
  if task not in TASKS:
    raise ValueError(f"there is no task {task!r}, only {sorted(TASKS)}")
  if split not in ("train", "eval"):
    raise ValueError(f'split is "train" or "eval", got {split!r}')
  if length < 1 or seed < 0:
    raise ValueError(f"a length is 1 token or more and a seed not negative, got {length=}, {seed=}")
  entropy = [("train", "eval").index(split), zlib.crc32(task.encode()), length, seed]
  write = TASKS[task].family(np.random.default_rng(entropy), text)
  (context, asked), first, n_tokens = _fit(task, write, length, tokenizer)
  n_completion = len(tokenizer.encode(first.completion)) - len(tokenizer.encode(""))
  more = tuple((other.prompt, other.completion) for other in itertools.islice(asked, n_more))
  return Instance(task, f"{context}\n{first.prompt}", *first[1:], n_tokens, n_completion, more)


def _fit(task: str, write: Callable[[int], Draft], length: int, tokenizer: Encoder) -> tuple[Draft, Asked, int]:
  """Finds how many units of content fit: two samples give the tokens of a unit, then a bracketed secant search.

  Of all these about two are texts of full length.
  """

  def measured(n: int) -> tuple[tuple[Draft, Asked], int]:
    draft = write(n)
    first = next(draft.asked)
    return (draft, first), len(tokenizer.encode(f"{draft.context}\n{first.prompt}{first.completion}"))

  fits = TASKS[task].min_units
  best, used = measured(fits)
  if used > length:
    raise ValueError(f"{task} takes at least {used} tokens with this tokenizer and seed, got {length=}")
  sample = max(8, length // 64)
  per_unit = max(1.0, (measured(fits + sample)[1] - used) / sample)
  too_many = length + 1  # a unit is a token or more
  while too_many - fits > 1 and length - used > 0.02 * length:
    n = fits + round((0.99 * length - used) / per_unit)
    n = min(max(n, fits + 1), too_many - 1)
    draft, tokens = measured(n)
    per_unit = max(1.0, (tokens - used) / (n - fits))
    if tokens <= length:
      best, used, fits = draft, tokens, n
    else:
      too_many = n
  return *best, used


def _answer(prediction: str) -> str:
  """Up to the first newline or the end of the first sentence."""
  return re.split(r"\n|[.!?](?=\s|$)", prediction.strip(), maxsplit=1)[0].strip()


def _exact(prediction: str, instance: Instance) -> float:
  return float(_answer(prediction) == instance.answers[0])


def _found(prediction: str, instance: Instance) -> float:
  """The fraction of the answers that are among the words of the prediction."""
  words = set(re.split(r"[,\s]+", _answer(prediction)))
  return sum(answer in words for answer in instance.answers) / len(instance.answers)


def _in_order(prediction: str, instance: Instance) -> float:
  """The longest common subsequence with the answers, all different, as a fraction of them."""
  place = {answer: i for i, answer in enumerate(instance.answers)}
  ends: list[int] = []  # ends[k]: the first place at which k + 1 answers in order can end
  for word in re.split(r"[,\s]+", _answer(prediction)):
    if word in place:
      k = bisect.bisect_left(ends, place[word])
      ends[k : k + 1] = [place[word]]
  return len(ends) / len(place)


TASKS: dict[str, Task] = {
  task.name: task
  for task in (
    Task("single_noise", "retrieval", families.codes(haystack=content.noise), _exact),
    Task("single_text", "retrieval", families.codes(), _exact),
    Task("single_uuid", "retrieval", families.codes(values=content.uuids), _exact),
    Task("multi_key", "retrieval", families.codes(every=2), _exact),
    Task("multi_value", "retrieval", families.codes(n_values=4, every=4), _found),
    Task("multi_query", "retrieval", families.codes(n_keys=4, every=4), _found),
    Task("key_value", "retrieval", families.pairs(content.things, content.numbers), _exact),
    Task("key_value_uuid", "retrieval", families.pairs(content.uuids, content.uuids), _exact),
    Task("variable_tracking", "retrieval", families.variables, _found),
    Task("question", "retrieval", families.questions, _exact),
    Task("question_two_hops", "retrieval", families.two_hops, _exact),
    Task("copy", "retrieval", families.copy, _found, min_units=20),
    Task("classification", "retrieval", families.classification, _exact),
    Task("common_words", "global", families.common, _found, min_units=40),
    Task("frequent_words", "global", families.frequent, _found, min_units=40),
    Task("count", "global", families.count, _exact),
    Task("recite", "long_output", families.recite, _in_order),
    Task("renumber", "long_output", families.renumber, _in_order),
  )
}
