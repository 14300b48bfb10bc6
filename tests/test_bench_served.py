"""The bench client against our own server: what the client measured is what the server counted."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from sparse_serve_jax.benchmarks import endpoint as asking
from tests import forks, jsonl
from tests.fake_endpoint import DONE, STREAM, FakeEndpoint, piece, response, usage
from tests.test_server import KEY, Process

ENGINE = ("iterations", "decode_batch_mean", "hbm_hit_rate", "blocks_attended", "blocks_loaded", "blocks_saved")
COUNTED = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")


def bench(url: str, model: str, *arguments: str) -> tuple[dict, list[str]]:
  flags = [f"--url={url}", f"--model={model}", "--tokenizer=random:tiny", "--workload=text", "--prompt_tokens=150"]
  done = forks.start("experiments.bench", *flags, "--limit=6", "--rate=50", *arguments, OPENAI_API_KEY=KEY)
  assert done.returncode == 0, done.stderr
  *table, last = done.stdout.splitlines()
  return json.loads(last), table


@pytest.mark.slow
def test_our_own_server(tmp_path):
  """Warm-up and a request of somebody else are before; the second run finds its prompts in the cache."""
  server = Process("random:tiny", "--set=cache.dram_bytes=8MiB", "--set=cache.hbm_bytes=700KiB")
  try:
    server.http.post("/v1/completions", json={"prompt": "somebody else", "max_tokens": 3}).raise_for_status()
    names = [*(f"{name}_total" for name in (*COUNTED, "iterations", "blocks_loaded", "blocks_saved")), "decode_batch"]
    start = {name: server.number(name) for name in names}
    told, table = bench(server.url, "random:tiny", f"--out={tmp_path}", "--max_new_tokens=12")
    rows = jsonl.read(tmp_path / "requests.jsonl")
    assert (told["requests"], told["failed"], told["output_tokens"]) == (6, 0, 72)
    assert [told[f"server_{name}"] for name in COUNTED] == [told[name] for name in COUNTED]
    assert told["server_prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    gained = {name: server.number(name) - start[name] for name in names}
    assert gained["requests_total"] > 6 and gained["iterations_total"] > told["iterations"] >= 12
    assert (
      told["blocks_attended"] > told["blocks_loaded"] > 0 and told["blocks_saved"] > 0 and 0 < told["hbm_hit_rate"] <= 1
    )
    assert 1 <= told["decode_batch_mean"] <= 6
    assert {line.split()[0] for line in table} >= {*ENGINE, *(f"server_{name}" for name in COUNTED)}

    again, _ = bench(server.url, "random:tiny", "--max_new_tokens=12", "--nowarm_up")
    assert again["server_cached_tokens"] == again["cached_tokens"] > told["cached_tokens"]
    assert (again["server_requests"], again["server_output_tokens"]) == (6, 72)
    finished, _ = bench(server.url, "random:tiny", f"--out={tmp_path}", "--max_new_tokens=12")  # nothing was left
    assert finished["requests"] == 6 and finished["server_requests"] is finished["iterations"] is None
  finally:
    assert server.close() == 0


def test_other_servers_tell_nothing_of_their_engine():
  """Whether they have /metrics or not."""
  vllm = response("200 OK", "vllm:num_requests_running 3.0\nvllm:prompt_tokens_total 7.0\n", "text/plain")
  for metrics in ([], [vllm, vllm]):
    script = lambda _, __: [STREAM + piece("12", "length") + usage(150, 2) + DONE]  # noqa: E731
    with FakeEndpoint(script, metrics=metrics) as server:
      told, table = bench(server.url, "fake", "--nowarm_up")
    names = [*ENGINE, *(f"server_{name}" for name in COUNTED)]
    assert told["requests"] == 6 and [told[name] for name in names] == [None] * len(names)
    assert [line.split() for line in table if line.split()[0] in names] == [[name, "-"] for name in names]


def test_numbers_of_replicas_are_added_and_those_of_one_that_began_anew_are_none():
  def at(**of: list[float]) -> dict[str, float]:
    return {f'sparse_serve_{name}_total{{replica="{i}"}}': n for name, each in of.items() for i, n in enumerate(each)}

  before = at(iterations=[5.0, 7.0], decode_rows=[9.0, 9.0], decode_steps=[4.0, 4.0], replica_restarts=[0.0, 1.0])
  after = at(iterations=[9.0, 8.0], decode_rows=[19.0, 10.0], decode_steps=[8.0, 5.0], replica_restarts=[0.0, 1.0])
  told = asking.engine_numbers(before, after)
  assert (told["iterations"], told["decode_batch_mean"]) == (5, 2.2)
  assert (told["hbm_hit_rate"], told["server_requests"]) == (None, 0)
  for other in ({}, after | at(iterations=[4.0]), after | at(replica_restarts=[1.0]), at(iterations=[9.0])):
    assert set(asking.engine_numbers(before, other).values()) == {None}
  silent = at(iterations=[5.0], decode_rows=[9.0], decode_steps=[4.0], replica_restarts=[0.0, 1.0])
  for other in ({}, silent):  # a replica that did not answer in time has counted since its start
    assert set(asking.engine_numbers(other, after).values()) == {None}
  assert set(asking.engine_numbers(silent, silent).values()) == {None}
