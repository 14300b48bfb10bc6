"""The console script: every command is told, found, and the same as its module under `experiments`."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve_jax import __version__, commands, results
from sparse_serve_jax.config import EngineConfig, ModelConfig, describe, from_dict, load_config, override
from tests import forks
from tests.fake_endpoint import FakeEndpoint
from tests.longbench import write_release
from tests.test_simulation import cost

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for group in commands.COMMANDS.values() for name in group]
start = functools.partial(forks.start, "sparse_serve_jax")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_help_names_every_command(arguments):
  done = start(*arguments)
  assert (done.returncode, done.stderr) == (0, "")
  assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == NAMES


def test_the_version():
  assert start("--version").stdout == f"{__version__}\n"


def test_an_unknown_command_is_refused():
  done = start("serv")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "error: 'serv' is no command; `sparse-serve --help` shows what there is\n"


def test_a_command_takes_its_flags_and_says_its_name():
  assert "--rungs" in start("ladder", "--help").stdout
  done = start("ladder", "--nonsense")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nonsense" in done.stderr


IMPORTING = """
import importlib, os, signal, sys, time
from sparse_serve_jax.commands import main


class Finalized:
  def __del__(self):  # in which Python drops what is raised
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


def imported(name):
  Finalized()
  time.sleep(30)


importlib.import_module, sys.argv = imported, ["sparse-serve", "run"]
main()
"""


def test_an_interrupt_of_the_imports_is_a_line():
  """Also one that comes within JAX's callback of garbage collection."""
  done = subprocess.run([sys.executable, "-c", IMPORTING], cwd=ROOT, capture_output=True, text=True, timeout=25)
  assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


FIRST_IMPORT = """
import os, runpy, signal, sys, time
from sparse_serve_jax.commands import main


class Interrupting:
  def find_spec(self, name, *_):
    if name == "sparse_serve_jax.commands.cli":
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(30)


sys.meta_path.insert(0, Interrupting())
if sys.argv[1] == "experiments":
  runpy.run_module("experiments.accuracy", run_name="__main__")
sys.argv = ["sparse-serve", sys.argv[1]]
main()
"""


@pytest.mark.parametrize("argument", ["run", "--help", "--version", "experiments"])
def test_an_interrupt_of_the_first_import_is_a_line(argument):
  """Which comes before interrupts are watched."""
  command = [sys.executable, "-c", FIRST_IMPORT, argument]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=25)
  assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_nothing_is_imported_before_interrupts_are_handled():
  code = (
    "import sys; from sparse_serve_jax.commands import main; print([m for m in sys.modules if 'sparse_serve' in m])"
  )
  said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert said == "['sparse_serve_jax', 'sparse_serve_jax.commands']\n"


# What a command needs to come as far as its folder of results.
WRITING = {
  "run": [],
  "bench": ["--model=fake", "--tokenizer=random:tiny"],
  "ladder": ["--model=random:tiny"],
  "simulate": ["--model=random:tiny"],
  "accuracy": ["--model=random:tiny"],
  "longbench": [],
  "selections": ["--traces=models/reference/traces/recite_16384_2048.npz"],
  "bench-kernels": ["--smoke"],
  "bench-step": ["--smoke"],
  "bench-prefill": ["--smoke"],
  "train-reference": [],
}


def test_what_writes_rows_is_known():
  files = {name: ROOT / f"sparse_serve_jax/commands/{name.replace('-', '_')}.py" for name in NAMES}
  texts = {name: file.read_text() for name, file in files.items()}
  with_out = {name for name, text in texts.items() if "cli.define_out(" in text or "cli.define_benchmark(" in text}
  assert with_out == {*WRITING, "plot"}


@pytest.mark.parametrize("name", WRITING)
def test_no_two_commands_write_to_one_folder(name, tmp_path):
  """The second one ends before it has done anything."""
  more = list(WRITING[name])
  if name == "simulate":
    (tmp_path / "cost.json").write_text(json.dumps(dataclasses.asdict(cost())))
    more += [f"--cost={tmp_path / 'cost.json'}"]
  if name == "longbench":
    more += [f"--longbench_dir={write_release(tmp_path / 'release', trec=2)}", "--tasks=trec"]
  results.take_folder(out := tmp_path / "out")
  with FakeEndpoint(lambda *_: []) as server:
    done = start(name, *more, *([f"--url={server.url}"] if name == "bench" else []), f"--out={out}")
  assert (done.returncode, done.stdout, [file.name for file in out.iterdir()]) == (2, "", [".lock"])
  (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert told.startswith(f"error: {out} is in use by process {os.getpid()} on ")


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_a_module(name):
  assert importlib.util.find_spec(f"sparse_serve_jax.commands.{name.replace('-', '_')}")


def test_every_module_under_experiments_is_a_command():
  for file in (ROOT / "experiments").glob("[!_]*.py"):
    docstring, code = file.read_text().split("\n", 1)
    name = docstring.split("`")[1].removeprefix("sparse-serve ")
    assert name in NAMES
    start = f'if __name__ == "__main__":\n  main("{name}")\n'
    assert code == f"\nfrom sparse_serve_jax.commands import main\n\n{start}"


def test_every_key_of_a_configuration_is_described():
  rows = {row.key: row for row in describe(EngineConfig)}
  sections = {name: vars(getattr(EngineConfig(), name)) for name in ("cache", "sparse", "scheduler")}
  values = {f"{section}.{name}": value for section, of in sections.items() for name, value in of.items()}
  assert {key: row.default for key, row in rows.items()} == values | {"implementation": "auto", "tp": 1}
  assert not [row for row in rows.values() if not row.meaning.endswith(".") or len(row.meaning) < 20]
  assert rows["cache.zones"].type == "shared, layer, lane" and rows["sparse.threshold"].type == "float or str"
  assert rows["cache.lanes"].meaning.startswith("Places of resident requests, R: prefilling, decoding or paused. 0: 64")
  needed = {row.key: row.default for row in describe(ModelConfig)}
  assert needed["d_model"] is None and needed["rope.theta"] == 10000.0


def test_config_lists_and_resolves():
  listed = start("config", "--list")
  assert listed.returncode == 0
  for row in describe(EngineConfig):
    assert f"{row.key}  {row.type} (default: {json.dumps(row.default)})\n  {row.meaning[:60]}" in listed.stdout
  assert "configurations: dense, fifo," in listed.stdout
  shown = start("config", "psa", "--set", "tp=2", "--set", "cache.hbm_bytes=1GiB")
  expected = override(load_config("psa"), {"tp": 2, "cache.hbm_bytes": 1 << 30})
  assert from_dict(EngineConfig, json.loads(shown.stdout)) == expected


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "which? there are dense, fifo, "),
    (["psa", "--list"], "--list shows all keys: it takes no name and no --set"),
    (["pso"], "did you mean 'psa'?"),
    (["tests.json"], "tests.json is no file"),
    (["psa", "--set", "tpp=2"], "unknown key 'tpp'; the nearest is 'tp'"),
  ],
)
def test_config_refuses(arguments, message):
  done = start("config", *arguments)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and message in done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["demo", ""], "'' is no model: it has no config.json and no model.json"),
    (
      ["generate", "random:tiny", "a", "--max_tokens=1e9"],
      "--max_tokens=1e9 is no integer; --help shows what there is",
    ),
    (["run", "--rate=abc"], "--rate=abc is no number; --help shows what there is"),
    (["ladder", "--rates=1,a", "--out=o"], "--rates: 'a' is no number"),
    (
      ["generate", "random:tiny", "a", "--config=16.json"],
      "16.json:1: not UTF-8: its byte order mark is that of UTF-16",
    ),
    (
      ["generate", "random:tiny", "a", "--set", "tp=3"],
      "tp=3 asks for 3 devices, and there are 1: give tp=1 up to tp=1",
    ),
    (["selections", "--traces=16.json"], "16.json is no trace of selections: it is no .npz file"),
    (["selections", "--traces=absent"], "absent is no trace of selections: No such file or directory"),
    (["longbench", "--score_only=absent"], "--score_only: absent is no folder"),
    (["config", "--set", "tp=2", "pso"], "configs/serving has no 'pso'; there are: dense"),
    (["calibrate", "--cost=a.txt"], "--cost: a.txt is the JSON file to write: its name must end in .json"),
  ],
)
def test_careless_input_is_one_plain_line(tmp_path, arguments, message):
  (tmp_path / "16.json").write_bytes("{}".encode("utf-16"))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  done = _elsewhere().run("sparse_serve_jax", *arguments, folder=tmp_path, environment=environment)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
  assert done.stderr.startswith("error: ") and message in done.stderr, done.stderr
  assert not (tmp_path / "o").exists()


@functools.cache
def _elsewhere() -> forks.Forks:
  made = forks.Forks(forks.OUR_OWN, {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
  atexit.register(made.close)
  return made


def test_what_a_model_is_warned_of_is_one_line_of_the_log(tmp_path):
  """Neither file and line of this package, nor its source."""
  goldens = ROOT / "tests" / "goldens"
  for name in ("mistral", "tokenizer"):
    shutil.copytree(goldens / name, tmp_path, dirs_exist_ok=True)
  config = (goldens / "mistral" / "config.json").read_text()
  (tmp_path / "config.json").write_text(config.replace("MistralForCausalLM", "LlamaForCausalLM"))
  done = start("generate", str(tmp_path), "hi", "--max_tokens=2")
  assert done.returncode == 0, done.stderr
  lines = [line for line in done.stderr.splitlines() if "LlamaForCausalLM" in line]
  told = "the architecture of model_type 'mistral' is 'MistralForCausalLM' and architectures is 'LlamaForCausalLM'; "
  assert len(lines) == 1 and lines[0].startswith(f"{tmp_path / 'config.json'}: {told}")
  assert ".py" not in done.stderr and "fields.chosen" not in done.stderr
