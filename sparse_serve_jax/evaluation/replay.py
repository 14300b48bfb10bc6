"""What sparse attention does to a model's predictions, many settings on one prefill.

A sequence is run once with dense attention, or its prompt with sparse attention (`sparse_prefill`). Then its last
tokens are run again as decode steps, with sparse attention, over the keys and values of what precedes them. Tokens and
counts of blocks are those of the engine's decode steps over such a cache, but all steps are made at once, since each
layer's keys of all of them are there when the layer begins. Every key is looked at and what is not selected is masked,
so the true attention mass comes with it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as kernels
from pallas_kernels import StopRule, triton
from pallas_kernels.score import across_heads
from pallas_kernels.stop import LOG2_E
from sparse_serve_jax.attention.decode import Selector
from sparse_serve_jax.attention.methods import Method
from sparse_serve_jax.attention.prefill import TileSelector
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.models import llama

ALL = 1 << 30  # blocks: no limit
PROMPT_TOKENS = 1024
CLAIMS = {  # what a stop test goes by
  "rule": "what the rule of the configuration claims",
  "certified": "an upper bound of what is unread",
  "true": "the true mass, which no engine knows",
}


class _Program(NamedTuple):
  """The part of a configuration that is compiled in."""

  method: Method | None  # None is the oracle: blocks are ranked by their true attention mass
  reduce: str
  group: int  # blocks between two stop tests
  block_tokens: int
  claims: str = "rule"  # a name in CLAIMS
  rule: StopRule = StopRule()

  @classmethod
  def of(cls, config: EngineConfig, oracle: bool, claims: str) -> _Program:
    config.sparse.refuse_drawn("measurements of accuracy")
    selector, name = Selector.of(config), "oracle" if oracle else config.sparse.method
    if claims not in CLAIMS:
      raise ValueError(f"{claims=} is none of {', '.join(CLAIMS)}")
    if claims == "certified" and name != "min_max":
      raise ValueError(f"a certified stop needs the bound that min_max digests give, not {name}")
    method = None if oracle else selector.method
    size = config.cache.block_tokens
    return cls(method, selector.reduce, selector.group_blocks, size, claims, selector.rule)


class _Setting(NamedTuple):
  """The part of a configuration that is an argument of the program; counts are int32, of blocks."""

  budget: jax.Array  # sinks and window included
  sinks: jax.Array
  window: jax.Array
  dense_layers: jax.Array  # the first layers, which attend to everything
  threshold: jax.Array  # float32, PSA's epsilon; above 1: no stop test

  @classmethod
  def of(cls, config: EngineConfig) -> _Setting:
    selector, sparse = Selector.of(config), config.sparse
    return cls(
      budget=jnp.int32(ALL if selector.limit is None else selector.limit),
      sinks=jnp.int32(selector.sinks),
      window=jnp.int32(selector.window),
      dense_layers=jnp.int32(sparse.dense_layers),
      threshold=jnp.float32(sparse.fixed_threshold if selector.progressive else 2.0),
    )


class Replay(NamedTuple):
  """n decode steps of B sequences. Steps beyond a sequence's end hold anything."""

  best: jax.Array  # [B, n] int32, the most likely next token
  right: jax.Array  # [B, n] bool, it is the next token
  nats: jax.Array  # [B, n] float32, its negative log-likelihood
  blocks: jax.Array  # [B, n, L, K] int32, attended, the tail not counted
  mass: jax.Array  # [B, n, L, K, G] float32, the share of the attention mass in what is attended, the tail included
  error: jax.Array  # of a head's output, |o - o_dense| / |o_dense|, o_dense being dense attention of the same query
  estimate: jax.Array  # what the stop test went by where it stopped, see CLAIMS
  excess: jax.Array  # by how much that was more than the share: where it stopped, or certified in the worst test
  selected: jax.Array | None  # [B, n, L, K, N] bool
  # Of a sparse prefill: what it read of the blocks before its tiles, as a share [B, L] float32; and the mean negative
  # log-likelihood of a prompt's last tokens [B] float32, at most PROMPT_TOKENS, by the prefill itself.
  read: jax.Array | None = None
  prompt_nats: jax.Array | None = None


class Prefill(NamedTuple):
  """Whole sequences that have been run."""

  tokens: jax.Array  # [B, T] int32, padded
  keys: jax.Array  # [L, B, T, K, D]
  values: jax.Array  # [L, B, T, K, D]
  read: jax.Array | None = None  # as in Replay
  prompt_nats: jax.Array | None = None


@functools.partial(jax.jit, static_argnums=0)
def prefill(cfg: ModelConfig, params: llama.Params, tokens: jax.Array) -> Prefill:
  """Runs tokens [B, T] int32 densely through the model `cfg`, whose `params` are arrays."""
  cos_sin = llama.rope(cfg, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])

  def layer(x, lp):
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    o = llama.causal_attention(cfg, q, k, v)
    return llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None), (k, v)

  return Prefill(tokens, *lax.scan(layer, llama.embed(params, tokens), params["layers"])[1])


class _Tiled(NamedTuple):
  """The part of a configuration that a sparse prefill is compiled for."""

  selector: TileSelector
  dense_layers: int
  block_tokens: int
  implementation: str

  def attend(self, layer, q, k, v, n_tokens) -> tuple[jax.Array, jax.Array]:
    """o [T, K, G, D] of a prompt of `n_tokens`, padded to T, and the share of blocks read; `PrefillAttention`'s."""
    size, n_heads = self.block_tokens, k.shape[1]
    tiles, places = kernels.Tiles.of(q.shape[0], size), kernels.Places(0, -(-n_tokens // size), 0)
    digests = self.selector.method.summarize(k.reshape(-1, size, *k.shape[1:]).transpose(2, 0, 1, 3))
    lists = self.selector.lists(q, n_tokens, digests, tiles, places, self.implementation)
    n_all = places.seen(tiles, self.selector.rule)[0].sum() * n_heads
    share = jnp.where(n_all > 0, lists.length.sum() / jnp.maximum(n_all, 1), 1.0)

    def dense():
      o = kernels.prefill_attention(q, k, v)
      return o, jnp.ones_like(share)

    def sparse():
      return kernels.prefill_tiles(q, k, v, lists, tiles, implementation=self.implementation), share

    return lax.cond(layer < self.dense_layers, dense, sparse)


def sparse_prefill(
  cfg: ModelConfig, params: llama.Params, config: EngineConfig, tokens: np.ndarray, start: np.ndarray
) -> Prefill:
  """Runs prompts tokens[b, :start[b]], each in one piece; what follows one is as padding to it.

  `cfg` and `params` are as of `prefill`; `config.sparse` says what is read.

  Raises:
    ValueError: `config.sparse.prefill` is dense.
  """
  selector, sparse = TileSelector.of(config), config.sparse
  if selector is None:
    raise ValueError(f"sparse.prefill={sparse.prefill!r} selects nothing")
  # XLA masks what a tile does not read: 5 s for 8 prompts of 16k tokens. The kernel has been run in 16 bits only.
  by_kernel = llama.attends_fused(cfg) and config.implementation != "xla" and triton.plgpu is not None
  implementation = "triton" if by_kernel and cfg.head_dim & (cfg.head_dim - 1) == 0 else "xla"
  tiled = _Tiled(selector, sparse.dense_layers, config.cache.block_tokens, implementation)
  return _sparse_prefill(cfg, tiled, params, tokens, start)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sparse_prefill(cfg, tiled: _Tiled, params, tokens, start) -> Prefill:
  cos_sin = llama.rope(cfg, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])

  def layer(carry, lp):
    x, index = carry
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    o, share = lax.map(lambda one: tiled.attend(index, *one), (q, k, v, start))
    x = llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None)
    return (x, index + 1), (k, v, share)

  def nats(of):
    """Of the last n tokens of a prompt that have one before them."""
    x, tokens, start = of
    n = min(PROMPT_TOKENS, tokens.shape[0] // 2)
    at = start - 1 - n + jnp.arange(n)
    logits = llama.logits(cfg, params, x[jnp.maximum(at, 0)], None)
    target = tokens[jnp.maximum(at, 0) + 1]
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0]
    return jnp.where(at >= 0, each, 0.0).sum() / jnp.maximum((at >= 0).sum(), 1).astype(jnp.float32)

  first = llama.embed(params, tokens), jnp.int32(0)
  (x, _), (keys, values, read) = lax.scan(layer, first, params["layers"])
  return Prefill(tokens, keys, values, read.T, lax.map(nats, (x, tokens, start)))


def replay(
  cfg: ModelConfig,
  params: llama.Params,
  config: EngineConfig,
  dense: Prefill,
  start: np.ndarray,
  n_steps: int,
  *,
  oracle: bool = False,
  claims: str = "rule",
) -> Replay:
  """Runs decode steps over a prefill. Only what `_Program` holds of a configuration is compiled anew.

  Args:
    cfg: the model.
    params: of the model.
    config: how much is attended to, and how it is selected; its S divides T.
    dense: the sequences.
    start: [B] int32, the position of the first token that is a decode step's input, at least 1.
    n_steps: n; steps are at start, start + 1, ...
    oracle: blocks are ranked by their true attention mass.
    claims: a name in CLAIMS, what the stop test goes by.

  Returns:
    Replay, of the predictions of tokens start + 1, start + 2, ...

  Raises:
    ValueError: no such claims, or they are certified and the method's score is no bound.
  """
  program = _Program.of(config, oracle, claims)
  found = _replay(
    cfg, program, params, _Setting.of(config), dense._replace(read=None, prompt_nats=None), start, n_steps
  )
  return found._replace(read=dense.read, prompt_nats=dense.prompt_nats)


@functools.partial(jax.jit, static_argnums=(0, 1, 6))
def _replay(cfg, program: _Program, params, setting: _Setting, dense: Prefill, start, n_steps) -> Replay:
  one = functools.partial(_replay_one, cfg, program, params, setting, n_steps)
  of_sequences: Any = 0, 1, 1  # axes of tokens, keys and values
  return jax.vmap(one, in_axes=(Prefill(*of_sequences), 0))(dense, start)


def _replay_one(cfg, program: _Program, params, setting: _Setting, n_steps, dense: Prefill, start) -> Replay:
  """Of one sequence: tokens [T], keys and values [L, T, K, D]."""
  tokens = dense.tokens
  at = start + jnp.arange(n_steps, dtype=jnp.int32)  # [n]
  positions = jnp.minimum(at, tokens.shape[0] - 1)
  cos_sin = llama.rope(cfg, positions)

  def layer(carry, inputs):
    x, index = carry
    lp, keys, values = inputs
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    keys, values = keys.at[at].set(k, mode="drop"), values.at[at].set(v, mode="drop")
    o, found = _attend(program, setting, index, q, keys, values, positions)
    x = llama.mlp(cfg, lp, llama.attention_out(lp, x, o, None), None)
    return (x, index + 1), found

  first = llama.embed(params, tokens[positions]), jnp.int32(0)
  (x, _), found = lax.scan(layer, first, (params["layers"], dense.keys, dense.values))
  logits = llama.logits(cfg, params, x, None)  # [n, V]
  target = tokens[jnp.minimum(positions + 1, tokens.shape[0] - 1)]
  nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0]
  best = logits.argmax(-1).astype(jnp.int32)
  return Replay(best, best == target, nats, *(jnp.moveaxis(x, 0, 1) for x in found))


class _Ranked(NamedTuple):
  """The blocks of a step and KV head in the order in which they are read; those that do not exist come last."""

  ids: jax.Array  # [n, K, N]
  count: jax.Array  # [n, K], blocks that may be read
  bound: jax.Array | None  # [n, K, G, N] by block, log of a share that it cannot exceed, -inf if it does not exist


class _Mass(NamedTuple):
  """The whole attention mass of a step and query head, as a log in two parts.

  What is compared are logs of shares of it: of large logits, sums would be off by as much as these are rounded.
  """

  largest: jax.Array  # [n, K, G], of the logs of its parts
  rest: jax.Array  # [n, K, G], log of the whole less `largest`

  @classmethod
  def of(cls, by_block: jax.Array, tail: jax.Array, exists: jax.Array) -> _Mass:
    """From logs of the masses of blocks [n, K, G, N], which exist [n, N] or count for nothing, and of the tail."""
    exists = exists[:, None, None]
    largest = jnp.maximum(tail, jnp.where(exists, by_block, -jnp.inf).max(-1))
    of_largest = jnp.where(exists, by_block - largest[..., None], -jnp.inf)
    return cls(largest, jnp.logaddexp(tail - largest, jax.nn.logsumexp(of_largest, -1)))

  def log_share(self, x: jax.Array) -> jax.Array:
    """Of logs of masses [n, K, G, N]."""
    return x - self.largest[..., None] - self.rest[..., None]


def _attend(program: _Program, setting: _Setting, layer, q, keys, values, positions):
  """One layer: q [n, K, G, D] over keys, values [T, K, D] -> o [n, K, G, D] and the last fields of Replay."""
  (n, n_heads, n_group, depth), size = q.shape, program.block_tokens
  n_blocks = positions // size  # full blocks of each step
  precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
  logits = jnp.einsum("nkgd,tkd->nkgt", q, keys, precision=precision, preferred_element_type=jnp.float32) * depth**-0.5
  logits = logits.reshape(n, n_heads, n_group, -1, size)  # [n, K, G, N, S]
  block = jnp.arange(logits.shape[3])
  exists = block[None] < n_blocks[:, None]  # [n, N]
  in_tail = (jnp.arange(block.size * size)[None] <= positions[:, None]).reshape(n, -1, size) & ~exists[..., None]
  by_block = jax.nn.logsumexp(logits, -1)  # [n, K, G, N]
  tail = jax.nn.logsumexp(jnp.where(in_tail[:, None, None], logits, -jnp.inf), (-2, -1))  # [n, K, G]

  whole = _Mass.of(by_block, tail, exists)
  by_block, tail = whole.log_share(by_block), whole.log_share(tail[..., None])[..., 0]
  ranked = _rank(program, setting, layer, q, keys, n_blocks, by_block, whole)
  threshold = jnp.where(layer < setting.dense_layers, 2.0, setting.threshold)
  # No stop test may leave out sinks and window, rounded up to whole groups.
  untested = -(-(setting.sinks + setting.window) // program.group) * program.group
  used, estimate, worst = _stop(program, threshold, untested, ranked, by_block, tail)
  rank = jnp.argsort(ranked.ids, -1)
  selected = rank < used[..., None]  # [n, K, N]

  def output(attended):
    """o [n, K, G, D], of the tokens that are attended to [n, K or 1, 1, N, S]."""
    p = jax.nn.softmax(jnp.where(attended, logits, -jnp.inf).reshape(n, n_heads, n_group, -1), -1)
    return jnp.einsum("nkgt,tkd->nkgd", p, values.astype(jnp.float32), precision=precision)

  o = output((selected[..., None] | in_tail[:, None])[:, :, None])
  o_dense = output((exists[..., None] | in_tail)[:, None, None])
  tiny = jnp.finfo(jnp.float32).tiny
  error = jnp.linalg.norm(o - o_dense, axis=-1) / jnp.maximum(jnp.linalg.norm(o_dense, axis=-1), tiny)
  mass = jnp.exp(jnp.logaddexp(tail, jax.nn.logsumexp(jnp.where(selected[:, :, None], by_block, -jnp.inf), -1)))
  excess = worst if program.claims == "certified" else estimate - mass
  return o, (used, mass, error, estimate, excess, selected)


def _rank(program: _Program, setting: _Setting, layer, q, keys, n_blocks, by_block: jax.Array, whole: _Mass) -> _Ranked:
  """As `pallas_kernels.score` and `select`: sinks and window first, ties to the lowest block.

  `by_block` are logs of the blocks' shares of the `whole` mass; shape comments are those of `_attend`.
  """
  exists = jnp.arange(by_block.shape[-1])[None] < n_blocks[:, None]  # [n, N]
  by_head, reduce = jnp.exp(by_block), "max" if program.reduce == "max" else "mean"  # [n, K, G, N], shares
  if program.method is not None:
    blocks = keys.swapaxes(0, 1).reshape(keys.shape[1], -1, program.block_tokens, keys.shape[2])  # [K, N, S, D]
    digests = program.method.summarize(blocks)  # [K, N, E, D]
    queries, digests = q.astype(jnp.float32), digests.astype(jnp.float32)
    by_head, reduce = program.method.score(queries, digests[None]), program.reduce
  block, last = jnp.arange(by_head.shape[-1])[None], n_blocks[:, None]
  forced = (block < setting.sinks) | (block >= last - setting.window)
  scores = across_heads(by_head, (exists & ~forced)[:, None], q.shape[-1], reduce)
  scores = jnp.where(forced[:, None], jnp.inf, scores)
  scores = jnp.where(exists[:, None], scores, -jnp.inf)
  ids = jnp.argsort(-scores, -1, stable=True)
  limit = jnp.where(layer < setting.dense_layers, ALL, setting.budget)
  count = jnp.broadcast_to(jnp.minimum(n_blocks, limit)[:, None], scores.shape[:2])
  if program.method is not None and (budget := program.method.budget) is not None:
    ordered = jnp.take_along_axis(scores, ids, -1)
    counted = budget(jnp.where(block[None] < limit, ordered, -jnp.inf), count)
    count = jnp.where(layer < setting.dense_layers, count, counted)
  if program.claims != "certified":
    return _Ranked(ids, count, None)
  # No key of a block has a larger product with q than the score, and there are S of them. Of D float32 products both
  # are sums, each off by at most D 2^-24 of the products' sizes (Higham, Accuracy and Stability, section 3.1).
  sizes = jnp.einsum("nkgd,kbd->nkgb", jnp.abs(queries), jnp.abs(digests).max(2), precision=lax.Precision.HIGHEST)
  off = 2 * q.shape[-1] * 2.0**-24 * sizes
  bound = whole.log_share((by_head + off) * q.shape[-1] ** -0.5 + math.log(program.block_tokens))
  return _Ranked(ids, count, jnp.where(exists[:, None, None], bound, -jnp.inf))


def _stop(
  program: _Program, threshold, untested, ranked: _Ranked, by_block, tail
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The stop test after each group of blocks; `by_block` and `tail` are logs of shares of the whole mass.

  The share of mass it goes by is what the rule claims, or the true one, or by `ranked.bound` one that the true share
  cannot be below.

  Returns:
    How many blocks are read [n, K], the share there [n, K, G], and the most by which the share of any test, made or
    not, exceeds the true one [n, K, G].
  """
  size, rule, n_blocks = program.group, program.rule, by_block.shape[-1]
  n_groups = -(-n_blocks // size)  # J
  count = ranked.count[..., None]  # [n, K, 1]

  def in_order(x):
    """[n, K, J, size, G] from [n, K, G, N]; -inf where no group has a block."""
    x = jnp.take_along_axis(x, jnp.broadcast_to(ranked.ids[:, :, None], x.shape), -1)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, n_groups * size - n_blocks)], constant_values=-jnp.inf)
    return jnp.moveaxis(x, 2, -1).reshape(*count.shape[:2], n_groups, size, -1)

  place = jnp.arange(n_groups * size).reshape(1, 1, n_groups, size)
  start, read = place[..., 0], place < count[..., None]  # [1, 1, J], [n, K, J, size]
  lse = jnp.where(read[..., None], in_order(by_block), -jnp.inf)
  seen = jnp.logaddexp(tail[:, :, None], lax.cumlogsumexp(jax.nn.logsumexp(lse, 3), axis=2))  # [n, K, J, G]
  left = jnp.maximum(count - start - size, 0)  # [n, K, J], after the group
  if program.claims == "true":
    claims = jnp.exp(seen)
  elif ranked.bound is None:
    of_group = jnp.where((start >= untested)[..., None], rule.of_group(lse * LOG2_E, read), jnp.inf)

    def test(before, group):
      claims, kept = rule.claim(before, *group)
      return kept, claims

    groups = of_group, seen * LOG2_E, left[..., None].astype(jnp.float32)
    of_each = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), groups)  # [J, n, K, G or 1]
    claims = jnp.moveaxis(lax.scan(test, jnp.full_like(of_each[0][0], jnp.inf), of_each)[1], 0, 2)
  else:
    from_here = lax.cumlogsumexp(jax.nn.logsumexp(in_order(ranked.bound), 3), axis=2, reverse=True)
    unseen = jnp.pad(from_here[:, :, 1:], [(0, 0), (0, 0), (0, 1), (0, 0)], constant_values=-jnp.inf)
    claims = jnp.exp(seen - jnp.logaddexp(seen, unseen))
  enough = rule.passes(claims, threshold, claims.shape[-1]) & (start + size >= untested)
  at = jnp.argmax(enough | (left == 0), -1)  # [n, K]
  worst = jnp.where((start < count)[..., None], claims - jnp.exp(seen), -1.0).max(2)
  used = jnp.minimum((at + 1) * size, ranked.count)
  return used, jnp.take_along_axis(claims, at[..., None, None], 2)[:, :, 0], worst
