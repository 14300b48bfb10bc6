"""The main path: one decode step, one prefill segment, each a pure function jitted with the cache donated.

  decode_step      embed -> for each layer: qkv, append to the tail, attend to selected blocks where they lie, MLP
                   -> finished tails go to the pool -> logits, sample
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
from sparse_serve_jax.attention.decode import LayerRows, Selector, decode_attention
from sparse_serve_jax.config import EngineConfig, ModelConfig
from sparse_serve_jax.memory import kv_cache
from sparse_serve_jax.memory.kv_cache import KVCache
from sparse_serve_jax.models import llama
from sparse_serve_jax.models.sampling import ban, greedy, sample

Array = Any  # of a batch: jax.Array in a program, numpy before

AXIS = "tp"  # of the mesh
MLP_TILE = 8192  # tokens; bounds the d_ff activations of a long prompt


@dataclasses.dataclass(frozen=True)
class Setup:
  """What is fixed when a program is compiled. Engines of equal setups share their programs."""

  model: ModelConfig
  selector: Selector
  dense_layers: int
  newest_blocks: int  # at most so many blocks of a piece of a prompt enter slots, where the next piece reads them
  working_set_steps: int
  offload: bool
  implementation: str  # of the kernels: "xla", "triton" or "interpret"

  @classmethod
  def of(cls, model: ModelConfig, config: EngineConfig, implementation: str) -> Setup:
    return cls(
      model=model,
      selector=Selector.of(config),
      dense_layers=min(config.sparse.dense_layers, model.n_layers),
      newest_blocks=config.budget_blocks,
      working_set_steps=config.scheduler.working_set_steps,
      offload=config.cache.offload,
      implementation=implementation,
    )

  @property
  def host_pool(self) -> bool:
    """Whether the pool lies in memory that is not the device's own."""
    return self.offload and kv_cache.host_memory_kind() is not None


class SamplingRows(flax.struct.PyTreeNode):
  temperature: Array  # [B] float32, 0 is greedy
  top_p: Array  # [B] float32
  seeds: Array  # [B] uint32
  banned: Array  # [B, X] int32, token ids that are not drawn, padded with -1


class DecodeBatch(flax.struct.PyTreeNode):
  """The rows of a decode step; a padding row has `rows` = R."""

  rows: Array  # [B] int32
  positions: Array  # [B] int32, tokens already cached
  steps: Array  # [B] int32, decode steps the request has made
  tables: Array  # [B, N] int32
  # None if every row takes its most likely token, which is a program of its own: a branch in one would make the host
  # wait in every step.
  sampling: SamplingRows | None


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
  cfg = setup.model
  n_resident, size = cache.tail.shape[2], cache.tail.shape[4]
  real = batch.rows < n_resident
  at = LayerRows(
    rows=batch.rows,
    tables=batch.tables,
    n_blocks=jnp.where(real, batch.positions // size, 0),
    tail_tokens=jnp.where(real, batch.positions % size + 1, 0),
    steps=batch.steps,
  )
  new_block = jnp.take_along_axis(batch.tables, (batch.positions // size)[:, None], 1, mode="clip")[:, 0]
  new_block = jnp.where(at.tail_tokens == size, new_block, -1)  # of the tails that this token fills

  def layer(selector, i, carry):
    x, cache, counts, given = carry
    lp = llama.layer_params(params, i)
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    cache = cache.replace(tail=_append(cache.tail, i, batch, k, v))
    on = setup.implementation
    o, cache, attended, given = decode_attention(selector, q, cache, i, at, pool, victims, given, on)
    x = llama.attention_out(lp, x, o, AXIS)
    return llama.mlp(cfg, lp, x, AXIS), cache, counts + attended, given

  # No layer writes the pool, so it stays out of the loops' carry.
  pool, cache = cache.pool, cache.replace(pool=None)
  cache, victims = _begin(cache)
  x = llama.embed(params, cache.last_token.at[batch.rows].get(mode="clip"))
  cos_sin = llama.rope(cfg, batch.positions)
  carry = x, cache, jnp.zeros((2, x.shape[0], cache.tail.shape[0]), jnp.int32), jnp.int32(0)
  for first, end, selector in (
    (0, setup.dense_layers, setup.selector.dense),
    (setup.dense_layers, cfg.n_layers, setup.selector),
  ):
    if first < end:
      carry = jax.lax.fori_loop(first, end, functools.partial(layer, selector), carry)
  x, cache, counts, given = carry

  cache = _save_tails(setup, cache.replace(pool=pool), batch, new_block, victims, given)
  logits = llama.logits(cfg, params, x, AXIS)
  tokens = _sample(logits, batch.positions + 1, batch.sampling)
  last_token = cache.last_token.at[batch.rows].set(tokens, mode="drop")
  counts = jax.lax.psum(jnp.append(counts.sum((1, 2)), _slots_in_use(cache)), AXIS)
  return cache.replace(last_token=last_token, clock=cache.clock + 1), tokens, counts


def _begin(cache: KVCache) -> tuple[KVCache, kernels.Victims]:
  """The cache as a step begins, and the slots in the order in which it gives them up."""
  since = cache.stamp(0)
  maps = kernels.saturate(cache.maps, since)
  return cache.replace(maps=maps), kernels.victims(kernels.ages(maps, since), since)


def _append(tail: jax.Array, layer, batch: DecodeBatch, k, v) -> jax.Array:
  """Writes one token's k, v [B, K, D] to the tails."""
  head = jnp.arange(k.shape[1])[:, None]
  offset = batch.positions % tail.shape[4]
  kv = jnp.stack([k, v], 2).swapaxes(0, 1)  # [K, B, 2, D]
  return tail.at[head, layer, batch.rows, :, offset].set(kv, mode="drop")


def _save_tails(
  setup: Setup, cache: KVCache, batch: DecodeBatch, new_block: jax.Array, victims: kernels.Victims, given: jax.Array
) -> KVCache:
  """Copies the tails that filled to the pool and to slots, and makes their digests, in all layers at once."""
  n_heads, n_layers, n_resident = cache.tail.shape[:3]
  layers = jnp.arange(n_layers)  # the ranks of this list
  blocks = jnp.broadcast_to(new_block[:, None, None], (new_block.shape[0], n_heads, n_layers))
  options = dict(implementation=setup.implementation)
  whole = jnp.full(blocks.shape[:2], n_layers)
  located = kernels.propose(cache.maps, victims, layers, blocks, whole, given=given, group=1, **options)
  maps = kernels.commit(cache.maps, layers, located, whole, cache.stamp(layers), batch.steps, **options)

  rows = jnp.minimum(batch.rows, n_resident - 1)
  slot = jnp.moveaxis(located.place, 0, 2)  # [K, L, B]
  pool = kernels.store_blocks(cache.pool, cache.tail, 0, rows, new_block, **options)
  slots = kernels.place_blocks(cache.slots, cache.tail, rows, slot, **options)
  digest = _store_digests(setup, cache.digest, cache.tail, 0, rows, new_block)
  return cache.replace(pool=pool, slots=slots, digest=digest, maps=maps)


def prefill_segment(
  setup: Setup, params: llama.Params, cache: KVCache, x: jax.Array, batch: PrefillBatch
) -> tuple[KVCache, jax.Array, jax.Array]:
  """Runs some layers of one piece of a prompt.

  `x` [C, d] are the activations the piece's previous segment returned; layer 0 ignores them and embeds the tokens.

  Returns:
    The cache; x for the next segment; int32 [3]: the token that follows the piece if its last layer was run, earlier
    blocks read from DRAM, slots in use.
  """
  cfg = setup.model
  positions = batch.start + jnp.arange(batch.tokens.shape[0])
  x = jnp.where(batch.first_layer == 0, llama.embed(params, batch.tokens), x)
  cos_sin = llama.rope(cfg, positions)

  def layer(i, carry):
    x, cache, loaded = carry
    lp = llama.layer_params(params, i)
    q, k, v = llama.qkv(cfg, lp, x, cos_sin)
    prefix = None
    if batch.prefix is not None:
      slot = jnp.where(batch.prefix >= 0, cache.maps.slot_of[:, i, batch.prefix], -1)  # [K, N]
      blocks = jnp.broadcast_to(batch.prefix, slot.shape)
      prefix = kernels.Prefix(cache.pool, cache.slots, i, blocks, slot, batch.start)
      loaded += ((blocks >= 0) & (slot < 0)).sum(dtype=jnp.int32) if setup.offload else 0
    o = kernels.prefill_attention(q, k, v, prefix, implementation=setup.implementation)
    cache = _save_piece(setup, cache, i, batch, k, v, victims)
    x = llama.attention_out(lp, x, o, AXIS)
    return _in_tiles(lambda x: llama.mlp(cfg, lp, x, AXIS), x), cache, loaded

  cache, victims = _begin(cache)
  end = batch.first_layer + batch.n_layers
  x, cache, loaded = jax.lax.fori_loop(batch.first_layer, end, layer, (x, cache, jnp.int32(0)))

  def next_token():
    last = jax.lax.dynamic_slice_in_dim(x, batch.n_tokens - 1, 1)
    logits = llama.logits(cfg, params, last, AXIS)
    return _sample(logits, (batch.start + batch.n_tokens)[None], batch.sampling)[0]

  token = jax.lax.cond(end == cfg.n_layers, next_token, lambda: cache.last_token[batch.row])
  cache = cache.replace(last_token=cache.last_token.at[batch.row].set(token), clock=cache.clock + 1)
  counts = jax.lax.psum(jnp.stack([loaded, _slots_in_use(cache)]), AXIS)
  return cache, x, jnp.concatenate([token[None], counts])


def _save_piece(
  setup: Setup, cache: KVCache, layer, batch: PrefillBatch, k: jax.Array, v: jax.Array, victims: kernels.Victims
) -> KVCache:
  """One layer of a piece, k, v [C, K, D]: full blocks to the pool, the newest also to slots, the rest to the tail."""
  n_heads, size = k.shape[1], cache.tail.shape[4]
  kv = jnp.stack([k, v]).reshape(2, -1, size, *k.shape[1:]).transpose(3, 1, 0, 2, 4)  # [K, n, 2, S, D]
  n, n_full = kv.shape[1], batch.n_tokens // size
  ids = jnp.arange(n)
  newest = (ids >= n_full - setup.newest_blocks) & (batch.blocks >= 0)
  blocks = jnp.broadcast_to(jnp.where(newest, batch.blocks, -1)[::-1], (1, n_heads, n))  # the newest first
  options = dict(implementation=setup.implementation)
  given = (layer - batch.first_layer) * newest.sum(dtype=jnp.int32) * n_heads  # by the layers before, at most
  whole, never = jnp.full((1, n_heads), n), jnp.full(1, kernels.NEVER)
  located = kernels.propose(cache.maps, victims, layer, blocks, whole, given=given, group=1, **options)
  maps = kernels.commit(cache.maps, layer, located, whole, cache.stamp(layer), never, **options)

  source, slot = kv[:, None], located.place[0, :, ::-1][:, None]  # [K, 1, n, ...]
  pool = kernels.store_blocks(cache.pool, source, layer, ids, batch.blocks, **options)
  slots = kernels.place_blocks(cache.slots, source, ids, slot, **options)
  if setup.host_pool:  # a kernel's result is typed as device memory; the loop's carry is not
    pool = jax.device_put(pool, jax.memory.Space.Host)
  digest = _store_digests(setup, cache.digest, source, layer, ids, batch.blocks)
  unfinished = jax.lax.dynamic_index_in_dim(kv, jnp.minimum(n_full, n - 1), 1, keepdims=False)
  tail = cache.tail.at[:, layer, batch.row].set(unfinished)
  return cache.replace(pool=pool, slots=slots, digest=digest, maps=maps, tail=tail)


def _store_digests(setup: Setup, digest: jax.Array, *of_blocks) -> jax.Array:
  method = setup.selector.method
  implementation = method.runs_on(setup.implementation)
  return kernels.store_digests(digest, *of_blocks, rule=method.summarize, implementation=implementation)


def _in_tiles(f, x: jax.Array) -> jax.Array:
  """f over x [C, d] in equal tiles of at most MLP_TILE tokens, padded as needed."""
  n = x.shape[0]
  tiles = -(-n // MLP_TILE)
  if tiles == 1:
    return f(x)
  padded = jnp.pad(x, ((0, -n % tiles), (0, 0)))
  return jax.lax.map(f, padded.reshape(tiles, -1, x.shape[1])).reshape(padded.shape)[:n]


def _slots_in_use(cache: KVCache) -> jax.Array:
  return (cache.maps.block_of >= 0).sum(dtype=jnp.int32)


def _sample(logits, positions, rows: SamplingRows | None) -> jax.Array:
  if rows is None:
    return greedy(logits)
  return sample(ban(logits, rows.banned), positions, rows.temperature, rows.top_p, rows.seeds)


@functools.lru_cache(maxsize=32)
def programs(setup: Setup, mesh: Mesh) -> Programs:
  """The programs of a setup: engines of the same setup share what has been compiled."""
  return Programs(setup, mesh)


class Programs:
  """The jitted programs of one setup. Calling one donates the cache it is given."""

  def __init__(self, setup: Setup, mesh: Mesh):
    specs, whole = kv_cache.cache_specs(), P()
    params = llama.param_specs(setup.model, mesh.size)
    cache, everywhere = kv_cache.cache_shardings(mesh, setup.offload), NamedSharding(mesh, whole)

    def program(f, in_specs, out_specs, out_shardings, donate=()):
      mapped = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
      # A pool in host memory stays there only if the result says so.
      return jax.jit(mapped, donate_argnums=donate, out_shardings=out_shardings)

    def release(cache, freed):
      return cache.replace(maps=kernels.release(cache.maps, freed))

    def working_sets(cache, tables, n_blocks, steps):
      counts = kv_cache.working_sets(cache, tables, n_blocks, steps, setup.working_set_steps)
      return jax.lax.psum(counts, AXIS)

    out, placed = (specs, whole, whole), (cache, everywhere, everywhere)
    decode, prefill = functools.partial(decode_step, setup), functools.partial(prefill_segment, setup)
    self.decode = program(decode, (params, specs, whole), out, placed, (1,))
    self.prefill = program(prefill, (params, specs, whole, whole), out, placed, (1, 2))
    self.release = program(release, (specs, whole), specs, cache, (0,))
    self.working_sets = program(working_sets, (specs, whole, whole, whole), whole, everywhere)
