"""One model over two processes of this machine, each with one CPU device, by gloo: the tokens of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_serve_jax import hosts
from tests import jsonl
from tests.forks import ROOT
from tests.tiny import SMALL_SERVING

SMALL = [f"--set={of}" for of in SMALL_SERVING]


def start(n: int, *arguments: str) -> list[subprocess.Popen[str]]:
  """`n` processes of a command with one CPU device each; a single one has `n` of them."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  environment["XLA_FLAGS"] = environment["XLA_FLAGS"].replace("device_count=2", "device_count=1")
  command = [sys.executable, "-m", "sparse_serve_jax", *arguments]
  if n > 1:
    command += [f"--coordinator=127.0.0.1:{port}", f"--hosts={n}"]
    command += [] if "--set=tp=1" in command else [f"--set=tp={n}"]
  each = [[*command, f"--host_index={i}"] for i in range(n)] if n > 1 else [command]
  pipe = subprocess.PIPE
  return [subprocess.Popen(of, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True) for of in each]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
  try:
    said = [of.communicate(timeout=55) for of in processes]
  finally:
    for of in processes:
      of.kill()
  return [(of.returncode, *texts) for of, texts in zip(processes, said, strict=True)]


def tokens(folder: Path) -> dict[str, list[int]]:
  rows = jsonl.read(folder / "requests.jsonl")
  return {row["request_id"]: row["output_token_ids"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sparse_serve", pytest.param("psa", marks=pytest.mark.soak)])
def test_two_processes_have_the_tokens_of_one(config, tmp_path):
  """More requests than lanes, prompts that begin alike, and slots for a part of the blocks."""
  of = ["run", f"--config={config}", "--model=random:tiny", "--prompt_tokens=300", "--limit=6", "--ignore_eos", *SMALL]
  of += ["--max_new_tokens=6", "--dtype=float32"]
  alone = start(1, *of, f"--out={tmp_path / 'one'}")
  two = start(2, *of, f"--out={tmp_path / 'two'}")
  for status, _, errors in ended(alone):
    assert status == 0, errors
  (first, said, errors), (second, nothing, more) = ended(two)
  assert (first, second) == (0, 0), errors + more
  assert json.loads(said.splitlines()[-1])["requests"] == 6 and nothing == ""
  assert tokens(tmp_path / "two") == tokens(tmp_path / "one") and len(tokens(tmp_path / "one")) == 6


@pytest.mark.slow
def test_only_the_first_reads_the_prompt(tmp_path):
  (tmp_path / "prompt.txt").write_text("Once upon a time")
  of = ["generate", "random:tiny", f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_tokens=8", *SMALL]
  alone, two = start(1, *of), start(2, *of)
  ((status, expected, errors),) = ended(alone)
  (first, said, more), (second, nothing, _) = ended(two)
  assert (status, first, second) == (0, 0, 0), errors + more
  assert said == expected != "" and nothing == ""


def test_what_processes_cannot_agree_on_is_refused():
  with pytest.raises(ValueError, match="hosts=2, index=2: give HOST:PORT"):
    hosts.join("127.0.0.1:1", 2, 2)
  with pytest.raises(ValueError, match="coordinator=''"):
    hosts.join("", 2, 0)
  assert hosts.agreed({"a": [1]}) == {"a": [1]} and hosts.is_first()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--rate=5", *SMALL], "several processes serve what comes all at once"),
    ([], "2 processes must have the same sizes, give numbers"),
    ([*SMALL, "--set=tp=1"], "tp=1: 2 processes have 2 devices"),
  ],
)
def test_what_depends_on_one_process_is_refused(flags, message):
  done = ended(start(2, "run", "--model=random:tiny", "--limit=2", "--prompt_tokens=300", *flags))
  assert [status for status, _, _ in done] == [2, 2]
  assert all(message in errors for _, _, errors in done), done
