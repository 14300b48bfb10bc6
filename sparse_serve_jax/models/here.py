"""Models with the numbers that this machine, or a cluster, computes with."""

from __future__ import annotations

import logging
import pathlib

import jax

from sparse_serve_jax import cluster
from sparse_serve_jax.models.weights import Model, load_model

_LOG = logging.getLogger(__name__)


def load_model_here(name_or_path: str | pathlib.Path, dtype: str | None = None, seed: int = 0) -> Model:
  """`load_model`, but if `dtype` is None and JAX runs on a CPU, which multiplies bfloat16 many times slower than
  float32, a model of bfloat16 becomes one of float32. A line of the log says so.
  """
  model = load_model(name_or_path, dtype, seed)
  if dtype is not None or model.config.dtype != "bfloat16" or jax.default_backend() != "cpu":
    return model
  _LOG.warning(
    "%s, in bfloat16, would be slow on a CPU: it runs in float32; --dtype=bfloat16 (dtype= in Python) keeps it",
    model.name,
  )
  return load_model(name_or_path, "float32", seed)


def load_model_for_others(name_or_path: str | pathlib.Path, dtype: str | None = None, seed: int = 0) -> Model:
  """The model that `load_model_here` loads in processes of `cluster`. This process leaves GPUs to them from now on.

  Raises:
    ValueError: as of `load_model` and `cluster.connect`.
  """
  gpus = cluster.gpus_each(cluster.connect(), 1, 1)
  jax.config.update("jax_platforms", "cpu")
  return load_model(name_or_path, dtype, seed) if gpus else load_model_here(name_or_path, dtype, seed)
