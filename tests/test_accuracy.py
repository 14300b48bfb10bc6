"""The accuracy experiment: what is counted as an answer, what a setting reads, and that a run goes on."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax.attention import methods
from sparse_serve_jax.config import ModelConfig, override
from sparse_serve_jax.evaluation import accuracy, replay, selections
from sparse_serve_jax.evaluation.cases import AXES, DENSE_PREFILL, GRID, prefill_cases
from sparse_serve_jax.models import ByteTokenizer, Model, forward, init_params, load_model, save_hf
from tests import forks, jsonl

CFG = ModelConfig(
  vocab_size=264, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48, max_context=1024,
  dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(CFG, init_params(CFG, 0), ByteTokenizer(), (257,), "tiny")


def test_the_steps_of_an_answer(model):
  """What a step predicts is the token after its own; the first steps are the question's."""
  batch = accuracy.Instances.of(model.tokenizer, "multi_key", 640, range(3), 192)
  assert batch.tokens.shape[1] % 64 == 0 and batch.answers.shape == (3, 192)
  for tokens, start, answers in zip(batch.tokens, batch.start, batch.answers, strict=True):
    text = model.tokenizer.decode(tokens[: int(np.flatnonzero(tokens)[-1]) + 1].tolist())
    assert model.tokenizer.decode(tokens[start:].tolist()).startswith("\nQuestion: what is the special code of")
    steps = np.flatnonzero(answers)
    assert steps.tolist() == list(range(steps[0], steps[-1] + 1))
    answer = model.tokenizer.decode(tokens[start + steps + 1].tolist())
    assert answer.strip().isdigit() and answer == text[text.rindex(" is ") + len(" is") :]


def logits_of(model, tokens: np.ndarray) -> jax.Array:
  """[n, T, V]"""
  return jax.jit(jax.vmap(lambda ids: forward(CFG, model.params, ids)))(tokens)


def test_what_a_setting_reads(model):
  """Bytes and blocks of hand-computed cases; the oracle's mass is the most that a budget can have."""
  batch = accuracy.Instances.of(model.tokenizer, "single_text", 640, range(4), 192)
  dense = replay.prefill(CFG, model.params, batch.tokens)
  rows = {}
  series = "dense", "cuboid_mean", "oracle", "random", "sinks and window", "blocks of 16", "psa, groups of 4"
  every = accuracy.cases(["cuboid_mean", "oracle", "random", "window"], [128], [0.5], ["blocks", "groups"])
  for case in [case for case in every if case.series in series]:
    found = accuracy.replayed(model, model.params, case, dense, batch)
    rows[case.series] = accuracy.summary(model, case, batch, jax.device_get(found))
  steps = batch.start[:, None] + np.arange(192)
  exist = ((steps // 32) * batch.answers).sum(1) / batch.answers.sum(1)
  np.testing.assert_allclose(rows["dense"]["blocks"], exist)
  np.testing.assert_allclose(rows["dense"]["bytes"], 1)
  np.testing.assert_allclose(rows["dense"]["mass"], 1, rtol=1e-5)
  np.testing.assert_allclose(rows["cuboid_mean"]["blocks"], 4)
  np.testing.assert_allclose(rows["cuboid_mean"]["bytes"], 4 / exist + 1 / 32, rtol=1e-2)
  block = 2 * 2 * 32 * 16 * 4  # K and V of 2 KV heads, 32 tokens of 16 float32
  np.testing.assert_allclose(rows["dense"]["bytes_read"], exist * block)
  np.testing.assert_allclose(rows["cuboid_mean"]["bytes_read"], (4 + exist / 32) * block)
  np.testing.assert_allclose(rows["blocks of 16"]["bytes"], 8 / (exist * 2) + 1 / 16, rtol=5e-2)
  mass = {series: row["mass"].mean() for series, row in rows.items()}
  assert max(mass["cuboid_mean"], mass["random"], mass["sinks and window"]) < mass["oracle"] < 1
  assert 8 <= rows["psa, groups of 4"]["blocks"].mean() < rows["dense"]["blocks"].mean()


def test_text_of_a_file(model, tmp_path):
  """Needles stand in it."""
  (tmp_path / "own.txt").write_text("One sentence of mine. " * 3)
  sample = accuracy.Sample("single_text", 640, 1, 1, 192, text=(str(tmp_path / "own.txt"),))
  (ids,) = sample.batch(model.tokenizer, 0).tokens
  words = model.tokenizer.decode(ids[ids > 0].tolist())
  assert words.count("One sentence of mine.") > 10 and "special code" in words


def test_ordinary_text(model):
  """Dense nats are those of a forward pass over the whole text; an instance is right by the share of its tokens."""
  batch = accuracy.Instances.of_text(model.tokenizer, 300, range(2), 96)
  assert batch.answers.all() and batch.answers.shape == (2, 96) and batch.tokens.shape == (2, 320)
  assert accuracy.Instances.of_text(model.tokenizer, 100, range(1), 96).answers.shape == (1, 50)  # half of it at most
  wanted = list(accuracy.cases(["cuboid_mean"], [128], []))[:2]
  told = {
    case.series: row
    for case, row in accuracy.measure(model, model.params, accuracy.Sample("text", 300, 2, 2, 96), wanted)
  }
  logits = logits_of(model, batch.tokens[:, :300])
  at = batch.start[:, None] + np.arange(96)
  chosen, target = np.take_along_axis(np.asarray(logits), at[..., None], 1), batch.tokens[np.arange(2)[:, None], at + 1]
  nats = -np.take_along_axis(np.asarray(jax.nn.log_softmax(chosen)), target[..., None], 2)[..., 0]
  row = told["dense"]
  np.testing.assert_allclose(row["each"]["nats"], nats.mean(1), rtol=1e-4)
  np.testing.assert_allclose(row["each"]["accuracy"], (chosen.argmax(-1) == target).mean(1), atol=1e-6)
  sparse = told["cuboid_mean"]
  assert sparse["nats"] != row["nats"]
  assert row["agreement"] == 1 and row["error"] < 1e-5 < 0.01 < sparse["error"]
  found = accuracy.replayed(model, model.params, wanted[1], replay.prefill(CFG, model.params, batch.tokens), batch)
  agreement = (np.asarray(found.best) == chosen.argmax(-1)).mean(1)
  np.testing.assert_allclose(sparse["each"]["agreement"], agreement, atol=1e-6)
  assert 0 < sparse["agreement"] < 1
  np.testing.assert_allclose(sparse["each"]["error"], np.asarray(found.error).mean((1, 2, 3, 4)), atol=1e-5)
  np.testing.assert_allclose(np.mean(sparse["error_by_layer"]), sparse["error"], atol=1e-4)
  # Dense is what others agree with, also when its own row is there.
  ((_, alone),) = accuracy.measure(model, model.params, accuracy.Sample("text", 300, 2, 2, 96), wanted[1:])
  assert alone == sparse


def test_blocks_by_head_and_claims(model):
  """Of a case that stops; another claims nothing."""
  _, fixed, psa = accuracy.cases(["cuboid_mean"], [128], [0.9])
  paper = override(psa.config, ["sparse.rest=least", "sparse.group_blocks=4"])  # some of its stops break the promise
  wanted = [fixed, dataclasses.replace(psa, config=paper)]
  rows = {
    case.series: row
    for case, row in accuracy.measure(model, model.params, accuracy.Sample("text", 512, 4, 2, 96), wanted)
  }
  assert "by_head" not in rows["cuboid_mean"] and "pairs" not in rows["cuboid_mean"]
  psa = rows["psa"]
  mean, quantiles = np.array(psa["by_head"]["mean"]), np.array(psa["by_head"]["quantiles"])
  assert mean.shape == (2, 2) and quantiles.shape == (5, 2, 2) and (np.diff(quantiles, axis=0) >= 0).all()
  np.testing.assert_allclose(mean.mean(), psa["blocks"], atol=1e-3)
  assert psa["pairs"] == 4 * 96 * 2 * 4  # tokens, layers, query heads
  assert 0 < psa["short"] <= psa["violations"] < psa["pairs"]
  assert psa["short"] <= psa["stopped"] and psa["broken"] <= psa["stops"] == psa["stopped"] // 2
  assert psa["true"] < psa["claimed"] < 1 and psa["claimed"] > 0.9


def test_only_what_was_asked_for_is_measured():
  names = lambda *asked: [case.name for case in accuracy.cases(*asked)]  # noqa: E731
  asked = ["cuboid_mean", "window"], [128, 512], [0.9]
  assert names(*asked) == [
    *("dense 1", "cuboid_mean 128", "sinks and window 128", "cuboid_mean 512", "sinks and window 512"),
    "psa 0.9",
  ]
  more = {
    "between": ["cuboid_mean 320"],
    "sinks": ["no sinks, no window 128", "no sinks, no window 512"],
    "grid": [f"cuboid_mean {32 * n}" for n in GRID if n not in (4, 16)],
    "layers": [
      *("one layer dense 128", "two layers dense 128", "one layer dense 512", "two layers dense 512"),
      *("psa, one layer dense 0.9", "psa, two layers dense 0.9"),
    ],
    "heads": [f"{name} {budget}" for budget in (128, 512) for name in ("best query head", "shares of query heads")]
    + ["psa, shares of query heads 0.9"],
    "groups": [f"{name}, groups of {n} 0.9" for name in ("psa", "psa, least", "oracle stop") for n in (4, 8, 32)],
    "blocks": [f"blocks of {size} {budget}" for budget in (128, 512) for size in (16, 64)],
    "stops": ["psa, min_max 0.9", "certified 0.9", "oracle stop 0.9", "oracle stop, mean_of_heads 0.9"],
    "rules": [
      *("psa, least, every_head 0.9", "psa, least, mean_of_heads 0.9", "psa, last_group, every_head 0.9"),
      *("psa, last_group, mean_of_heads 0.9", "psa, last_two_groups, mean_of_heads 0.9"),
    ],
  }
  assert more.keys() == AXES.keys()
  assert [case.name for case in accuracy.cases([], [], [0.9], ["rules"], ["last_group"])] == [
    *("dense 1", "psa 0.9", "psa, last_group, every_head 0.9", "psa, last_group, mean_of_heads 0.9")
  ]
  small = [case.at for case in accuracy.cases([], [128], [], ["grid"], longest=512) if case.series == "cuboid_mean"]
  assert small == [256, 384, 512]
  for axis, expected in more.items():
    assert [name for name in names(*asked, [axis]) if name not in names(*asked)] == expected
  every = names(*asked, list(AXES))
  assert len(every) == len(set(every))


def test_cases_of_sparse_prefill():
  names = [case.name for case in prefill_cases(["mean"], [0.5], [0.9], ["layers", "heads", "rules"])]
  ways = "mean", *(f"cuboid_mean, {way}" for way in ("one layer dense", "two layers dense", "best query head"))
  assert names == ["dense prefill 1", *(f"prefill {by}, {way} {at}" for way in ways for by, at in BY_SHARE)]
  assert all(case.prefills and not case.digest_vectors for case in prefill_cases(["mean"], [0.5], [0.9]))


BY_SHARE = ("top_k", 0.5), ("threshold", 0.9)


def test_sparse_prefill(model):
  """Reading everything is dense attention; reading less changes what follows, and the prompt's own nats more."""
  wanted, sample = list(prefill_cases(["cuboid_mean"], [0.25], [0.5])), accuracy.Sample("text", 600, 3, 2, 96)
  rows = {case.series: row for case, row in accuracy.measure(model, model.params, sample, wanted)}
  dense, (top_k, threshold) = rows[DENSE_PREFILL], [row for series, row in rows.items() if series != DENSE_PREFILL]
  ((_, expected),) = accuracy.measure(model, model.params, sample, [next(accuracy.cases([], [], []))])
  np.testing.assert_allclose(dense["each"]["nats"], expected["each"]["nats"], rtol=1e-5)
  assert dense["agreement"] == 1 and dense["read"] == 1 and dense["read_by_layer"] == [1, 1]
  assert "read" not in expected and "prompt_nats" not in expected["each"]
  batch = accuracy.Instances.of_text(model.tokenizer, 600, range(3), 96)
  logits = jax.nn.log_softmax(logits_of(model, batch.tokens))
  of_tokens = -np.take_along_axis(np.asarray(logits)[:, :-1], batch.tokens[:, 1:, None], 2)[..., 0]
  prompts = [of[start - 1 - 320 : start - 1].mean() for of, start in zip(of_tokens, batch.start, strict=True)]
  np.testing.assert_allclose(dense["each"]["prompt_nats"], prompts, rtol=1e-4)
  # 503 tokens are four tiles, the last of 119; before the last three are 4, 8 and 12 blocks, of which a quarter is
  # read, but two at least: sink and window.
  np.testing.assert_allclose(top_k["read_by_layer"], (2 + 2 + 3) / 24, atol=1e-5)
  assert len(set(threshold["read_by_layer"])) == 2 and 0.25 < threshold["read"] < 1
  for row in (top_k, threshold):
    assert row["prompt_nats"] != dense["prompt_nats"] and row["nats"] != dense["nats"]
    assert row["mass"] == pytest.approx(1, abs=1e-5)  # decoding is dense


def test_steps_that_are_too_few_say_how_many_it_takes(model):
  with pytest.raises(
    ValueError, match=r"8 decode steps end before the answer .* begins: that takes \d+, and \d+ for"
  ) as e:
    accuracy.Instances.of(model.tokenizer, "multi_key", 640, range(3), 8)
  begins, whole = (int(n) for n in re.findall(r"(?:takes|and) (\d+)", str(e.value)))
  with pytest.raises(ValueError):
    accuracy.Instances.of(model.tokenizer, "multi_key", 640, range(3), begins - 1)
  assert accuracy.Instances.of(model.tokenizer, "multi_key", 640, range(3), begins).answers.any(1).all()
  enough, more = (accuracy.Instances.of(model.tokenizer, "multi_key", 640, range(3), whole + n) for n in (0, 20))
  assert enough.answers.sum() == more.answers.sum()


def test_nucleus():
  scores = jnp.array([[[np.inf, np.inf, 3.0, 2.0, 1.0, 0.0, -np.inf, -np.inf]]], jnp.float32)
  assert methods._nucleus(scores, jnp.array([[6]])).tolist() == [[4]]  # weights 0.64, 0.24, 0.09, 0.03
  assert methods._nucleus(scores, jnp.array([[3]])).tolist() == [[3]]


def test_representatives_are_keys():
  keys = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
  chosen = np.asarray(methods._representatives(jnp.asarray(keys)))
  assert chosen.shape == (3, 4, 16)
  for block, some in zip(keys, chosen, strict=True):
    agreement = (block @ block.T).sum(1)
    expected = block[np.argsort(-agreement)[:4]]
    np.testing.assert_array_equal(some, expected)


@pytest.mark.slow
def test_a_run_goes_on(model, tmp_path):
  save_hf(model, tmp_path / "model")
  out = tmp_path / "out"
  # Texts of 600 tokens are padded to 640 too: nothing is compiled twice.
  arguments = ["--lengths=640", "--text_lengths=600", "--instances=3", "--budgets=128", "--methods=cuboid_mean"]
  arguments += ["--tasks=key_value", "--requests=2", "--trace_steps=40", "--steps=96"]

  def run(*more: str) -> subprocess.CompletedProcess[str]:
    folders = f"--model={tmp_path / 'model'}", f"--out={out}"
    return forks.start("experiments.accuracy", *folders, *arguments, *more)

  def rows(name: str) -> list[dict]:
    return jsonl.read(out / name)

  nothing = run("--parts=tasks", "--tasks=")
  assert nothing.returncode == 2 and "nothing is measured: --parts, --tasks," in nothing.stderr and not out.exists()
  refused = run("--parts=tasks", "--thresholds=0.5", "--steps=8")
  assert refused.returncode == 2 and "8 decode steps end before" in refused.stderr.splitlines()[-1]
  first = run("--parts=tasks", "--thresholds=0.5")  # in the same folder, which has no rows
  before = rows("results.jsonl")
  assert [row["case"] for row in before] == ["dense 1", "cuboid_mean 128", "psa 0.5"], first.stderr
  with (out / "results.jsonl").open("a") as file:
    file.write('{"task": "key_val')  # as a run that is killed leaves it
  shares = "--prefill_shares=0.5", "--prefill_thresholds=0.9"
  second = run("--thresholds=0.5,0.9", "--axes=stops,rules", "--rules=least", *shares)
  after = rows("results.jsonl")
  new = after[len(before) :]
  assert after[: len(before)] == before, second.stderr
  kinds = "psa, min_max", "certified", "oracle stop", "oracle stop, mean_of_heads"
  rules = "psa, least, every_head", "psa, least, mean_of_heads"
  stops = [*(f"{kind} 0.5" for kind in (*kinds, *rules)), "psa 0.9", *(f"{kind} 0.9" for kind in (*kinds, *rules))]
  assert [row["case"] for row in new if row["task"] == "key_value"] == stops
  assert {row["tokens"] for row in new if row["task"] == "text"} == {600}
  assert [row["case"] for row in rows("reuse.jsonl")] == 2 * [
    *("cuboid_mean 128", "psa 0.5", *(f"{rule} 0.5" for rule in rules), "psa 0.9", *(f"{rule} 0.9" for rule in rules))
  ]
  prefills = "dense prefill 1", *(f"prefill {by}, cuboid_mean {at}" for by, at in BY_SHARE)
  of_prefill = rows("prefill.jsonl")
  assert [(row["task"], row["case"]) for row in of_prefill] == [
    (task, case) for task in ("text", "key_value") for case in prefills
  ]
  told = json.loads(second.stdout.splitlines()[-1])
  whole = json.loads((out / "summary.json").read_text())
  dense = [entry["accuracy"] for entry in whole["accuracies"] if entry["series"] == "dense"]
  (nats,) = [entry["nats"] for entry in whole["text"] if entry["series"] == "dense"]
  dense = {"dense": {"retrieval 640": dense[0]}, "dense_nats": {"text 600": pytest.approx(nats, abs=1e-4)}}
  assert told == dense | {"rows": len(after) + 6, "out": str(out)}
  with (out / "results.csv").open(encoding="utf-8", newline="") as opened:
    table = list(csv.DictReader(opened))
  of_files = {"results": after, "prefill": of_prefill, "reuse": rows("reuse.jsonl")}
  keys = "task", "case", "accuracy"
  lines = sorted((line["file"], *(line[key] for key in keys)) for line in table)
  told_of = [(name, row) for name, of in of_files.items() for row in of]
  assert lines == sorted((name, *(str(row.get(key, "")) for key in keys)) for name, row in told_of)
  assert float(table[-1]["working_set.2"]) > 0 and "each.accuracy" not in table[0]
  made = json.loads((out / "run.json").read_text())
  assert made["setting"]["model"]["dtype"] == "float32" and len(made["parts"]) == 2
  by_head = "psa_retrieval_640", "psa_text_600", "psa_least_mean_of_heads_text_600"
  of_prefills = "prefill_retrieval_640", "prefill_text_600"
  for name in (
    *by_head,
    *of_prefills,
    "accuracy_retrieval_640",
    "reuse_recite_640",
    "reuse_renumber_640",
    "equal_bytes_text_600",
  ):
    assert (out / f"{name}.png").stat().st_size > 10_000
  traces = {file.stem: selections.Trace.load(file) for file in (out / "traces").iterdir()}
  at = "128", "0.5", "0.9"
  assert sorted(traces) == sorted(f"{task}_640_{of}" for task in ("recite", "renumber") for of in at)
  assert {trace.selected.shape for trace in traces.values()} == {(2, 40, 2, 2, 20)}
  assert {name: trace.case for name, trace in traces.items() if "recite" in name} == {
    f"recite_640_{of}": case for of, case in zip(at, ("cuboid_mean 128", "psa 0.5", "psa 0.9"), strict=True)
  }
  assert traces["recite_640_128"].policy == "topk" and traces["recite_640_0.5"].policy == "psa"

  for wrong, message in {
    "--methods=cuboid": "--methods: no cuboid; there are cuboid_mean",
    "--lengths=2048": "the model's context is 1024 tokens, too short for [2048]",
    "--budgets=many": "--budgets: 'many' is no integer",
    "--text=none.txt": "none.txt is missing",
    "--text_chat": "--text_chat is of texts of --text or --longbench_dir",
    "--rules=most": "--rules: no most; there are least",
    "--instances=4": "holds another run, choose another folder: instances was 3 and is 4",
    "--dtype=bfloat16": "model.dtype was 'float32' and is 'bfloat16'",
    "--tasks=all,none": "--tasks: no none; there are single_noise",
    "--thresholds=0.5,0.5,0.9": "has rows of another dense 1",
  }.items():
    if "dense" in message:  # as after a change of what a case means
      changed = (out / "results.jsonl").read_text().replace('"config": "', '"config": "-')
      (out / "results.jsonl").write_text(changed)
    refused = run(wrong)
    assert refused.returncode == 2 and message in refused.stderr.splitlines()[-1], refused.stderr


@pytest.mark.parametrize(
  ("asked", "said"),
  [
    ("--steps=8", "error: 8 decode steps end before the answer to a question of 'key_value' begins: that takes "),
    ("--tasks=key_value,count --lengths=256", "; count takes at least "),
    ("--methods=cuboid_mean,oracle", "error: --methods: the part prefill has no 'oracle', but cuboid_mean, min_max, "),
    ("--axes=heads,grid", "error: --axes: the part prefill has no 'grid', but layers, heads"),
  ],
)
def test_what_the_part_prefill_cannot_do_is_told_before_anything_is_measured(model, tmp_path, asked, said):
  save_hf(model, tmp_path / "model")
  of = [f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}", "--parts=prefill", "--tasks=key_value"]
  of += ["--lengths=640", "--text_lengths=600", "--instances=2", "--steps=48", *asked.split()]
  refused = subprocess.run([sys.executable, "-m", "sparse_serve_jax", "accuracy", *of], capture_output=True, text=True)
  assert refused.returncode == 2 and said in refused.stderr.splitlines()[-1], refused.stderr
  assert not (tmp_path / "out" / "prefill.jsonl").exists()


def test_what_does_not_fit_the_memory_is_refused(monkeypatch):
  model, wanted = load_model("random:tiny"), list(accuracy.cases([], [], []))
  monkeypatch.setattr(accuracy, "bytes_free", lambda: 2**30)
  # 8 heads x 16384^2 scores in float32, twice, and 4 layers x 2 heads x 16 channels of keys and values.
  with pytest.raises(ValueError, match=r"a sequence of 16384 tokens .* 0.0 GiB .* 16.0 GiB .* 1.0 GiB are free"):
    next(accuracy.measure(model, model.params, accuracy.Sample("text", 16384, 9, 8, 96), wanted))
  monkeypatch.setattr(accuracy, "bytes_free", lambda: 40 * 2**30)
  assert accuracy.most_at_once(model.config, 16384) == 1  # two leave no room for the rest
  assert accuracy.most_at_once(model.config, 8192) == 7


def test_as_many_at_once_as_fit(model, monkeypatch):
  """With the values of larger batches."""
  sample, wanted = accuracy.Sample("text", 640, 3, 3, 48), list(accuracy.cases([], [], []))
  sizes = []

  def rows() -> list[dict]:
    sizes.append([len(batch.tokens) for batch, _, _ in accuracy.replays(model, model.params, sample, wanted)])
    return [row for _, row in accuracy.measure(model, model.params, sample, wanted)]

  whole = rows()
  one = 640 * accuracy.kv_bytes(CFG) + 2 * 4 * CFG.n_heads * 640**2
  monkeypatch.setattr(accuracy, "bytes_free", lambda: 2.6 * one)
  assert rows()[0]["nats"] == pytest.approx(whole[0]["nats"], rel=1e-5) and sizes == [[3], [2, 1]]


def test_a_length_that_does_not_fit_is_refused_before_the_first_is_measured(model, tmp_path):
  save_hf(model, tmp_path / "model")
  asked = ["--parts=text", "--text_lengths=640,1024", "--methods=", "--budgets=", "--instances=2", "--steps=48"]
  asked += [f"--model={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"]
  least = 1024 * accuracy.kv_bytes(CFG) + 2 * 4 * CFG.n_heads * 1024**2
  code = f"""
from sparse_serve_jax.evaluation import accuracy
from sparse_serve_jax.commands import accuracy as command
accuracy.bytes_free = lambda: {least - 1}
command.command({["accuracy", *asked]})
"""
  refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert refused.returncode == 2 and "a sequence of 1024 tokens takes" in refused.stderr.splitlines()[-1], (
    refused.stderr
  )
  assert not (tmp_path / "out" / "results.jsonl").exists()
