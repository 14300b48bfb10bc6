"""Settings whose accuracy is compared: selection methods by budget, PSA's stop rules by threshold, variations; and
sparse prefill by the share that it reads."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence

from pallas_kernels.stop import REST, WHEN
from sparse_serve_jax.attention import get_method
from sparse_serve_jax.attention.methods import TOP_P
from sparse_serve_jax.config import EngineConfig, SparseConfig, override

GROUPS = (4, 8, 32)  # blocks between two stop tests, beside the default
BLOCK_SIZES = (32, 16, 64)  # the first is that of all other comparisons
GRID = (*range(4, 65, 4), *range(80, 129, 16), *range(160, 257, 32))  # blocks
DEFAULT_METHOD = SparseConfig().method

# Variations that may be asked for besides methods, budgets and thresholds. Those of budgets are the default method's.
AXES = {
  "between": "budgets between those given, for comparison with PSA",
  "grid": "a fine grid of budgets: every 4 blocks up to 64, then 16 up to 128 and 32 up to 256",
  "sinks": "without sinks and window",
  "layers": "the first layer dense, and two: budgets, and rules that test every head",
  "heads": "blocks ranked by the best query head of a group, and by estimated shares, not by the mean of scores: "
  "budgets, and PSA's thresholds by shares",
  "groups": "PSA's thresholds with a stop test after every 4, 8 and 32 blocks: by the default rule, by PSA's own "
  "(which has 4), and with stops that know the true mass",
  "blocks": "blocks of 16 and 64 tokens",
  "stops": "PSA's thresholds on the ranking of min_max too, with its estimate and with a certified stop; and, on the "
  "default ranking, with stops that know the true mass",
  "rules": "PSA's thresholds with every other rule of the stop test (sparse.rest, sparse.stop_when)",
}
PREFILL_AXES = ("layers", "heads")  # those that sparse prefill has too

# Series that tables name; those of budgets have their method's name, or the axis's.
DENSE, WINDOW, PSA, PSA_MIN_MAX, CERTIFIED = "dense", "sinks and window", "psa", "psa, min_max", "certified"
TRUE_STOP = "oracle stop"
SHARES = "shares of query heads"
PSA_SHARES = f"{PSA}, {SHARES}"
DENSE_PREFILL = "dense prefill"
DENSE_LAYERS = {1: "one layer dense", 2: "two layers dense"}

# Rules of the stop test on the default ranking: series -> (sparse.rest, sparse.stop_when), the default first.
DEFAULT_RULE = SparseConfig().rest, SparseConfig().stop_when
RULES = {PSA: DEFAULT_RULE} | {
  f"{PSA}, {', '.join(rule)}": rule for rule in itertools.product(REST, WHEN) if rule != DEFAULT_RULE
}

# The same by another number of blocks between two tests: series -> (sparse.group_blocks, sparse.rest).
IN_GROUPS = {f"{PSA}, groups of {n}": (n, DEFAULT_RULE[0]) for n in GROUPS} | {
  f"{PSA}, least, groups of {n}": (n, "least") for n in GROUPS
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One setting: a point of a series, that is of a line of a plot, at a budget in tokens, a threshold or 1."""

  series: str
  at: float
  config: EngineConfig
  oracle: bool = False  # blocks are ranked by their true mass
  claims: str = "rule"  # what a stop test goes by, a name in `replay.CLAIMS`

  @property
  def name(self) -> str:
    return f"{self.series} {self.at:g}"

  @property
  def stops(self) -> bool:
    """Whether a test, and no budget, says how much is attended to."""
    return self.config.sparse.policy == "psa"

  @property
  def prefills(self) -> bool:
    """Whether prompts are read sparsely."""
    return self.config.sparse.prefill != "dense"

  @property
  def digest_vectors(self) -> int:
    """Vectors that a decode step reads of each block to rank them: none where nothing is ranked, or by true mass."""
    unranked = self.oracle or self.series == WINDOW or self.config.sparse.policy == "dense"
    return 0 if unranked else get_method(self.config.sparse.method).vectors


def cases(
  names: Sequence[str],
  budgets: Sequence[int],
  thresholds: Sequence[float],
  axes: Collection[str] = (),
  rests: Collection[str] = tuple(REST),
  longest: int = 1 << 30,
) -> Iterator[Case]:
  """Dense; every method at every budget; PSA at every threshold; and along the `AXES` that are named.

  Args:
    names: of methods, or oracle, or window.
    budgets: in tokens.
    thresholds: of stop tests.
    axes: names in AXES.
    rests: names in REST, of the axis rules only these.
    longest: tokens beyond which the axis grid has no budgets.
  """
  yield _case(DENSE, 1, "sparse.policy=dense")
  more = _more_budgets(budgets, axes, longest) if {"between", "grid"} & set(axes) else ()
  yield from (_case(DEFAULT_METHOD, budget, f"sparse.token_budget={budget}") for budget in more)
  for budget in budgets:
    yield from _of_budget(names, budget, axes)
  if "top_p" in names:
    yield _case("top_p", TOP_P, f"sparse.token_budget={1 << 20}", "sparse.method=top_p")
  for threshold in thresholds:
    yield from _of_threshold(threshold, axes, rests)


def prefill_cases(
  names: Sequence[str], shares: Sequence[float], thresholds: Sequence[float], axes: Collection[str] = ()
) -> Iterator[Case]:
  """Prompts read whole, tile by tile too; and sparsely, a share of the blocks or of the estimated mass.

  Args:
    names: of methods.
    shares: of blocks.
    thresholds: shares of the mass, for methods whose scores estimate it.
    axes: of these PREFILL_AXES count; they are the default method's.
  """
  dense = "sparse.policy=dense"
  yield _case(DENSE_PREFILL, 1, dense, "sparse.prefill=top_k", "sparse.prefill_share=1")
  varied = {name: (f"sparse.dense_layers={n}",) for n, name in DENSE_LAYERS.items() if "layers" in axes}
  varied |= {"best query head": ("sparse.group_reduce=max",)} if "heads" in axes else {}
  ways = [(name, name, (f"sparse.method={name}",)) for name in names]
  ways += [(DEFAULT_METHOD, f"{DEFAULT_METHOD}, {name}", changes) for name, changes in varied.items()]
  for (method, name, changes), (by, at) in itertools.product(ways, (("top_k", shares), ("threshold", thresholds))):
    for share in at if by == "top_k" or get_method(method).estimates else ():
      of = f"sparse.prefill={by}", f"sparse.prefill_share={share}"
      yield _case(f"prefill {by}, {name}", share, dense, *of, *changes)


def _case(
  series: str, at: float, *changes: str, oracle: bool = False, claims: str = "rule", block_tokens: int = BLOCK_SIZES[0]
) -> Case:
  small = f"sparse.sink_tokens={block_tokens}", f"sparse.window_tokens={block_tokens}"
  base = [f"cache.block_tokens={block_tokens}", *small, "sparse.policy=topk"]
  return Case(series, at, override(EngineConfig(), [*base, *changes]), oracle, claims)


def _more_budgets(budgets: Sequence[int], axes: Collection[str], longest: int) -> list[int]:
  """Those between the given ones, and those of the grid."""
  more = []
  for low, high in itertools.pairwise(budgets) if "between" in axes else ():
    if (between := (low + high) // 2 // max(BLOCK_SIZES) * max(BLOCK_SIZES)) > low:
      more.append(between)
  if "grid" in axes:
    more += [n * BLOCK_SIZES[0] for n in GRID if n * BLOCK_SIZES[0] <= longest]
  return [budget for budget in dict.fromkeys(more) if budget not in budgets]


def _of_budget(names: Sequence[str], budget: int, axes: Collection[str]) -> Iterator[Case]:
  of = f"sparse.token_budget={budget}"
  for name in names:
    if name == "window":
      rest = max(0, budget - BLOCK_SIZES[0])
      yield _case(WINDOW, budget, of, f"sparse.window_tokens={rest}")
    elif name != "top_p":
      method = DEFAULT_METHOD if name == "oracle" else name
      yield _case(name, budget, of, f"sparse.method={method}", oracle=name == "oracle")
  if "sinks" in axes:
    yield _case("no sinks, no window", budget, of, "sparse.sink_tokens=0", "sparse.window_tokens=0")
  for n, name in DENSE_LAYERS.items() if "layers" in axes else ():
    yield _case(name, budget, of, f"sparse.dense_layers={n}")
  if "heads" in axes:
    yield _case("best query head", budget, of, "sparse.group_reduce=max")
    yield _case(SHARES, budget, of, "sparse.group_reduce=softmax")
  for size in BLOCK_SIZES[1:] if "blocks" in axes else ():
    yield _case(f"blocks of {size}", budget, of, block_tokens=size)


def _of_threshold(threshold: float, axes: Collection[str], rests: Collection[str]) -> Iterator[Case]:
  of = "sparse.policy=psa", f"sparse.threshold={threshold}"
  yield _case(PSA, threshold, *of)
  if "stops" in axes:
    yield _case(PSA_MIN_MAX, threshold, *of, "sparse.method=min_max")
    yield _case(CERTIFIED, threshold, *of, "sparse.method=min_max", claims="certified")
    yield _case(TRUE_STOP, threshold, *of, claims="true")
    yield _case(f"{TRUE_STOP}, mean_of_heads", threshold, *of, "sparse.stop_when=mean_of_heads", claims="true")
  if "heads" in axes:
    yield _case(PSA_SHARES, threshold, *of, "sparse.group_reduce=softmax")
  if "groups" in axes:
    for series, (n, rest) in IN_GROUPS.items():
      yield _case(series, threshold, *of, f"sparse.group_blocks={n}", f"sparse.rest={rest}")
    for n in GROUPS:
      yield _case(f"{TRUE_STOP}, groups of {n}", threshold, *of, f"sparse.group_blocks={n}", claims="true")
  for series, (rest, when) in RULES.items():
    changes = *of, f"sparse.rest={rest}", f"sparse.stop_when={when}"
    asked = "rules" in axes and rest in rests
    if asked and series != PSA:
      yield _case(series, threshold, *changes)
    for n, name in DENSE_LAYERS.items() if "layers" in axes and when == SparseConfig().stop_when else ():
      if asked or series == PSA:
        yield _case(f"{series}, {name}", threshold, *changes, f"sparse.dense_layers={n}")
