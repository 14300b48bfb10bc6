"""Flags of commands that ask a model themselves: how it answers."""

from __future__ import annotations

import sys

from absl import flags

from sparse_serve_jax.commands import cli
from sparse_serve_jax.outputs import RequestOutput
from sparse_serve_jax.sampling_params import SamplingParams

flags.disclaim_key_flags()  # they are their caller's


class AskingFlags:
  """--dtype, and fields of `SamplingParams`."""

  def __init__(self):
    with cli.group("The model"):
      self._dtype = cli.define_dtype()
    with cli.group("The answer"):
      self._tokens = flags.DEFINE_integer("max_tokens", 512, "Tokens of the output at most.", lower_bound=1)
      self._temperature = flags.DEFINE_float(
        "temperature", 0.0, "Temperature that tokens are drawn at; 0 takes the most likely one.", lower_bound=0.0
      )
      self._top_p = flags.DEFINE_float(
        "top_p", 1.0, "Probability that the most likely tokens which are drawn among have together."
      )
      self._seed = flags.DEFINE_integer("seed", 0, "Seed of what is drawn.", lower_bound=0)

  @property
  def dtype(self) -> str | None:
    return self._dtype.value

  @property
  def params(self) -> SamplingParams:
    return SamplingParams(
      max_tokens=self._tokens.value,
      temperature=self._temperature.value,
      top_p=self._top_p.value,
      seed=self._seed.value,
    )


def tell_end(output: RequestOutput) -> None:
  """On stderr, why an output ended and what it took."""
  of = output.usage
  took = f"{of.prompt_tokens} prompt tokens ({of.cached_tokens} cached), {of.output_tokens} output tokens"
  print(f"[{output.finish_reason}: {took}]", file=sys.stderr)
