"""Comparison at equal bytes, against plain numpy; and the texts that it is made on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sparse_serve_jax.evaluation import equal_bytes, intervals
from sparse_serve_jax.evaluation.corpus import Corpus
from sparse_serve_jax.models import ByteTokenizer
from tests import jsonl
from tests.longbench import BOS, row_of, write_release

BYTES = ByteTokenizer()
N = 12  # instances of a task
EACH = ("accuracy", "nats", "agreement", "error")


def row(task: str, series: str, at: float, read: float, seed: int, level: float, **more) -> dict:
  rng = np.random.default_rng(seed)
  each = {key: (level * rng.uniform(0.5, 1.5, N)).tolist() for key in EACH}
  told = dict(task=task, case=f"{series} {at:g}", series=series, at=at, blocks=read / 100, bytes=read / 1e4, mass=0.9)
  return told | {"bytes_read": read, "each": each} | {key: float(np.mean(each[key])) for key in EACH} | more


def rows_of(task: str, seed: int) -> list[dict]:
  budgets = [row(task, "cuboid_mean", at, 10.0 * at, seed + i, 1 / at) for i, at in enumerate((128, 512, 256, 640))]
  psa = row(task, "psa", 0.9, 3000.0, seed + 10, 0.002, stopped=1000, short=70, stops=400, broken=30)
  same = budgets[1] | {"series": "top_p", "case": "top_p 1"}
  far = row(task, "psa", 0.99, 9000.0, seed + 11, 0.001, stopped=0, short=0, stops=0, broken=0)
  return [row(task, "dense", 1, 20000.0, seed + 12, 0.001), *budgets, psa, same, far]


@pytest.fixture
def rows() -> list[dict]:
  only_a = row("a", "oracle", 256, 2000.0, 3, 0.01)
  return [*rows_of("a", 0), *rows_of("b", 100), only_a]


def test_errors_and_nats_at_equal_bytes(rows):
  told = {entry["case"]: entry for entry in equal_bytes.compared(rows)}
  assert "oracle 256" not in told  # which task b lacks
  of = {case: [r for r in rows if r["case"] == case] for case in told}
  sizes, cases = (1280, 2560, 5120, 6400), [f"cuboid_mean {at}" for at in (128, 256, 512, 640)]

  def fixed(key: str) -> float:
    return float(np.interp(3000, sizes, [np.mean([r[key] for r in of[case]]) for case in cases]))

  psa = told["psa 0.9"]
  error, nats = (np.mean([r[key] for r in of["psa 0.9"]]) for key in ("error", "nats"))
  assert psa["fixed_error"] == pytest.approx(fixed("error"))
  assert psa["error"] == pytest.approx(error) and psa["error_ratio"] == pytest.approx(error / fixed("error"))
  assert psa["nats_more_than_fixed"] == pytest.approx(nats - fixed("nats"))
  assert psa["nats_more"] == pytest.approx(nats - np.mean([r["nats"] for r in of["dense 1"]]))
  assert psa["broken"] == 60 / 800 and psa["short"] == 140 / 2000
  assert told["psa 0.99"]["short"] is told["dense 1"]["broken"] is None
  low, high = psa["ratio_interval"]
  assert low < psa["error_ratio"] < high and psa["nats_interval"][0] < psa["nats_more_than_fixed"]
  # What a budget is compared with at its own bytes is itself, and instance by instance.
  same = told["top_p 1"]
  assert same["error_ratio"] == pytest.approx(1) and same["ratio_interval"] == pytest.approx((1, 1))
  assert same["nats_more_than_fixed"] == pytest.approx(0) and same["nats_interval"] == pytest.approx((0, 0))
  for case in ("psa 0.99", "dense 1", *cases):  # beyond the largest budget; and no settings to compare
    assert told[case]["error_ratio"] is told[case]["nats_interval"] is None
  heads = {len(line) for entry in told.values() for line in equal_bytes.cells(entry, [])}
  assert heads == {len(equal_bytes.HEAD)}


def test_of_a_case_that_reads_no_block_there_is_no_ratio(rows):
  """As of contexts that are shorter than a block."""
  told = {entry["case"]: entry for entry in equal_bytes.compared([r | {"blocks": 0.0} for r in rows])}
  assert told["psa 0.9"]["fewer_for_nats"] is told["psa 0.9"]["fewer_for_error_interval"] is None
  assert told["psa 0.9"]["error_ratio"] is not None


def test_how_much_less_is_read_for_the_same_nats(rows):
  """By the budgets' means, 1/128 to 1/640 of numbers that vary: where they rise, the least before counts."""
  told = {entry["case"]: entry for entry in equal_bytes.compared(rows)}
  budgets = [[r for r in rows if r["case"] == f"cuboid_mean {at}"] for at in (128, 256, 512, 640)]
  falling = np.minimum.accumulate([np.mean([r["nats"] for r in ours]) for ours in budgets])
  blocks = [12.8, 25.6, 51.2, 64.0]
  nats = np.mean([r["nats"] for r in rows if r["case"] == "psa 0.9"])
  needed = float(np.interp(-nats, -falling, blocks))
  assert 25.6 < needed < 51.2 and told["psa 0.9"]["fewer_for_nats"] == pytest.approx(needed / 30)
  low, high = told["psa 0.9"]["fewer_for_nats_interval"]
  assert 12.8 / 30 <= low < needed / 30 < high <= 64 / 30
  same = told["top_p 1"]  # the budget of 512 tokens
  assert same["fewer_for_nats"] == pytest.approx(1) and same["fewer_for_nats_interval"] == pytest.approx((1, 1))
  for case in ("psa 0.99", "dense 1", "cuboid_mean 256"):  # less than any budget has; and nothing to compare
    assert told[case]["fewer_for_nats"] is told[case]["fewer_for_error_interval"] is None


def test_instances_are_interpolated_each(rows):
  budgets = [[r] for r in rows if r["task"] == "a" and r["series"] == "cuboid_mean"]
  budgets.sort(key=lambda ours: ours[0]["bytes_read"])
  found = equal_bytes.at_bytes(budgets, 5760.0, "nats")
  each = np.array([ours[0]["each"]["nats"] for ours in budgets])  # [4, N]
  expected = [np.interp(5760.0, (1280, 2560, 5120, 6400), of) for of in each.T]
  assert found is not None
  np.testing.assert_allclose(found, [expected])
  for ends, read in ((0, 1280.0), (3, 6400.0)):
    found = equal_bytes.at_bytes(budgets, read, "nats")
    assert found is not None
    np.testing.assert_allclose(found, [each[ends]])
  assert equal_bytes.at_bytes(budgets, 1279.0, "nats") is equal_bytes.at_bytes(budgets, 6401.0, "nats") is None
  assert equal_bytes.at_bytes([], 1280.0, "nats") is None


def test_the_interval_of_a_ratio_is_paired():
  """Instances differ by a factor of hundred, the ratio by a hundredth."""
  rng = np.random.default_rng(0)
  others = np.exp(rng.uniform(-2.3, 2.3, 200))
  values = others * rng.normal(0.8, 0.01, 200)
  low, high = intervals.of_ratio([values.tolist()], [others.tolist()])
  assert 0.79 < low < values.mean() / others.mean() < high < 0.81 and high - low > 1e-4


def test_pieces_share_no_token(tmp_path):
  """The first of each text, then the second, whose order is that of the texts; a text of less than a piece has none."""
  (tmp_path / "texts" / "deep").mkdir(parents=True)
  texts = {"a.txt": "a" * 25, "b.md": "b" * 12, "deep/c.txt": "c" * 31, "short.txt": "d" * 8, "other.py": "e" * 99}
  for name, text in texts.items():
    (tmp_path / "texts" / name).write_text(text)
  (tmp_path / "one.txt").write_text("f" * 10)
  corpus = Corpus((str(tmp_path / "one.txt"), str(tmp_path / "texts")))
  pieces = corpus.pieces(BYTES, 10, 7)
  assert pieces.dtype == np.int32 and (pieces[:, 0] == BOS).all()
  letters = "".join(BYTES.decode(of.tolist())[0] for of in pieces)
  assert {BYTES.decode(of.tolist()) for of in pieces} == {9 * letter for letter in "abcf"}
  assert sorted(letters[:4]) == list("abcf") and letters[6] == "c" and sorted(letters[4:6]) == list("ac")
  np.testing.assert_array_equal(corpus.pieces(BYTES, 10, 3), pieces[:3])
  with pytest.raises(ValueError, match="5 texts give 7 pieces of 10 tokens, and 8 are asked for"):
    corpus.pieces(BYTES, 10, 8)
  with pytest.raises(ValueError, match="1 tokens are taken up by the 1"):
    corpus.pieces(BYTES, 1, 1)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty has no files that end in \.txt or \.md"):
    Corpus((str(tmp_path / "empty"),)).files()
  before = corpus.digest()
  (tmp_path / "one.txt").write_text("f" * 9 + "g")
  assert corpus.digest() != before


def test_contexts_of_longbench(tmp_path):
  """Each context once, broken rows aside, and in the chat template as the beginning of what a user says."""
  release = write_release(tmp_path / "bench", qasper=3, trec=4)
  jsonl.write(release / "data" / "lcc.jsonl", [row_of(0, context="code " * 9), {"context": "no answers"}])
  contexts = [row_of(i)["context"] for i in range(4)]
  assert Corpus(longbench=str(release)).documents() == [*contexts, "code " * 9]
  corpus = Corpus(longbench=str(release), tasks=("qasper",), chat=True)
  assert corpus.documents() == contexts[:3]
  size = 20 - len("<user>")  # the first context is shorter
  beginnings = {BYTES.decode(of.tolist()) for of in corpus.pieces(BYTES, 20, 2)}
  assert beginnings == {"<user>" + text[:size] for text in contexts[1:3]}
  with pytest.raises(ValueError, match="no task 'qaspe'"):
    Corpus(longbench=str(release), tasks=("qaspe",)).documents()


def test_entries_are_json(rows):
  entries = list(equal_bytes.compared(rows))
  assert len(json.loads(json.dumps(entries, allow_nan=False))) == 8
