"""A chunked prompt reads its earlier chunks where they lie, in slots, and what else runs does not drive them out."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from sparse_serve_jax.serving.plan import Plan, StepResult
from tests.test_exactness import CPU_AND_GPU
from tests.tiny import config, greedy, new_engine, prompt_of, tiny_model, with_slots

SHORT, LONG, N = 64, 200, 24  # tokens of prompts that decode, and of a longer one; of output
CHUNK = 32  # tokens, of which all but the last chunk of the longer one have as many: few programs
ROWS, CHUNKS = 3 * 4 * (SHORT + N) // 8, 4 * LONG // 8  # blocks of them, at most: 3 rows, 2 layers, 2 heads
N_CHUNKS = -(-LONG // CHUNK)


class Run(NamedTuple):
  steps: list[tuple[Plan, StepResult]]

  def chunks(self) -> list[int]:
    """Iterations that prefill the long prompt."""
    return [i for i, (plan, _) in enumerate(self.steps) if any(work.request_id == "long" for work in plan.works)]

  def loaded(self, last: int | None = None) -> int:
    """Blocks that its chunks, or the last ones of them, and the decode steps beside them read from the pool."""
    chunks = self.chunks()[1:] if last is None else self.chunks()[-last:]
    return sum(self.steps[i][1].stats.loaded for i in chunks)


def run(slots: int, control: str, *assignments: str) -> Run:
  """Three requests that decode, then a long prompt beside them; all selections are of everything."""
  model, steps = tiny_model(), []
  conf = config(
    "scheduler.prefill=chunked",
    f"scheduler.chunk_tokens={CHUNK}",
    f"scheduler.batch_control={control}",
    "cache.save=direct",  # a chunk after staged saves waits until they have landed
    *assignments,
  )
  observe = lambda seen: steps.append((seen.plan, seen.result))  # noqa: E731
  engine = new_engine(with_slots(conf, slots, model), model, observer=observe)
  prompts = [*(prompt_of(SHORT, i) for i in range(3)), prompt_of(LONG, 3)]
  requests = [engine.add_request(prompt, N) for prompt in prompts[:3]]
  for _ in range(7):
    engine.step()
  requests.append(engine.add_request(prompts[3], N, request_id="long"))
  engine.run()
  for request, prompt in zip(requests, prompts, strict=True):
    assert request.output_tokens == greedy("gqa2", tuple(prompt), N)
  return Run(steps)


@CPU_AND_GPU
@pytest.mark.parametrize("budget", ["sparse.token_budget=512", "sparse.token_budget=32"])
def test_later_chunks_load_nothing_where_slots_hold_them_and_the_rows_beside(device, budget):
  """Also where a chunk has more blocks than the budget."""
  assignments = [] if "512" in budget else [budget, "sparse.policy=psa", "sparse.threshold=1.0"]
  fits = run(ROWS + CHUNKS, "working_set", *assignments)
  chunks = fits.chunks()
  assert chunks == list(range(chunks[0], chunks[0] + N_CHUNKS))  # none of them paused
  assert all(len(fits.steps[i][0].decode) == 3 for i in chunks)
  assert fits.loaded() == 0


@CPU_AND_GPU
def test_with_too_few_slots_a_prompt_pauses_rather_than_thrash(device):
  """The slots hold the prompt, or those that decode, but not both."""
  controlled, free = run(ROWS, "working_set"), run(ROWS, "none")
  chunks = free.chunks()
  assert chunks == list(range(chunks[0], chunks[0] + N_CHUNKS)) and free.loaded() > 2 * CHUNKS
  chunks = controlled.chunks()
  assert len(chunks) == N_CHUNKS < chunks[-1] + 1 - chunks[0]  # it paused
  assert controlled.loaded() < CHUNKS


def test_a_chunk_after_a_pause_brings_back_what_was_driven_out():
  """So that the chunks after it load nothing."""
  paused = run(CHUNKS, "working_set", "scheduler.chunk_tokens=40")  # it pauses once
  first, second = paused.chunks()[:2]
  assert second > first + 1 and paused.steps[second][1].stats.loaded > 0
  assert paused.loaded(last=3) == 0


@pytest.mark.soak
def test_kernels_do_the_same():
  assert run(ROWS + CHUNKS, "working_set", "implementation=interpret").loaded() == 0
