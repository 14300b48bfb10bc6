"""Prompts of a trace that says which of them begin alike, and how much of them a prefix cache holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparse_serve_jax.memory.allocator import BlockAllocator
from sparse_serve_jax.memory.prefix import PrefixIndex, hash_chain
from sparse_serve_jax.workloads.traces import HASH_TOKENS, Trace


def prompt_of(ids: np.ndarray, n_tokens: int, vocab_size: int) -> np.ndarray:
  """A prompt, int32 [n_tokens], by the ids of its blocks: their digits, lowest first, and zeros. Where the ids of two
  prompts begin alike so do the prompts, and no further.
  """
  tokens = np.zeros(-(-n_tokens // HASH_TOKENS) * HASH_TOKENS, np.int32)
  blocks = tokens.reshape(-1, HASH_TOKENS)
  rest = ids[: len(blocks)]
  for digit in range(HASH_TOKENS):
    if not rest.any():
      break
    blocks[:, digit], rest = rest % vocab_size, rest // vocab_size
  return tokens[:n_tokens]


def hit_shares(trace: Trace, pools: Sequence[int]) -> list[float]:
  """Shares of the blocks of all prompts that a cache holds when their turn comes, one for each size of its pool.

  Requests come one after the other, and what a prompt needs beside others is not there. Output is not kept. Of a prompt
  that is longer than the pool nothing is found, and nothing is kept.

  Args:
    trace: with the ids of blocks.
    pools: blocks of `HASH_TOKENS` tokens; 0, or more than there are: as many as there are.

  Raises:
    ValueError: the trace does not say which prompts begin alike.
  """
  if trace.hash_ids is None:
    raise ValueError("the trace does not say which prompts begin alike: it has no hash_ids")
  chains = [hash_chain(ids.astype(np.int32), 1) for ids in trace.hash_ids]
  n_all = int((-(-trace.prompt_tokens // HASH_TOKENS)).sum())
  return [_hits(trace, chains, min(n, n_all) or n_all) / n_all for n in pools]


def _hits(trace: Trace, chains: Sequence[Sequence[bytes]], n_pool: int) -> int:
  allocator = BlockAllocator(n_pool)
  index, hits, ran = PrefixIndex(allocator), 0, 0
  for chain, n_tokens in zip(chains, trace.prompt_tokens.tolist(), strict=True):
    shared = index.find(chain[: (n_tokens - 1) // HASH_TOKENS])  # the last token is always computed
    own = allocator.allocate(-(-n_tokens // HASH_TOKENS) - len(shared), shared)
    if own is None:  # longer than the pool
      continue
    hits, ran = hits + len(shared), ran + 1
    full, table = chain[: n_tokens // HASH_TOKENS], np.concatenate([shared, own])
    index.enter(full, table)
    index.free(full, table, after=ran)
    allocator.take_release()
    allocator.complete(ran)
  return hits
