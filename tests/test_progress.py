"""Progress where nobody looks at a terminal."""

from __future__ import annotations

import sys

from sparse_serve_jax import progress


def test_a_file_gets_a_line_now_and_then(monkeypatch, capsys):
  """Not more often than every 20 seconds, whichever of several short bars is on its way, and none of a short run."""
  now = [1000.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  monkeypatch.setattr(progress._Lines, "told", 1000.0)
  for name, seconds in [("copy 1024", 3.0), ("multi_key 1024", 9.0)]:
    with progress.bar(desc=name, total=4, unit="setting", leave=False) as bar:
      for i in range(4):
        now[0] += seconds
        if i == 3:
          progress.write(f"{name} is done")
        bar.update()
  told = capsys.readouterr().err
  assert "\r" not in told
  lines = [line.partition(", ")[0] for line in told.splitlines()]
  assert lines == [
    "copy 1024 is done",
    "multi_key 1024: 1 of 4 settings",
    "multi_key 1024 is done",
    "multi_key 1024: 4 of 4 settings",
  ]


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  with progress.bar(total=2, unit="row") as bar:
    bar.update(2)
  assert "2/2" in capsys.readouterr().err


def test_what_is_done_before_counts(monkeypatch, capsys):
  monkeypatch.setattr(progress, "EVERY_S", 0.0)
  with progress.bar(total=5, initial=3, unit="row") as bar:
    bar.set_postfix_str("loss 1", refresh=False)
    bar.update()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("4 of 5 rows, ") and line.endswith("left, loss 1")
