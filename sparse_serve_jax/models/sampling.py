"""Choosing tokens. A draw depends on its row's logits, settings, seed and position alone, never on the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt


def greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
  """The most likely token of every row of `logits`, int32; ties to the lowest id."""
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def ban(logits: Float[Array, "B V"], banned: Int[Array, "B X"]) -> Float[Array, "B V"]:
  """The `logits` with -inf at each row's `banned` token ids; -1 is none."""
  token = jnp.arange(logits.shape[1], dtype=banned.dtype)[None, None]
  return jnp.where((token == banned[:, :, None]).any(1), -jnp.inf, logits)


def logprobs(
  logits: Float[Array, "B V"], tokens: Int[Array, " B"], n: int
) -> tuple[Float[Array, " B"], Int[Array, "B n"], Float[Array, "B n"]]:
  """Natural log probabilities by `logits`: those of `tokens`, one of each row; then the `n` most likely tokens of each
  row, and theirs."""
  of_all = jax.nn.log_softmax(logits)
  top, ids = jax.lax.top_k(of_all, n)
  return jnp.take_along_axis(of_all, tokens[:, None], 1, mode="clip")[:, 0], ids.astype(jnp.int32), top


def sample(
  logits: Float[Array, "B V"],
  positions: Int[Array, " B"],
  temperature: Float[Array, " B"],
  top_p: Float[Array, " B"],
  seeds: UInt[Array, " B"],
  top_k: Int[Array, " B"],
  min_p: Float[Array, " B"],
) -> Int[Array, " B"]:
  """Draws a token for each row: of the `top_k` most likely ones, of which `top_p` keeps some, of which `min_p` does.

  Args:
    logits: float32.
    positions: int32, of the tokens that are drawn: what makes the draws of a request differ.
    temperature: 0 is `greedy`.
    top_p: the most likely tokens whose mass before them is below it are kept, ties to the lowest id, and never fewer
      than one.
    seeds: uint32, of the requests.
    top_k: int32, 0: all tokens; ties to the lowest id.
    min_p: tokens with less than this part of the probability of the most likely one are left out.

  Returns:
    Token ids, int32.
  """
  scale = jnp.where(temperature > 0, temperature, 1.0)
  drawn = jax.vmap(_draw)(logits, positions, scale, top_p, seeds, top_k, min_p)
  return jnp.where(temperature > 0, drawn, greedy(logits))


def _draw(
  logits: Float[Array, " V"],
  position: Int[Array, ""],
  temperature: Float[Array, ""],
  top_p: Float[Array, ""],
  seed: UInt[Array, ""],
  top_k: Int[Array, ""],
  min_p: Float[Array, ""],
) -> Int[Array, ""]:
  """One row. The Gumbel noise belongs to token ids, so that logits that differ in rounding rarely change the draw."""
  noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position), logits.shape)
  scaled = (logits - logits.max()) / temperature  # at most 0: a tiny temperature cannot overflow
  order = jnp.argsort(scaled, descending=True, stable=True)
  ranked = scaled[order]
  ranked = jnp.where((jnp.arange(ranked.shape[0]) < top_k) | (top_k == 0), ranked, -jnp.inf)
  mass = jax.nn.softmax(ranked)
  before = jnp.cumsum(mass) - mass
  keep = ((before < top_p) | (top_p >= 1)) & (ranked >= jnp.log(min_p))
  keep = keep.at[0].set(True)
  return order[jnp.argmax(jnp.where(keep, ranked + noise[order], -jnp.inf))].astype(jnp.int32)
