"""Choosing tokens. A draw depends on its row's logits, settings, seed and position alone, never on the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt


def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
  """The most likely token of every row, int32; ties to the lowest id."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def ban(logits: Float[Array, "B V"], banned: Int[Array, "B X"]) -> Float[Array, "B V"]:
  """Logits with -inf at each row's `banned` token ids; -1 is none."""
  token = jnp.arange(logits.shape[1], dtype=banned.dtype)[None, None]
  return jnp.where((token == banned[:, :, None]).any(1), -jnp.inf, logits)


def sample(
  logits: Float[Array, "B V"],
  positions: Int[Array, " B"],
  temperature: Float[Array, " B"],
  top_p: Float[Array, " B"],
  seeds: UInt[Array, " B"],
) -> Int[Array, " B"]:
  """Draws a token for each row.

  Args:
    logits: float32.
    positions: int32, of the tokens that are drawn: what makes the draws of a request differ.
    temperature: 0 is `greedy`.
    top_p: the most likely tokens whose mass before them is below it are kept, ties to the lowest id, and never fewer
      than one.
    seeds: uint32, of the requests.

  Returns:
    Token ids, int32.
  """
  drawn = jax.vmap(_draw)(logits, positions, jnp.where(temperature > 0, temperature, 1.0), top_p, seeds)
  return jnp.where(temperature > 0, drawn, greedy(logits))


def _draw(
  logits: Float[Array, " V"],
  position: Int[Array, ""],
  temperature: Float[Array, ""],
  top_p: Float[Array, ""],
  seed: UInt[Array, ""],
) -> Int[Array, ""]:
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
