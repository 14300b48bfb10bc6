"""How much of the prompts of a trace a prefix cache holds, by the size of its pool.

  sparse-serve prefix --trace=conversation_trace.jsonl --pool_tokens=1000000,10000000,0

The trace says which prompts begin alike (workloads/traces.py: "hash_ids"). Requests come one after the other; what is
kept goes in the order of its last use. Counted are blocks of 512 tokens, and the last, shorter one of a prompt as one.
A prompt's last block is always computed, and nothing is found of a prompt that is longer than the pool.

An engine's `cached_tokens` are others: its blocks are shorter (`cache.block_tokens`, 32), so it also shares a part of
512 tokens, all but the last token; it keeps answers; and it shares nothing if that is less than 1/16 of a prompt.
`sparse-serve simulate` serves a trace in virtual time over the engine's cache.

The table goes to stdout, and as its last line one JSON object with its shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from absl import flags

from sparse_serve_jax.commands import cli
from sparse_serve_jax.serving import metrics
from sparse_serve_jax.simulation.prefix import hit_shares
from sparse_serve_jax.workloads import read_trace
from sparse_serve_jax.workloads.traces import HASH_TOKENS

with cli.group("What is asked"):
  _TRACE = flags.DEFINE_string("trace", None, "File of times, lengths and ids of blocks.", required=True)
  _POOLS = flags.DEFINE_list("pool_tokens", ["0"], "Tokens that pools hold; 0 is all there are.")
_VERBOSE = cli.define_verbose()


def main() -> None:
  pools = cli.numbers(_POOLS, int)
  if not pools:
    raise ValueError("--pool_tokens names no pool; 0 is one of all tokens")
  if wrong := [n for n in pools if n and n < HASH_TOKENS]:
    raise ValueError(f"--pool_tokens: {wrong[0]} is not 0, nor a block of the trace, {HASH_TOKENS} tokens, or more")
  trace, sizes = read_trace(_TRACE.value), [n // HASH_TOKENS for n in pools]
  names = [str(n or "all") for n in pools]
  shares = dict(zip(names, hit_shares(trace, sizes), strict=True))
  blocks = [-(-n // HASH_TOKENS) for n in trace.prompt_tokens.tolist()]
  longer = {name: sum(0 < size < n for n in blocks) for name, size in zip(names, sizes, strict=True)}
  cli.end_with(metrics.table({"share of prompts' blocks": shares, "prompts longer than the pool": longer}), shares)


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, argv=argv)
