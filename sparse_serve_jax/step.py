"""The main path: one decode step, one prefill segment, each a pure function jitted with the cache donated.

  decode_step      embed -> for each layer: qkv, append to the tail, attend to selected blocks where they lie, MLP
                   -> logits, sample -> finished tails go to the pool
  prefill_segment  some layers of a piece of a prompt -> its KV into the pool, digests made, the newest into slots

Both are per-device code under `shard_map` over the mesh axis "tp"; `Programs` wraps them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as kernels
from pallas_kernels import residency
from sparse_serve_jax.attention.decode import DecodeRows, Selector, decode_attention
from sparse_serve_jax.attention.methods import get_method
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.memory.kv_cache import KVCache
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.sampling import sample

Array = Any  # of a batch: jax.Array in a program, numpy before

MLP_TILE = 8192  # tokens; bounds the d_ff activations of a long prompt


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is fixed when a program is compiled."""

  model: ModelConfig
  config: EngineConfig
  implementation: str  # of the kernels: "xla", "triton" or "interpret"
  host_pool: bool  # the pool lies in host memory, apart from the device's
  axis: str = "tp"


class SamplingRows(flax.struct.PyTreeNode):
  temperature: Array  # [B] float32, 0 is greedy
  top_p: Array  # [B] float32
  seeds: Array  # [B] uint32


class DecodeBatch(flax.struct.PyTreeNode):
  """The rows of a decode step; a padding row has `rows` = R."""

  rows: Array  # [B] int32
  positions: Array  # [B] int32, tokens already cached
  steps: Array  # [B] int32, decode steps the request has made
  tables: Array  # [B, N] int32
  sampling: SamplingRows


class PrefillBatch(flax.struct.PyTreeNode):
  """Layers [first_layer, first_layer + n_layers) of `n_tokens` prompt tokens from `start` on."""

  tokens: Array  # [C] int32, padded
  start: Array  # int32, a multiple of S
  n_tokens: Array  # int32
  first_layer: Array  # int32
  n_layers: Array  # int32
  row: Array  # int32
  blocks: Array  # [C / S] int32, DRAM blocks of the piece; -1 where a block does not fill
  prefix: Array | None  # [N] int32, the request's table up to `start`, padded with -1; None when the prompt begins
  sampling: SamplingRows


def decode_step(
  setup: Setup, params: llama.Params, cache: KVCache, batch: DecodeBatch
) -> tuple[KVCache, jax.Array, jax.Array]:
  """One token for every row: the cache, tokens [B] int32, and int32 [3]: blocks attended, missed, slots in use."""
  cfg, size = setup.model, setup.config.cache.block_tokens
  n_resident = cache.tail.shape[2]
  real = batch.rows < n_resident
  at = DecodeRows(
    rows=batch.rows,
    tables=batch.tables,
    n_blocks=jnp.where(real, batch.positions // size, 0),
    tail_tokens=jnp.where(real, batch.positions % size + 1, 0),
    steps=batch.steps,
  )
  filled = real & (at.tail_tokens == size)
  new_block = jnp.take_along_axis(batch.tables, (batch.positions // size)[:, None], 1, mode="clip")[:, 0]
  new_block = jnp.where(filled, new_block, -1)

  def layer(selector, i, carry):
    x, cache, counts = carry
    lp = llama.layer_params(params, i)
    q, k, v = llama.qkv(cfg, lp, x, batch.positions)
    cache = _append(setup, cache, i, batch, k, v, new_block)
    o, cache, attended = decode_attention(selector, q, cache, i, at, pool, setup.implementation)
    x = llama.attention_out(cfg, lp, x, o, setup.axis)
    return llama.mlp(cfg, lp, x, setup.axis), cache, counts + attended

  # No layer writes the pool, so it stays out of the loop's carry.
  pool, cache = cache.pool, cache.replace(pool=None)
  x = llama.embed(params, cache.last_token.at[batch.rows].get(mode="clip"))
  carry = x, cache, jnp.zeros(2, jnp.int32)
  dense_until = min(setup.config.sparse.dense_layers, cfg.n_layers)
  for first, end, dense in ((0, dense_until, True), (dense_until, cfg.n_layers, False)):
    if first < end:
      body = functools.partial(layer, Selector.of(setup.config, dense=dense))
      carry = jax.lax.fori_loop(first, end, body, carry)
  x, cache, counts = carry

  cache = _save_tails(setup, cache.replace(pool=pool), batch, new_block)
  logits = llama.logits(cfg, params, x, setup.axis)
  tokens = _sample(logits, batch.positions + 1, batch.sampling)
  cache = cache.replace(last_token=cache.last_token.at[batch.rows].set(tokens, mode="drop"), clock=cache.clock + 1)
  return cache, tokens, jax.lax.psum(jnp.append(counts, _slots_in_use(cache)), setup.axis)


def _append(setup: Setup, cache: KVCache, layer, batch: DecodeBatch, k, v, new_block) -> KVCache:
  """Writes one token's k, v [B, K, D] to the tails; a tail that this fills gets its digest."""
  head = jnp.arange(k.shape[1])[:, None]
  offset = batch.positions % cache.tail.shape[4]
  kv = jnp.stack([k, v], 2).swapaxes(0, 1)  # [K, B, 2, D]
  tail = cache.tail.at[head, layer, batch.rows, :, offset].set(kv, mode="drop")
  keys = tail.at[head, layer, batch.rows, 0].get(mode="clip")  # [K, B, S, D]
  to = jnp.where(new_block >= 0, new_block, cache.digest.shape[2])
  summary = get_method(setup.config.sparse.method).summarize(keys)
  return cache.replace(tail=tail, digest=cache.digest.at[head, layer, to].set(summary, mode="drop"))


def _save_tails(setup: Setup, cache: KVCache, batch: DecodeBatch, new_block: jax.Array) -> KVCache:
  """Moves the tails that filled into the pool and into slots, in all layers at once."""
  n_heads, n_layers = cache.tail.shape[:2]
  layers = jnp.arange(n_layers)[None, None]  # the ranks of this proposal
  blocks = jnp.broadcast_to(new_block[:, None, None], (new_block.shape[0], n_heads, n_layers))
  proposal = residency.propose(cache.maps, layers, blocks)
  rows = jnp.minimum(batch.rows, cache.tail.shape[2] - 1)
  slot = jnp.moveaxis(proposal.slot, 0, 2)  # [K, L, B]
  pool = kernels.store_blocks(cache.pool, cache.tail, 0, rows, new_block, implementation=setup.implementation)
  slots = kernels.place_blocks(cache.slots, cache.tail, rows, slot, implementation=setup.implementation)
  used = jnp.full(blocks.shape[:2], n_layers)
  maps = residency.commit(cache.maps, layers, blocks, proposal, used, cache.stamp(layers), batch.steps)
  return cache.replace(pool=pool, slots=slots, **maps._asdict())


def prefill_segment(
  setup: Setup, params: llama.Params, cache: KVCache, x: jax.Array, batch: PrefillBatch
) -> tuple[KVCache, jax.Array, jax.Array]:
  """Runs some layers of one piece of a prompt.

  `x` [C, d] are the activations the piece's previous segment returned; layer 0 ignores them and embeds the tokens.

  Returns:
    The cache; x for the next segment; int32 [2]: the token that follows the piece if its last layer was run, slots in
    use.
  """
  cfg = setup.model
  positions = batch.start + jnp.arange(batch.tokens.shape[0])
  x = jnp.where(batch.first_layer == 0, llama.embed(params, batch.tokens), x)

  def layer(i, carry):
    x, cache = carry
    lp = llama.layer_params(params, i)
    q, k, v = llama.qkv(cfg, lp, x, positions)
    kv = _to_blocks(k, v, setup.config.cache.block_tokens)
    prefix = None
    if batch.prefix is not None:
      slot = jnp.where(batch.prefix >= 0, cache.slot_of[:, i, batch.prefix], -1)
      prefix = jnp.broadcast_to(batch.prefix, slot.shape)
      prefix = kernels.gather_blocks(cache.pool, cache.slots, i, prefix, slot, implementation=setup.implementation)
    o = kernels.prefill_attention(q, kv, prefix, batch.start, scale=cfg.head_dim**-0.5)
    cache = _save_piece(setup, cache, i, batch, kv)
    x = llama.attention_out(cfg, lp, x, o, setup.axis)
    return _in_tiles(lambda x: llama.mlp(cfg, lp, x, setup.axis), x), cache

  end = batch.first_layer + batch.n_layers
  x, cache = jax.lax.fori_loop(batch.first_layer, end, layer, (x, cache))

  def next_token():
    last = jax.lax.dynamic_slice_in_dim(x, batch.n_tokens - 1, 1)
    logits = llama.logits(cfg, params, last, setup.axis)
    return _sample(logits, (batch.start + batch.n_tokens)[None], batch.sampling)[0]

  token = jax.lax.cond(end == cfg.n_layers, next_token, lambda: cache.last_token[batch.row])
  cache = cache.replace(last_token=cache.last_token.at[batch.row].set(token), clock=cache.clock + 1)
  return cache, x, jnp.stack([token, jax.lax.psum(_slots_in_use(cache), setup.axis)])


def _to_blocks(k: jax.Array, v: jax.Array, size: int) -> jax.Array:
  """k, v [C, K, D] -> [K, C / S, 2, S, D]."""
  kv = jnp.stack([k, v]).reshape(2, -1, size, *k.shape[1:])  # [2, n, S, K, D]
  return kv.transpose(3, 1, 0, 2, 4)


def _save_piece(setup: Setup, cache: KVCache, layer, batch: PrefillBatch, kv: jax.Array) -> KVCache:
  """One layer of a piece, kv [K, n, 2, S, D]: full blocks to the pool, the newest also to slots, the rest a tail."""
  n_heads, n = kv.shape[:2]
  n_full = batch.n_tokens // kv.shape[3]
  ids = jnp.arange(n)
  newest = (ids >= n_full - setup.config.budget_blocks) & (batch.blocks >= 0)  # as many as one step reads
  blocks = jnp.broadcast_to(jnp.where(newest, batch.blocks, -1)[::-1], (1, n_heads, n))  # the newest first
  proposal = residency.propose(cache.maps, layer, blocks)
  used, never = jnp.full((1, n_heads), n), jnp.full(1, residency.NEVER)
  maps = residency.commit(cache.maps, layer, blocks, proposal, used, cache.stamp(layer), never)

  slot = proposal.slot[0, :, ::-1][:, None]  # [K, 1, n]
  source = kv[:, None]
  pool = kernels.store_blocks(cache.pool, source, layer, ids, batch.blocks, implementation=setup.implementation)
  slots = kernels.place_blocks(cache.slots, source, ids, slot, implementation=setup.implementation)
  if setup.host_pool:  # a kernel's result is typed as device memory; the loop's carry is not
    pool = jax.device_put(pool, jax.memory.Space.Host)
  summary = get_method(setup.config.sparse.method).summarize(kv[:, :, 0])  # [K, n, E, D]
  to = jnp.where(batch.blocks >= 0, batch.blocks, cache.digest.shape[2])
  unfinished = jax.lax.dynamic_index_in_dim(kv, jnp.minimum(n_full, n - 1), 1, keepdims=False)
  return cache.replace(
    pool=pool,
    slots=slots,
    digest=cache.digest.at[:, layer, to].set(summary, mode="drop"),
    tail=cache.tail.at[:, layer, batch.row].set(unfinished),
    **maps._asdict(),
  )


def _in_tiles(f, x: jax.Array) -> jax.Array:
  """f over x [C, d] in equal tiles of at most MLP_TILE tokens."""
  n = x.shape[0]
  tiles = next(t for t in range(-(-n // MLP_TILE), n + 1) if n % t == 0)
  return f(x) if tiles == 1 else jax.lax.map(f, x.reshape(tiles, n // tiles, -1)).reshape(x.shape)


def _slots_in_use(cache: KVCache) -> jax.Array:
  return (cache.block_of >= 0).sum(dtype=jnp.int32)


def _sample(logits, positions, rows: SamplingRows) -> jax.Array:
  return sample(logits, positions, rows.temperature, rows.top_p, rows.seeds)


@functools.lru_cache(maxsize=32)
def programs(setup: Setup, mesh: Mesh) -> Programs:
  """The programs of a setup: engines of the same setup share what has been compiled."""
  return Programs(setup, mesh)


class Programs:
  """The jitted programs of one setup. Calling one donates the cache it is given."""

  def __init__(self, setup: Setup, mesh: Mesh):
    cache, whole = kv_cache.cache_specs(), P()
    params = llama.param_specs(setup.model, mesh.size)
    placed = {
      id(cache): kv_cache.cache_shardings(mesh, setup.config.cache.offload),
      id(whole): NamedSharding(mesh, whole),
    }

    def program(f, in_specs, out_specs, donate):
      mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
      placement = jax.tree.map(lambda s: placed[id(s)], out_specs, is_leaf=lambda s: id(s) in placed)
      return jax.jit(mapped, donate_argnums=donate, out_shardings=placement)

    self.decode = program(functools.partial(decode_step, setup), (params, cache, whole), (cache, whole, whole), 1)
    self.prefill = program(
      functools.partial(prefill_segment, setup), (params, cache, whole, whole), (cache, whole, whole), (1, 2)
    )

    def release(cache, freed):
      return cache.replace(**residency.release(cache.maps, freed)._asdict())

    self.release = program(release, (cache, whole), cache, 0)

    def measure(cache, tables, n_blocks, steps):
      w = setup.config.scheduler.working_set_steps
      return jax.lax.psum(kv_cache.working_sets(cache, tables, n_blocks, steps, w), setup.axis)

    self.working_sets = program(measure, (cache, whole, whole, whole), whole, ())
