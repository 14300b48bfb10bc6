"""What a training run depends on, read from strict JSON (configs/training)."""

from __future__ import annotations

import dataclasses

from sparse_serve_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class AttentionLossWeights:
  """In the loss, of `attention_losses.LOSSES` of the same names."""

  digest: float = 0.0  # not before a model retrieves: with it, it did not learn to
  sharpness: float = 0.0
  diffuseness: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
  """Steps at one length; a curriculum goes from short to long."""

  tokens: int  # of a sequence
  sequences: int  # of a step
  steps: int
  attention_loss: AttentionLossWeights = dataclasses.field(default_factory=AttentionLossWeights)


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

  KIND = "training"

  model: ModelConfig  # its dtype is that of the products; parameters are float32
  stages: tuple[Stage, ...]
  sources: Sources
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  context_weight: float = 0.1  # in the loss, of a token that is no answer; an answer's is 1 or more (data.ANSWER_SHARE)
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

  def __post_init__(self):
    if not self.stages:
      raise ValueError("a run has one stage or more")
    for stage in self.stages:
      if min(stage.tokens, stage.sequences, stage.steps) < 1 or min(dataclasses.astuple(stage.attention_loss)) < 0:
        told = dataclasses.asdict(stage)
        raise ValueError(f"stages: tokens, sequences and steps are at least 1, weights 0, got {told}")
    if self.optimizer.learning_rate <= 0 or min(self.optimizer.warmup_steps, self.optimizer.decay_steps) < 0:
      told = dataclasses.asdict(self.optimizer)
      raise ValueError(f"optimizer: learning_rate is more than 0, warmup_steps and decay_steps at least 0, got {told}")
    if (needed := self.optimizer.warmup_steps + self.optimizer.decay_steps) > self.steps:
      raise ValueError(f"warmup_steps + decay_steps = {needed} exceed the {self.steps} steps of the run")
    shares = dataclasses.astuple(self.sources)
    if min(shares) < 0 or sum(shares) <= 0:
      raise ValueError(f"sources are shares of at least 0, and one is more, got {dataclasses.asdict(self.sources)}")
    if not 0 <= self.context_weight < 1:
      raise ValueError(f"context_weight={self.context_weight} is not in [0, 1): 1 is an answer's")
    if longest := [stage.tokens for stage in self.stages if stage.tokens > self.model.max_context]:
      raise ValueError(f"a stage of {max(longest)} tokens exceeds model.max_context={self.model.max_context}")
