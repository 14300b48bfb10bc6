"""Which replica serves a request. No Ray is needed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparse_serve_jax.memory.prefix import hash_chain
from sparse_serve_jax.server import routing
from sparse_serve_jax.server.routing import MORE, MOST_LOAD, Router


def chain_of(*blocks: int, salt: str | None = None) -> list[bytes]:
  """Of a prompt whose blocks of 4 tokens each hold one number."""
  return hash_chain(np.repeat(np.array(blocks, np.int32), 4), 4, salt)


def test_what_begins_alike_goes_to_one_replica():
  router, idle = Router(), {0: 0, 1: 0, 2: 0}
  first = {i: router.choose(chain_of(i, 7), idle) for i in range(6)}
  assert sorted(first.values()) == [0, 0, 1, 1, 2, 2]  # in turn
  for i in reversed(range(6)):
    assert router.choose(chain_of(i, 7, 8), idle) == first[i]  # a longer one
    assert router.choose(chain_of(i, 9), idle) == first[i]  # one that parts later
  # The longest beginning counts.
  loads = {0: 0, 1: 0}
  router = Router()
  ours, theirs = router.choose(chain_of(1, 2, 3), loads), router.choose(chain_of(1, 4), {**loads, 0: 50})
  assert (ours, theirs) == (0, 1)
  assert router.choose(chain_of(1, 2, 5), loads) == 0 and router.choose(chain_of(1, 4, 5), loads) == 1


def test_a_salt_is_another_beginning():
  router = Router()
  at = router.choose(chain_of(1, 2), {0: 0, 1: 0})
  assert router.choose(chain_of(1, 2, salt="b"), {0: 0, 1: 0}) == 1 - at
  assert router.choose(chain_of(1, 2), {0: 0, 1: 0}) == at


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), max_size=200), st.integers(1, 4))
def test_no_replica_has_much_more_than_the_others(requests: list[tuple[int, int]], n: int):
  """Of requests that live for a while: number of beginning, and how many others it outlives."""
  router, ends = Router(), dict[int, list[int]]({i: [] for i in range(n)})
  for now, (begins, life) in enumerate(requests):
    loads = {i: sum(end > now for end in of) for i, of in ends.items()}
    at = router.choose(chain_of(begins), loads)
    assert loads[at] < MOST_LOAD * sum(loads.values()) / n + MORE or loads[at] == min(loads.values())
    ends[at].append(now + life)


def test_one_that_is_gone_gets_nothing_and_begins_anew():
  router = Router()
  at = router.choose(chain_of(1), {0: 0, 1: 0})
  assert router.choose(chain_of(1), {1 - at: 3}) == 1 - at
  router = Router()
  at = router.choose(chain_of(1), {0: 0, 1: 0})
  router.choose(chain_of(2), {0: 0, 1: 0})
  router.forget(at)
  assert router.choose(chain_of(1), {at: 1, 1 - at: 0}) == 1 - at
  assert router.choose(chain_of(2), {0: 1, 1: 1}) == 1 - at


def test_it_remembers_so_many(monkeypatch):
  monkeypatch.setattr(routing, "_KEPT", 10)
  router = Router()
  for i in range(30):
    router.choose(chain_of(0, i, i), {0: 0, 1: 0})
  assert len(router._where) == 10 and chain_of(0)[0] in router._where
