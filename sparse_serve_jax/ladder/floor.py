"""The least time that a run's work can take, by what was multiplied and moved and the rates of the same device.

  prefill         the layers' matrix products, and dense causal attention, each at the rate that it has alone
  a decode step   all weights and digests at the rate of HBM; and of the KV the slower of HBM and PCIe

What a run did is measured: its steps, the blocks they attended to and those of them that missed HBM. So a floor says
how well the engine ran what it planned, and not whether it planned well. Nothing overlaps but HBM and PCIe within a
layer's attention; layers are taken to be alike. Saves, and what comes back for a later chunk of a prompt, are in none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax

from sparse_serve_jax.benchmarks import prefill, step
from sparse_serve_jax.benchmarks.machine import GPU_EFFORT
from sparse_serve_jax.benchmarks.timing import Ceilings, Effort
from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.mesh import make_mesh
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.measure import Iteration

_ON_GPU = GPU_EFFORT, 8192, 16384  # tokens of products, of attention
_ON_CPU = Effort(calls=1, seconds=0, rounds=1, copy_bytes=64 << 20), 256, 256  # some seconds


@dataclasses.dataclass(frozen=True)
class Rates:
  """What one device reaches: floating point operations a second, and bytes a second."""

  products: float
  attention: float  # pairs of a token with itself and those before it count
  hbm: float
  h2d: float

  @classmethod
  def measure(cls, cfg: ModelConfig) -> Rates:
    """Here and now, with one layer of a model's shape: on a GPU some ten seconds, before its memory is taken."""
    effort, n, n_attended = _ON_GPU if jax.default_backend() == "gpu" else _ON_CPU
    of = Ceilings.measure(effort)
    layer = dataclasses.replace(cfg, n_layers=1, vocab_size=128)
    params = step.random_params(layer, make_mesh(1))
    products = 2 * layer_weights(cfg) * n / prefill.products_us(layer, params, n, effort)
    attention = attention_flops(layer, n_attended, 0) / prefill.attention_us(layer, n_attended, 0, effort)
    return cls(1e6 * products, 1e6 * attention, of.hbm, of.h2d)


def layer_weights(cfg: ModelConfig) -> int:
  """Numbers in the matrices of a layer."""
  heads = cfg.head_dim * (2 * cfg.n_heads + 2 * cfg.n_kv_heads)
  return cfg.d_model * (heads + 3 * cfg.d_ff)


def attention_flops(cfg: ModelConfig, n_tokens: int, n_before: int) -> float:
  """Of all layers, for tokens that attend to themselves, to each other causally, and to so many before them."""
  return 4 * cfg.n_layers * cfg.n_heads * cfg.head_dim * n_tokens * (n_before + n_tokens / 2)


def prefill_s(rates: Rates, cfg: ModelConfig, requests: Iterable[Request], devices: int = 1) -> float:
  """Seconds for the prompts, without the parts that the cache had."""
  seconds = 0.0
  for request in requests:
    new = len(request.prompt) - request.cached_tokens
    seconds += 2 * layer_weights(cfg) * cfg.n_layers * new / rates.products
    seconds += attention_flops(cfg, new, request.cached_tokens) / rates.attention
  return seconds / devices


def decode_s(
  rates: Rates, cfg: ModelConfig, shape: CacheShape, iterations: Sequence[Iteration], devices: int = 1
) -> float:
  """Seconds for the decode steps among iterations."""
  seconds = 0.0
  for of in iterations:
    if of.rows:
      parts = step.step_bytes(cfg, shape, of.rows, of.full_blocks, of.work.attended_blocks, of.missed_blocks)
      seconds += sum(max(part["hbm"] / rates.hbm, part.get("h2d", 0) / rates.h2d) for part in parts.values())
  return seconds / devices
