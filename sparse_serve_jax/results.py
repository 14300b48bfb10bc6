"""A run's folder: what made it, and rows of results that stay readable whenever the run ends.

  out = results.take_folder(path)  # at once, so that a wrong path is told before anything is loaded
  results.claim(out, {"config": config, "model": model.config})
  rows = results.Rows(out / "requests.jsonl")
  done = {row["request_id"] for row in rows.all}  # by the runs before this one
  rows.append({"request_id": "needle-3", "tokens": [1, 2]})

`run.json` of the folder holds under "setting" what decides that two runs are the same, and under "parts" what only
informs, an entry for each time that somebody went on with it: time, command line, git commit, versions, device, and
the sizes that were used where the setting leaves them open.

One process at a time adds to a folder: `.lock` there says which, and is removed when that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import csv
import dataclasses
import datetime
import errno
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_serve_jax import __version__
from sparse_serve_jax.files import read_json, read_lines, write_text, writing

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
PACKAGES = ("jax", "jaxlib", "numpy")
_ABSENT = object()
_taken: dict[pathlib.Path, tuple[int, int]] = {}  # descriptor of its locked file, and process, by folder


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
  """Makes a folder, unless it is there, in which files can be written.

  Raises:
    ValueError: the path is empty or a file's, or nothing can be written there.
  """
  if not os.fspath(path):
    raise ValueError("a folder of results needs a name, got an empty one")
  folder = pathlib.Path(path)
  if folder.exists() and not folder.is_dir():
    raise ValueError(f"{folder} is a file, results need a folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise ValueError(f"{folder} cannot be made: {error.strerror}") from None
  if not os.access(folder, os.W_OK | os.X_OK):
    raise ValueError(f"{folder} cannot be written to")
  return folder


def take_folder(path: str | os.PathLike[str]) -> pathlib.Path:
  """`make_folder` of a folder that no other process takes until this one ends, however that is. May be called again.

  Who only reads, or draws what is there, does not take it.

  Raises:
    ValueError: another process has it, which is told; its lock cannot be opened; or `make_folder` refuses the path.
  """
  folder = make_folder(path)
  file, key = folder / LOCK_FILE, folder.resolve()
  if key in _taken and _is(_taken[key][0], file):
    return folder
  while True:
    try:
      descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:  # another user's, say
      raise ValueError(
        f"{file} cannot be opened: {error.strerror}; it says who uses {folder}: if nobody does any more, remove it, "
        "or choose another folder"
      ) from None
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = os.pread(descriptor, 300, 0).decode() or "another process"  # it may be about to write that
      os.close(descriptor)
      raise ValueError(f"{folder} is in use by {holder}: wait for its end, or choose another folder") from None
    except OSError as error:  # some network file systems
      print(f"{folder} cannot be locked, {error.strerror}: let no other command write there", file=sys.stderr)
    if _is(descriptor, file):
      break
    os.close(descriptor)  # of a process that has just ended, and removed it
  os.ftruncate(descriptor, 0)
  os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
  _taken[key] = descriptor, os.getpid()
  return folder


def _is(descriptor: int, file: pathlib.Path) -> bool:
  with contextlib.suppress(FileNotFoundError):
    return os.path.samestat(os.fstat(descriptor), file.stat())
  return False


@atexit.register
def _give_back() -> None:
  """Removes the files; the kernel removes the locks."""
  for folder, (descriptor, process) in _taken.items():
    file = folder / LOCK_FILE
    if process == os.getpid() and _is(descriptor, file):
      with contextlib.suppress(OSError):
        file.unlink()


def claim(
  path: str | os.PathLike[str],
  setting: Mapping[str, Any],
  kept: Sequence[str] = ("*.jsonl",),
  device: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Takes a folder for the run of one setting only, and notes who went on with it now.

  A folder without results is taken, and one of the same setting is gone on with.

  Args:
    path: of the folder, which is made if it is not there.
    setting: what decides whether two runs are the same; values of JSON, and dataclasses of these.
    kept: patterns of the files (empty ones do not count) and folders that are results.
    device: what it runs on, as `provenance` tells it; None: what this process has.

  Returns:
    The folder.

  Raises:
    ValueError: the folder holds results of another run (the difference is told, with both values), or of one that is
      not known; or `take_folder` refuses the path.
  """
  folder, setting = take_folder(path), _plain(setting)
  file, parts = folder / RUN_FILE, []
  found = [path.name for pattern in kept for path in folder.glob(pattern) if path.is_dir() or path.stat().st_size]
  if found and not file.exists():
    raise ValueError(f"{folder} has {found[0]} but no {RUN_FILE} that says what made it: choose another folder")
  if found:
    before = read_json(file)
    if told := differences(before.get("setting", {}), setting):
      raise ValueError(f"{folder} holds another run, choose another folder: {'; '.join(told)}")
    parts = before.get("parts", [])
  replace_json(file, {"setting": setting, "parts": [*parts, provenance() | ({"device": device} if device else {})]})
  return folder


def note(folder: pathlib.Path, about: Mapping[str, Any]) -> None:
  """Adds `about`, what was not known yet, such as sizes that were derived, to what `claim` noted of this time."""
  run = read_json(folder / RUN_FILE)
  run["parts"][-1] |= _plain(about)
  replace_json(folder / RUN_FILE, run)


def noted(folder: pathlib.Path, key: str) -> Any:
  """What was noted last under a key, now or when somebody else went on with the folder; None if nothing was."""
  return next((part[key] for part in reversed(read_json(folder / RUN_FILE)["parts"]) if key in part), None)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
  """What differs between the settings `before` and `now`, by dotted names in order, with both values."""
  was, now = leaves(before), leaves(now)

  def show(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)

  both = {key: (was.get(key, _ABSENT), now.get(key, _ABSENT)) for key in was | now}
  return [f"{key} was {show(old)} and is {show(new)}" for key, (old, new) in both.items() if old != new]


def provenance() -> dict[str, Any]:
  """When, by what and on what this process runs. JAX chooses its devices, if it has not yet."""
  import jax

  device = jax.devices()[0]
  return {
    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": sys.argv,
    "commit": commit(),
    "versions": {
      "sparse_serve_jax": __version__,
      "python": platform.python_version(),
      **{name: importlib.metadata.version(name) for name in PACKAGES},
    },
    "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
  }


def commit() -> str | None:
  """The commit of the checkout that this package lies in, with a "+" if it was changed since; None: in no checkout."""
  here = pathlib.Path(__file__)

  def git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()

  try:
    # A package that is installed within somebody's checkout is not of it.
    return git("describe", "--always", "--dirty=+") if git("ls-files", "--error-unmatch", here.name) else None
  except OSError:  # there is no git
    return None


def replace_json(file: pathlib.Path, value: Any) -> None:
  """Writes a `value` as a JSON file, in one piece: whenever the process ends, the old or the new one is there."""
  partial = file.with_name(f"{file.name}.partial")
  write_text(partial, json.dumps(value, indent=2) + "\n")
  partial.replace(file)


def write_table(
  file: pathlib.Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = (), markdown: str | None = None
) -> None:
  """Writes a table for readers and for programs.

  Args:
    file: their name, to which .md and .csv are added.
    rows: a line each.
    columns: some of their keys, by default all in the order in which they come.
    markdown: the text for readers, by default these columns with numbers of four digits.
  """
  heads = list(columns) or list(dict.fromkeys(key for row in rows for key in row))
  if markdown is None:
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *([_shown(row.get(head)) for head in heads] for row in rows)]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  write_text(file.with_name(f"{file.name}.md"), markdown)
  table = file.with_name(f"{file.name}.csv")
  with writing(table), table.open("w", newline="", encoding="utf-8") as opened:
    writer = csv.DictWriter(opened, heads, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)


def _shown(value: Any) -> str:
  return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class Rows:
  """Rows in a .jsonl file, a JSON object a line: whenever the process ends, all of its lines are whole but the last."""

  def __init__(self, file: pathlib.Path):
    """Reads what is there. A last line without its end, as a run that was killed leaves it, is removed.

    Raises:
      ValueError: a line is no JSON object; names file and line.
    """
    self.file = file
    self.all: list[dict[str, Any]] = []
    if file.exists():
      _remove_unfinished_line(file)
      self.all = [row for _, row in read_lines(file)]

  def append(self, *rows: Mapping[str, Any]) -> None:
    """Adds rows to the file, all in one piece, and to `all`; OSError and none of them where there is no room."""
    if rows:
      data = b"".join(map(_line, rows))
      with writing(self.file), self.file.open("ab", buffering=0) as file:
        before = file.tell()
        if file.write(data) != len(data):
          file.truncate(before)
          raise OSError(errno.ENOSPC, f"not all of {len(data)} bytes could be written", str(self.file))
      self.all += map(dict, rows)

  def replace(self, index: int, row: Mapping[str, Any]) -> None:
    """Puts a `row` in the place of that of `index`. The file is written anew, in one piece."""
    self.all[index] = dict(row)
    partial = self.file.with_name(f"{self.file.name}.partial")
    with writing(partial):
      partial.write_bytes(b"".join(map(_line, self.all)))
    partial.replace(self.file)


def _remove_unfinished_line(file: pathlib.Path) -> None:
  text = file.read_bytes()
  whole = text.rfind(b"\n") + 1
  if whole != len(text):
    with file.open("r+b") as opened:
      opened.truncate(whole)


def _line(row: Mapping[str, Any]) -> bytes:
  try:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
  except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
    return (json.dumps(row) + "\n").encode()


def _plain(value: Any) -> Any:
  """The value as a JSON file gives it back."""
  return json.loads(json.dumps(value, default=lambda other: dataclasses.asdict(other)))


def leaves(value: Any, path: str = "") -> dict[str, Any]:
  """Dotted name, after `path` if it is given, -> value of everything in nested objects; an empty one is a value."""
  if not isinstance(value, Mapping) or (path and not value):
    return {path: value}
  return {k: v for key, part in value.items() for k, v in leaves(part, f"{path}.{key}" if path else key).items()}
