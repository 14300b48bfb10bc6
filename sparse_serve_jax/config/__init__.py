"""Configuration as frozen dataclasses, read from strict JSON: of models, of the engine, and the reader of all kinds."""

from __future__ import annotations

from sparse_serve_jax.config.model import ModelConfig, RopeConfig
from sparse_serve_jax.config.reader import (
  Described,
  check_fields,
  describe,
  find_config,
  from_dict,
  override,
  parse_bytes,
  read_config,
  shipped,
  to_json,
)
from sparse_serve_jax.config.serving import (
  AUTO,
  BLOCK_SIZES,
  CacheConfig,
  EngineConfig,
  SchedulerConfig,
  SparseConfig,
  load_config,
  with_fixed_sizes,
  with_requests,
)

__all__ = [
  "AUTO",
  "BLOCK_SIZES",
  "CacheConfig",
  "Described",
  "EngineConfig",
  "ModelConfig",
  "RopeConfig",
  "SchedulerConfig",
  "SparseConfig",
  "check_fields",
  "describe",
  "find_config",
  "from_dict",
  "load_config",
  "override",
  "parse_bytes",
  "read_config",
  "shipped",
  "to_json",
  "with_fixed_sizes",
  "with_requests",
]
