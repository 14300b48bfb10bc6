"""What a model's attention can be trained towards, besides right answers: attention that sparse methods can follow.

Each of LOSSES takes a layer's queries [B, T, K, G, D] and keys [B, T, K, D], and at [B, n] int32, the tokens whose
queries are looked at, and returns a float32 scalar, the smaller the better.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from sparse_serve_jax.attention.methods import METHODS, Method
from sparse_serve_jax.config import CacheConfig

BLOCK_TOKENS = CacheConfig().block_tokens  # S
Z_MARGIN = 3.0  # deviations; of a thousand scores at random, one is so high
MIN_STD = 0.3  # of scores: a smaller one is none
MAX_KL_NATS = 5.0
TOP_BLOCKS = 8


def _logits_at(q: jax.Array, k: jax.Array, at: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Queries [B, K, n, G, D] at [B, n], and the logits of their attention [B, K, n, G, T] float32, causal."""
  q = jnp.take_along_axis(q, at[:, :, None, None, None], 1).swapaxes(1, 2)
  logits = q.shape[-1] ** -0.5 * jnp.einsum("bkngd,btkd->bkngt", q, k, preferred_element_type=jnp.float32)
  return q, jnp.where(jnp.arange(k.shape[1])[(None,) * 4] <= at[:, None, :, None, None], logits, -jnp.inf)


def sharpness(q: jax.Array, k: jax.Array, at: jax.Array) -> jax.Array:
  """By how many nats attention is further from uniform than MAX_KL_NATS, a mean over tokens and query heads.

  Of a token, max(0, KL(uniform || attention) - MAX_KL_NATS), over the tokens that it sees. Attention that lies to 99 %
  in one place and evenly in all others has 4.6 nats. Without norms of queries and keys nothing else in training bounds
  logits, and those that find a token end up tens of deviations above the others, each of which is tens of nats wide;
  large models' are some 2 nats wide. What is read first then tells nothing of what is left, and a stop test stops at
  once.
  """
  _, logits = _logits_at(q, k, at)
  seen = (at + 1).astype(jnp.float32)[:, None, :, None]
  mean = jnp.where(logits > -jnp.inf, logits, 0.0).sum(-1) / seen
  return jax.nn.relu(jax.nn.logsumexp(logits, -1) - mean - jnp.log(seen) - MAX_KL_NATS).mean()


def diffuseness(q: jax.Array, k: jax.Array, at: jax.Array) -> jax.Array:
  """The share of attention's mass outside the TOP_BLOCKS blocks with most of it, a mean over tokens and KV heads.

  A head that has found nothing may look everywhere or rest on the first tokens: the model answers the same, but who
  wants to read most of its mass reads everything or next to nothing.
  """
  p = jax.nn.softmax(_logits_at(q, k, at)[1], -1).mean(3)  # [B, K, n, T]
  p = jnp.pad(p, [(0, 0)] * 3 + [(0, -p.shape[-1] % BLOCK_TOKENS)])
  mass = p.reshape(*p.shape[:-1], -1, BLOCK_TOKENS).sum(-1)
  return 1 - lax.top_k(mass, min(TOP_BLOCKS, mass.shape[-1]))[0].sum(-1).mean()


def digest(q: jax.Array, k: jax.Array, at: jax.Array) -> jax.Array:
  """How much of attention's mass lies in blocks whose digests do not stand out.

  Of a token and KV head, the sum over the blocks before it of

    mass^2 softplus(Z_MARGIN - z),    z = (score - mean) / deviation, over these blocks,

  mass and score as means over query heads, as selection takes them. Only the order of scores selects, so that they are
  measured by their own spread: a key among S cannot make its digest score what attention gives it, but it can make it
  higher than the others' digests. Squared, as heads whose mass lies everywhere have no block to choose. The first block
  and the two newest, which selection reads anyway, are left out. Of two rules, the mean of both. Where the mass lies is
  not to be changed: no gradient goes through it.
  """
  scale, n_blocks = q.shape[-1] ** -0.5, k.shape[1] // BLOCK_TOKENS
  q, logits = _logits_at(q, k, at)
  at = at[:, None, :, None]  # [B, 1, n, 1]
  k = k.swapaxes(1, 2)  # [B, K, T, D]
  blocks = k[:, :, : n_blocks * BLOCK_TOKENS].reshape(*k.shape[:2], n_blocks, BLOCK_TOKENS, -1)  # [B, K, N, S, D]
  block = jnp.arange(n_blocks)[(None,) * 3]
  by_block = logits[..., : n_blocks * BLOCK_TOKENS].reshape(*logits.shape[:-1], n_blocks, BLOCK_TOKENS)
  total = jax.nn.logsumexp(logits, -1, keepdims=True)
  free = (block > 0) & (block < at // BLOCK_TOKENS - 1)  # [B, 1, n, N]
  mass = jnp.exp(jax.nn.logsumexp(by_block, -1) - total).mean(3)  # [B, K, n, N]
  mass = lax.stop_gradient(jnp.where(free, mass, 0.0))
  n_free = jnp.maximum(free.sum(-1, keepdims=True), 1).astype(jnp.float32)

  def loss_of(method: Method) -> jax.Array:
    digests = method.summarize(blocks).astype(jnp.float32)[:, :, None]  # [B, K, 1, N, E, D]
    scores = scale * method.score(q.astype(jnp.float32), digests).mean(3)
    mean = jnp.where(free, scores, 0.0).sum(-1, keepdims=True) / n_free
    over = jnp.where(free, scores - mean, 0.0)
    z = over * lax.rsqrt((over**2).sum(-1, keepdims=True) / n_free + MIN_STD**2)
    return (mass**2 * jax.nn.softplus(Z_MARGIN - z)).sum(-1).mean()

  return (loss_of(METHODS["cuboid_mean"]) + loss_of(METHODS["mean"])) / 2


LOSSES = {"digest": digest, "sharpness": sharpness, "diffuseness": diffuseness}
