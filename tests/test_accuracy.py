"""The accuracy experiment: what is counted as an answer, what a setting reads, and that a run goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.evaluation import accuracy, methods, replay
from sparse_serve_jax.models import ByteTokenizer, Model, init_params, save_hf

CFG = ModelConfig(
  vocab_size=264, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48, max_context=1024,
  dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
  return Model(CFG, init_params(CFG, 0), ByteTokenizer(), (257,), "tiny")


def test_the_steps_of_an_answer(model):
  """What a step predicts is the token after its own; the first steps are the question's."""
  batch = accuracy.Instances.of(model, "multi_key", 640, range(3), 192)
  assert batch.tokens.shape[1] % 64 == 0 and batch.answers.shape == (3, 96)
  for tokens, start, answers in zip(batch.tokens, batch.start, batch.answers, strict=True):
    text = model.tokenizer.decode(tokens[: int(np.flatnonzero(tokens)[-1]) + 1])
    assert model.tokenizer.decode(tokens[start:]).startswith("\nQuestion: what is the special code of")
    steps = np.flatnonzero(answers)
    assert steps.tolist() == list(range(steps[0], steps[-1] + 1))
    answer = model.tokenizer.decode(tokens[start + steps + 1])
    assert answer.strip().isdigit() and answer == text[text.rindex("Answer:") + len("Answer:") :]


def test_what_a_setting_reads(model):
  """Bytes and blocks of hand-computed cases; the oracle's mass is the most that a budget can have."""
  batch = accuracy.Instances.of(model, "single_text", 640, range(4), 96)
  dense = replay.prefill(CFG, model.params, batch.tokens)
  rows = {}
  for case in accuracy.cases(["cuboid_mean", "oracle", "random", "window"], [128], [0.5]):
    program, setting = replay.Program.of(case.config, oracle=case.oracle), replay.Setting.of(case.config)
    found = replay.replay(CFG, program, model.params, setting, dense, batch.tokens, batch.start, 96)
    rows[case.family] = accuracy.summary(model, case, batch, jax.device_get(found))
  steps = batch.start[:, None] + np.arange(96)
  exist = ((steps // 32) * batch.answers).sum(1) / batch.answers.sum(1)
  np.testing.assert_allclose(rows["dense"]["blocks"], exist)
  np.testing.assert_allclose(rows["dense"]["bytes"], 1)
  np.testing.assert_allclose(rows["dense"]["mass"], 1, rtol=1e-5)
  np.testing.assert_allclose(rows["cuboid_mean"]["blocks"], 4)
  np.testing.assert_allclose(rows["cuboid_mean"]["bytes"], 4 / exist + 1 / 32, rtol=1e-2)
  np.testing.assert_allclose(rows["blocks of 16"]["bytes"], 8 / (exist * 2) + 1 / 16, rtol=5e-2)
  mass = {family: row["mass"].mean() for family, row in rows.items()}
  assert max(mass["cuboid_mean"], mass["random"], mass["sinks and window"]) < mass["oracle"] < 1
  assert 4 <= rows["psa"]["blocks"].mean() < rows["dense"]["blocks"].mean()


def test_the_interval_is_paired():
  dense, worse = [1] * 80 + [0] * 20, [0] * 10 + [1] * 70 + [0] * 20
  low, high = accuracy.interval(worse, dense)
  assert low < -0.1 < high < -0.03
  assert accuracy.interval(dense, dense) == (0, 0)


def test_nucleus():
  scores = np.array([[[np.inf, np.inf, 3.0, 2.0, 1.0, 0.0, -np.inf, -np.inf]]], np.float32)
  assert methods._nucleus(scores, np.array([[6]])).tolist() == [[4]]  # weights 0.64, 0.24, 0.09, 0.03
  assert methods._nucleus(scores, np.array([[3]])).tolist() == [[3]]


def test_representatives_are_keys():
  keys = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
  chosen = np.asarray(methods._representatives(keys))
  assert chosen.shape == (3, 4, 16)
  for block, some in zip(keys, chosen, strict=True):
    agreement = (block @ block.T).sum(1)
    expected = block[np.argsort(-agreement)[:4]]
    np.testing.assert_array_equal(some, expected)


@pytest.mark.slow
def test_a_run_goes_on(model, tmp_path):
  save_hf(model, tmp_path / "model")
  arguments = ["--tasks=key_value", "--lengths=384", "--instances=3", "--budgets=128", "--methods=cuboid_mean"]

  def run(*more: str) -> subprocess.CompletedProcess[str]:
    command = [
      sys.executable,
      "-m",
      "experiments.accuracy",
      f"--model={tmp_path / 'model'}",
      f"--out={tmp_path / 'out'}",
    ]
    return subprocess.run([*command, *arguments, *more], capture_output=True, text=True)

  first = run("--thresholds=0.5")
  rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
  assert [row["case"] for row in rows][:2] == ["dense 1", "cuboid_mean 128"], first.stderr
  assert len(json.loads(first.stdout.splitlines()[-1])) == len(rows)
  second = run("--thresholds=0.5,0.9")
  again = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
  assert again[:-1] == rows and again[-1]["case"] == "psa 0.9", second.stderr
  assert (tmp_path / "out" / "accuracy_384.png").stat().st_size > 10_000
  wrong = run("--methods=cuboid")
  assert wrong.returncode == 1 and "--methods: no cuboid; there are cuboid_mean" in wrong.stderr.splitlines()[-1]
