"""Traces of selections: files, ids, and how much of a selection comes back."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_serve_jax.attention.drawn import held
from sparse_serve_jax.config import ModelConfig
from sparse_serve_jax.evaluation import accuracy, selections
from sparse_serve_jax.evaluation.selections import MOST, Trace
from sparse_serve_jax.models import ByteTokenizer, Model, init_params

CFG = ModelConfig(
  vocab_size=264, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48, max_context=1024,
  dtype="float32",
)  # fmt: skip


def trace_of(selected: np.ndarray) -> Trace:
  return Trace(selected, np.full(len(selected), 300, np.int32), 32, "cuboid_mean 128", "tiny", "recite")


def drifting(n_requests: int = 2, n: int = MOST + 12, n_layers: int = 2, n_heads: int = 3, n_blocks: int = 20) -> Trace:
  """Selections of four to eight blocks that change slowly; blocks come into being."""
  rng, kept = np.random.default_rng(0), []
  scores = rng.normal(size=(n_requests, n_layers, n_heads, n_blocks))
  for t in range(n):
    scores = 0.9 * scores + 0.4 * rng.normal(size=scores.shape)
    exists = np.arange(n_blocks) < 14 + t // 8
    count = rng.integers(4, 9, (*scores.shape[:3], 1))
    rank = np.argsort(np.argsort(-np.where(exists, scores, -np.inf), -1), -1)
    kept.append(rank < count)
  return trace_of(np.stack(kept, 1))


def test_a_file_holds_all_of_a_trace(tmp_path):
  trace = drifting()
  trace.save(tmp_path / "trace.npz")
  again = Trace.load(tmp_path / "trace.npz")
  np.testing.assert_array_equal(again.selected, trace.selected)
  assert again.selected.dtype == bool and again.lengths.tolist() == [300, 300]
  assert (again.block_tokens, again.case, again.model, again.task) == (32, "cuboid_mean 128", "tiny", "recite")
  np.savez(tmp_path / "other.npz", x=np.arange(3))
  (tmp_path / "none.npz").write_bytes((tmp_path / "trace.npz").read_bytes()[:100])
  for name in ("other", "none", "missing"):
    with pytest.raises(ValueError, match=f"{name}.npz is no trace of selections"):
      Trace.load(tmp_path / f"{name}.npz")


def test_a_trace_of_nothing_is_refused(tmp_path):
  trace_of(np.zeros((1, 8, 2, 2, 16), bool)).save(tmp_path / "nothing.npz")
  with pytest.raises(ValueError, match=r"nothing.npz is a trace of nothing: of shape \(1, 8, 2, 2, 16\)"):
    Trace.load(tmp_path / "nothing.npz")


def test_ids():
  trace = drifting()
  ids = trace.ids()
  assert ids.dtype == np.int16 and ids.shape == (MOST + 12, 2, 2, 3, 8)
  for t, layer, request, head in np.ndindex(ids.shape[:4]):
    some = ids[t, layer, request, head]
    expected = np.flatnonzero(trace.selected[request, t, layer, head])
    assert some.tolist() == expected.tolist() + [-1] * (8 - len(expected))


def test_ids_of_a_million_tokens():
  """Beyond 32,767 they do not fit two bytes."""
  selected = np.zeros((1, 2, 1, 1, 32769), bool)
  selected[0, 0, 0, 0, [3, 32767, 32768]] = selected[0, 1, 0, 0, 32768] = True
  assert trace_of(selected).ids()[:, 0, 0, 0].tolist() == [[3, 32767, 32768], [32768, -1, -1]]
  assert trace_of(selected[..., :32768]).ids().dtype == np.int16
  assert trace_of(selected[..., :32768]).ids()[0, 0, 0, 0].tolist() == [3, 32767]


def test_reuse_is_that_of_sets():
  trace, w_of = drifting(), range(1, MOST + 1)
  told = selections.reuse(trace)
  _, n, n_layers, n_heads, _ = trace.selected.shape
  for layer, head in np.ndindex(n_layers, n_heads):
    sets = [[set(np.flatnonzero(of[t, layer, head])) for t in range(n)] for of in trace.selected]
    steps = [(of, t) for of in sets for t in range(MOST, n)]
    total = sum(len(of[t]) for of, t in steps)
    overlap = [sum(len(of[t] & set().union(*of[t - w : t])) for of, t in steps) / total for w in w_of]
    working_set = [sum(len(set().union(*of[t - w + 1 : t + 1])) for of, t in steps) / total for w in w_of]
    np.testing.assert_allclose(told["overlap"][layer][head], overlap, atol=1e-4)
    np.testing.assert_allclose(told["working_set"][layer][head], working_set, atol=1e-4)
    np.testing.assert_allclose(told["blocks"][layer][head], total / len(steps), atol=1e-3)
  assert told["working_set"][0][0][0] == 1 and 0.2 < told["overlap"][0][0][0] < told["overlap"][0][0][MOST - 1] < 1


def test_the_steps_of_an_answer():
  """A trace begins with the first token of the answer, whatever the question's length."""
  model = Model(CFG, init_params(CFG, 0), ByteTokenizer(), (257,), "tiny")
  wanted = [case for case in accuracy.cases(["cuboid_mean"], [128], []) if case.series == "cuboid_mean"]
  ((case, trace),) = selections.measure(model, model.params, accuracy.Sample("recite", 640, 3, 2, 40), wanted)
  batch = accuracy.Instances.of(model.tokenizer, "recite", 640, range(3), 192)
  assert case.name == trace.case == "cuboid_mean 128" and trace.selected.shape == (3, 40, 2, 2, 20)
  assert trace.lengths.tolist() == (batch.start + batch.answers.argmax(1)).tolist()
  n_blocks = (trace.lengths[:, None] + np.arange(40)) // 32
  assert (trace.selected.sum(-1) == 4).all()
  for of, blocks in zip(trace.selected, n_blocks, strict=True):
    for step, last in zip(of, blocks, strict=True):
      assert step[..., 0].all() and step[..., last - 1].all() and not step[..., last:].any()  # sink and window
  with pytest.raises(ValueError, match="20 steps of an answer of recite at 640 tokens are too few"):
    next(selections.measure(model, model.params, accuracy.Sample("recite", 640, 1, 1, 20), wanted))


def test_misses_are_those_of_exact_lru():
  """One head that selects one of three blocks in turn: all or none of two slots' worth, after FILLED steps."""
  turns = np.zeros((1, selections.FILLED + 30, 1, 1, 3), bool)
  turns[0, np.arange(turns.shape[1]), 0, 0, np.arange(turns.shape[1]) % 3] = True
  assert [selections.misses(trace_of(turns), slots) for slots in (2, 3)] == [1, 0]
  late = turns.copy()
  late[:, : selections.FILLED, ..., :] = [True, False, False]  # two blocks are new, then all are known
  assert selections.misses(trace_of(late), 3) == 2 / 30
  with pytest.raises(ValueError, match="from step 64 on, and the trace has 44"):
    selections.misses(drifting(), 2)


def test_a_fit_finds_what_was_drawn():
  like = Trace(drifting(2, 100, 2, 2, 64).selected, np.array([64 * 30, 64 * 30 + 1], np.int32), 32, "c", "m", "t")
  drawn = selections.drawn_like("held:0.3", held(0.3), like)
  assert (drawn.selected.sum(-1) == round(like.selected.sum(-1).mean())).all()
  assert drawn.selected[..., 0].all()  # the sink
  found = selections.fit(drawn)
  assert found["by_misses"] == 0.3 and found["by_overlap"] == pytest.approx(0.3, abs=0.02)
  told = selections.in_short(drawn)
  assert list(told["misses"].values()) == sorted(told["misses"].values(), reverse=True)
  assert told["blocks"] == round(like.selected.sum(-1).mean()) and told["full"] == 60
