"""What a training run depends on, read from strict JSON (configs/training)."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any, Self

from sparse_serve_jax.config import ModelConfig, from_dict


@dataclasses.dataclass(frozen=True)
class Stage:
  """Steps at one length; a curriculum goes from short to long."""

  tokens: int  # of a sequence
  sequences: int  # of a step
  steps: int
  digest_weight: float = (
    0.0  # in the loss, of `trainer.digest_loss`; before a model retrieves it keeps it from learning to
  )


@dataclasses.dataclass(frozen=True)
class Sources:
  """Shares of the sequences, of any sum; see `data.sequence`."""

  text: float = 0.0
  repeat: float = 0.0
  recall: float = 0.0
  tasks: float = 0.0


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW, its rate warmed up linearly, then constant, then falling linearly to zero over the last steps of the run."""

  learning_rate: float = 1e-3
  warmup_steps: int = 100
  decay_steps: int = 0
  beta1: float = 0.9
  beta2: float = 0.95
  weight_decay: float = 0.1  # of matrices
  clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """One training run."""

  model: ModelConfig  # its dtype is that of the products; parameters are float32
  stages: tuple[Stage, ...]
  optimizer: Optimizer
  sources: Sources
  # In the loss, of a token that is no answer. An answer's weighs 1; of a task, at least so that the whole answer weighs
  # as much as ANSWER_SHARE of the sequence would: else a short answer to a long prompt would hardly count.
  context_weight: float = 0.1
  seed: int = 0

  @property
  def steps(self) -> int:
    return sum(stage.steps for stage in self.stages)

  def stage_of(self, step: int) -> Stage:
    """The stage that a step belongs to."""
    for stage in self.stages:
      if step < stage.steps:
        return stage
      step -= stage.steps
    raise ValueError(f"{step=} is beyond the {self.steps} steps of the run")

  @classmethod
  def read(cls, file: str | pathlib.Path) -> Self:
    """Reads a JSON file of these fields.

    Raises:
      ValueError: it is no such file, a key is unknown or lacking, or a value is out of range.
    """
    file = pathlib.Path(file)
    try:
      raw = json.loads(file.read_text())
      known = {field.name for field in dataclasses.fields(cls)}
      if not isinstance(raw, dict) or set(raw) - known or not {"model", "stages"} <= set(raw):
        raise ValueError(f"expected the keys {sorted(known)}, of which model and stages must be there")
      parts: dict[str, Any] = raw | {
        "model": from_dict(ModelConfig, raw["model"]),
        "stages": tuple(from_dict(Stage, stage) for stage in raw["stages"]),
        "optimizer": from_dict(Optimizer, raw.get("optimizer", {})),
        "sources": from_dict(Sources, raw.get("sources", {})),
      }
      return cls(**parts)
    except (OSError, ValueError, TypeError) as error:
      raise ValueError(f"{file}: {error}") from None

  def __post_init__(self):
    for stage in self.stages:
      if min(stage.tokens, stage.sequences, stage.steps) < 1 or stage.digest_weight < 0:
        raise ValueError(f"a stage's tokens, sequences and steps are at least 1, its digest_weight 0, got {stage}")
    if (needed := self.optimizer.warmup_steps + self.optimizer.decay_steps) > self.steps:
      raise ValueError(f"warmup_steps + decay_steps = {needed} exceed the {self.steps} steps of the run")
    shares = dataclasses.astuple(self.sources)
    if min(shares) < 0 or sum(shares) <= 0:
      raise ValueError(f"sources are shares of at least 0, and one is more, got {self.sources}")
    if longest := [stage.tokens for stage in self.stages if stage.tokens > self.model.max_context]:
      raise ValueError(f"a stage of {max(longest)} tokens exceeds max_context={self.model.max_context}")
