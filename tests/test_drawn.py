"""Drawn selections: what is reused, on which shapes they land, and who may not have them."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax import LLM
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.attention.drawn import Where, held, replay
from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.evaluation.replay import _Program
from sparse_serve_jax.models import Model
from sparse_serve_jax.serving.executor import JaxExecutor
from tests.tiny import config, new_engine, prompt_of, serve, tiny_model

TRACE = Path(__file__).resolve().parent.parent / "models" / "reference" / "traces" / "recite_16384_2048.npz"


def benchmarked(shape: str = "gqa2") -> Model:
  return dataclasses.replace(tiny_model(shape), name=f"random:{shape}")


def chosen(drawn, n: int, of: int, steps: int, *, heads: int = 4, start: int = 32_000, layer: int = 0) -> np.ndarray:
  """The best n of so many blocks: [steps, heads, n]."""

  @jax.jit
  def step(position):
    at = Where(jnp.int32(layer), jnp.arange(heads), jnp.full(1, start), position[None], 32, of)
    return jax.lax.top_k(drawn(at)[0], n)[1]

  return np.stack([step(jnp.int32(start + t)) for t in range(steps)])


def overlap(ids: np.ndarray) -> float:
  pairs = [
    (set(a), set(b)) for now, before in zip(ids[1:], ids[:-1], strict=True) for a, b in zip(now, before, strict=True)
  ]
  return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def working_set(ids: np.ndarray, w: int = 12) -> float:
  windows = [ids[t : t + w, k].ravel() for t in range(len(ids) - w) for k in range(ids.shape[1])]
  return sum(len(set(of)) for of in windows) / (len(windows) * ids.shape[-1])


@pytest.mark.parametrize(
  ("share", "of", "again", "union"), [(0.2, 1000, 0.78, 1.77), (0.4, 280, 0.72, 1.94), (0, 90, 1, 1)]
)
def test_held_blocks_come_back(share: float, of: int, again: float, union: float):
  ids = chosen(held(share), 62, of, 48, heads=32)
  assert overlap(ids) == pytest.approx(again, abs=0.015)
  assert working_set(ids) == pytest.approx(union, abs=0.06)
  assert (ids[:2] == chosen(held(share), 62, of, 2, heads=32)).all()
  assert len({frozenset(of_head) for of_head in ids[0]}) == 32  # heads differ


def small_trace() -> Trace:
  """Two requests, six steps, a layer, two heads, 12 blocks of 32 tokens, 10 of them before the first step."""
  selected = np.zeros((2, 6, 1, 2, 12), bool)
  for (r, t, k), i in np.ndenumerate((np.arange(24).reshape(2, 6, 2) * 7) % 10):
    selected[r, t, 0, k, [i, (i + 3) % 10]] = True
  return Trace(selected, np.array([330, 335], np.int32), 32, "some", "model", "task")


def test_replay_selects_what_was_recorded():
  trace = small_trace()
  for start, request in ((320, 0), (321, 1)):
    ids = chosen(replay(trace), 2, 12, 11, heads=2, start=start)
    for t in range(11):
      expected = trace.selected[request, min(t, 10 - t), 0]  # forth and back
      assert [sorted(of) for of in ids[t]] == [np.flatnonzero(of).tolist() for of in expected]


def test_replay_spreads_blocks_over_a_longer_request():
  trace = small_trace()
  ids = chosen(replay(trace), 2, 25, 6, heads=2, start=640)
  for t in range(6):
    assert [sorted(of) for of in ids[t]] == [(2 * np.flatnonzero(of)).tolist() for of in trace.selected[0, t, 0]]
  other = chosen(replay(trace), 2, 12, 6, heads=4, start=320)  # heads beyond the trace's: of the next request
  assert [sorted(of) for of in other[0, 2:]] == [np.flatnonzero(of).tolist() for of in trace.selected[1, 0, 0]]


def misses(ids: np.ndarray, slots: float) -> float:
  """Of exact LRU over [steps, heads, n], from the 64th step on."""
  used, counts = collections.OrderedDict(), [0, 0]
  for t, step in enumerate(ids):
    for key in np.ndenumerate(step):
      key = key[0][0], int(key[1])
      counts[0] += t >= 64 and key not in used
      counts[1] += t >= 64
      used[key] = used.pop(key, None)
      if len(used) > slots * step.size:
        used.popitem(last=False)
  return counts[0] / counts[1]


def test_a_replayed_trace_misses_as_the_recorded_one():
  trace = Trace.load(TRACE)
  at = replay(trace)
  ids = chosen(at, 64, 262, 180, heads=2, start=254 * 32, layer=3)
  recorded = trace.ids()[:180, 3, 254 * 32 % 4]
  for slots in (1.5, 3):
    assert misses(ids, slots) == pytest.approx(misses(recorded, slots), abs=0.003)


def of_both(folder: Path) -> str:
  """A method of two traces, of a budget and of PSA; in the second, step t of head k reads 1 + (t + k) % 3 blocks."""
  trace, ends = small_trace(), np.zeros((2, 6, 1, 2, 12), bool)
  for r, t, k in np.ndindex(2, 6, 2):
    ends[r, t, 0, k, 2 : 3 + (t + k) % 3] = True
  trace.save(folder / "trace.npz")
  dataclasses.replace(trace, selected=ends, policy="psa").save(folder / "ends.npz")
  return f"replay:{folder / 'trace.npz'},{folder / 'ends.npz'}"


@pytest.mark.parametrize(
  ("method", "policy"),
  [("held:0.2", "topk"), pytest.param("replay", "topk", marks=pytest.mark.soak), ("replay", "psa")],
)
def test_both_implementations_select_alike(method: str, policy: str, tmp_path: Path):
  if method == "replay":
    method = of_both(tmp_path)
  changes = [f"sparse.policy={policy}", "sparse.token_budget=48", "sparse.group_blocks=2", f"sparse.method={method}"]
  changes += ["sparse.threshold=1"] if policy == "psa" else []
  found = []
  for of in ("implementation=xla", "implementation=interpret", "tp=2"):
    tokens, engine = serve(config(*changes, of), benchmarked(), [prompt_of(120), prompt_of(90, 1)], 6)
    found.append((tokens, engine.usage.blocks_attended, engine.usage.blocks_missed))
  assert found[0] == found[1] and found[0][:2] == found[2][:2]
  if policy == "topk":
    assert found[0][1] == 2 * 2 * 2 * 5 * 6  # layers, heads, requests, steps, blocks


def test_lists_end_where_recorded_ones_did(tmp_path: Path):
  """The stop test never passes; sinks and window are read besides."""
  method = f"sparse.method={of_both(tmp_path)}"
  more = ["sparse.policy=psa", "sparse.threshold=1", "sparse.group_blocks=1"]
  small = ["sparse.sink_tokens=8", "sparse.window_tokens=8"]
  _, engine = serve(config(*more, *small, method), benchmarked(), [prompt_of(8 * 10 + 1)], 5)
  read = 1 + np.mean([(t + k) % 3 for t in range(4) for k in range(2)])
  assert engine.usage.blocks_attended == 2 * 2 * 4 * (2 + read)  # layers, heads, steps


@pytest.mark.parametrize("method", ["held:0.2", f"replay:{TRACE}"])
def test_psa_needs_a_trace_of_psa(method: str):
  with pytest.raises(ValueError, match="stops by attention mass.*must replay a trace of PSA"):
    JaxExecutor(config("sparse.policy=psa", f"sparse.method={method}"), benchmarked())


def test_one_trace_of_each_kind(tmp_path: Path):
  with pytest.raises(ValueError, match="one trace of a budget and one of PSA, not .* two of a kind"):
    get_method(f"replay:{TRACE},{TRACE}")


def test_only_random_weights_have_drawn_selections():
  conf = config("sparse.method=held:0.2")
  with pytest.raises(ValueError, match=r"held:0.2.*for benchmarks of random weights: not for gqa2, whose weights"):
    new_engine(conf, tiny_model())
  JaxExecutor(conf, benchmarked())
  with pytest.raises(ValueError, match="not for LLM"):
    LLM("random:tiny", overrides=["sparse.method=held:0.2"])
  with pytest.raises(ValueError, match="not for measurements of accuracy"):
    _Program.of(conf, False, "rule")


@pytest.mark.parametrize("name", ["held", "held:", "held:-1", "held:nan", "held:much"])
def test_what_held_is_not(name: str):
  with pytest.raises(ValueError, match="A of held:A must be a number, 0 or more"):
    get_method(name)


def test_what_no_trace_is(tmp_path: Path):
  with pytest.raises(ValueError, match="is no trace of selections"):
    get_method(f"replay:{tmp_path / 'none.npz'}")
  assert get_method("held:0.5") == get_method("held:0.5")  # programs are shared
