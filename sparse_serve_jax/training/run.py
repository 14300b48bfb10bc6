"""A training run in a folder: tokenizer, checkpoints, metrics and, whenever it stops, the model for others to load."""

from __future__ import annotations

import itertools
import pathlib
import shutil
import time
from typing import Any

from sparse_serve_jax import progress, results
from sparse_serve_jax.models import Model, save_hf
from sparse_serve_jax.models.tokenizer import Tokenizer, load_tokenizer
from sparse_serve_jax.serving import budget
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
      ValueError: the folder holds a run of another configuration, the tokenizer does not fit the vocabulary, or a new
        run needs more memory than there is.
    """
    if not self.is_in(folder):
      _check_memory(config, 0)  # a folder that is claimed is this configuration's
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

    Raises:
      ValueError: a step of those left needs more memory than there is.
    """
    if self.step >= self._config.steps:
      return
    _check_memory(self._config, self.step)
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


def _check_memory(config: TrainConfig, step: int) -> None:
  """Of the stages from a step on, where the devices are the host: there the system would kill the process."""
  free = budget.host_bytes_free() if budget.device_bytes_free() is None else None
  ends = itertools.accumulate(stage.steps for stage in config.stages)
  needs = [
    (trainer.step_bytes(config.model, of), of) for of, end in zip(config.stages, ends, strict=True) if end > step
  ]
  if free is not None and (most := max(needs, key=lambda of: of[0]))[0] > free:
    raise ValueError(
      f"a step of {most[1].sequences} sequences of {most[1].tokens} tokens needs some {budget.gib(most[0])}, and "
      f"{budget.gib(free)} of the host are free: give a --config with fewer sequences or tokens in its stages"
    )


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
