"""The ladder: cells that are run once, what is compiled before, goodput's search, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparse_serve_jax.config import ModelConfig, load_config, override
from sparse_serve_jax.ladder import floor, report
from sparse_serve_jax.ladder.cells import ALONE_TOKENS, Ladder, share_equal
from sparse_serve_jax.ladder.goodput import Goodput, passing, search
from sparse_serve_jax.ladder.rungs import check, read_rungs, shapes
from sparse_serve_jax.memory.shape import CacheShape
from sparse_serve_jax.models import load_model
from sparse_serve_jax.serving.engine import Engine
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.serving.request import Request
from sparse_serve_jax.simulation.cost import Work
from sparse_serve_jax.simulation.measure import Iteration
from sparse_serve_jax.workloads import Item
from tests import jsonl
from tests.forks import ROOT, start
from tests.tiny import SMALL_SERVING

RUNGS = ("sparse_serve", "psa")
COMMAND = [
  "--model=random:tiny",
  f"--rungs={','.join(RUNGS)}",
  "--rates=0,20",
  "--limit=3",
  "--prompt_tokens=300",
  "--max_new_tokens=6",
  *[f"--set={change}" for change in SMALL_SERVING],
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
  """In a process of its own, as commands define the same flags."""
  return start("experiments.ladder", *COMMAND, *arguments)


@pytest.mark.slow
def test_cells_are_run_once_and_told_in_every_form(tmp_path):
  done = run(f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout.splitlines()[-1])
  assert list(told) == list(RUNGS) and all(set(of["throughput_tok_s"]) == {"0", "20"} for of in told.values())
  rows = jsonl.read(tmp_path / "cells.jsonl")
  assert [(row["rung"], row["rate"]) for row in rows] == [
    ("sparse_serve", 0.0), ("sparse_serve", None), ("sparse_serve", 20.0), ("psa", 0.0), ("psa", None), ("psa", 20.0),
  ]  # fmt: skip
  assert all(row["requests"] == 3 and row["refused"] == 0 for row in rows if row["rate"] is not None)
  answers = jsonl.read(tmp_path / "answers.jsonl")
  assert [row["request_id"] for row in answers] == 2 * [f"needle-{i}" for i in range(3)]
  assert all(len(row["tokens"]) == 6 and 0 <= row["score"] <= 1 for row in answers)
  iterations = jsonl.read(tmp_path / "iterations.jsonl")
  cells = [row for row in rows if row["rate"] is not None]
  assert [(row["rung"], row["rate"]) for row in iterations] == [(row["rung"], row["rate"]) for row in cells]
  for row, of in zip(cells, iterations, strict=True):
    assert row["iterations"] == len(of["seconds"]) and row["blocks_loaded"] == sum(of["loaded_blocks"])
    assert row["busy_s"] == pytest.approx(sum(of["seconds"]), abs=1e-3)
    assert 0 < row["floor_s"] < row["busy_s"] and row["floor_share"] == pytest.approx(row["floor_s"] / row["busy_s"])
  assert [row["keeps_slo"] for row in cells if not row["rate"]] == [None, None]  # a burst is no rate
  assert rows[0]["tokens_as_first"] == 1 and "programs compiled" in done.stderr
  with (tmp_path / "results.csv").open() as file:
    read = list(csv.DictReader(file))
    assert [float(row["rate"]) for row in read] == [0, 20, 0, 20] and all(float(row["hbm_rate"]) > 0 for row in read)
  assert (tmp_path / "results.md").read_text().count("\n| psa |") == 2

  whole = (tmp_path / "cells.jsonl").read_bytes()
  again = run(f"--out={tmp_path}")
  assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1]) == told
  assert (tmp_path / "cells.jsonl").read_bytes() == whole and "programs compiled" not in again.stderr

  other = run("--set=sparse.window_tokens=24", f"--out={tmp_path}")
  assert other.returncode == 2
  assert "configs.sparse_serve.sparse.window_tokens was 16 and is 24" in other.stderr
  turned = run(f"--rungs={','.join(reversed(RUNGS))}", f"--out={tmp_path}")
  assert turned.returncode == 2 and "compared_with was 'sparse_serve' and is 'psa'" in turned.stderr
  assert (tmp_path / "cells.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
  ("names", "changes", "message"),
  [
    (["dense", "sprase"], [], "did you mean 'sparse'?"),
    (["psa", "psa"], [], "the rung psa is given twice"),
    ([], [], "a ladder has one rung or more, got none"),
    (["psa"], ["cache.load=gather"], "psa: a rung whose parts exclude each other: cache.load='gather'"),
    (RUNGS, ["cache.hbm_bytes=300KiB"], "sparse_serve: cache.hbm_bytes=307200 is below the minimum of .* psa: cache"),
    (["psa"], ["sparse.dense_layers=9"], "psa: sparse.dense_layers=9 is beyond the model's 4"),
  ],
)
def test_rungs_that_cannot_run(names, changes, message):
  model = load_model("random:tiny")
  with pytest.raises(ValueError, match=message):
    shapes(read_rungs(names, [*SMALL_SERVING, *changes]), model.config)


def item(name: str, n_prompt: int, n_output: int, **more) -> Item:
  return Item(name, np.arange(n_prompt, dtype=np.int32), n_output, **more)


def test_rungs_that_cannot_be_compared():
  """A request that only some of them can serve is refused, with a minimum of HBM that is exact."""
  model = load_model("random:tiny").config
  items = [item("a", 300, 20), item("b", 100, 7), item("nobody", 1000, 1)]
  memory = ["cache.dram_bytes=2MiB", "cache.hbm_bytes=400KB"]
  names = ["dense", "sparse", "sparse_serve"]

  def read(*changes: str):
    return read_rungs(names, [*SMALL_SERVING, "scheduler.chunk_tokens=64", *memory, *changes])

  with pytest.raises(ValueError) as caught:
    check(read("cache.hbm_bytes=450KB"), model, items)
  told = re.findall(r"(\w+): a request has 320 tokens, and only \d+ fit; .*?minimum of (\d+) bytes", str(caught.value))
  assert [name for name, _ in told] == ["dense", "sparse"]
  least = {name: int(n) for name, n in told}
  check(read(f"cache.hbm_bytes={max(least.values())}"), model, items)
  for name, n in least.items():
    with pytest.raises(ValueError, match=f"{name}: a request has 320 tokens"):
      check(read(f"cache.hbm_bytes={n - 1}"), model, items)
  check(read("cache.hbm_bytes=450KB"), model, items[1:])
  with pytest.raises(
    ValueError, match="^sparse_serve: .* only 48 fit; cache.dram_bytes=50000 or scheduler.max_context=384 is"
  ):
    check(read("cache.hbm_bytes=2MiB", "cache.dram_bytes=50000"), model, items)
  most = model.max_context
  with pytest.raises(ValueError, match=f"only {most} fit; the model's context is {most} tokens"):
    check(read("cache.hbm_bytes=1GiB", "cache.dram_bytes=1GiB", "scheduler.max_context=0"), model, [item("a", most, 1)])
  one, other = read("cache.hbm_bytes=1MiB"), read("cache.hbm_bytes=2MiB")
  with pytest.raises(
    ValueError, match="one cache.hbm_bytes, these have dense 1048576, sparse 2097152: set one for all"
  ):
    check({"dense": one["dense"], "sparse": other["sparse"]}, model, items)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "configs" / "serving").glob("*.json")))
def test_every_rungs_minimum_is_told_and_exact(name):
  """Of what a rung needs at all, then of what it needs for the shortest request."""
  model, items = load_model("random:tiny").config, [item("a", 300, 20), item("b", 280, 20)]

  def checked(hbm_bytes: int) -> None:
    rungs = read_rungs([name], [*SMALL_SERVING, "cache.dram_bytes=2MiB", f"cache.hbm_bytes={hbm_bytes}"])
    assert shapes(rungs, model)
    check(rungs, model, items)

  def least(hbm_bytes: int) -> int:
    with pytest.raises(
      ValueError, match=rf"^{name}: .*cache.hbm_bytes={hbm_bytes} is below the minimum of \d+ bytes"
    ) as e:
      checked(hbm_bytes)
    return int(re.findall(r"minimum of (\d+)", str(e.value))[0])

  n = least(1000)
  assert least(n - 1) == n
  if name in ("dense", "sparse"):  # the pool lies there, and at first has one block
    block, n = n, least(n)
    assert n > block and least(n - 1) == n
  checked(n)


def test_what_follows_an_answer_is_not_compared(tmp_path):
  items = [item("a", 10, 4, answer_tokens=2), item("b", 10, 4)]
  made = Ladder(load_model("random:tiny"), read_rungs(["dense", "psa"]), items, np.zeros, tmp_path)
  tokens = {"dense": [[1, 2, 3, 4], [5, 6, 7, 8]], "psa": [[1, 2, 9, 9], [5, 6, 9, 9]]}
  for rung, answers in tokens.items():
    for name, answer in zip("ab", answers, strict=True):
      made._folder.answers.append({"rung": rung, "request_id": name, "tokens": answer, "score": None})
  assert made._quality("psa")["tokens_as_first"] == 4 / 6 and made._quality("dense")["tokens_as_first"] == 1


@pytest.mark.parametrize(
  "options", [pytest.param({"temperature": 0.7}, marks=pytest.mark.soak), {"min_tokens": 5, "stop_token_ids": [3]}]
)
def test_what_draws_tokens_is_compiled_before(options, tmp_path):
  """So that no time of it is in a cell."""
  rungs = read_rungs(["sparse_serve"], [*SMALL_SERVING, "sparse.group_blocks=8", "scheduler.working_set_steps=7"])
  items = [item("a", 100, 8, options=options)]
  made = Ladder(load_model("random:tiny"), rungs, items, lambda rate: np.zeros(1), tmp_path)
  jax.clear_caches()
  made._serve.__self__.compiled("sparse_serve")
  after = compiled()
  assert made.cell("sparse_serve", 1.0)["requests"] == 1
  assert not after


@pytest.mark.parametrize(
  "options",
  [{}, {"stop_token_ids": list(range(512))}, pytest.param({"min_tokens": 35}, marks=pytest.mark.soak)],
  ids=["", "stop", "min"],
)
def test_a_rung_alone_runs_for_its_steps_whatever_its_request_asks_for(options, tmp_path):
  """A prompt that leaves no room for so many tokens; a stop token at once, or only after more tokens."""
  rungs = read_rungs(["sparse_serve"], SMALL_SERVING)
  lengths = [(20, 40), (382, 2), (383, 1)]
  items = [Item(str(n), np.arange(n, dtype=np.int32) % 250, output, options) for n, output in lengths]
  made = Ladder(load_model("random:tiny"), rungs, items, np.zeros, tmp_path)
  row = made.alone("sparse_serve")
  assert row["iteration_s"] > 0 and row["prompt_tokens"] + ALONE_TOKENS <= 384


def test_what_no_rung_can_serve_is_held_against_none(tmp_path, monkeypatch):
  rungs = read_rungs(["sparse_serve"], SMALL_SERVING)
  items = [item("a", 20, 4), item("nobody", 1000, 1)]
  made = Ladder(load_model("random:tiny"), rungs, items, lambda rate: np.zeros(2), tmp_path)
  monkeypatch.setattr(made, "alone", lambda rung: {"iteration_s": 1e3})
  cell = made.cell("sparse_serve", 1.0)
  assert (cell["requests"], cell["refused"], cell["keeps_slo"]) == (1, 1, True)


def test_a_rung_for_each_choice_of_values():
  varied = {"scheduler.max_batch": ["2", "4"], "scheduler.batch_control": ["none", "working_set"]}
  rungs = read_rungs(["sparse_serve"], ["cache.lanes=3"], varied)
  assert list(rungs) == [
    f"sparse_serve max_batch={n} batch_control={how}" for n in (2, 4) for how in ("none", "working_set")
  ]
  last = rungs["sparse_serve max_batch=4 batch_control=working_set"]
  assert (last.scheduler.max_batch, last.scheduler.batch_control, last.cache.lanes) == (4, "working_set", 3)
  with pytest.raises(ValueError, match="sparse_serve max_batch=-1: .*max_batch=-1 must not be negative"):
    read_rungs(["sparse_serve"], [], {"scheduler.max_batch": ["-1"]})
  done = start("experiments.ladder", *COMMAND, "--vary=scheduler.max_batch", "--out=OUT")
  assert done.returncode == 2 and "--vary: 'scheduler.max_batch' is not KEY=VALUE" in done.stderr


def test_the_floor_of_a_run_by_hand():
  cfg = ModelConfig(
    vocab_size=10, d_model=8, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=32, max_context=64, dtype="float32"
  )
  shape = CacheShape.of(cfg, override(load_config("sparse_serve"), [*SMALL_SERVING, "scheduler.max_context=64"]), 2)
  rates = floor.Rates(products=1e6, attention=1e5, hbm=1e4, h2d=1e3)
  requests = [
    Request("a", np.zeros(20, np.int32), 1, 0.0),
    Request("b", np.zeros(9, np.int32), 1, 0.0, cached_tokens=8),
  ]
  weights = 8 * 16 * (4 + 2 + 2) + 4 * 16 * 8 + 3 * 8 * 32
  pairs = 20 * 10 + 8.5  # of b one token is new, after eight
  expected = 2 * 3 * weights * 21 / 1e6 + 4 * 3 * 64 * pairs / 1e5
  assert floor.prefill_s(rates, cfg, requests) == pytest.approx(expected)
  nothing = dict.fromkeys(Work._fields, 0)

  def step(attended: int, missed: int) -> Iteration:
    return Iteration(Work(**nothing | {"attended_blocks": attended}), 2, 5, missed, 1.0)

  block, lists = 2 * 8 * 16 * 4, 6  # bytes; layers x heads
  # Matrices, norms and the head, of the embedding two rows; two vectors a digest. The second step waits for PCIe.
  fixed = 4 * (3 * (weights + 2 * 8) + 8 + (10 + 2) * 8) + 5 * lists * 2 * 16 * 4
  both = [fixed / 1e4 + (60 + 2 * lists) * block / 1e4, fixed / 1e4 + 30 * block / 1e3]
  iterations = [step(60, 2), step(60, 30), Iteration(Work(**nothing | {"prefill_tokens": 9}), 0, 0, 0, 1.0)]
  assert floor.decode_s(rates, cfg, shape, iterations) == pytest.approx(sum(both))
  assert floor.decode_s(rates, cfg, shape, iterations, devices=2) == pytest.approx(sum(both) / 2)


def test_a_users_own_rung(tmp_path):
  (tmp_path / "mine.json").write_text('{"extends": "psa", "sparse": {"threshold": 0.5}}')
  rungs = read_rungs(["dense", str(tmp_path / "mine.json")], ["cache.lanes=3"])
  assert list(rungs) == ["dense", "mine"] and rungs["mine"].sparse.threshold == 0.5
  assert [config.cache.lanes for config in rungs.values()] == [3, 3]


def compiled() -> list[str]:
  """Names of what JAX compiles from now on."""
  names: list[str] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: names.append(event) if event.endswith("backend_compile_duration") else None
  )
  return names


@pytest.mark.parametrize(("rung", "prefill"), [("sparse_serve", "layer_segmented"), ("flash_transfer", "chunked")])
def test_nothing_is_compiled_afterwards(rung, prefill):
  config = override(
    load_config(rung),
    [*SMALL_SERVING, f"scheduler.prefill={prefill}", "scheduler.chunk_tokens=16", "scheduler.max_inject_tokens=512"],
  )
  model, lengths = load_model("random:tiny"), [70, 200, 330]
  executor = JaxExecutor(config, model)
  n = executor.compile(lengths)
  after = compiled()
  engine = Engine(executor)
  for i, length in enumerate(lengths):
    engine.add_request(np.full(length, i), 40, ignore_eos=True)
  ended = engine.run()
  assert [len(request.output_tokens) for request in ended] == [40, 40, 40] and n >= 4
  assert not after


def test_what_is_compiled_changes_nothing():
  config = override(load_config("psa"), SMALL_SERVING)
  model, prompt = load_model("random:tiny"), np.arange(200) % 250
  tokens = []
  for warm in (False, True):
    executor = JaxExecutor(config, model)
    if warm:
      executor.compile([200], sampled=True)
    engine = Engine(executor)
    request = engine.add_request(prompt, 20, ignore_eos=True)
    engine.run()
    tokens.append(request.output_tokens)
  assert tokens[0] == tokens[1]


# ------------------------------------------------------------------------------------------------------------- goodput


@pytest.mark.parametrize("capacity", [0.9, 3.0, 5.2, 99.0])
def test_goodputs_search(capacity):
  tried: list[float] = []

  def serves_well(rate: float) -> bool:
    tried.append(rate)
    return rate <= capacity

  found = search(serves_well, [4, 1, 2, 8], most_runs=8)
  assert tried[: len(tried)] == list(dict.fromkeys(tried))  # none twice
  if capacity < 1:
    assert found == Goodput(None, 1) and tried == [1]
  elif capacity > 8:
    assert found == Goodput(8, None) and tried == [1, 2, 4, 8]
  else:
    assert found.rate and found.fails_at and found.rate <= capacity < found.fails_at <= 1.1 * found.rate


def test_the_rate_at_which_requests_begin_to_wait():
  tried: list[float] = []

  def delay(rate: float) -> float:
    tried.append(rate)
    return 2.0 * (rate / 3.0) ** 8

  assert passing(delay, [0, 1, 4], most_runs=8) == pytest.approx(3, rel=0.02)
  assert 0 not in tried and min(rate for rate in tried if rate > 3) <= 1.1 * max(rate for rate in tried if rate < 3)
  with pytest.raises(ValueError, match="the mean delay is below 2 s at all of the rates 1, 2: add one"):
    passing(delay, [1, 2], most_runs=8)
  with pytest.raises(ValueError, match="at none of the rates 5: add one"):
    passing(delay, [5], most_runs=8)


def test_the_rate_of_overload_is_told_by_cells_of_the_first_rung(tmp_path, monkeypatch):
  made = Ladder(load_model("random:tiny"), read_rungs(["dense", "psa"]), [], np.zeros, tmp_path)
  delays = {1.0: 0.0, 2.0: 1.0, 4.0: 3.0}

  def cell(rung: str, rate: float) -> dict[str, float]:
    assert rung == "dense"
    return {"scheduling_delay_mean_s": delays[rate]}

  monkeypatch.setattr(made, "cell", cell)
  assert made.overload([0.0, 1.0, 2.0, 4.0], most_runs=0) == pytest.approx(1.1 * 2**1.5, rel=5e-3)


def test_what_rungs_beside_each_other_are_compared_with_is_there_before(tmp_path, monkeypatch):
  """Else each of them would time the first rung alone, while others use it."""
  made = Ladder(load_model("random:tiny"), read_rungs(["dense", "psa"]), [], np.zeros, tmp_path)
  ran: list[tuple[str, float]] = []
  monkeypatch.setattr(made, "cell", lambda *of: ran.append(of))
  for rates in ([0.0, 1.0, 2.0], [0.0]):
    made.begin(rates)
  assert ran == [("dense", 1.0), ("dense", 0.0)]


def test_what_is_searched_between_no_rates_is_refused_at_once(tmp_path):
  done = start("experiments.ladder", "--rates=", "--model=absent", f"--out={tmp_path / 'out'}")
  assert done.returncode == 2 and done.stderr.startswith("error: --rates has no rate")
  for flag in ("--goodput", "--overload"):
    done = start("experiments.ladder", "--rates=0", flag, "--model=absent", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and done.stderr.startswith("error: --goodput and --overload search between rates above")


MEASURED = """
from types import SimpleNamespace
from absl import flags
from sparse_serve_jax.commands import ladder as command
from sparse_serve_jax.ladder.goodput import Goodput, search

flags.FLAGS(["ladder", "--goodput", "--most_runs=0", "--out=none"])
ran = []
cell = lambda rung, rate: ran.append((rung, rate)) or {"keeps_slo": rate < {"dense": 2, "psa": 9}[rung]}
goodput = lambda rung, rates, runs: search(lambda rate: cell(rung, rate)["keeps_slo"], [r for r in rates if r], runs)
command._measured(SimpleNamespace(rungs=["dense", "psa"], cell=cell, goodput=goodput), [0.0, 1.0, 2.0, 4.0], None, 1)
print(ran)
"""


def test_goodputs_search_ends_at_the_first_rate_that_is_not_served_well():
  done = subprocess.run([sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True)
  dense, psa = [("dense", rate) for rate in (0.0, 1.0, 2.0)], [("psa", rate) for rate in (0.0, 1.0, 2.0, 4.0)]
  assert done.stdout == f"{dense + psa}\n", done.stderr


def test_goodputs_search_ends_after_so_many_runs():
  tried: list[float] = []
  found = search(lambda rate: tried.append(rate) or rate < 1.5, [1, 100], most_runs=2)
  assert len(tried) == 4 and found == Goodput(1, pytest.approx(10**0.5))


def test_a_slower_rung_is_told_as_slower():
  cells = [
    {"rung": rung, "rate": 2.0, "ttft_mean_s": ttft, "throughput_tok_s": speed}
    for rung, ttft, speed in (("dense", 0.04, 200.0), ("psa", 0.1, 150.0))
  ]
  told = "psa at 2 requests/s: 2.50 times the mean TTFT of dense, 0.75 times its tokens/s"
  assert report._against_first(cells) == [told]


def test_goodput_in_words():
  told = report._goodputs({"a": Goodput(None, 1), "b": Goodput(8, None), "c": Goodput(1, 2)})
  told_of = {"dense": Goodput(1, 2), "sparse": Goodput(1.5, 2), "mine": Goodput(3, None)}
  assert report._goodputs(told_of)[1:] == [
    "goodput of sparse: 1.5 requests/s; 2 is not served well; 1.50 times dense, 1.50 in all; the paper has 1.13 "
    "(Llama3-8B), 1.20 (LWM-7B)",
    "goodput of mine: 3 requests/s or more, the highest rate that was tried; 2.00 times sparse, 3.00 in all",
  ]
  skips = {"dense": Goodput(1, 2), "sparse_offload": Goodput(1.5, 2)}  # of the paper's steps one
  assert "1.50 times dense" in report._goodputs(skips)[1] and "paper" not in report._goodputs(skips)[1]
  assert told == [
    "goodput of a: below 1 requests/s, the lowest rate that was tried",
    "goodput of b: 8 requests/s or more, the highest rate that was tried",
    "goodput of c: 1 requests/s; 2 is not served well",
  ]


def test_tokens_up_to_where_they_part():
  assert share_equal([([1, 2, 3], [1, 2, 4]), ([5], [5, 6]), ([], [])]) == 3 / 5
  assert share_equal([([], [])]) is None


def test_rows_that_are_refused_are_told_before_a_model_is_loaded(tmp_path):
  file = tmp_path / "rows.jsonl"
  file.write_text('{"prompt": "x"}\n{"prompt": 5}\n')
  done = start("experiments.ladder", f"--jsonl={file}", "--model=absent", f"--out={tmp_path / 'out'}")
  refused, error = done.stderr.splitlines()
  assert refused == f'refused: {file}:2: "prompt" is a text, got 5'
  assert done.returncode == 2 and error.startswith("error: 'absent' is no model")
