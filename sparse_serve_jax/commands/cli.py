"""What commands share: flags, --help, and how they end.

  _MODEL, _DTYPE = cli.define_model(default="random:tiny")
  _OUT = cli.define_out("Folder for requests.jsonl and run.json.", required=False)
  with cli.group("The workload"):
    _LIMIT = flags.DEFINE_integer("limit", None, "Requests to serve.", lower_bound=1)

  def main() -> int | None:  # the exit status; None is 0
    ...

  def command(argv: Sequence[str] | None = None) -> NoReturn:
    cli.run(main, interrupted="the same command goes on from {out}", argv=argv)

A command that did a part of its work ends with 1: a request of many was refused, say. It ends with 2 and one line on
stderr for what the user can mend, a wrong flag or a ValueError; with 130 when it is interrupted. A second interrupt
ends it at once, even while it waits for a device.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import pathlib
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

from absl import flags

from sparse_serve_jax import progress
from sparse_serve_jax.files import writing

flags.disclaim_key_flags()  # those that functions below define are their caller's

_HELP = {"--help", "-help", "-h", "--helpshort", "--helpfull"}
_OUTPUT = "standard output"
INTERRUPTED = 128 + signal.SIGINT
_HANDLED = b"\1"  # what an interrupt raised was handled, and the command goes on
_wake: int | None = None  # the descriptor that these numbers are written to, once interrupts are watched
_MOMENT = 0.5  # seconds: signals that are less apart are one interrupt
_DROPPED = b"\0"  # beside numbers of signals: what an interrupt raised was dropped
_was_interrupted = False  # ever, handled or not
_groups: dict[str, str] = {}  # title of the group that a flag belongs to, by its name


# --------------------------------------------------------------------------------------------------------------- flags


@contextlib.contextmanager
def group(title: str) -> Iterator[None]:
  """Flags that are defined inside stand under this title in --help."""
  before = set(flags.FLAGS)
  yield
  _groups.update(dict.fromkeys([name for name in flags.FLAGS if name not in before], title))


def define_model(default: str | None = None) -> tuple[flags.FlagHolder[Any], flags.FlagHolder[Any]]:
  """--model, which has to be given if it has no default, and --dtype."""
  kinds = (
    "A model directory or a GGUF file."
    if default is None
    else 'A model directory, a GGUF file, "reference", or random:<name in configs/models>.'
  )
  with group("The model"):
    model = flags.DEFINE_string("model", default, kinds, required=default is None)
    return model, define_dtype()


def define_dtype() -> flags.FlagHolder[Any]:
  """--dtype, in the group of the model."""
  return flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Its numbers; by default those it was saved in, on a CPU float32."
  )


def define_serving() -> tuple[flags.FlagHolder[str], flags.FlagHolder[list[str]]]:
  """--config and --set: of what `load_config` and `override` take."""
  with group("How it is served"):
    config = flags.DEFINE_string("config", "sparse_serve", "A name in configs/serving, or a JSON file.")
    changes = flags.DEFINE_multi_string("set", [], "Overrides of the configuration, such as cache.hbm_bytes=8GiB.")
  return config, changes


def define_strict() -> flags.FlagHolder[bool]:
  """--strict, of commands that read rows of files."""
  with group("What is asked"):
    return flags.DEFINE_bool("strict", False, "End at the first row that cannot be served; else the others are.")


def define_out(what: str, required: bool = True) -> flags.FlagHolder[Any]:
  """--out, a folder that holds `what`."""
  with group("Results"):
    out = flags.DEFINE_string("out", None, what, required=required)
  flags.register_validator(out, lambda path: path != "", "a folder needs a name")
  return out


def define_ray() -> flags.FlagHolder[bool]:
  """--ray, of commands whose parts can run in several processes at once."""
  with group("How it is run"):
    return flags.DEFINE_bool(
      "ray", False, "Parts run beside each other, in a process for each GPU of a Ray cluster, or of this machine."
    )


class HostsFlags:
  """--coordinator, --hosts and --host_index: of a command that several processes run."""

  def __init__(self):
    with group("Several processes"):
      self._coordinator = flags.DEFINE_string("coordinator", None, "HOST:PORT at which the first process listens.")
      self._hosts = flags.DEFINE_integer(
        "hosts", 1, "Processes, each with these flags but its own number.", lower_bound=1
      )
      self._index = flags.DEFINE_integer(
        "host_index", 0, "Which of the processes this is, from 0 on; the first one reads and prints.", lower_bound=0
      )

  @property
  def is_first(self) -> bool:
    """Whether this process reads requests and prints."""
    return self._index.value == 0

  def join(self) -> None:
    """Waits for the others. From then on only the first process has a stdout."""
    if self._hosts.value == 1 and self._coordinator.value is None and self.is_first:
      return
    from sparse_serve_jax import hosts  # slow to import

    hosts.join(self._coordinator.value or "", self._hosts.value, self._index.value)
    own = os.dup(1)
    os.dup2(2, 1)  # libraries in C tell there whom they have met
    sys.stdout = open(own if self.is_first else os.devnull, "w", encoding=sys.stdout.encoding)  # noqa: SIM115


def define_verbose() -> flags.FlagHolder[bool]:
  """--verbose, which `run` reads."""
  with group("Results"):
    return flags.DEFINE_bool("verbose", False, "Show where an error comes from.")


def define_benchmark() -> tuple[flags.FlagHolder[Any], flags.FlagHolder[Any], flags.FlagHolder[Any]]:
  """--out, which may be left out; --commit and --smoke."""
  out = define_out("Folder for rows as JSON lines; they are added to what is there.", required=False)
  with group("Results"):
    commit = flags.DEFINE_string("commit", None, "What rows are stamped with where there is no git to ask.")
    smoke = flags.DEFINE_bool(
      "smoke", False, "Tiny shapes of its own, few repetitions, any machine: whether it runs, not how fast."
    )
  return out, commit, smoke


def file_in(out: flags.FlagHolder[Any], name: str) -> pathlib.Path | None:
  """A file in the folder of --out; None if there is no folder."""
  return None if out.value is None else pathlib.Path(out.value) / name


def chosen(flag: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
  """What a list of names chooses, each once and in the order given; "all" stands for all that is known.

  Raises:
    ValueError: a name is unknown.
  """
  if unknown := [name for name in given if name not in known and name != "all"]:
    raise ValueError(f"--{flag}: no {', '.join(unknown)}; there are {', '.join(known)}")
  return list(dict.fromkeys(name for one in given for name in (known if one == "all" else [one])))


def sizes(flag: flags.FlagHolder[Any]) -> dict[str, tuple[int, int]]:
  """Requests and tokens of each, by the entries of a list of <requests>x<tokens>.

  Raises:
    ValueError: one is not that.
  """
  matches = {text: re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) for text in flag.value}
  if wrong := [text for text, match in matches.items() if match is None]:
    raise ValueError(f"--{flag.name}: {wrong[0]!r} is not <requests>x<tokens>")
  return {text: (int(match[1]), int(match[2])) for text, match in matches.items() if match}


def numbers(flag: flags.FlagHolder[Any], kind: type[int] | type[float]) -> list[Any]:
  """The numbers of a list, ascending, each once.

  Raises:
    ValueError: they are none.
  """
  made = set()
  for text in flag.value:
    try:
      made.add(kind(text))
    except ValueError:
      raise ValueError(f"--{flag.name}: {text!r} is no {'integer' if kind is int else 'number'}") from None
  return sorted(made)


# ---------------------------------------------------------------------------------------------------------- beginnings


def run(
  main: Callable[..., int | None],
  arguments: Sequence[str] = (),
  interrupted: str = "",
  argv: Sequence[str] | None = None,
) -> NoReturn:
  """Parses the command line, calls `main` and ends the process. The main thread calls it.

  Args:
    main: gets what is given for `arguments`. What it returns is the exit status, None is 0. The docstring of its module
      is what --help shows.
    arguments: names of what may be given besides flags, each of which may be left out.
    interrupted: what to say then; {out} is the folder of results. Nothing is said where none was given.
    argv: the command line, by default the process's; its first entry is the program.
  """
  argv = sys.argv if argv is None else argv
  watch_interrupts()
  progress.log_warnings()
  module = sys.modules[main.__module__]
  if _HELP & set(argv[1:]):
    with endings(False, ""):
      print(help_of(module), flush=True)
      sys.exit(0)
  try:
    given = flags.FLAGS(list(argv))[1:]
    if len(given) > len(arguments):
      raise flags.Error(f"unexpected arguments: {' '.join(given[len(arguments) :])}")
    if nan := [name for name, value in flags.FLAGS.flag_values_dict().items() if value != value]:
      raise flags.Error(f"--{nan[0]}=nan is no number")
  except flags.Error as error:
    sys.exit(_mistake(f"{_asked_for(_in_a_line(error))}; --help shows what there is"))
  values = flags.FLAGS.flag_values_dict()
  told = interrupted.format(out=values["out"]) if values.get("out") else ""
  with _leaving(), endings(values.get("verbose", False), f"; {told}" if told else ""):
    status = main(*given) or 0
    with writing(_OUTPUT):
      sys.stdout.flush()
    sys.exit(status)


def help_of(module: ModuleType) -> str:
  """What --help prints: the docstring of a command, and its flags in groups."""
  titles: dict[str, list[str]] = {}
  own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(module)}
  for name in [name for name in flags.FLAGS if name in own]:
    flag = own[name]
    title = "--[no]" if flag.boolean else "--"
    text = re.sub(r";\s*repeat this option.*", " It can be repeated.", f"{title}{name}  {flag.help}")  # absl's
    if flag.default not in (None, [], "") and (flag.default or not flag.boolean):
      text += f" (default: {str(flag.default_as_str).strip(chr(39))})"
    elif any("must have a value" in of.message for of in flag.validators):  # absl's own, of one that is required
      text += " (required)"
    elif "default" not in text:
      text += " (default: false)" if flag.boolean else " (default: none)"
    lines = textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False)
    titles.setdefault(_groups.get(name, "Other flags"), []).extend(lines)
  parts = [(module.__doc__ or "").rstrip(), *("\n".join([f"{title}:", *lines]) for title, lines in titles.items())]
  return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------------------- endings


def end_with(table: str, result: Any) -> None:
  """Prints a table for people, and as the last line of stdout one JSON object for programs."""
  with writing(_OUTPUT):
    print(table)
    print(json.dumps(result), flush=True)


@contextlib.contextmanager
def endings(verbose: bool, interrupted: str) -> Iterator[None]:
  """Ends the process with 130 when it is interrupted, which `interrupted` adds to, and with 2 and a line on stderr for
  what the user can mend; `verbose` shows where that comes from. Output that nobody reads any more, as of `| head`, ends
  it with 141 and no word. `run` does this for a whole command.
  """
  try:
    yield
  except KeyboardInterrupt:
    print(f"interrupted{interrupted}", file=sys.stderr)
    sys.exit(INTERRUPTED)
  except BrokenPipeError:
    _drop_output()
    sys.exit(128 + signal.SIGPIPE)
  except (ValueError, NotImplementedError, OSError) as error:
    if isinstance(error, OSError) and error.filename == _OUTPUT:
      _drop_output()
    if verbose:
      raise
    sys.exit(_mistake(_in_a_line(error)))


def _drop_output() -> None:
  """Otherwise Python writes what is left of it when it ends."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _leaving() -> Iterator[None]:
  """Ends a process that was interrupted as Python does, but takes nothing down. An interrupt leaves a program that is
  being compiled to XLA's threads, and Python would take JAX's client from under them: a segmentation fault, whatever
  the status (jax 0.10.2).
  """
  try:
    yield
  except SystemExit as end:
    if not _was_interrupted:
      raise
    threading._shutdown()  # pyright: ignore  # ends worker processes, for which exit functions would wait
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(BrokenPipeError):
        stream.flush()
    os._exit(end.code if isinstance(end.code, int) else 1)


def _mistake(text: str) -> int:
  print(f"error: {text}", file=sys.stderr)
  return 2


def _asked_for(text: str) -> str:
  """With names of flags that have to be given, and with what is no number, in place of what absl says of them."""
  if wrong := re.match(r"flag (--\w+=.*): (invalid literal for int|could not convert string to float)", text):
    return f"{wrong[1]} is no {'integer' if 'int' in wrong[2] else 'number'}"
  missing = re.findall(r"Flag (--\w+) must have a value other than None", text)
  return f"{', '.join(missing)} must be given" if missing else text


def _in_a_line(error: BaseException) -> str:
  return re.sub(r"\s*\n\s*", " ", str(error).strip())


def go_on() -> None:
  """After an interrupt that ended a part of the work only: the next one is a first one again."""
  if _wake is not None:
    os.write(_wake, _HANDLED)


def watch_interrupts() -> None:
  """From now on, an interrupt is raised once, and a second one ends the process at once. May be called again.

  Signals within a moment are one interrupt: `timeout` and some shells send two. Where Python drops the exception, as
  of a finalizer or a callback of garbage collection, it is raised again in what the main thread does next. Python
  raises only when the main thread runs its code, not while it waits for a device: so another thread counts the
  signals, of which the interpreter tells at once.
  """
  global _wake
  if _wake is not None:
    return
  raised = first = -math.inf  # when: by `interrupt`; by the first signal of those that count

  def interrupt(*_: Any) -> None:
    global _was_interrupted
    nonlocal raised
    _was_interrupted = True
    before, raised = raised, time.monotonic()
    if raised - before > _MOMENT:
      raise KeyboardInterrupt

  def not_raised(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
      os.write(write, _DROPPED)
    else:
      sys.__unraisablehook__(unraisable)

  def watch() -> None:
    nonlocal raised, first
    while True:
      told = os.read(read, 64)
      if _DROPPED in told:
        time.sleep(0.01)  # until the finalizer has ended
        raised = first = -math.inf
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
      elif _HANDLED in told:
        first = -math.inf
      elif signal.SIGINT in told and first == -math.inf:
        first = time.monotonic()
      elif signal.SIGINT in told and time.monotonic() - first > _MOMENT:
        os._exit(INTERRUPTED)

  read, write = os.pipe()
  _wake = write
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell lets what it starts behind it ignore them
    signal.signal(signal.SIGINT, interrupt)
  sys.unraisablehook = not_raised
  threading.Thread(target=watch, name="interrupts", daemon=True).start()
