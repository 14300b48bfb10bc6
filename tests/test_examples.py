"""The scripts in examples/ run, and say what they promise."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

import pytest

from sparse_serve_jax import workloads
from sparse_serve_jax.attention.methods import METHODS

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
REFERENCE = str(EXAMPLES.parent / "models" / "reference")


def example(name: str) -> Any:
  spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_these_are_all():
  here = {name.removeprefix("test_the_example_") for name in globals() if name.startswith("test_the_example_")}
  assert here == {file.stem for file in EXAMPLES.glob("*.py")}


@pytest.mark.slow
def test_the_example_generate(optimized, capsys):
  *answers, drawn = example("generate").main(REFERENCE, prompt_tokens=600)
  assert [output.finish_reason for output in answers] == ["stop", "stop"]  # at the stop string
  lines = capsys.readouterr().out.splitlines()
  assert len(drawn.samples) == 3 and len(lines) == 5
  for output, line in zip(answers, lines, strict=False):
    assert f"right is ('{output.text.strip()}',)" in line


def test_the_example_chat(capsys):
  messages = example("chat").main()
  assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
  assert capsys.readouterr().out.startswith("Why is the sky blue?\n")


def test_the_example_stream(capsys):
  pieces = example("stream").main("random:tiny")
  said = capsys.readouterr().out
  assert len(pieces) > 3 and said.startswith("".join(pieces)) and "text-1" in said


@pytest.mark.slow
def test_the_example_selection_method(optimized):
  try:
    right = example("selection_method").main(REFERENCE, prompt_tokens=1200, instances=1)
  finally:
    METHODS.pop("better_half")
  assert right["cuboid_mean"] == right["better_half"] == 1


def test_the_example_workload(capsys):
  try:
    served = example("workload").main()
  finally:
    workloads.WORKLOADS.pop("countdown")
  assert (served.summary.requests, served.refused, served.failed) == (6, 0, 0)
  assert "bottles-5: " in capsys.readouterr().out
