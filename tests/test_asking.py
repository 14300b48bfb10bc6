"""`sparse-serve generate` and `chat`, and where the reference model is looked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparse_serve_jax import LLM
from sparse_serve_jax.commands import cli
from sparse_serve_jax.models import load_model, reference
from tests.forks import start
from tests.tiny import SMALL_SERVING

ROOT = Path(__file__).resolve().parent.parent
SMALL = [f"--set={change}" for change in SMALL_SERVING]


def test_generate_prints_the_text_and_why_it_ended(tmp_path: Path):
  story = tmp_path / "story.txt"
  story.write_text("Once upon a time")
  expected = LLM("random:tiny", overrides=SMALL_SERVING).generate("Once upon a time", max_tokens=12)[0].text
  done = start("sparse_serve_jax", "generate", "random:tiny", f"--prompt_file={story}", "--max_tokens=12", *SMALL)
  assert (done.returncode, done.stdout) == (0, expected + "\n")
  assert done.stderr == "[length: 17 prompt tokens (0 cached), 12 output tokens]\n"
  drawn = ["--temperature=1", "--seed=3", "--top_p=0.9"]
  again = start("sparse_serve_jax", "generate", "random:tiny", "Once upon a time", "--max_tokens=12", *drawn, *SMALL)
  assert again.returncode == 0 and again.stdout != done.stdout


def test_an_empty_prompt_is_begin_of_text_alone():
  expected = LLM("random:tiny", overrides=SMALL_SERVING).generate("", max_tokens=3)[0].text
  for prompt in ([""], []):  # nothing stands on stdin
    done = start("sparse_serve_jax", "generate", "random:tiny", *prompt, "--max_tokens=3", *SMALL)
    assert (done.returncode, done.stdout) == (0, expected + "\n")
    assert done.stderr == "[length: 1 prompt tokens (0 cached), 3 output tokens]\n"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "give a model: sparse-serve generate MODEL [PROMPT]"),
    (["random:tiny", "a", f"--prompt_file={__file__}"], "the prompt is given twice: as PROMPT and by --prompt_file"),
    (["random:tiny", "a", "--top_p=2"], "top_p must be above 0 and at most 1, got 2.0"),
    (["random:tony", "a"], "configs/models has no 'tony'"),
    (["random:tiny", "a" * 400, *SMALL], "384"),
  ],
)
def test_a_wrong_question_is_a_line(arguments: list[str], message: str):
  done = start("sparse_serve_jax", "generate", *arguments)
  assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
  assert message in done.stderr


def test_chat_answers_one_message():
  messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
  expected = LLM("random:tiny", overrides=SMALL_SERVING).chat(messages, max_tokens=8).text
  done = start(
    "sparse_serve_jax", "chat", "random:tiny", "--message=Hi", "--system=Be short.", "--max_tokens=8", *SMALL
  )
  assert (done.returncode, done.stdout) == (0, expected + "\n")
  assert start("sparse_serve_jax", "chat").returncode == 2


def test_interrupts_end_answers_and_the_conversation_goes_on():
  """Also the second one, though a second interrupt ends other commands at once."""
  flags = ["--max_tokens=20000", "--set=scheduler.max_context=30000", "--set=cache.block_tokens=16"]
  memory = ["--set=cache.hbm_bytes=64MiB", "--set=cache.dram_bytes=64MiB"]
  command = [sys.executable, "-m", "sparse_serve_jax", "chat", "random:tiny", *flags, *memory]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(
    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment
  ) as process:
    assert process.stdin and process.stdout and process.stderr
    try:
      for text in (b"Hi\n", b"And?\n"):
        process.stdin.write(text)
        process.stdin.flush()
        assert os.read(process.stdout.fileno(), 1)  # the answer has begun
        time.sleep(cli._MOMENT)  # signals that are less apart are one
        process.send_signal(signal.SIGINT)
        assert [process.stderr.readline() for _ in range(2)] == [b"\n", b"[interrupted]\n"]
      process.stdin.write(b"/new\n/exit\n")
      _, errors = process.communicate(timeout=60)
      assert (process.returncode, errors) == (0, b"")
    finally:
      process.kill()


def test_the_reference_model_is_found_or_told_where_to_get(tmp_path: Path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert reference.is_meant("reference") and reference.is_meant("models/reference/")
  assert not reference.is_meant("models/other") and not reference.is_meant("/models/reference")
  assert reference.find() == ROOT / "models" / "reference" and load_model("models/reference").name == "reference"
  trace = "models/reference/traces/recite_16384_512.npz"
  assert reference.file(trace) == ROOT / trace and reference.file("other.npz") == Path("other.npz")
  monkeypatch.setenv(reference.FOLDER, str(tmp_path / "mine"))
  with pytest.raises(ValueError, match=r"the reference model is not in .*/mine: it is the folder models/reference of"):
    load_model("reference")
  (tmp_path / "mine").symlink_to(ROOT / "models" / "reference")
  assert reference.find() == tmp_path / "mine" and load_model("reference").config.n_layers == 8
  (tmp_path / "reference").mkdir()
  (tmp_path / "reference" / "config.json").write_text("{}")
  assert not reference.is_meant("reference")  # the user's own, which is in this folder
