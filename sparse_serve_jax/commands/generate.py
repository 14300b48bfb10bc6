"""Continues a text, on stdout as it comes.

  sparse-serve generate MODEL "Once upon a time"
  sparse-serve generate MODEL --prompt_file=story.txt --max_tokens=200
  cat story.txt | sparse-serve generate MODEL

MODEL is a model directory, a GGUF file, "reference", or random:<name in configs/models>. Without PROMPT and
--prompt_file the prompt is what comes on stdin; an empty one is what the tokenizer puts before texts (BOS), and an
error if that is nothing. Why the output ended stands on stderr. `sparse-serve chat` takes a model's chat template.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags, logging

from sparse_serve_jax import files, runtime
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.asking import AskingFlags, tell_end

with cli.group("The prompt"):
  _FILE = flags.DEFINE_string("prompt_file", None, "UTF-8 file that holds the prompt.")
_ASKED = AskingFlags()
_CONFIG, _SET = cli.define_serving()
_HOSTS = cli.HostsFlags()
_VERBOSE = cli.define_verbose()


def main(model: str | None = None, prompt: str | None = None) -> int:
  """Returns 1 if the output ended with an error."""
  if model is None:
    raise ValueError("give a model: sparse-serve generate MODEL [PROMPT]")
  params, text = _ASKED.params, _prompt(prompt) if _HOSTS.is_first else None
  runtime.configure()
  _HOSTS.join()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  from sparse_serve_jax import hosts  # slow to import, as is the next
  from sparse_serve_jax.llm import LLM

  text = hosts.agreed(text)
  llm = LLM(model, config=_CONFIG.value, overrides=_SET.value, dtype=_ASKED.dtype)
  stream = llm.stream(text, params)
  try:
    for piece in stream:
      print(piece, end="", flush=True)
  except RuntimeError as error:
    print(f"\nerror: {error}", file=sys.stderr)
    return 1
  print(flush=True)
  tell_end(stream.output)
  return 0


def _prompt(given: str | None) -> str:
  """What is to be continued.

  Raises:
    ValueError: it is given twice or not at all.
  """
  if given is not None and _FILE.value is not None:
    raise ValueError("the prompt is given twice: as PROMPT and by --prompt_file")
  if _FILE.value is not None:
    return files.read_text(_FILE.value)
  if given is None and sys.stdin.isatty():
    raise ValueError("give a prompt: as an argument, by --prompt_file, or on stdin")
  return sys.stdin.read() if given is None else given


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, ["MODEL", "PROMPT"], argv=argv)
