"""The model that is shipped: what its files are, and that it retrieves through the engine and in evaluation."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from sparse_serve_jax import LLM, tasks
from sparse_serve_jax.config import find_config, read_config
from sparse_serve_jax.evaluation import accuracy
from sparse_serve_jax.evaluation.accuracy import Sample
from sparse_serve_jax.evaluation.selections import Trace
from sparse_serve_jax.models import load_model, place_params, reference
from sparse_serve_jax.training.config import TrainConfig

MB = 1_000_000
REFERENCE = reference.find()


@pytest.fixture(scope="module")
def model():
  return load_model(REFERENCE, dtype="float32")


def test_its_shape_is_the_recipes(model):
  recipe = read_config(TrainConfig, find_config("training", "reference")).model
  assert dataclasses.replace(model.config, dtype=recipe.dtype) == recipe
  assert load_model(REFERENCE).config.dtype == recipe.dtype
  assert model.tokenizer.vocab_size <= recipe.vocab_size


def test_its_files_are_small():
  sizes = {file.name: file.stat().st_size for file in REFERENCE.iterdir() if file.is_file()}
  assert sum(sizes.values()) < 32 * MB and max(sizes.values()) < 16 * MB
  weights = json.loads((REFERENCE / "model.safetensors.index.json").read_text())["weight_map"]
  assert set(weights.values()) == {name for name in sizes if name.endswith(".safetensors")}


@pytest.mark.slow
def test_it_answers_through_the_engine(optimized):  # README.md's example does with another configuration
  memory = ["cache.lanes=8", "cache.hbm_bytes=32MiB", "cache.dram_bytes=64MiB", "scheduler.max_context=1088"]
  llm = LLM(str(REFERENCE), config="sparse_serve", overrides=[*memory, "sparse.token_budget=256"], dtype="float32")
  asked = [tasks.make(task, 1024, 0, llm.model.tokenizer, split="eval") for task in ("multi_key", "key_value")]
  outputs = llm.generate([of.prompt for of in asked], max_new_tokens=24)
  assert [tasks.TASKS[of.task].score(got.text, of) for of, got in zip(asked, outputs, strict=True)] == [1, 1]


@pytest.mark.slow
def test_it_retrieves_from_few_blocks(model, optimized):
  """At 2k tokens 63 blocks; a random choice of blocks finds next to nothing, so that what is chosen matters."""
  psa, names = "psa, groups of 4 0.95", ("dense 1", "cuboid_mean 512", "random 512", "psa, groups of 4 0.95")
  cases = accuracy.cases(["cuboid_mean", "random"], [512], [0.95], ["groups"])
  wanted = {case.name: case for case in cases if case.name in names}
  sample = Sample("key_value", 2048, 4, at_once=4, steps=48)
  rows = {case.name: row for case, row in accuracy.measure(model, place_params(model), sample, [*wanted.values()])}
  found = {name: row["accuracy"] for name, row in rows.items()}
  assert min(found["dense 1"], found["cuboid_mean 512"], found[psa]) == 1 and found["random 512"] < 0.5
  assert rows["dense 1"]["blocks"] > 60 and rows[psa]["blocks"] < 16


@pytest.mark.parametrize("file", [f"{task}_16384_{n}.npz" for task in ("recite", "renumber") for n in (512, 2048)])
def test_its_traces(file: str, model):
  trace = Trace.load(REFERENCE / "traces" / file)
  budget = int(file.removesuffix(".npz").split("_")[-1])
  _, n_steps, n_layers, n_heads, _ = trace.selected.shape
  assert (n_layers, n_heads) == (model.config.n_layers, model.config.n_kv_heads) and n_steps == 256
  assert np.all(trace.selected.sum(-1) == budget // trace.block_tokens)
