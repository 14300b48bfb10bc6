"""What a prefix cache is worth on a trace: prompts by the ids of their blocks, and curves over the size of a pool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sparse_serve_jax.serving import run
from sparse_serve_jax.serving.clock import Virtual
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.simulation.prefix import hit_shares, prompt_of
from sparse_serve_jax.workloads import Item, Trace, read_trace
from tests import jsonl
from tests.test_simulation import config, executor

BLOCK = 512
WITHOUT = "the trace does not say which prompts begin alike: it has no hash_ids"


def trace_of(*requests: tuple[int, list[int]]) -> Trace:
  """Of (prompt tokens, ids)."""
  n = len(requests)
  ids = tuple(np.array(ids, np.int64) for _, ids in requests)
  return Trace(np.arange(n) * 10.0, np.array([tokens for tokens, _ in requests]), np.full(n, 3), ids)


# 13 blocks. The second finds two of the first's three, the third its first two, not its own last; the fourth nothing.
REQUESTS = ((1400, [1, 2, 3]), (1500, [1, 2, 4]), (1024, [1, 2]), (2500, [9, 2, 3, 4, 5]))


def test_prompts_begin_alike_where_their_ids_do():
  for vocab in (7, 97, 50_000):
    a, b, c = (prompt_of(np.array(ids), 1500, vocab) for ids in ([0, 5, 60_000], [0, 5, 59_999], [1, 5, 60_000]))
    assert a.dtype == np.int32 and len(a) == 1500 and max(a.max(), b.max(), c.max()) < vocab
    assert (a[: 2 * BLOCK] == b[: 2 * BLOCK]).all() and (a[2 * BLOCK :] != b[2 * BLOCK :]).any()
    assert (a[:8] != c[:8]).any()


def test_shares_by_hand():
  assert hit_shares(trace_of(*REQUESTS), [0]) == [3 / 13]  # of the third its last block is computed
  assert hit_shares(trace_of(*REQUESTS), [3, 2]) == [3 / 13, 0]  # only the third fits two blocks, and is alone there
  repeated = trace_of((1536, [1, 2, 3]), (1536, [4, 5, 6]), (1537, [1, 2, 3, 7]))
  assert hit_shares(repeated, [4, 5, 6, 7, 8]) == [1 / 10, 2 / 10, 3 / 10, 3 / 10, 3 / 10]
  assert hit_shares(trace_of(*REQUESTS), [13, 10**30]) == [3 / 13] * 2  # a pool without end is one of all blocks
  with pytest.raises(ValueError, match=WITHOUT):
    hit_shares(Trace(np.zeros(1), np.ones(1, int), np.ones(1, int)), [0])


@pytest.mark.parametrize(
  ("pools", "status", "text"),
  [
    ("1025,0", 0, '{"all": 0.375, "1025": 0.0}'),
    ("99999999999999999999", 0, '{"99999999999999999999": 0.375}'),
    ("", 2, "error: --pool_tokens names no pool; 0 is one of all tokens"),
    ("0,", 2, "error: --pool_tokens: '' is no integer"),
    ("511", 2, "error: --pool_tokens: 511 is not 0, nor a block of the trace, 512 tokens, or more"),
  ],
)
def test_the_command(tmp_path, pools, status, text):
  """Two prompts of four blocks, of which the second finds three: neither fits a pool of two."""
  row = {"timestamp": 0, "input_length": 1537, "output_length": 1, "hash_ids": [1, 2, 3, 4]}
  jsonl.write(tmp_path / "trace.jsonl", [row, row])
  command = [sys.executable, "-m", "sparse_serve_jax", "prefix", f"--trace={tmp_path / 'trace.jsonl'}"]
  done = subprocess.run([*command, f"--pool_tokens={pools}"], capture_output=True, text=True)
  assert done.returncode == status and text in (done.stderr if status else done.stdout)
  told = "2 of 2 prompts, of up to 1537 tokens, are longer than a pool of 2 x 512 tokens (--pool_tokens=1025): nothing "
  if status:
    assert done.stdout == "" and done.stderr.count("\n") == 1
  elif "," in pools:
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:3]] == ["0", "2"]
    assert done.stderr == f"{told}of them is found\n"
  else:
    assert done.stderr == ""


def test_a_trace_that_does_not_say_what_is_alike(tmp_path):
  jsonl.write(tmp_path / "trace.jsonl", [{"timestamp": 0, "input_length": 1537, "output_length": 1}])
  command = [sys.executable, "-m", "sparse_serve_jax", "prefix", f"--trace={tmp_path / 'trace.jsonl'}"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2 and done.stdout == ""
  assert done.stderr == f"error: {tmp_path / 'trace.jsonl'}: {WITHOUT}\n"


def cached_by_an_engine(trace: Trace, *changes: str) -> tuple[list[int], run.Served]:
  """Tokens that a simulated engine finds of each prompt, one request after the other, and its summary."""
  assert trace.hash_ids is not None
  clock, rows = Virtual(), []
  device = executor(config("cache.prefix=true", "scheduler.max_context=4096", "cache.hbm_bytes=9MiB", *changes), clock)
  prompts = [prompt_of(ids, int(n), 97) for ids, n in zip(trace.hash_ids, trace.prompt_tokens, strict=True)]
  items = [Item(str(i), prompt, 3) for i, prompt in enumerate(prompts)]
  served = run.serve(Engine(device, clock=clock), items, trace.times, lambda end: rows.append(run.row(end, 0.0)))
  return [row["cached_tokens"] for row in rows], served


def test_a_simulation_has_the_same_hits():
  """Blocks of 8 tokens: the share is of tokens, so that parts of blocks count."""
  cached, served = cached_by_an_engine(trace_of(*REQUESTS))
  assert cached == [0, 1024, 1016, 0]
  assert served.summary.cached_tokens == 2040 and served.summary.cached_share == 2040 / 6424


def test_where_an_engine_holds_another_share():
  """More of a prompt's end, with the numbers of docs/prefill.md."""
  blocks_of_32 = ("cache.block_tokens=32", "sparse.sink_tokens=32", "sparse.window_tokens=32")
  alike = trace_of((1023, [1, 2]), (1023, [1, 2]))
  assert hit_shares(alike, [0]) == [0.25] and cached_by_an_engine(alike, *blocks_of_32)[0] == [0, 992]


def test_the_published_traces():
  if not (folder := os.environ.get("SPARSE_SERVE_TRACES")):
    pytest.skip("$SPARSE_SERVE_TRACES is not set: the folder of the published traces")
  for name, share in (("conversation", 0.366), ("synthetic", 0.638)):
    (found,) = hit_shares(read_trace(Path(folder) / "mooncake" / f"{name}_trace.jsonl"), [0])
    assert found == pytest.approx(share, abs=5e-4)
