"""A run's folder: whose it is, what stands in it, and what a run that was killed leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors

import sparse_serve_jax
from sparse_serve_jax import results
from sparse_serve_jax.attention.traces import Trace
from sparse_serve_jax.config import load_config, override
from sparse_serve_jax.models import ByteTokenizer, hf, save_hf, weights
from sparse_serve_jax.results import Rows, claim
from sparse_serve_jax.serving.timeline import Timeline
from tests.fake_engine import fake_executor
from tests.tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent


def parts_of(folder: Path) -> list[dict]:
  return json.loads((folder / "run.json").read_text())["parts"]


def test_a_folder_is_made_and_gone_on_with(tmp_path):
  setting = {"config": load_config("psa"), "limit": 3, "sizes": (1, 2)}
  assert claim(tmp_path / "a" / "b", setting) == tmp_path / "a" / "b"
  (tmp_path / "a" / "b" / "rows.jsonl").write_text("{}\n")
  claim(str(tmp_path / "a" / "b"), setting)
  written = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
  assert written["setting"]["config"] == json.loads(json.dumps(dataclasses.asdict(load_config("psa"))))
  assert written["setting"]["sizes"] == [1, 2]
  first, second = written["parts"]
  assert first["time"] <= second["time"] and {k: v for k, v in first.items() if k != "time"}.items() <= second.items()
  assert first["command"] == sys.argv
  assert first["versions"]["jax"] == jax.__version__ and first["versions"]["numpy"] == np.__version__
  assert first["versions"]["sparse_serve_jax"] == sparse_serve_jax.__version__
  assert first["device"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": jax.device_count()}


def test_what_is_known_later_is_noted_of_this_time(tmp_path):
  for size in (5, 7):
    claim(tmp_path, {"limit": 3})
    (tmp_path / "rows.jsonl").write_text("{}\n")
    results.note(tmp_path, {"sizes": {"cache.hbm_bytes": size}})
  assert [part["sizes"]["cache.hbm_bytes"] for part in parts_of(tmp_path)] == [5, 7]
  assert all("command" in part for part in parts_of(tmp_path))


def test_another_run_is_refused_with_the_difference(tmp_path):
  config = load_config("psa")
  claim(tmp_path, {"config": config, "model": "tiny", "limit": None, "rate": 2})
  Rows(tmp_path / "rows.jsonl").append({})
  before = (tmp_path / "run.json").read_bytes()
  other = {"config": override(config, ["sparse.threshold=0.5"]), "model": "tiny", "limit": 4, "seed": None}
  with pytest.raises(ValueError) as error:
    claim(tmp_path, other)
  assert str(error.value) == (
    f"{tmp_path} holds another run, choose another folder: config.sparse.threshold was 0.95 and is 0.5; "
    "limit was None and is 4; rate was 2 and is absent; seed was absent and is None"
  )
  assert (tmp_path / "run.json").read_bytes() == before


def test_rows_of_unknown_origin_are_not_gone_on_with(tmp_path):
  (tmp_path / "log.txt").write_text("made by a shell before the run began")
  (tmp_path / "rows.jsonl").write_text("{}\n")
  with pytest.raises(ValueError, match=r"has rows\.jsonl but no run\.json that says what made it"):
    claim(tmp_path, {})
  assert not (tmp_path / "run.json").exists()
  (tmp_path / "rows.jsonl").unlink()
  claim(tmp_path, {})


def test_a_run_that_left_no_results_makes_room(tmp_path):
  """It failed before its first row, so that a corrected command takes the folder."""
  claim(tmp_path, {"steps": 8})
  (tmp_path / "rows.jsonl").touch()
  claim(tmp_path, {"steps": 48})
  assert json.loads((tmp_path / "run.json").read_text())["setting"] == {"steps": 48} and len(parts_of(tmp_path)) == 1
  (tmp_path / "checkpoints").mkdir()
  claim(tmp_path, {"steps": 9})
  with pytest.raises(ValueError, match="steps was 9 and is 10"):
    claim(tmp_path, {"steps": 10}, kept=["checkpoints"])


def test_a_damaged_run_file_is_named(tmp_path):
  (tmp_path / "run.json").write_text('{"setting": ')
  (tmp_path / "rows.jsonl").write_text("{}\n")
  with pytest.raises(ValueError, match=r"run\.json:1: not JSON"):
    claim(tmp_path, {})


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("", "a folder of results needs a name, got an empty one"),
    ("file", "file is a file, results need a folder"),
    ("file/in", "file/in cannot be made: Not a directory"),
    ("/proc/none", "/proc/none cannot be made: "),
  ],
)
def test_a_path_that_is_no_folder(path, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("file").write_text("kept")
  with pytest.raises(ValueError) as error:
    results.make_folder(path)
  assert str(error.value).startswith(message)
  assert [file.name for file in tmp_path.iterdir()] == ["file"] and Path("file").read_text() == "kept"


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(ValueError, match="cannot be written to"):
    results.make_folder(tmp_path)


HOLDER = """
import os, sys
from sparse_serve_jax import results
results.take_folder(sys.argv[1])
results.take_folder(sys.argv[1])
if sys.argv[2] == "forks" and not os.fork():  # a worker, which leaves the lock to this process
  results.take_folder(sys.argv[1])
  sys.exit()
sys.argv[2] == "forks" and os.wait()
print(os.getpid(), flush=True)
sys.stdin.read()
"""


def holder(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
  command = [sys.executable, "-c", HOLDER, str(folder), how]
  return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_a_folder_is_one_process_s_at_a_time(how, tmp_path):
  with holder(tmp_path, how) as other:
    assert other.stdout and other.stdout.readline() == f"{other.pid}\n"
    for take in (results.take_folder, lambda path: claim(path, {})):
      with pytest.raises(ValueError) as error:
        take(tmp_path)
      assert str(error.value).startswith(f"{tmp_path} is in use by process {other.pid} on ")
    assert results.make_folder(tmp_path) == tmp_path  # of who draws what is there
    other.communicate()
  assert not list(tmp_path.iterdir())
  assert results.take_folder(tmp_path) == results.take_folder(tmp_path) == tmp_path


def test_a_process_that_was_killed_has_no_folder(tmp_path):
  with holder(tmp_path) as other:
    assert other.stdout and other.stdout.readline()
    other.kill()
  assert [file.name for file in tmp_path.iterdir()] == [".lock"]
  claim(tmp_path, {})
  assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
  """As of another user, whose process was killed."""

  def denied(file, *_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)

  with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
    patch.setattr(results.os, "open", denied)
    results.take_folder(tmp_path)
  assert str(error.value) == (
    f"{tmp_path}/.lock cannot be opened: Permission denied; it says who uses {tmp_path}: if nobody does any more, "
    "remove it, or choose another folder"
  )


def test_a_folder_that_was_made_anew_is_taken_anew(tmp_path):
  results.take_folder(tmp_path / "a")
  shutil.rmtree(tmp_path / "a")
  assert (results.take_folder(tmp_path / "a") / ".lock").exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
  def none(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

  monkeypatch.setattr(results.fcntl, "flock", none)
  assert results.take_folder(tmp_path) == tmp_path
  assert "cannot be locked, Function not implemented: let no other command write there" in capsys.readouterr().err


def test_rows_are_read_back(tmp_path):
  rows = Rows(tmp_path / "rows.jsonl")
  assert rows.all == [] and not rows.file.exists()
  rows.append({"i": 0, "text": "港\u2028é"})
  assert rows.file.read_bytes() == '{"i": 0, "text": "港\u2028é"}\n'.encode()  # there at once, and readable
  rows.append({"i": 1}, {"i": 2})
  rows.append()
  assert Rows(rows.file).all == rows.all == [{"i": 0, "text": "港\u2028é"}, {"i": 1}, {"i": 2}]


def test_a_row_is_replaced(tmp_path):
  rows = Rows(tmp_path / "rows.jsonl")
  rows.append({"i": 0}, {"error": "no"}, {"i": 2})
  rows.replace(1, {"i": 1})
  rows.append({"i": 3})
  assert Rows(rows.file).all == rows.all == [{"i": i} for i in range(4)]
  assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


FULL = Path("/dev/full")
WRITERS = {
  "rows.jsonl": lambda file: Rows(file).append({"i": 0}),
  "again.jsonl.partial": lambda file: Rows(file.with_suffix("")).replace(0, {"i": 1}),
  "run.json.partial": lambda file: results.replace_json(file.with_suffix(""), {}),
  "table.csv": lambda file: results.write_table(file.with_suffix(""), [{"a": 1}]),
  "table.md": lambda file: results.write_table(file.with_suffix(""), [{"a": 1}]),
  "timeline.json": lambda file: Timeline(fake_executor().shape).write(file),
  "trace.npz": lambda file: Trace(np.ones((1, 1, 1, 1, 8), bool), np.ones(1, np.int32), 8, "", "", "").save(file),
  "tokenizer_config.json": lambda file: ByteTokenizer().save(file.parent),
  "config.json": lambda file: save_hf(tiny_model(), file.parent),
}


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_file(name, tmp_path, monkeypatch):
  (tmp_path / "again.jsonl").write_text('{"i": 0}\n')
  (tmp_path / name).symlink_to(FULL)
  monkeypatch.setattr(results, "_remove_unfinished_line", lambda _: None)  # there is no end of what can be read there
  monkeypatch.setattr(results, "read_lines", lambda file: iter([(1, {"i": 0})]))
  monkeypatch.setattr(weights, "_new_directory", lambda path: path)
  with pytest.raises(OSError, match="No space left on device") as error:
    WRITERS[name](tmp_path / name)
  assert error.value.errno == errno.ENOSPC and str(error.value).endswith(f": '{tmp_path / name}'")


def test_weights_that_a_disk_has_no_room_for_are_told_with_the_file(tmp_path, monkeypatch):
  def full(*_, **__):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(hf.safetensors.numpy, "save_file", full)
  with pytest.raises(OSError, match=r"hf/model-00001-of-00001\.safetensors: Error while serializing: .*No space left"):
    save_hf(tiny_model(), tmp_path / "hf")


def test_half_a_surrogate_pair_is_written_too(tmp_path):
  rows = Rows(tmp_path / "rows.jsonl")
  rows.append({"prompt": "half \ud83d"})
  rows.file.read_text(encoding="utf-8")
  assert Rows(rows.file).all == [{"prompt": "half \ud83d"}]


@pytest.mark.parametrize("unfinished", ['{"i": 1', '{"i": 1}', "港"[:1], '{"i": "\xe9'])
def test_a_line_without_its_end_is_removed(tmp_path, unfinished):
  file = tmp_path / "rows.jsonl"
  file.write_bytes(b'{"i": 0}\n' + unfinished.encode()[:-1])
  assert Rows(file).all == [{"i": 0}] and file.read_bytes() == b'{"i": 0}\n'
  Rows(file).append({"i": 1})
  assert file.read_bytes() == b'{"i": 0}\n{"i": 1}\n'


def test_rows_that_are_none_are_named(tmp_path):
  (tmp_path / "rows.jsonl").write_text('{"i": 0}\n[]\n')
  with pytest.raises(ValueError, match=r"rows\.jsonl:2: wanted is a JSON object, got list"):
    Rows(tmp_path / "rows.jsonl")


def test_the_commit_is_that_of_the_packages_checkout(tmp_path, monkeypatch):
  def git(*arguments: str) -> str:
    named = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(["git", *named, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

  file = tmp_path / "results.py"
  monkeypatch.setattr(results, "__file__", str(file))
  file.write_text("")
  assert results.commit() is None  # no checkout
  git("init")
  git("commit", "--allow-empty", "-m", "first")
  assert results.commit() is None  # of a checkout that it does not belong to
  git("add", "results.py")
  git("commit", "-m", "second")
  commit = git("describe", "--always").strip()
  assert results.commit() == commit
  file.write_text("changed")
  assert results.commit() == f"{commit}+"


def test_it_loads_no_jax():
  code = "import sys, sparse_serve_jax.results; print('jax' in sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  assert out.strip() == "False"
