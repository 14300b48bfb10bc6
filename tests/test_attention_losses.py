"""The losses of attention, each against loops over tokens, heads and blocks."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.digest import cuboid_mean
from sparse_serve_jax.training import attention_losses


def test_the_digest_loss_is_mass_in_blocks_that_do_not_stand_out(monkeypatch):
  """Against loops, one query after the other."""
  rng, (n_tokens, n_heads, n_group, depth, size) = np.random.default_rng(0), (45, 2, 3, 8, 4)
  q, k = rng.normal(size=(2, n_tokens, n_heads, n_group, depth)), 2 * rng.normal(size=(2, n_tokens, n_heads, depth))
  at, scale, expected = np.array([[44, 17, 30], [12, 3, 41]]), depth**-0.5, []
  for b, i, head in itertools.product(range(2), range(3), range(n_heads)):
    position = at[b, i]
    p = np.exp(scale * q[b, position, head] @ k[b, : position + 1, head].T)  # [G, tokens]
    free = range(1, position // size - 1)
    blocks = [slice(size * j, size * (j + 1)) for j in free]
    if not blocks:
      expected += [0.0, 0.0]
      continue
    mass = np.array([(p[:, block].sum(1) / p.sum(1)).mean() for block in blocks])
    for rule in (lambda x: x.mean(0, keepdims=True), lambda x: np.asarray(cuboid_mean(jnp.asarray(x)))):
      digests = [rule(k[b, block, head]) for block in blocks]
      products = [[np.maximum(one * d[0], one * d[-1]).sum() for d in digests] for one in q[b, position, head]]
      scores = scale * np.mean(products, 0)
      z = (scores - scores.mean()) / np.sqrt(scores.var() + attention_losses.MIN_STD**2)
      expected.append((mass**2 * np.log1p(np.exp(attention_losses.Z_MARGIN - z))).sum())
  monkeypatch.setattr(attention_losses, "BLOCK_TOKENS", size)
  found = attention_losses.digest(*map(jnp.float32, (q, k)), jnp.asarray(at))
  assert found == pytest.approx(np.mean(expected), rel=1e-4) and found > 0.01


def test_sharpness_is_what_attention_is_too_far_from_uniform(monkeypatch):
  """Against loops; attention that lies evenly, or to 99 % in one place and evenly elsewhere, is not too far."""
  monkeypatch.setattr(attention_losses, "MAX_KL_NATS", 2.0)
  rng, depth, at = np.random.default_rng(0), 8, np.array([[44, 17, 0], [12, 3, 41]])
  q, k = 3 * rng.normal(size=(2, 45, 2, 3, depth)), rng.normal(size=(2, 45, 2, depth))
  expected = []
  for b, i, head, group in itertools.product(range(2), range(3), range(2), range(3)):
    logits = k[b, : at[b, i] + 1, head] @ q[b, at[b, i], head, group] / np.sqrt(depth)
    log_p = logits - np.log(np.exp(logits).sum())
    expected.append(max(0.0, (-np.log(log_p.size) - log_p).mean() - 2.0))
  assert 0.2 < np.mean([x > 0 for x in expected]) < 0.8
  found = attention_losses.sharpness(jnp.float32(q), jnp.float32(k), jnp.asarray(at))
  assert found == pytest.approx(np.mean(expected), rel=1e-4)
  monkeypatch.undo()
  one = np.zeros_like(k)
  one[:, 1, :, 0] = np.log(99 * 44) * np.sqrt(depth)
  q[..., 0] = 1.0
  for keys, too_far in (np.zeros_like(k), False), (one, False), (2 * one, True):
    found = attention_losses.sharpness(jnp.float32(q), jnp.float32(keys), jnp.full((2, 1), 44))
    assert (found > 0.1) if too_far else (found == 0)


def test_diffuseness_is_the_mass_outside_few_blocks(monkeypatch):
  """Against loops; the block that is not full yet, and the last one of the sequence, are blocks too."""
  size, depth, at = 4, 8, np.array([[44, 17, 0], [12, 3, 41]])
  monkeypatch.setattr(attention_losses, "BLOCK_TOKENS", size)
  monkeypatch.setattr(attention_losses, "TOP_BLOCKS", 3)
  rng = np.random.default_rng(0)
  q, k, expected = rng.normal(size=(2, 45, 2, 3, depth)), rng.normal(size=(2, 45, 2, depth)), []
  for b, i, head in itertools.product(range(2), range(3), range(2)):
    p = np.exp(k[b, : at[b, i] + 1, head] @ q[b, at[b, i], head].T / np.sqrt(depth))  # [tokens, G]
    p = (p / p.sum(0)).mean(1)
    by_block = sorted(p[start : start + size].sum() for start in range(0, p.size, size))
    expected.append(sum(by_block[:-3]))
  found = attention_losses.diffuseness(jnp.float32(q), jnp.float32(k), jnp.asarray(at))
  assert found == pytest.approx(np.mean(expected), rel=1e-4) and 0.1 < found < 0.9


def test_a_block_that_is_attended_to_is_to_stand_out(monkeypatch):
  """What one query looks for is one key of a block, then all of it; and gradients reach queries and keys."""
  rng, (n_tokens, size, depth) = np.random.default_rng(0), (256, 8, 16)
  q, k = rng.normal(size=(1, n_tokens, 1, 2, depth)), rng.normal(size=(1, n_tokens, 1, depth))
  q[0, 255] = q[0, 255, :, :1]
  one, whole = k.copy(), k.copy()
  one[0, 84], whole[0, 80:88] = 3 * q[0, 255, 0, 0], 3 * q[0, 255, 0, 0]
  monkeypatch.setattr(attention_losses, "BLOCK_TOKENS", size)
  loss = functools.partial(attention_losses.digest, at=jnp.array([[255]]))
  found = [float(loss(jnp.float32(q), jnp.float32(keys))) for keys in (one, whole)]
  assert found[1] < 0.5 * found[0] and found[1] < np.log(2) + 0.1
  grads = jax.grad(loss, argnums=(0, 1))(jnp.float32(q), jnp.float32(one))
  assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-4 for g in grads)
  grads = jax.grad(functools.partial(loss, at=jnp.array([[9]])), argnums=(0, 1))(jnp.float32(q), jnp.float32(one))
  assert all((np.asarray(g) == 0).all() for g in grads)  # no block is free to be chosen
