"""Llama-family models: weights, forward functions, tokenizers, sampling."""

from __future__ import annotations

from sparse_serve_jax.models.initial import init_params
from sparse_serve_jax.models.llama import (
  Params,
  attention_out,
  embed,
  forward,
  layer_params,
  logits,
  mlp,
  param_shapes,
  param_specs,
  qkv,
  rope,
)
from sparse_serve_jax.models.placement import is_placed, place_params
from sparse_serve_jax.models.sampling import ban, sample
from sparse_serve_jax.models.tokenizer import ByteTokenizer, Tokenizer
from sparse_serve_jax.models.weights import Model, load_model, save_hf, save_model

__all__ = [
  "ByteTokenizer",
  "Model",
  "Params",
  "Tokenizer",
  "attention_out",
  "ban",
  "embed",
  "forward",
  "init_params",
  "is_placed",
  "layer_params",
  "load_model",
  "logits",
  "mlp",
  "param_shapes",
  "param_specs",
  "place_params",
  "qkv",
  "rope",
  "sample",
  "save_hf",
  "save_model",
]
