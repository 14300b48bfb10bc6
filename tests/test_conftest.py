"""What a session tells of its worker processes."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.forks import ROOT

CONFTEST = """
from tests import conftest
from tests.conftest import *

conftest.LONGEST = 3
"""
HANGS = """
import time
import pytest

@pytest.fixture
def that_hangs():
  yield
  time.sleep(60)

def test_with_one(that_hangs):
  pass
"""


def test_a_fixture_that_does_not_end_ends_its_worker(tmp_path):
  (tmp_path / "conftest.py").write_text(CONFTEST)
  (tmp_path / "test_hangs.py").write_text(HANGS)
  command = [sys.executable, "-m", "pytest", "-n1", "-p", "no:cacheprovider", "test_hangs.py"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
  told = done.stdout.partition("how gw0 ended")[2]
  assert done.returncode == 1 and "Timeout (0:00:03)" in told and "in that_hangs" in told, done.stdout + done.stderr
