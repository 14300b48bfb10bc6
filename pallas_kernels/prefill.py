"""Dense causal attention of a piece of a prompt, over itself and over earlier blocks of the same layer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import triton
from pallas_kernels.copy import gather_blocks
from pallas_kernels.packed import Packed
from pallas_kernels.partial import Partial, merge

_HIGHEST = jax.lax.Precision.HIGHEST
QUERY_TILE = 256  # queries whose scores XLA's attention holds at a time, at most
CLEARED_TOKENS = 512  # after the prefix; cuDNN's tiles of keys are shorter, and it reads none that begins after the end


class Prefix(NamedTuple):
  """What comes before a piece, in blocks of one layer."""

  pool: Float[Array, "K L M 2 S D"]
  slots: Float[Array, "P 2 S D"]
  layer: Int32[Array, ""]
  blocks: Int32[Array, "K N"]  # pool blocks; those beyond `tokens` may be anything
  slot: Int32[Array, "K N"]  # -1 where a block is to be read from the pool
  tokens: Int32[Array, ""]  # a multiple of S


def prefill_attention(
  q: Float[Array, "C K G D"],
  k: Float[Array, "C K D"],
  v: Float[Array, "C K D"],
  prefix: Prefix | None = None,
  *,
  packed: Packed | None = None,
  implementation: str = "xla",
) -> Float[Array, "C K G D"]:
  """Attention output of the queries of a piece. Products are scaled by D ** -0.5.

  Args:
    q: of the piece's tokens.
    k: the piece's own keys; causal.
    v: their values.
    prefix: what comes before the piece. None: it begins the prompt.
    packed: the prompts of the piece, if they are several; then it has no prefix. Between them the output is 0.
    implementation: "xla", "triton" or "interpret": of the reads from the pool. The attention is XLA's, but for
      "triton", which is the GPU's path: there it is cuDNN's in 16 bits, and in float32, which cuDNN lacks, XLA's.

  Raises:
    NotImplementedError: "triton" in 16 bits with a D that cuDNN lacks, or a kernel is to read the prefix, and S or D is
      not a power of two.
  """
  triton.check(implementation)
  depth, cudnn = q.shape[-1], implementation == "triton" and q.dtype.itemsize == 2
  if cudnn and (depth % 8 or depth > 256):
    raise NotImplementedError(
      f"cuDNN's attention needs a head dimension that is a multiple of 8 up to 256, not {depth}"
    )
  earlier, n_earlier = None, None
  if prefix is not None:
    earlier, n_earlier = _gather(prefix, implementation), prefix.tokens
  if packed is not None:
    assert prefix is None
    o = _packed(q, k, v, packed, cudnn)
    return jnp.where(packed.own(jnp.arange(q.shape[0]))[:, None, None, None], o, 0)
  if not cudnn:
    return _prefill_attention_xla(q, k, v, earlier, n_earlier)
  attended = _attention(q, k, v, None)
  if earlier is not None:
    attended = merge(attended, _attention(q, *earlier, n_earlier))
  return attended.output.astype(q.dtype)


def _gather(prefix: Prefix, implementation: str) -> tuple[jax.Array, jax.Array]:
  """Keys and values [N * S, K, D] of the prefix, and zeros for as far as cuDNN may look beyond it."""
  size = prefix.pool.shape[4]
  left = prefix.tokens // size - jnp.arange(prefix.blocks.shape[1])  # blocks of the prefix from each on
  padding = jnp.where(left > -CLEARED_TOKENS // size, -1, -2)
  blocks = jnp.where(left > 0, prefix.blocks, padding)
  return gather_blocks(prefix.pool, prefix.slots, prefix.layer, blocks, prefix.slot, implementation=implementation)


def _cudnn() -> Any:
  """Private: jax.nn.dot_product_attention knows no ragged sequences, and it rounds the log-sum-exp to the dtype of q,
  which leaves no weights to merge by."""
  try:
    from jax._src.cudnn import fused_attention_stablehlo
  except ImportError as error:
    raise NotImplementedError("this jax keeps cuDNN's attention elsewhere; use implementation='xla'") from error
  return fused_attention_stablehlo


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, n_keys: jax.Array | None) -> Partial:
  """cuDNN's attention of q [C, K, G, D] over k, v [t, K, D]: causal, or each over the first `n_keys`."""
  cudnn = _cudnn()
  n_tokens, n_heads, n_group, depth = q.shape
  n_queries = n_read = None
  if n_keys is not None:  # of none, one that was cleared: its product is 0, never NaN
    n_queries, n_read = jnp.full(1, n_tokens, jnp.int32), jnp.maximum(n_keys, 1).reshape(1).astype(jnp.int32)
  result: Any = cudnn.dot_product_attention(
    q.reshape(1, n_tokens, n_heads * n_group, depth),
    k[None],
    v[None],
    q_seqlen=n_queries,
    kv_seqlen=n_read,
    scale=depth**-0.5,
    mask_type=cudnn.MaskType.CAUSAL if n_keys is None else cudnn.MaskType.PADDING,
    return_residual=True,
  )
  o, lse = result  # [1, C, H, D], [1, H, C] float32
  lse = jnp.moveaxis(lse.reshape(n_heads, n_group, n_tokens), 2, 0)
  if n_keys is not None:
    lse = jnp.where(n_keys > 0, lse, -jnp.inf)
  # A normalised o is a partial result whose reference m is its log-sum-exp.
  return Partial(o.reshape(q.shape).astype(jnp.float32), lse, jnp.ones_like(lse))


def _packed(q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed, cudnn: bool) -> jax.Array:
  """Between prompts anything. What is not finite stays in its prompt."""
  if cudnn and _cudnn().check_compute_capability("9.0"):
    return _ragged(q, k, v, packed)
  at = jnp.arange(q.shape[0])
  row, finite = packed.row(at), jnp.isfinite(k) & jnp.isfinite(v)
  k, v = jnp.where(finite, k, 0), jnp.where(finite, v, 0)
  if cudnn:
    o = jax.nn.dot_product_attention(
      q.reshape(1, q.shape[0], -1, q.shape[-1]),
      k[None],
      v[None],
      bias=jnp.where(row[:, None] == row[None], 0.0, -1e30).astype(q.dtype)[None, None],
      scale=q.shape[-1] ** -0.5,
      is_causal=True,
      implementation="cudnn",
    ).reshape(q.shape)
  else:
    o = _prefill_attention_xla(q, k, v, None, None, row)
  lost = jnp.zeros(packed.begins.shape, bool).at[row].max(packed.own(at) & ~finite.all((1, 2)))
  return jnp.where(lost[row][:, None, None, None], jnp.nan, o)


def _ragged(q: jax.Array, k: jax.Array, v: jax.Array, packed: Packed) -> jax.Array:
  """cuDNN's attention of ragged sequences, which needs a Hopper GPU."""
  there = packed.n_tokens > 0
  lengths = jnp.where(there, packed.n_tokens, -1)[None].astype(jnp.int32)
  end = jnp.where(there, packed.begins + packed.n_tokens, 0).max()
  begins = jnp.append(jnp.where(there, packed.begins, -1), -1).astype(jnp.int32)
  offsets = jnp.where(jnp.arange(begins.shape[0]) == there.sum(), end, begins)[None]
  # jax (0.10 to 0.12) takes the stride of a key's token for that of a query's: each query head gets its own.
  k, v = (jnp.repeat(x, q.shape[2], 1)[None] for x in (k, v))
  o: Any = _cudnn().dot_product_attention(
    q.reshape(1, q.shape[0], -1, q.shape[-1]),
    k,
    v,
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=offsets,
    kv_offsets=offsets,
    scale=q.shape[-1] ** -0.5,
    mask_type=_cudnn().MaskType.PADDING_CAUSAL,
  )
  return o.reshape(q.shape)


def _prefill_attention_xla(q, k, v, earlier, n_earlier, row=None) -> jax.Array:
  """Attention to `earlier`, keys and values [N * S, K, D] of which `n_earlier` count, or None; and to k and v, of the
  same `row` [C] if there are several."""
  tokens, n_heads, n_group, depth = q.shape
  before, scale = 0, depth**-0.5
  if earlier is None:
    n_earlier = 0
  else:
    before = earlier[0].shape[0]
    k, v = (jnp.concatenate(x) for x in zip(earlier, (k, v), strict=True))
  k, v = (jnp.moveaxis(x, 1, 0) for x in (k, v))  # [K, before + T, D]
  place = jnp.arange(k.shape[1])
  v = jnp.where(((place < n_earlier) | (place >= before))[None, :, None], v, 0.0)  # 0 * NaN is NaN
  k, v = k.astype(jnp.float32), v.astype(jnp.float32)
  tile = math.gcd(tokens, QUERY_TILE)

  def one(start):
    queries = jax.lax.dynamic_slice_in_dim(q, start, tile, 0)  # [tile, K, G, D]
    at = (start + jnp.arange(tile))[:, None]
    seen = (place[None] < n_earlier) | ((place[None] >= before) & (place[None] - before <= at))  # [tile, T]
    if row is not None:
      seen &= jax.lax.dynamic_slice_in_dim(row, start, tile)[:, None] == row[None]
    by_head = jnp.moveaxis(queries, 0, 2).reshape(n_heads, n_group * tile, depth)  # rows of one head: G x tile
    s = jnp.einsum("kgd,ktd->kgt", by_head.astype(jnp.float32), k, precision=_HIGHEST) * scale
    p = jax.nn.softmax(jnp.where(jnp.tile(seen, (n_group, 1))[None], s, -jnp.inf), axis=-1)
    o = jnp.einsum("kgt,ktd->kgd", p, v, precision=_HIGHEST)
    return jnp.moveaxis(o.reshape(n_heads, n_group, tile, depth), 2, 0)

  out = jax.lax.map(one, jnp.arange(0, tokens, tile))
  return out.reshape(q.shape).astype(q.dtype)
