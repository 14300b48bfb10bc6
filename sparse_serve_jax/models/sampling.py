"""Choosing tokens. A draw depends on its row's logits, settings, seed and position alone, never on the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def greedy(logits: jax.Array) -> jax.Array:
  """The most likely token [B] int32 of every row of logits [B, V]; ties to the lowest id."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def ban(logits: jax.Array, banned: jax.Array) -> jax.Array:
  """Logits [B, V] with -inf at each row's token ids `banned` int32 [B, X]; -1 is none."""
  token = jnp.arange(logits.shape[1], dtype=banned.dtype)[None, None]
  return jnp.where((token == banned[:, :, None]).any(1), -jnp.inf, logits)


def sample(
  logits: jax.Array, positions: jax.Array, temperature: jax.Array, top_p: jax.Array, seeds: jax.Array
) -> jax.Array:
  """Draws a token for each row.

  Args:
    logits: float32 [B, V].
    positions: int32 [B], of the token that is drawn from: what makes the draws of a request differ.
    temperature: float32 [B]; 0 is `greedy`.
    top_p: float32 [B]; the most likely tokens whose mass before them is below it are kept, ties to the lowest id, and
      never fewer than one.
    seeds: uint32 [B].

  Returns:
    int32 [B].
  """
  drawn = jax.vmap(_draw)(logits, positions, jnp.where(temperature > 0, temperature, 1.0), top_p, seeds)
  return jnp.where(temperature > 0, drawn, greedy(logits))


def _draw(
  logits: jax.Array, position: jax.Array, temperature: jax.Array, top_p: jax.Array, seed: jax.Array
) -> jax.Array:
  """One row. The Gumbel noise belongs to token ids, so that logits that differ in rounding rarely change the draw."""
  noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position), logits.shape)
  scaled = (logits - logits.max()) / temperature  # at most 0: a tiny temperature cannot overflow
  order = jnp.argsort(scaled, descending=True, stable=True)
  ranked = scaled[order]
  mass = jax.nn.softmax(ranked)
  before = jnp.cumsum(mass) - mass
  keep = (before < top_p) | (top_p >= 1)
  keep = keep.at[0].set(True)
  return order[jnp.argmax(jnp.where(keep, ranked + noise[order], -jnp.inf))].astype(jnp.int32)
