"""Which replica serves a request: one that holds the beginning of its prompt, unless it has too much to do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

MOST_LOAD, MORE = 1.25, 4  # a replica takes requests for their beginning up to 1.25 x the mean load + 4
_KEPT = 1 << 17  # links that are remembered: 4 M tokens in blocks of 32


class Router:
  """Remembers where blocks of prompts went, by the links of their chains (`memory.prefix.hash_chain`)."""

  def __init__(self) -> None:
    self._where: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
    self._turn: dict[int, int] = {}  # of each replica, when it was last chosen
    self._n = 0

  def choose(self, chain: Sequence[bytes], loads: Mapping[int, int]) -> int:
    """The replica that was last given the longest beginning of a chain. If there is none among `loads`, or its load is
    beyond the bound, the least loaded one, of several the one whose last turn is the longest ago.

    Args:
      chain: of the prompt.
      loads: requests that live, by replica; not empty.
    """
    bound = MOST_LOAD * sum(loads.values()) / len(loads) + MORE
    known = (self._where.get(link) for link in reversed(chain))
    at = next((replica for replica in known if replica is not None), None)
    if at is None or loads.get(at, bound) >= bound:
      at = min(loads, key=lambda replica: (loads[replica], self._turn.get(replica, -1)))
    self._n += 1
    self._turn[at] = self._n
    for link in reversed(chain):  # of a chain its end goes before its beginning
      self._where[link] = at
      self._where.move_to_end(link)
    while len(self._where) > _KEPT:
      self._where.popitem(last=False)
    return at

  def forget(self, replica: int) -> None:
    """Its cache is gone."""
    for link in [link for link, at in self._where.items() if at == replica]:
      del self._where[link]
