"""How commands end."""

from __future__ import annotations

import contextlib
import sys


@contextlib.contextmanager
def endings(verbose: bool, interrupted: str):
  """Ends the process with 130 when it is interrupted, which `interrupted` adds to, and with 2 and a line on stderr for
  what the user can mend; `verbose` shows where that comes from.
  """
  try:
    yield
  except KeyboardInterrupt:
    print(f"interrupted{interrupted}", file=sys.stderr)
    sys.exit(130)
  except (ValueError, NotImplementedError, OSError) as error:
    if verbose:
      raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
