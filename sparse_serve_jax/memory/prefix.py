"""The prefix cache: which blocks of the pool hold the beginning of which prompts. Plain Python and numpy.

A block is found by a hash of its tokens, of all tokens before them and of a salt: a chain, one hash for each full
block. Blocks that are found may have owners still or none any more. Those without wait in the allocator, in the order
of their last use, until their place is wanted: the least recently used goes first, and of a chain its end before its
beginning, as whoever uses a block uses all before it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from sparse_serve_jax.memory.allocator import BlockAllocator

LEAST_SHARE = 16  # of a prompt: reading earlier blocks costs a pass over the rest, and programs of its own
_HASH_BYTES = 16  # two chains of one hash are not to be found, by nobody who tries


def hash_chain(
  tokens: np.ndarray, block_tokens: int, salt: str | None = None, before: Sequence[bytes] = ()
) -> list[bytes]:
  """A chain: the hashes of blocks that come first, and those of the full blocks of `tokens`, int32 [T], after them."""
  if before:
    last = before[-1]
  else:
    last = b"" if salt is None else hashlib.blake2b(salt.encode("utf-8", "surrogatepass")).digest()
  chain, n_bytes = list(before), 4 * block_tokens
  content = memoryview(np.ascontiguousarray(tokens, "<i4").tobytes())
  for end in range(n_bytes, len(content) + 1, n_bytes):
    made = hashlib.blake2b(last, digest_size=_HASH_BYTES)
    made.update(content[end - n_bytes : end])
    chain.append(last := made.digest())
  return chain


def is_worth(n_shared: int, n_prompt: int) -> bool:
  """Whether a prompt of so many tokens uses so many that others have computed: 1 / `LEAST_SHARE` of it, or more."""
  return n_shared > 0 and n_shared * LEAST_SHARE >= n_prompt


def begin_alike(prompts: Iterable[np.ndarray], block_tokens: int) -> bool:
  """Whether any prompt, int32 [T] each, begins so much like another that it would use its blocks."""
  prompts = list(prompts)
  chains = [hash_chain(prompt, block_tokens)[: (len(prompt) - 1) // block_tokens] for prompt in prompts]
  times = Counter(itertools.chain.from_iterable(chains))
  alike = [sum(1 for _ in itertools.takewhile(lambda link: times[link] > 1, chain)) for chain in chains]
  return any(is_worth(n * block_tokens, len(prompt)) for n, prompt in zip(alike, prompts, strict=True))


class PrefixIndex:
  """Blocks of a pool by the hashes of their chains. The first block that enters for a hash is the one that is found."""

  def __init__(self, allocator: BlockAllocator):
    """Makes an empty index; the allocator tells it what is given out anew."""
    self._allocator = allocator
    self._block_of: dict[bytes, int] = {}
    self._hash_of: dict[int, bytes] = {}
    allocator.on_evict = self._forget

  def __len__(self) -> int:
    return len(self._block_of)

  def find(self, chain: Iterable[bytes]) -> np.ndarray:
    """The blocks of a chain, int32, up to the first that is not there."""
    blocks = []
    for link in chain:
      block = self._block_of.get(link)
      if block is None:
        break
      blocks.append(block)
    return np.array(blocks, np.int32)

  def enter(self, chain: Sequence[bytes], blocks: np.ndarray) -> np.ndarray:
    """Notes that blocks, int32 [at least as many], hold a chain; they have owners. Returns those that were wanted: a
    hash that is known keeps the block that it has.
    """
    entered = []
    for link, block in zip(chain, blocks.tolist(), strict=False):
      if self._block_of.setdefault(link, block) == block and block not in self._hash_of:
        self._hash_of[block] = link
        entered.append(block)
    made = np.array(entered, np.int32)
    self._allocator.keep(made)
    return made

  def free(self, chain: Sequence[bytes], blocks: np.ndarray, after: int) -> None:
    """Takes blocks back from an owner that used the chain, as `BlockAllocator.free` does; what is found by the chain
    has been used now, its end before its beginning.
    """
    self._allocator.free(blocks, after)
    self._allocator.touch(self.find(chain), after)

  def leave(self, blocks: np.ndarray) -> None:
    """Forgets blocks: what they hold is not to be found. Those that are not here do not matter."""
    here = [block for block in blocks.tolist() if block in self._hash_of]
    self._forget(here)
    self._allocator.drop(np.array(here, np.int32))

  def _forget(self, blocks: Iterable[int]) -> None:
    for block in blocks:
      del self._block_of[self._hash_of.pop(block)]
