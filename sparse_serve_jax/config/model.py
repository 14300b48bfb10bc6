"""The shapes of models."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sparse_serve_jax.config.reader import check_fields


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding.

  `kind` "llama3" and "yarn" follow the Hugging Face `rope_scaling` entries of the same names; "linear" divides
  positions by `factor`.

  Raises:
    ValueError: a value of the wrong type or size, or one that `kind` needs and that is not given.
  """

  SECTION = "rope"

  theta: float = 10000.0
  kind: Literal["default", "linear", "llama3", "yarn"] = "default"
  factor: float = 1.0
  original_context: int = 0  # tokens; llama3 and yarn
  low_freq_factor: float = 1.0  # llama3
  high_freq_factor: float = 4.0  # llama3
  beta_fast: float = 32.0  # yarn
  beta_slow: float = 1.0  # yarn
  attention_factor: float = 0.0  # yarn; 0: 0.1 ln(factor) + 1
  truncate: bool = True  # yarn: round the correction range to whole dimensions

  def __post_init__(self):
    check_fields(self, positive=("theta", "factor"), not_negative=("original_context", "attention_factor"))
    if self.kind in ("llama3", "yarn") and not self.original_context:
      raise ValueError(f"rope kind {self.kind!r} needs original_context, the tokens before scaling; it is 0")
    if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
      low, high = self.low_freq_factor, self.high_freq_factor
      raise ValueError(f"llama3 rope needs 0 < low_freq_factor={low} < high_freq_factor={high}")
    if self.kind == "yarn" and not 0 < self.beta_slow < self.beta_fast:
      raise ValueError(f"yarn rope needs 0 < beta_slow={self.beta_slow} < beta_fast={self.beta_fast}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of a llama-family decoder; the letters beside the fields are `docs/glossary.md`'s.

  Raises:
    ValueError: a value of the wrong type or size, query heads that are no multiple of KV heads, or an odd head_dim.
  """

  KIND = "models"

  vocab_size: int  # V
  d_model: int  # d
  n_layers: int  # L
  n_heads: int  # H
  n_kv_heads: int  # K
  head_dim: int  # D
  d_ff: int  # F
  max_context: int  # tokens
  norm_eps: float = 1e-5
  rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
  tie_embeddings: bool = False
  qkv_bias: bool = False  # Qwen2
  qk_norm: bool = False  # Qwen3
  dtype: Literal["float32", "bfloat16"] = "bfloat16"

  def __post_init__(self):
    sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_context")
    check_fields(self, positive=(*sizes, "norm_eps"))
    if self.n_heads % self.n_kv_heads:
      raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim} is odd; rope turns pairs")

  @property
  def group(self) -> int:
    """G, query heads per KV head."""
    return self.n_heads // self.n_kv_heads
