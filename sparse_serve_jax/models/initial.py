"""Random weights, for measurements and tests. (Training begins with others: `training.trainer.init_params`.)"""

from __future__ import annotations

import functools
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import ml_dtypes
import numpy as np

from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.leaves import AHEAD, Leaf

_PIECE = 1 << 24  # elements of one random stream
_AT_ONCE = 1 << 16  # elements that are drawn before the next: a core keeps them in its cache


def init_params(cfg: ModelConfig, seed: int) -> llama.Params:
  """Random host arrays, a function of the shape `cfg` and `seed` alone.

  They keep the residual stream near unit size, give attention scores a spread of about 2 (so that it matters which
  tokens are attended) and logits a spread of about 4 (so that greedy ties are rare).
  """
  return jax.tree.map(np.asarray, random_params(cfg, seed))


def random_params(cfg: ModelConfig, seed: int) -> llama.Params:
  """The same weights, made when they are wanted: a tree of `Leaf`s."""
  return llama.map_shapes(functools.partial(_leaf, cfg, seed), cfg)


def _leaf(cfg: ModelConfig, seed: int, name: str, shape: tuple[int, ...]) -> Leaf:
  stacked = name.startswith("layers.")
  threads = 1 if stacked else AHEAD  # that read one part; parts of a stacked leaf are read side by side
  read = functools.partial(_part, cfg, seed, name.removeprefix("layers."), shape[stacked:], threads)
  return Leaf(name, shape, llama.dtype_of(cfg), read, stacked)


def _part(cfg: ModelConfig, seed: int, name: str, shape: Any, threads: int, layer: int) -> np.ndarray:
  """One layer of a leaf. Each, and each of its pieces, has a random stream of its own: they are made in any order."""
  step, few = (max(1, n // math.prod(shape[1:])) for n in (_PIECE, _AT_ONCE))
  part = np.empty(shape, llama.dtype_of(cfg))

  def draw(first: int) -> None:
    # The first piece has the stream that all of a leaf once had: what fits one piece has kept its values.
    stream = seed, zlib.crc32(name.encode()), layer, *([first] if first else [])
    piece, generator = part[first : first + step], np.random.Generator(np.random.SFC64(stream))
    for at in range(0, len(piece), few):
      some = piece[at : at + few]
      _round_to(some, _scaled(cfg, name, generator.standard_normal(some.shape, np.float32)))

  with ThreadPoolExecutor(threads) as pool:
    list(pool.map(draw, range(0, shape[0], step)))
  return part


def _round_to(out: np.ndarray, w: np.ndarray) -> None:
  """out[:] = w, of finite numbers. NumPy's own cast to bfloat16 keeps Python's lock: other threads would wait."""
  if out.dtype != ml_dtypes.bfloat16:
    out[:] = w
    return
  bits = w.view(np.uint32)
  half = (bits >> 16) & 1  # a tie goes to the even one
  half += 0x7FFF
  half += bits
  out.view(np.uint16)[:] = half >> 16


def _scaled(cfg: ModelConfig, name: str, w: np.ndarray) -> np.ndarray:
  if name.endswith("norm"):
    w = (1 + 0.1 * w) * (2 if name == "q_norm" else 1)
  elif name == "bqkv":
    w *= 0.3
  elif name == "embed":
    w *= 4 * cfg.d_model**-0.5 if cfg.tie_embeddings else 1
  else:
    fan_in = {"wo": cfg.n_heads * cfg.head_dim, "w_down": cfg.d_ff}.get(name, cfg.d_model)
    w *= fan_in**-0.5 * (4 if name == "lm_head" else 1)
  if name == "wqkv":
    w[..., :-2, :] *= 2
  return w
