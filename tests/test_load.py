"""The server under load, shortly; `make soak` runs two minutes with 200 streams."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
from tests.load import load

MiB = 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
  ("streams", "seconds", "warm_seconds"), [(16, 5, 5), pytest.param(200, 120, 30, marks=pytest.mark.soak)]
)
def test_a_server_under_load(streams, seconds, warm_seconds):
  """Nothing is compiled while it serves, as programs stay in memory. The warm part fills pools and the prefix cache.

  How many clients leave or are cancelled grows with the streams: a slow machine has had three in the short part.
  """
  told = load(streams, seconds, warm_seconds)
  print(told)
  assert not told["wrong"] and told["whole"] > streams and told["left"] > streams // 8
  assert told["compiled"] == 0
  assert told["cancelled"] > streams // 8 and told["iterations_to_cancel"] <= 1
  assert told["healths"] > 20 * seconds and told["health_p99_s"] < 0.1
  before, after = told["before"], told["after"]
  assert (after["threads"], after["descriptors"]) == (before["threads"], before["descriptors"])
  assert after["rss"] - before["rss"] < 32 * MiB
