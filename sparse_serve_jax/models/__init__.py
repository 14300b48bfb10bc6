"""Llama-family models: weights, forward functions (`llama`), tokenizers, sampling."""

from __future__ import annotations

from sparse_serve_jax.models.initial import init_params
from sparse_serve_jax.models.llama import forward
from sparse_serve_jax.models.placement import is_placed, place_params
from sparse_serve_jax.models.tokenizer import ByteTokenizer
from sparse_serve_jax.models.weights import Model, load_model, save_hf, save_model

__all__ = [
  "ByteTokenizer",
  "Model",
  "forward",
  "init_params",
  "is_placed",
  "load_model",
  "place_params",
  "save_hf",
  "save_model",
]
