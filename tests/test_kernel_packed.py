"""Attention of prompts that lie in one piece, against float64: each sees itself alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

import pallas_kernels as kernels
from tests.cases import DTYPES, IMPLEMENTATIONS, REAL, TOLERANCE, assert_rows_close

K, G, D, S = 2, 3, 16, 8
CASES = {  # lengths, tokens of the piece, rows
  "several": ((13, 8, 1, 30, 16), 96, 6),
  "one": ((21,), 24, 2),
  "full": ((40, 24), 64, 2),
}


def pack(case: str, dtype: str, shape=(G, S, D)):
  """q, k, v of a piece that is NaN between its prompts; where they lie; the result, 0 between them."""
  lengths, C, n_rows = CASES[case]
  (group, size, depth), rng = shape, np.random.default_rng(3)
  lengths, C = [n * size // S for n in lengths], C * size // S
  begins = np.full(n_rows, C, np.int32)
  begins[: len(lengths)] = np.cumsum([0, *(-(-n // size) * size for n in lengths[:-1])])
  q, k, v = (np.full((C, K, *dims), np.nan, DTYPES[dtype]) for dims in ((group, depth), (depth,), (depth,)))
  expected = np.zeros(q.shape)
  for begin, n in zip(begins, lengths, strict=False):
    own = slice(begin, begin + n)
    for x in (q, k, v):
      x[own] = rng.normal(size=x[own].shape)
    scores = np.einsum("tkgd,ukd->kgtu", q[own].astype(float), k[own].astype(float)) * depth**-0.5
    scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected[own] = np.einsum("kgtu,ukd->tkgd", p / p.sum(-1, keepdims=True), v[own].astype(float))
  n_tokens = np.zeros(n_rows, np.int32)
  n_tokens[: len(lengths)] = lengths
  return (q, k, v), kernels.Packed(begins, n_tokens), expected


def attend(arrays, packed: kernels.Packed, implementation: str) -> jax.Array:
  attention = jax.jit(functools.partial(kernels.prefill_attention, implementation=implementation))
  return attention(*arrays, packed=packed).astype(jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_each_prompt_attends_to_itself(case: str, dtype: str, implementation: str):
  arrays, packed, expected = pack(case, dtype)
  assert_rows_close(attend(arrays, packed, implementation), expected, TOLERANCE[dtype])


def test_what_is_not_finite_stays_in_its_prompt():
  (q, k, v), packed, expected = pack("several", "float32")
  for x, at in ((q, 3), (k, 17), (v, 45)):  # of the first, the second, and the fourth prompt
    x[at, 0] = np.nan
  actual = np.asarray(attend((q, k, v), packed, "xla"))
  assert all(
    np.isnan(actual[at, 0]).any() for at in (3, 23, 61)
  )  # of q the same token, else the last one of the prompt
  for own in (slice(0, 3), slice(4, 16), slice(24, 32), slice(62, 96)):
    assert_rows_close(actual[own], expected[own], TOLERANCE["float32"])


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", REAL)
def test_real_shapes(name: str, case: str):
  (q, k, v), packed, expected = pack(case, "bfloat16", REAL[name])
  assert_rows_close(attend((q, k, v), packed, "triton"), expected, TOLERANCE["bfloat16"])
  with pytest.raises(AssertionError):
    assert_rows_close(attend((q, v, k), packed, "triton"), expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("case", CASES)
def test_what_cudnn_is_told_of_ragged_sequences(case: str, monkeypatch: pytest.MonkeyPatch):
  """The path of a Hopper GPU, with a stand-in for what needs one: `seqlen` tokens from each offset on, in order."""

  def attention(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    assert mask_type == fused_attention_stablehlo.MaskType.PADDING_CAUSAL and q.shape == k.shape == v.shape
    assert q_seqlen is kv_seqlen and q_offsets is kv_offsets and q_offsets.shape[1] == q_seqlen.shape[1] + 1
    at, (begins, lengths) = jnp.arange(q.shape[1]), (q_offsets[0, :-1], q_seqlen[0])
    there = (at[:, None] >= begins[None]) & (at[:, None] < (begins + lengths)[None]) & (lengths > 0)[None]  # [C, B]
    row = jnp.where(there.any(1), there.argmax(1), -1)
    seen = (row[:, None] == row[None]) & (row >= 0)[:, None] & (at[:, None] >= at[None])
    q, k, v = (jnp.where((row >= 0)[:, None, None], x[0].astype(jnp.float32), 0) for x in (q, k, v))
    p = jax.nn.softmax(jnp.where(seen[None], jnp.einsum("thd,uhd->htu", q, k) * scale, -1e30))
    n = (lengths > 0).sum()
    ends = jnp.where(n > 0, begins[n - 1] + lengths[n - 1], 0)
    o = jnp.where(q_offsets[0, n] == ends, jnp.einsum("htu,uhd->thd", p, v), jnp.nan)
    return jnp.where((row >= 0)[:, None, None], o, jnp.nan)[None].astype(jnp.bfloat16)

  monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda least: least == "9.0")
  monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", attention)
  arrays, packed, expected = pack(case, "bfloat16")
  assert_rows_close(attend(arrays, packed, "triton"), expected, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("case", CASES)
def test_what_cudnn_is_told_elsewhere(case: str, monkeypatch: pytest.MonkeyPatch):
  """A GPU before Hopper adds a bias."""
  attention = jax.nn.dot_product_attention

  def with_xla(*arrays, implementation, **options):
    assert implementation == "cudnn"
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
      return attention(*arrays, implementation="xla", **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", with_xla)
  (q, k, v), packed, expected = pack(case, "bfloat16")
  q = np.where(np.isfinite(q), q, 0)
  actual = attend((q, k, v), packed, "triton")
  assert_rows_close(actual, expected, TOLERANCE["bfloat16"])
