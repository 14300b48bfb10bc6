"""LLM serving in JAX with dynamic sparse attention over a DRAM-HBM KV cache.

Importing this package loads no other module of it: what comes before a command handles interrupts is short. The names
below load their module at first use; those that need JAX configure it first (`runtime.configure`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sparse_serve_jax.config import EngineConfig, ModelConfig, load_config, override
  from sparse_serve_jax.detokenizer import Detokenizer
  from sparse_serve_jax.llm import LLM, TextStream
  from sparse_serve_jax.models import Model, load_model
  from sparse_serve_jax.outputs import RequestOutput
  from sparse_serve_jax.sampling_params import SamplingParams
  from sparse_serve_jax.serving.engine import Engine
  from sparse_serve_jax.serving.executor import JaxExecutor
  from sparse_serve_jax.serving.loop import Loop

__version__ = "0.1.0"

__all__ = [
  "LLM",
  "Detokenizer",
  "Engine",
  "EngineConfig",
  "JaxExecutor",
  "Loop",
  "Model",
  "ModelConfig",
  "RequestOutput",
  "SamplingParams",
  "TextStream",
  "load_config",
  "load_model",
  "override",
]

_CONFIG = "sparse_serve_jax.config"
_HOMES = {
  "EngineConfig": _CONFIG,
  "ModelConfig": _CONFIG,
  "load_config": _CONFIG,
  "override": _CONFIG,
  "Detokenizer": "sparse_serve_jax.detokenizer",
  "RequestOutput": "sparse_serve_jax.outputs",
  "SamplingParams": "sparse_serve_jax.sampling_params",
  "TextStream": "sparse_serve_jax.llm",
  "LLM": "sparse_serve_jax.llm",
  "Engine": "sparse_serve_jax.serving.engine",
  "JaxExecutor": "sparse_serve_jax.serving.executor",
  "Loop": "sparse_serve_jax.serving.loop",
  "Model": "sparse_serve_jax.models",
  "load_model": "sparse_serve_jax.models",
}


def __getattr__(name: str):
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  if _HOMES[name] != _CONFIG:
    from sparse_serve_jax import runtime

    runtime.configure()
  return getattr(importlib.import_module(_HOMES[name]), name)
