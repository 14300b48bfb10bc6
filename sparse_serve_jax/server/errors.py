"""What is told to a client in place of an answer, in OpenAI's form."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
  """A request gets this instead of an answer."""

  def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
    super().__init__(status, message, param, code)  # so that other processes can raise it
    self.status, self.message, self.param, self.code = status, message, param, code

  def __str__(self) -> str:
    return self.message

  def body(self) -> dict[str, Any]:
    kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
    message, param = _whole(self.message), self.param and _whole(self.param)
    return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}


def _whole(text: str) -> str:
  """Half of a character, which JSON can hold and UTF-8 cannot, written out."""
  return text.encode(errors="backslashreplace").decode()
