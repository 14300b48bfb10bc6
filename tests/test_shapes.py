"""The alphabet does not lie: every array of the values that pass between rooms has the shape that its annotation says,
with the same letter for the same size throughout.
"""

from __future__ import annotations

import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import jaxtyped

import pallas_kernels as kernels
from sparse_serve_jax.memory.kv_cache import Hot, KVCache
from sparse_serve_jax.serving.executor import JaxExecutor
from sparse_serve_jax.step import DecodeBatch, PrefillBatch, StepOutput
from tests.tiny import config, new_engine, prompt_of, tiny_model, with_slots

VALUES = (KVCache, Hot, kernels.Maps, DecodeBatch, PrefillBatch, StepOutput)


def wrong(value: Any, path: str = "") -> list[str]:
  """Fields of a value, and of values in it, that are not what their annotations say."""
  found = []
  for name, hint in typing.get_type_hints(type(value)).items():
    field, where = getattr(value, name), f"{path}{type(value).__name__}.{name}"
    if isinstance(field, VALUES):
      found += wrong(field, f"{where}: ")
    elif isinstance(field, jax.Array | np.ndarray | np.generic) and not any(
      isinstance(field, kind) for kind in typing.get_args(hint) or (hint,)
    ):
      found.append(f"{where} {getattr(field, 'shape', '')}")
  return found


def test_a_wrong_shape_is_found():
  maps = kernels.Maps.empty(2, 2, 40, 12)
  with jaxtyped("context"):
    assert not wrong(maps)
  with jaxtyped("context"):
    assert wrong(maps._replace(last_used=jnp.zeros(13, jnp.int32))) == ["Maps.last_used (13,)"]
  with jaxtyped("context"):
    assert wrong(maps._replace(slot_of=jnp.zeros((2, 2, 40)))) == ["Maps.slot_of (2, 2, 40)"]


@pytest.mark.parametrize("offload", [True, False])
def test_values_of_a_run(offload: bool):
  """Batches, outputs and the cache of every program of a run with pieces of prompts, drawn tokens and misses."""
  conf = config("sparse.token_budget=64", "scheduler.max_inject_tokens=64", f"cache.offload={str(offload).lower()}")
  engine = new_engine(with_slots(conf, 30, tiny_model()) if offload else conf, tiny_model())
  executor = engine._executor
  assert isinstance(executor, JaxExecutor)
  seen = set()

  def checked(name: str):
    program = getattr(executor.programs, name)

    def call(*args):
      results = program(*args)
      with jaxtyped("context"):
        for value in (*args, *results):
          if isinstance(value, VALUES):
            assert not wrong(value)
            seen.add(type(value))
      return results

    return call

  originals = {name: getattr(executor.programs, name) for name in ("decode", "prefill", "release_and_admit")}
  try:
    for name in originals:
      setattr(executor.programs, name, checked(name))
    for i, n in enumerate((100, 20, 7)):
      engine.add_request(prompt_of(n, seed=n), 9, temperature=0.5 * (i % 2))
    engine.run()
  finally:
    for name, program in originals.items():
      setattr(executor.programs, name, program)
  assert seen == {KVCache, Hot, DecodeBatch, PrefillBatch, StepOutput}
