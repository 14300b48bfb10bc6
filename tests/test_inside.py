"""What a watch tells of a step is what the engine did: the same blocks, token, attention mass and working set."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sparse_serve_jax import LLM
from sparse_serve_jax.config import override
from sparse_serve_jax.evaluation import inside
from sparse_serve_jax.evaluation import replay as replays
from tests.tiny import SMALL_SERVING

S, N_NEW = 8, 24  # two more blocks than a table has when its request is admitted
PROMPT = np.random.default_rng(0).integers(0, 256, 203).tolist()
POLICIES = {
  "topk": ["sparse.token_budget=80", "scheduler.batch_control=working_set", "scheduler.working_set_steps=4"],
  "psa": ["sparse.policy=psa", "sparse.threshold=0.6", "sparse.group_blocks=2", "sparse.stop_when=mean_of_heads"],
}


@pytest.fixture(scope="module", params=POLICIES)
def served(request) -> tuple[LLM, inside.Watch, list[int]]:
  llm = LLM("random:tiny", overrides=[*SMALL_SERVING, *POLICIES[request.param]])
  watch = inside.watch(llm, opens=lambda row: row.step % 3 == 1)
  (output,) = llm.generate([PROMPT], max_tokens=N_NEW, ignore_eos=True)
  return llm, watch, output.token_ids


def test_steps_are_those_of_the_engine(served):
  llm, watch, tokens = served
  assert [step.position for step in watch.of("text-0")] == [len(PROMPT) + i for i in range(N_NEW - 1)]
  attended = {seen.plan.iteration: seen.result.stats.attended for seen in watch.iterations}
  for step in watch.steps:
    assert step.selected.shape[-1] == step.position // S
    assert step.selected.sum() == attended[step.iteration] > 0
  assert {len(tokens), len(watch.steps) + 1} == {N_NEW}
  same = LLM("random:tiny", config=llm.config)
  assert same.generate([PROMPT], max_tokens=N_NEW, ignore_eos=True)[0].token_ids == tokens


def test_what_is_resident_hits(served):
  """Until a step's own misses give up a slot that it reads later, what misses is what was in no slot before it."""
  _, watch, _ = served
  missed = {seen.plan.iteration: seen.result.stats.missed for seen in watch.iterations}
  absent = np.array([(step.selected & ~step.resident).sum() for step in watch.steps])
  actual = np.array([missed[step.iteration] for step in watch.steps])
  assert (absent <= actual).all() and 0 < absent.sum() > 0.8 * actual.sum()
  assert any(step.resident.any() for step in watch.steps)


def test_an_opened_step_gives_the_engines_token(served):
  _, watch, tokens = served
  opened = [step for step in watch.steps if step.opened is not None]
  assert [step.step for step in opened] == [1, 4, 7, 10, 13, 16, 19, 22]
  for step in opened:
    assert step.opened.token == tokens[step.step + 1]
    np.testing.assert_allclose(step.opened.shares.sum(-1) + step.opened.tail, 1, rtol=1e-5)


def test_scores_rank_as_the_engine_did(served):
  """The blocks read first by the order of the scores are those that were read."""
  llm, watch, _ = served
  for step in watch.steps:
    if step.opened is not None:
      rank = np.argsort(inside.order(step.opened, llm.config), -1)
      np.testing.assert_array_equal(rank < step.selected.sum(-1)[..., None], step.selected)


def test_masses_are_those_of_a_replay(served):
  llm, watch, tokens = served
  params, cfg = llm.engine.executor._executor.params, llm.model.config
  sequence = np.zeros((1, 232), np.int32)
  sequence[0, : len(PROMPT) + N_NEW] = PROMPT + tokens
  dense = replays.prefill(cfg, params, jnp.asarray(sequence))
  found = replays.replay(cfg, params, llm.config, dense, np.array([len(PROMPT)], np.int32), N_NEW - 1)
  for step in watch.steps:
    if step.opened is not None:
      np.testing.assert_allclose(step.opened.mass, found.mass[0, step.step], rtol=1e-4)


@pytest.mark.parametrize("served", ["psa"], indirect=True)
def test_claims_stop_where_the_engine_stopped(served):
  llm, watch, _ = served
  stopped = [step for step in watch.steps if step.opened is not None]
  for step in stopped:
    claims, used = inside.claims(step.opened, llm.config)
    np.testing.assert_array_equal(used, step.selected.sum(-1))
    assert not claims[..., :2].any() and claims[..., 2:].all()  # a sink and a window of 2 blocks are 2 groups
    last = np.take_along_axis(claims, (-(-used // 2) - 1)[..., None, None], -1)[..., 0].mean(-1)
    assert ((last > 0.6) | (used == step.selected.shape[-1])).all()
  assert len({int(n) for step in stopped for n in step.selected.sum(-1).flat}) > 1
  never = override(llm.config, ["sparse.threshold=1"])
  assert (inside.claims(stopped[0].opened, never)[1] == stopped[0].selected.shape[-1]).all()


def test_captured_mass_ascends_to_all_and_an_oracle_has_more(served):
  llm, watch, _ = served
  opened = watch.steps[1].opened
  by_score = inside.captured(opened, inside.order(opened, llm.config)).mean(2)
  by_mass = inside.captured(opened, inside.best_order(opened)).mean(2)
  assert (np.diff(by_score) >= 0).all() and (by_mass >= by_score - 1e-6).all()
  np.testing.assert_allclose(by_score[..., -1], 1, rtol=1e-5)
  assert (inside.found(opened, opened.scores.shape[-1]) == 1).all() and inside.found(opened, 4).mean() < 1


def test_working_sets_are_those_the_scheduler_asked_for(served):
  """It asks before a step, of the steps before."""
  llm, watch, _ = served
  mine = inside.working_sets(watch.of("text-0"), llm.config.scheduler.working_set_steps)
  asked = {
    row.step: seen.result.working_sets["text-0"] for seen in watch.iterations for row in seen.plan.measure if row.step
  }
  assert bool(asked) == (llm.config.scheduler.batch_control == "working_set")
  assert asked == {step: mine[step - 1] for step in asked}


def _step(iteration: int, *blocks: int, request_id: str = "a") -> inside.Step:
  """One layer and head."""
  selected = np.zeros((1, 1, 6), bool)
  selected[0, 0, list(blocks)] = True
  return inside.Step(request_id, iteration, iteration, 48, selected, np.zeros_like(selected))


def test_hit_rates_by_hand():
  steps = [_step(0, 0, 1), _step(1, 1, 2), _step(2, 2, 3), _step(3, 0, 3)]
  # 1, 2 and 3 come back at once: of two blocks a call two slots hold them. 0 was last used before 1, 2 and 3 were.
  assert inside.hit_rates(steps, [1, 2, 3, 4]).tolist() == [0, 3 / 8, 3 / 8, 4 / 8]
  assert inside.hit_rates(steps, [2], skip=1).tolist() == [3 / 6]
  other = [_step(i, 4, 5, request_id="b") for i in range(4)]
  both = sorted([*steps, *other], key=lambda step: step.iteration)
  assert inside.hit_rates(both, [3, 4, 6]).tolist() == [0, 9 / 16, 10 / 16]
  with pytest.raises(ValueError, match="leaves none of 4 iterations"):
    inside.hit_rates(steps, [2], skip=4)
  with pytest.raises(ValueError, match="leaves none of 1 iterations"):
    inside.hit_rates([_step(0)], [2])
  with pytest.raises(ValueError, match="there are no steps"):
    inside.hit_rates([], [2])


def test_working_sets_by_hand():
  steps = [_step(0, 0, 1), _step(1, 1, 2), _step(2, 2, 3), _step(3, 0, 3)]
  assert inside.working_sets(steps, 1).tolist() == [2, 2, 2, 2]
  assert inside.working_sets(steps, 3).tolist() == [2, 3, 4, 4]
  assert inside.working_sets([], 3).tolist() == []


def test_an_interrupt_ends_a_watch_and_the_llm_goes_on(monkeypatch):
  llm = LLM("random:tiny", overrides=SMALL_SERVING)
  expected, watch = llm.generate([PROMPT], max_tokens=4), inside.watch(llm)

  def interrupted(plan):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(watch, "submit", interrupted)
    llm.generate([PROMPT], max_tokens=4)
  assert llm.engine.failed
  assert [of.token_ids for of in llm.generate([PROMPT], max_tokens=4)] == [of.token_ids for of in expected]
  assert not watch.steps and inside.watch(llm) is not watch


@pytest.mark.parametrize("served", ["topk"], indirect=True)
def test_what_cannot_be_watched_is_refused(served):
  llm, *_ = served
  with pytest.raises(ValueError, match="watched already"):
    inside.watch(llm)
  dense = LLM("random:tiny", config="dense", overrides=["cache.hbm_bytes=8MiB", "cache.lanes=2"])
  with pytest.raises(ValueError, match="nothing is selected"):
    inside.watch(dense)
  stream = dense.stream("A heron", max_tokens=4)
  next(stream)
  with pytest.raises(ValueError, match="requests are running"):
    inside.watch(dense)
