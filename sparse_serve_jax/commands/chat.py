"""A conversation with a model, in the terminal.

  sparse-serve chat MODEL
  sparse-serve chat MODEL --message="Why is the sky blue?"

MODEL is a model directory or a GGUF file that has a chat template. Each line is a message. /exit ends, and /new begins
another conversation; an interrupt (Ctrl-C) ends an answer or, while a message is waited for or with --message, the
command. Control tokens that are typed stay text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from absl import flags, logging

from sparse_serve_jax import runtime
from sparse_serve_jax.commands import cli
from sparse_serve_jax.commands.asking import AskingFlags, tell_end

if TYPE_CHECKING:
  from sparse_serve_jax.llm import LLM
  from sparse_serve_jax.tokenizing import Message

with cli.group("The conversation"):
  _MESSAGE = flags.DEFINE_string("message", None, "Answer this message on stdout, and end.")
  _SYSTEM = flags.DEFINE_string("system", None, "Text of the system message that each conversation begins with.")
_ASKED = AskingFlags()
_CONFIG, _SET = cli.define_serving()
_VERBOSE = cli.define_verbose()


def main(model: str | None = None) -> int:
  """Returns 1 if the answer to --message ended with an error."""
  if model is None:
    raise ValueError("give a model: sparse-serve chat MODEL")
  _ = _ASKED.params  # what is wrong with it is told now
  runtime.configure()
  logging.set_verbosity(logging.WARNING)  # JAX tells of every backend it does not find
  from sparse_serve_jax.llm import LLM  # slow to import

  llm = LLM(model, config=_CONFIG.value, overrides=_SET.value, dtype=_ASKED.dtype)
  begin: list[Message] = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
  llm.encode_chat([*begin, {"role": "user", "content": "?"}])  # there is a template, and it takes such messages
  if _MESSAGE.value is not None:
    return int(_answer(llm, [*begin, {"role": "user", "content": _MESSAGE.value}], goes_on=False) is None)
  messages = [*begin]
  while (text := _read()) is not None:
    if text == "/new":
      messages = [*begin]
    elif text:
      asked: list[Message] = [*messages, {"role": "user", "content": text}]
      try:
        answer = _answer(llm, asked)
      except ValueError as error:  # such as a conversation that is longer than what fits
        print(f"error: {error}; /new begins another conversation", file=sys.stderr)
        continue
      if answer is not None:
        messages = [*asked, {"role": "assistant", "content": answer}]
  return 0


def _read() -> str | None:
  """The next message; None at the end."""
  try:
    text = input("> " if sys.stdin.isatty() else "").strip()
  except EOFError:
    return None
  return None if text == "/exit" else text


def _answer(llm: LLM, messages: Sequence[Message], goes_on: bool = True) -> str | None:
  """Prints an answer as it comes and returns it; None if it ended with an error. An interrupt ends a conversation that
  `goes_on` no further than this answer, which is then what has come.
  """
  pieces = list[str]()
  try:
    stream = llm.stream(messages, _ASKED.params)
    for piece in stream:
      pieces.append(piece)
      print(piece, end="", flush=True)
  except KeyboardInterrupt:
    if not goes_on:
      print(flush=True)
      raise
    cli.go_on()
    print("\n[interrupted]", file=sys.stderr)
    return "".join(pieces)
  except RuntimeError as error:
    print(f"\nerror: {error}", file=sys.stderr)
    return None
  print(flush=True)
  tell_end(stream.output)
  return "".join(pieces)


def command(argv: Sequence[str] | None = None) -> NoReturn:
  cli.run(main, ["MODEL"], argv=argv)
