"""A training run in a folder: tokenizer, checkpoints, metrics and, whenever it stops, the model for others to load."""

from __future__ import annotations

import pathlib
import shutil
import time
from typing import Any

from sparse_serve_jax import progress, results
from sparse_serve_jax.models import Model, save_hf
from sparse_serve_jax.models.tokenizer import Tokenizer, load_tokenizer
from sparse_serve_jax.training import data, trainer
from sparse_serve_jax.training.config import TrainConfig
from sparse_serve_jax.training.vocabulary import END, train_tokenizer

SHARD_BYTES = 15 << 20  # of the weights that are written: files stay below 16 MB


class Run:
  """A run that can stop anywhere.

  Its folder holds run.json, tokenizer/, checkpoints/, metrics.jsonl and hf/, the model as a Hugging Face directory.
  """

  def __init__(self, config: TrainConfig, folder: pathlib.Path, start: Model | None = None):
    """Begins a run, or goes on with the one in the folder.

    Args:
      config: what is trained.
      folder: of the run, which is claimed for it.
      start: a model whose weights and tokenizer a new run begins with.

    Raises:
      ValueError: the folder holds a run of another configuration, or the tokenizer does not fit the vocabulary.
    """
    results.claim(folder, {"config": config}, kept=["checkpoints", "*.jsonl"])
    self._folder, self._tokenizer = folder, _tokenizer(config, folder, start)
    if not 0 < (size := self._tokenizer.vocab_size) <= config.model.vocab_size:
      raise ValueError(f"a tokenizer of {size} tokens for a vocab_size of {config.model.vocab_size}")
    self._metrics = results.Rows(folder / "metrics.jsonl")
    self._trainer = trainer.Trainer(config, folder, start.params if start else None)
    self._config = config

  @staticmethod
  def is_in(folder: pathlib.Path) -> bool:
    """Whether the folder holds a run to go on with."""
    return (folder / "checkpoints").exists()

  @property
  def step(self) -> int:
    return self._trainer.step

  def train(self, seconds: float, workers: int, log_every: int) -> None:
    """Trains to the end, or for so many seconds.

    Args:
      seconds: after which it stops.
      workers: processes that make training sequences; 0: this one does.
      log_every: steps of a row of metrics.jsonl.
    """
    if self.step >= self._config.steps:
      return
    began, seen = time.monotonic(), 0
    with progress.bar(total=self._config.steps, initial=self.step, unit="step") as bar:

      def on_step(step: int, found: trainer.StepMetrics, batch: data.Batch) -> None:
        nonlocal seen
        seen += batch.weights.size
        bar.update(step - bar.n)
        if step % log_every == 0 or step == self._config.steps:
          rate = seen / (time.monotonic() - began)
          row = dict(step=step, tokens=batch.weights.shape[1], **_told(found), tokens_per_s=rate)
          self._metrics.append(row)
          bar.set_postfix_str(_in_short(row), refresh=False)

      batches = data.batches(self._config, self._tokenizer, self.step, workers)
      self._trainer.run(batches, seconds, on_step)

  def export(self) -> None:
    """Writes the model as it is now to hf/, in one piece."""
    whole, partial = self._folder / "hf", self._folder / "hf.partial"
    end = tuple(self._tokenizer.encode(END, add_special_tokens=False))
    shutil.rmtree(partial, ignore_errors=True)
    model = Model(self._config.model, self._trainer.params(), self._tokenizer, end, "reference")
    save_hf(model, partial, SHARD_BYTES)
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)


def _told(found: trainer.StepMetrics) -> dict[str, Any]:
  """The metrics of a step, and under "answers" the share of right ones by source."""
  losses = {"loss": float(found.loss), "grad_norm": float(found.grad_norm)}
  losses |= {name: float(x) for name, x in found.attention.items()}
  counts = zip(data.SOURCES, found.right.tolist(), found.answers.tolist(), strict=True)
  return losses | {"answers": {source: n / answers for source, n, answers in counts if answers}}


def _in_short(row: dict[str, Any]) -> str:
  answers = ", ".join(f"{source} {share:.1%}" for source, share in row["answers"].items())
  return f"loss {row['loss']:.3f}, answers: {answers}, {row['tokens_per_s'] / 1e3:.0f}k tokens/s"


def _tokenizer(config: TrainConfig, folder: pathlib.Path, start: Model | None) -> Tokenizer:
  """The run's own, made at its beginning."""
  whole, partial = folder / "tokenizer", folder / "tokenizer.partial"
  if not whole.exists():
    made = start.tokenizer if start else train_tokenizer(config.model.vocab_size, config.seed)
    partial.mkdir(parents=True, exist_ok=True)
    made.save(partial)
    partial.rename(whole)
  return load_tokenizer(whole)
