"""How much of the prompts of a trace a prefix cache holds, by the size of its pool.

  sparse-serve prefix --trace=conversation_trace.jsonl --pool_tokens=1000000,10000000,0

The share is blocks found / blocks of all prompts. A block has 512 tokens, as many as an id of the trace stands for;
what is left at a prompt's end counts as a block too. The block of a prompt's last token is always computed. Those
before it are found, up to the first that the pool does not hold. Requests come one after the other, and answers are not
kept. When the pool is full, the block goes that was used longest ago. A pool of N tokens has N // 512 blocks: nothing
is found of a prompt that needs more, and stderr says how many do.

An engine's share may be lower or higher. Its `cached_share` is `cached_tokens` / tokens of all prompts. Its blocks are
shorter (`cache.block_tokens`, 32), so it computes less at a prompt's end. It shares nothing if that is less than 1/16
of a prompt. It serves many requests at once, and answers take room in its pool too. `sparse-serve simulate
--trace=FILE` tells that share.

FILE has a line for each request, as Mooncake's traces have:

  {"timestamp": 0, "input_length": 1400, "output_length": 20, "hash_ids": [0, 1, 2]}

- timestamp: milliseconds, a number from 0 on, and none less than that of the line before.
- input_length, output_length: tokens of the prompt and of the answer, integers from 1 to 2147483647.
- hash_ids: integers from 0 to 2147483647, one for each 512 tokens of the prompt and for the rest: ceil(input_length /
  512). Two prompts begin alike as far as their ids do.

A line that is wrong is told by its number, and nothing is counted. The table goes to stdout, and as its last line one
JSON object with its shares.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax import files
from sparse_serve_jax.commands import cli
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.simulation.prefix import hit_shares
from sparse_serve_jax.workloads import Trace, read_trace
from sparse_serve_jax.workloads.traces import HASH_TOKENS

with cli.group("What is asked"):
  _TRACE = flags.DEFINE_string("trace", None, "File of times, lengths and ids of blocks, Mooncake's.", required=True)
  _POOLS = flags.DEFINE_list("pool_tokens", ["0"], "Tokens that pools hold; 0 is all there are.")
_VERBOSE = cli.define_verbose()


def main() -> None:
  pools = cli.numbers(_POOLS, int)
  if not pools:
    raise ValueError("--pool_tokens names no pool; 0 is one of all tokens")
  if wrong := [n for n in pools if n and n < HASH_TOKENS]:
    raise ValueError(f"--pool_tokens: {wrong[0]} is not 0, nor a block of the trace, {HASH_TOKENS} tokens, or more")
  trace = read_trace(_TRACE.value)
  names = [str(n or "all") for n in pools]
  with files.placed(_TRACE.value):
    shares = dict(zip(names, hit_shares(trace, [n // HASH_TOKENS for n in pools]), strict=True))
  longer = {name: _tell_longer(trace, n) for name, n in zip(names, pools, strict=True)}
  cli.end_with(metrics.table({"share of prompts' blocks": shares, "prompts longer than the pool": longer}), shares)


def _tell_longer(trace: Trace, pool: int) -> int:
  """How many prompts need more blocks than a pool of so many tokens has, with a line on stderr if any do; 0 has all."""
  size = pool // HASH_TOKENS
  longer = [n for n in trace.prompt_tokens.tolist() if 0 < size < -(-n // HASH_TOKENS)]
  if longer:
    print(
      f"{len(longer)} of {len(trace)} prompts, of up to {max(longer)} tokens, are longer than a pool of {size} x "
      f"{HASH_TOKENS} tokens (--pool_tokens={pool}): nothing of them is found",
      file=sys.stderr,
    )
  return len(longer)


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, argv=argv)
