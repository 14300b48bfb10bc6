"""A llama-family decoder as pure functions: Llama 2 and 3.x, Mistral, Qwen2, Qwen3.

Every function is per-device code: inside `shard_map` the arrays are one device's shard (K, F and V are what it has) and
`axis` names the mesh axis to reduce over; with `axis` None there is one device and no collective. Attention itself is
the caller's: a layer is

  q, k, v = qkv(cfg, lp, x, rope(cfg, positions))
  x = attention_out(lp, x, <attention of q over k and v, scaled by D ** -0.5>, axis)
  x = mlp(cfg, lp, x, axis)

`forward` does that with plain causal attention and no cache: it is what everything else is compared with.

In all of them `cfg` is the model's shape, `params` the tree of `param_shapes`, `lp` one layer of it (`layer_params`),
`x` [*B, d] the residual stream; `q` [..., K, G, D], `k` and `v` [..., K, D] are a layer's queries, keys and values.

Arithmetic: norms, rope, softmax and SiLU in float32, products in the model's dtype, those of float32 at HIGHEST
precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sparse_serve_jax.config import ModelConfig, RopeConfig
from sparse_serve_jax.mesh import AXIS

Params = dict[str, Any]  # leaves are arrays, or `leaves.Leaf`s of a loaded model; see param_shapes

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def dtype_of(cfg: ModelConfig) -> np.dtype:
  """Of the weights and of the residual stream."""
  return _DTYPES[cfg.dtype]


def param_shapes(cfg: ModelConfig) -> Params:
  """The tree of parameter shapes. Layers are stacked; `wqkv` holds, per KV head, its G query heads, then k, then v."""
  d, n_layers, vocab, ff = cfg.d_model, cfg.n_layers, cfg.vocab_size, cfg.d_ff
  kv, group, dim = cfg.n_kv_heads, cfg.group, cfg.head_dim
  layers = {
    "attn_norm": (n_layers, d),
    "wqkv": (n_layers, d, kv, group + 2, dim),
    "wo": (n_layers, kv, group, dim, d),
    "mlp_norm": (n_layers, d),
    "w_gate_up": (n_layers, d, 2, ff),
    "w_down": (n_layers, ff, d),
  }
  if cfg.qkv_bias:
    layers["bqkv"] = (n_layers, kv, group + 2, dim)
  if cfg.qk_norm:
    layers |= {"q_norm": (n_layers, dim), "k_norm": (n_layers, dim)}
  shapes = {"embed": (vocab, d), "final_norm": (d,), "layers": layers}
  if not cfg.tie_embeddings:
    shapes["lm_head"] = (d, vocab)
  return shapes


def param_specs(cfg: ModelConfig, tp: int) -> Params:
  """PartitionSpecs for a mesh of `tp` devices. KV heads and d_ff are split, and the vocabulary where `tp` divides it.

  Raises:
    ValueError: `tp` does not divide the KV heads or d_ff.
  """
  if cfg.n_kv_heads % tp or cfg.d_ff % tp:
    raise ValueError(f"tp={tp} must divide n_kv_heads={cfg.n_kv_heads} and d_ff={cfg.d_ff}")
  split = {"wqkv": 2, "bqkv": 1, "wo": 1, "w_gate_up": 3, "w_down": 1}  # leaf -> the dimension that is split
  if cfg.vocab_size % tp == 0:
    split["lm_head"] = 1

  def spec(name: str, _shape: tuple[int, ...]) -> PartitionSpec:
    dim = split.get(name.removeprefix("layers."))
    return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, AXIS)

  return map_shapes(spec, cfg)


def map_shapes(f: Callable[[str, tuple[int, ...]], Any], cfg: ModelConfig) -> Params:
  """The tree of what `f` returns for the name ("layers.wqkv") and the shape of every parameter."""
  shapes = param_shapes(cfg)
  layers = {name: f(f"layers.{name}", shape) for name, shape in shapes["layers"].items()}
  return {name: layers if name == "layers" else f(name, shape) for name, shape in shapes.items()}


def layer_params(params: Params, layer: Int[Array, ""] | int) -> Params:
  """One layer's parameters; `layer` may be traced."""
  return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, keepdims=False), params["layers"])


def embed(params: Params, tokens: Int[Array, "*B"]) -> Float[Array, "*B d"]:
  """The residual stream that `tokens`, ids, begin; one out of range is the nearest id."""
  return jnp.take(params["embed"], tokens, axis=0, mode="clip")


def rope(cfg: ModelConfig, positions: Int[Array, "*B"]) -> Float[Array, "2 *B half"]:
  """Cosines and sines, float32, of positions; the same in all layers. `half` is D / 2."""
  angles = positions[..., None].astype(jnp.float32) * _trailing(rope_frequencies(cfg), positions.ndim + 1)
  return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope_amplitude(cfg.rope)


def qkv(
  cfg: ModelConfig, lp: Params, x: Float[Array, "*B d"], cos_sin: Float[Array, "2 *#B half"]
) -> tuple[Float[Array, "*B K G D"], Float[Array, "*B K D"], Float[Array, "*B K D"]]:
  """Queries, keys and values of the residual stream. The first two are rotated by `cos_sin`, which `rope` made."""
  h = _matmul(_norm(cfg, x, lp["attn_norm"]), lp["wqkv"], 1)
  if cfg.qkv_bias:
    h += _trailing(lp["bqkv"], h.ndim)
  q, k, v = h[..., :-2, :], h[..., -2, :], h[..., -1, :]
  if cfg.qk_norm:
    q, k = _norm(cfg, q, lp["q_norm"]), _norm(cfg, k, lp["k_norm"])
  cos, sin = cos_sin[..., None, :]
  return _rotate(q, cos[..., None, :], sin[..., None, :]), _rotate(k, cos, sin), v


def attention_out(
  lp: Params, x: Float[Array, "*B d"], o: Float[Array, "*B K G D"], axis: str | None
) -> Float[Array, "*B d"]:
  """x plus the output projection of `o`, what attention made of the queries."""
  return x + _psum(_matmul(o.astype(x.dtype), lp["wo"], 3), axis)


def mlp(cfg: ModelConfig, lp: Params, x: Float[Array, "*B d"], axis: str | None) -> Float[Array, "*B d"]:
  """x plus the gated MLP of its norm."""
  h = _matmul(_norm(cfg, x, lp["mlp_norm"]), lp["w_gate_up"], 1).astype(jnp.float32)
  h = (jax.nn.silu(h[..., 0, :]) * h[..., 1, :]).astype(x.dtype)
  return x + _psum(_matmul(h, lp["w_down"], 1), axis)


def attends_fused(cfg: ModelConfig) -> bool:
  """Whether `causal_attention` makes no scores in memory."""
  return jax.default_backend() == "gpu" and dtype_of(cfg).itemsize == 2


def causal_attention(
  cfg: ModelConfig, q: Float[Array, "B T K G D"], k: Float[Array, "B T K D"], v: Float[Array, "B T K D"]
) -> Float[Array, "B T K G D"]:
  """Attention of every token to those before it and itself, by a library: cuDNN on a GPU in 16 bits, XLA elsewhere."""
  implementation = "cudnn" if attends_fused(cfg) else "xla"
  heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
  with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else None):
    o = jax.nn.dot_product_attention(
      heads, k, v, is_causal=True, scale=cfg.head_dim**-0.5, implementation=implementation
    )
  return o.reshape(q.shape)


def logits(cfg: ModelConfig, params: Params, x: Float[Array, "*B d"], axis: str | None) -> Float[Array, "*B V"]:
  """Logits in float32 of x before the final norm, whole on every device."""
  if x.size == x.shape[-1]:  # XLA converts all of the head to float32 for a single row, at five times the time
    return logits(cfg, params, jnp.broadcast_to(x, (2, x.size)), axis)[0].reshape(*x.shape[:-1], -1)
  x = _norm(cfg, x, params["final_norm"])
  if cfg.tie_embeddings:
    return _einsum("...d,vd->...v", x, params["embed"], jnp.float32)
  y = _einsum("...d,dv->...v", x, params["lm_head"], jnp.float32)
  if axis is not None and y.shape[-1] != cfg.vocab_size:
    y = lax.all_gather(y, axis, axis=y.ndim - 1, tiled=True)
  return y


def forward(
  cfg: ModelConfig, params: Params, tokens: Int[Array, " T"], *, axis: str | None = None, hidden: bool = False
) -> Float[Array, "T V"] | tuple[Float[Array, "T V"], Float[Array, "states T d"]]:
  """Logits by dense causal attention without a cache.

  Args:
    cfg: the model's shape.
    params: arrays, or one device's shard of them.
    tokens: one sequence of ids.
    axis: of the mesh; None: one device has all.
    hidden: also the residual stream's L + 1 states are returned: the embeddings, then the output of every layer.

  Returns:
    Logits in float32; with `hidden`, logits and states in the model's dtype.
  """
  n = tokens.shape[0]
  positions = jnp.arange(n, dtype=jnp.int32)
  causal = positions[:, None] >= positions[None, :]
  cos_sin = rope(cfg, positions)

  def layer(x, lp):
    q, k, v = qkv(cfg, lp, x, cos_sin)
    s = _einsum("tkgh,skh->kgts", q, k, jnp.float32) * cfg.head_dim**-0.5
    p = jax.nn.softmax(jnp.where(causal[None, None], s, -jnp.inf), axis=-1)
    o = _einsum("kgts,skh->tkgh", p, v.astype(jnp.float32))
    x = mlp(cfg, lp, attention_out(lp, x, o, axis), axis)
    return x, (x if hidden else ())

  first = embed(params, tokens)
  x, states = lax.scan(layer, first, params["layers"])
  y = logits(cfg, params, x, axis)
  return (y, jnp.concatenate([first[None], jnp.asarray(states)])) if hidden else y


def rope_frequencies(cfg: ModelConfig) -> Float[np.ndarray, " half"]:
  """Radians per token of each rotated pair, computed in float32 as checkpoints were trained with."""
  rope, f32 = cfg.rope, np.float32
  freq = f32(1) / f32(rope.theta) ** (np.arange(0, cfg.head_dim, 2, dtype=f32) / f32(cfg.head_dim))
  if rope.kind == "linear":
    return freq / f32(rope.factor)
  if rope.kind == "llama3":
    # Turns within the original context decide: many stay, few are slowed, between them a blend.
    turns = f32(rope.original_context) * freq / f32(2 * np.pi)
    keep = (turns - f32(rope.low_freq_factor)) / f32(rope.high_freq_factor - rope.low_freq_factor)
  elif rope.kind == "yarn":
    low, high = (_yarn_dimension(cfg, beta) for beta in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_dim - 1)
    high += 0.001 * (low == high)
    keep = 1 - (np.arange(cfg.head_dim // 2, dtype=f32) - f32(low)) / f32(high - low)
  else:
    return freq
  keep = np.clip(keep, f32(0), f32(1))
  return (freq * keep + freq / f32(rope.factor) * (1 - keep)).astype(f32)


def rope_amplitude(rope: RopeConfig) -> float:
  """YaRN's attention factor of `rope` (arXiv 2309.00071, section 3.4); 1 of others. It scales q and k alike, through
  cos and sin."""
  if rope.kind != "yarn":
    return 1.0
  return rope.attention_factor or (0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0)


def _yarn_dimension(cfg: ModelConfig, turns: float) -> float:
  """The (fractional) pair that makes `turns` turns in the original context (arXiv 2309.00071, section 3.2)."""
  rope = cfg.rope
  return cfg.head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates the pairs (i, i + D / 2) of x [..., D]."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _norm(cfg: ModelConfig, x: jax.Array, weight: jax.Array | np.ndarray) -> jax.Array:
  """Root-mean-square norm over the last dimension; the weight is applied in the model's dtype, as in training."""
  h = x.astype(jnp.float32)
  h *= lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + cfg.norm_eps)
  return h.astype(x.dtype) * _trailing(weight, x.ndim)


def _trailing(a: jax.Array | np.ndarray, ndim: int) -> jax.Array | np.ndarray:
  """`a` with leading ones up to `ndim` dimensions."""
  return jnp.reshape(a, (1,) * (ndim - a.ndim) + a.shape)


def _matmul(x: jax.Array, w: jax.Array | np.ndarray, n: int) -> jax.Array:
  """Contracts the last `n` dimensions of x with the first `n` of w, as a product of two matrices.

  XLA would transpose a layer's slice of stacked weights first if it were shown more dimensions: 22 us on an H200.
  """
  flat = x.reshape(*x.shape[: x.ndim - n], -1)
  y = _einsum("...d,de->...e", flat, w.reshape(flat.shape[-1], -1))
  return y.reshape(*y.shape[:-1], *w.shape[n:])


def _einsum(spec: str, x: jax.Array, w: jax.Array | np.ndarray, out: Any = None) -> jax.Array:
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jnp.einsum(spec, x, w, precision=precision, preferred_element_type=out)


def _psum(y: jax.Array, axis: str | None) -> jax.Array:
  return y if axis is None else lax.psum(y, axis)
