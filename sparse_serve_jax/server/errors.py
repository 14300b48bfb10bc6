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
    return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
