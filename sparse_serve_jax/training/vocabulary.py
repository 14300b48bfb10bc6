"""The reference model's own tokenizer: byte-level BPE over the text that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sparse_serve_jax import tasks
from sparse_serve_jax.models.tokenizer import FileTokenizer
from sparse_serve_jax.tasks import text

BEGIN, END = "<begin>", "<end>"


def train_tokenizer(vocab_size: int, seed: int = 0, n_documents: int = 400) -> FileTokenizer:
  """A tokenizer of `vocab_size` tokens: bytes and their merges within words, digits one by one, line breaks apart.

  The same arguments give the same tokenizer.
  """
  core = tokenizers.Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(r"\n| ?[0-9]"), "isolated"),  # " 4" is a token of its own, then digits
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  core.decoder = decoders.ByteLevel()
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
  )
  core.train_from_iterator(_documents(seed, n_documents), trainer)
  core.post_processor = processors.TemplateProcessing(
    single=f"{BEGIN} $A", special_tokens=[(BEGIN, core.token_to_id(BEGIN))]
  )
  if (made := core.get_vocab_size()) != vocab_size:
    raise ValueError(f"{vocab_size=}, but the text has merges for only {made}")
  return FileTokenizer(core, None, {"bos_token": BEGIN, "eos_token": END})


def _documents(seed: int, n: int) -> Iterator[str]:
  """Ordinary text and every task in turns."""
  names = sorted(tasks.TASKS)
  for i in range(n):
    yield text.document(np.random.default_rng([seed, i]), 2000)
    yield tasks.make(names[i % len(names)], 1000, i, _Words(), split="train").text


class _Words:
  """Measures text before there is a tokenizer."""

  def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
    return [0] * (len(text) // 4)
