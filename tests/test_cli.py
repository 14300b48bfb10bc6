"""How commands begin and end, in processes of their own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparse_serve_jax import processes
from sparse_serve_jax.commands import COMMANDS, cli
from tests.forks import start

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = '''"""Does what it is told.

  python program.py [WORD]
"""

import ctypes, itertools, os, pathlib, signal, sys, time
from absl import flags
from sparse_serve_jax.commands import cli
from sparse_serve_jax import processes, results

_OUT = cli.define_out("Folder of rows.jsonl.", required=False)
_VERBOSE = cli.define_verbose()
with cli.group("What is done"):
  _KINDS = flags.DEFINE_list("kinds", ["a", "b"], "Kinds of things.")
  _FAST = flags.DEFINE_bool("fast", False, "Does it at once.")
_LEVEL = flags.DEFINE_integer("level", 3, "Of detail.", lower_bound=1)


def wait_for_ever():
  """As for a device: no Python runs, whatever signals come."""
  mutex = ctypes.create_string_buffer(64)
  for _ in range(2):
    ctypes.CDLL(None).pthread_mutex_lock(mutex)


class Finalized:
  def __del__(self):  # in which Python drops what is raised
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def compile_for_seconds():
  os.environ.pop("XLA_FLAGS", None)  # tests let it optimize nothing
  import jax
  import jax.numpy as jnp

  jax.config.update("jax_enable_compilation_cache", False)

  def product(x):
    for i in range(1000):
      x = jnp.sin(x @ x.T + i) @ x
    return x

  lowered = jax.jit(product).lower(jnp.ones((8, 8)))
  print("begun", flush=True)
  lowered.compile()


def main(word="none"):
  if word == "fail":
    raise ValueError("no such\\n  thing")
  if word == "status":
    return 1
  if word == "compile":
    compile_for_seconds()
  if word == "workers":
    made = processes.ahead(len, itertools.repeat("abc"), 2)
    print(next(made), flush=True)
    time.sleep(30)
  if word == "unread":
    print("begun", flush=True)
    sys.stdout = open(os.dup(1), "w")  # which keeps what is written, though PYTHONUNBUFFERED may be set
    print("more")
    time.sleep(30)
  if word == "finalizer":
    Finalized()
    time.sleep(30)
  if word in ("rows", "work", "cleanup"):
    rows = results.Rows(results.make_folder(_OUT.value) / "rows.jsonl")
    rows.append({"i": 0})
    print("begun", flush=True)
    try:
      if word == "work":
        wait_for_ever()
      while True:
        rows.append({"i": 1})
        time.sleep(0.001)
    finally:
      print("ends", flush=True)
      time.sleep(0.2)
      if word == "cleanup":
        wait_for_ever()
  print(word, _KINDS.value, _LEVEL.value)


if __name__ == "__main__":
  cli.run(main, arguments=["WORD"], interrupted="go on with {out}")
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
  file = tmp_path_factory.mktemp("cli") / "program.py"
  file.write_text(PROGRAM)
  return file


@contextlib.contextmanager
def begin(program: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
  """A process that has ended afterwards, whatever happens."""
  path = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = sys.argv[1:]; "
  command = [sys.executable, "-c", path + "runpy.run_path(sys.argv[0], run_name='__main__')", str(program), *arguments]
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    try:
      yield process
    finally:
      process.kill()


def run(program: Path, *arguments: str) -> tuple[int, str, str]:
  with begin(program, *arguments) as process:
    out, err = process.communicate(timeout=60)
  return process.returncode, out, err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(program, flag):
  code, out, err = run(program, flag)
  assert code == 0 and not err
  assert out == (
    "Does what it is told.\n\n  python program.py [WORD]\n\n"
    "Results:\n  --out  Folder of rows.jsonl. (default: none)\n"
    "  --[no]verbose  Show where an error comes from. (default: false)\n\n"
    "What is done:\n  --kinds  Kinds of things. (default: a,b)\n  --[no]fast  Does it at once. (default: false)\n\n"
    "Other flags:\n  --level  Of detail. (default: 3)\n"
  )


def test_all_may_stand_among_names():
  assert cli.chosen("tasks", ["all", "b"], ["a", "b"]) == ["a", "b"]
  assert cli.chosen("tasks", ["b", "all"], ["a", "b"]) == ["b", "a"]
  with pytest.raises(ValueError, match="--tasks: no c; there are a, b"):
    cli.chosen("tasks", ["all", "c"], ["a", "b"])


NAMES = [name for group in COMMANDS.values() for name in group]
UNITS = (
  r"(?i)\b(tokens?|requests?|seconds?|bytes|blocks|steps|times|instances|processes|rates?|rows|shares?|thresholds?|runs|"
  r"answers|pieces|calls|port|seed|probability|temperature|outputs|prompts)\b"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_in_sentences_and_groups(name):
  """With the unit of each number, and each flag's default."""
  done = start("sparse_serve_jax", name, "--help")
  assert done.returncode == 0 and not done.stderr, done.stderr
  about, *groups = re.split(r"\n\n(?=[A-Z][^\n]*:\n  --)", done.stdout)
  assert f"sparse-serve {name}" in about and groups and not [g for g in groups if g.startswith("Other flags")]
  flags = re.findall(r"^  --(?:\[no\])?\w+  (.*(?:\n {6}.*)*)", "\n".join(groups), re.M)
  for text in (re.sub(r"\s+", " ", flag) for flag in flags):
    sentence, _, default = text.partition(" (default: ")
    assert re.match(r"(<[\w|]+>: )?([A-Z]|--\w+: |[a-z]+: |http)", sentence) and not sentence.startswith("Of "), text
    assert sentence.removesuffix(" (required)").endswith("."), text
    assert default or "default" in sentence or "(required)" in sentence, text
    if re.match(r"(\d+(\.\d+)?,?)+\)|inf\)", default):
      assert re.search(UNITS, sentence), text
  assert flags
  shown = " ".join(re.findall(rf"sparse-serve {name} .*", about))
  assert set(re.findall(r"--(\w+)", shown)) <= set(re.findall(r"^  --(?:\[no\])?(\w+)", "\n".join(groups), re.M)), shown


def test_what_is_given(program):
  assert run(program, "--kinds=c", "word", "--level=4") == (0, "word ['c'] 4\n", "")
  assert run(program, "status")[0] == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--levle=4"], "Unknown command line flag 'levle'. Did you mean: level ?; --help shows what there is"),
    (["--level=0"], "flag --level=0: 0 is not a positive integer; --help shows what there is"),
    (["--out="], "flag --out=: a folder needs a name; --help shows what there is"),
    (["one", "two", "three"], "unexpected arguments: two three; --help shows what there is"),
    (["fail"], "no such thing"),
    (["rows", f"--out={__file__}"], f"{__file__} is a file, results need a folder"),
  ],
)
def test_a_mistake_is_one_line(program, arguments, message):
  assert run(program, *arguments) == (2, "", f"error: {message}\n")


def test_nan_is_no_number():
  """No bound of a flag refuses it."""
  done = start("sparse_serve_jax", "serve", "random:tiny", "--drain_seconds=nan")
  assert (done.returncode, done.stderr) == (2, "error: --drain_seconds=nan is no number; --help shows what there is\n")


def test_flags_that_must_be_given_are_named():
  done = start("sparse_serve_jax", "bench")
  told = "error: --url, --tokenizer must be given; --help shows what there is\n"
  assert (done.returncode, done.stderr) == (2, told)


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["config", "--list"]])
def test_output_that_nobody_reads_is_no_error(arguments):
  command = [sys.executable, "-m", "sparse_serve_jax", *arguments]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
  assert process.returncode == 128 + signal.SIGPIPE


def test_an_output_that_is_full_is_named(program):
  command = [sys.executable, str(program)]
  with open("/dev/full", "w") as full:
    done = subprocess.run(
      command,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )
  assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device: 'standard output'\n")


def test_verbose_shows_where_an_error_comes_from(program):
  code, _, err = run(program, "fail", "--verbose")
  assert code == 1 and "Traceback" in err and err.endswith("ValueError: no such\n  thing\n")


def test_an_interrupted_command_keeps_its_rows(program, tmp_path):
  with begin(program, "rows", f"--out={tmp_path}") as process:
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
  assert (process.returncode, out, err) == (130, "ends\n", f"interrupted; go on with {tmp_path}\n")
  first, *others = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
  assert first == {"i": 0} and len(others) > 9 and all(row == {"i": 1} for row in others)


def test_signals_within_a_moment_are_one_interrupt(program, tmp_path):
  with begin(program, "rows", f"--out={tmp_path}") as process:
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "ends\n"  # so that they are two for the process too
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
  assert (process.returncode, out, err) == (130, "", f"interrupted; go on with {tmp_path}\n")


def test_an_interrupt_of_a_finalizer_is_not_lost(program):
  start = time.monotonic()
  assert run(program, "finalizer") == (130, "", "interrupted\n")
  assert time.monotonic() - start < 25  # it would sleep for 30 seconds


def test_an_interrupt_of_a_compilation_is_an_interrupt(program):
  """XLA goes on with it in a thread of its own, which must not find that its client is gone."""
  with begin(program, "compile") as process:
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, "interrupted\n")


def test_an_interrupt_ends_worker_processes(program):
  """Also those whose results are not being waited for."""
  with begin(program, "workers") as process:
    assert process.stdout and process.stdout.readline() == "3\n"
    time.sleep(1)  # until all of them wait for work
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=25)
  assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_no_worker_process_sees_an_interrupt():
  """Of a terminal, which sends it to all of them, also while they begin."""
  blocked = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK)
  (workers,) = processes.ahead(blocked, [()], 1)
  assert signal.SIGINT in workers and signal.SIGINT not in blocked(())


def test_an_interrupt_is_one_where_nobody_reads_the_output(program):
  with begin(program, "unread") as process:
    assert process.stdout and process.stderr and process.stdout.readline() == "begun\n"
    process.stdout.close()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=25), process.stderr.read()) == (130, "interrupted\n")


@pytest.mark.parametrize("where", ["work", "cleanup"])
def test_a_second_interrupt_ends_at_once(program, tmp_path, where):
  """Though the main thread waits where no Python runs."""
  with begin(program, where, f"--out={tmp_path}") as process:
    assert process.stdout and process.stdout.readline() == "begun\n"
    time.sleep(0.3)  # until it waits
    process.send_signal(signal.SIGINT)
    if where == "cleanup":
      assert process.stdout.readline() == "ends\n"
    with pytest.raises(subprocess.TimeoutExpired):
      process.wait(timeout=0.8)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
  assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0]) == {"i": 0}
