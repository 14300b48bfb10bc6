"""What the two papers report, and what rows in experiments/results say to it: tables of docs/reproduction.md."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results"
KERNELS = "2026-11-26-h200/kernels.jsonl"
PREFILL_KERNELS = "2026-11-30-h200/kernels.jsonl", "2026-11-30-prefill/kernels.jsonl"
LADDER = "2026-11-30-ladder"
BURSTS = "2026-11-29-ladder"
LWM = "2026-11-30-lwm"
FIRST_RUNGS, RUNGS, MORE_RUNGS = "2026-11-30-goodput", "2026-11-30-rungs", "2026-11-30-more-rungs"
PREFILLS = "2026-11-30-prefill/221c08d.jsonl"
REFERENCE = "2026-11-26-reference/summary.json"
PRESENT = "2026-11-30-accuracy/reference/summary.json"
# A command, and the name of its --out in experiments/workloads/README.md, which has the whole line.
ARRIVALS = "`sparse-serve ladder`, arrivals"
BURST = "`sparse-serve ladder`, W2"
LOW = "`sparse-serve ladder`, low and goodput"
GOODPUT = "`sparse-serve ladder`, goodput"
BATCHES = "`sparse-serve ladder`, batches"
SEGMENTS = "`sparse-serve ladder`, segments"
LOADS = "`sparse-serve bench-step`, loads"
PREFILL = "`sparse-serve bench-prefill`, prefill"
CHUNKS = "`sparse-serve bench-kernels`, kernels"
MOVES = "`sparse-serve bench-kernels --out=OUT`"
ACCURACY = "`sparse-serve accuracy --model=models/reference --out=OUT`"
ACCURACY_AGAIN = "`sparse-serve accuracy`, `experiments/results/2026-11-30-accuracy`"
TEXTS = "`sparse-serve accuracy --model=DIR --parts=text --longbench_dir=DIR --out=OUT`"
LONGBENCH_RUN = "`sparse-serve longbench`, below"
SECOND_HAND = "evaluation, second-hand"


class Found(NamedTuple):
  """What our rows say to a claim."""

  number: float | tuple[float, float]  # or what it lies between
  form: str
  wanted: float  # the least, or most, that meets the paper's
  device: str


@dataclasses.dataclass(frozen=True)
class Claim:
  """A published number.

  Attributes:
    where: figure, table or section.
    what: in words.
    value: the paper's, as it is printed.
    command: what measures it here.
    ours: what our rows give; None if nothing was run.
  """

  paper: Literal["SparseServe", "PSA"]
  where: str
  what: str
  value: str
  command: str
  ours: Callable[[], Found] | None = None
  at_most: bool = False

  def row(self) -> str:
    if self.ours is None:
      told = "not run", "not run", ""
    else:
      number, form, wanted, device = self.ours()
      ends = number if isinstance(number, tuple) else (number,)
      met = {end <= wanted if self.at_most else end >= wanted for end in ends}
      verdict = "open" if len(met) > 1 else "met" if met == {True} else "missed"
      told = f"{form.format(ends[0])} or more" if math.inf in ends else " to ".join(map(form.format, ends))
      told = told, verdict, device
    return f"| {self.where} | {self.what} | {self.value} | {told[0]} | {told[1]} | {told[2]} | {self.command} |"


def table(paper: str) -> str:
  """All claims of a paper."""
  lines = ["| where | what | paper | ours | | device | command |", "|---|---|---|---|---|---|---|"]
  return "\n".join([*lines, *(claim.row() for claim in CLAIMS if claim.paper == paper)]) + "\n"


def longbench_table() -> str:
  """The scores of Table 1, and what is run of them: nothing yet."""
  lines = ["| dataset | LWM-Text-Chat-1M | Llama-3-8B-262k | ours |", "|---|---|---|---|"]
  for name, models in LONGBENCH.items():
    lines.append(f"| {name} | {' | '.join(', '.join(f'{score:.2f}' for score in of) for of in models)} | not run |")
  return "\n".join(lines) + "\n"


@functools.cache
def _rows(file: str) -> tuple[dict[str, Any], ...]:
  return tuple(json.loads(line) for line in (RESULTS / file).read_text(encoding="utf-8").splitlines())


@functools.cache
def _summary(file: str) -> dict[str, Any]:
  return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def _rate(case: str, instead: str | None, wanted: float) -> Callable[[], Found]:
  """GB/s of a copy of blocks of 16 KiB, or of what is timed instead of it."""

  def ours() -> Found:
    (row,) = [row for row in _rows(KERNELS) if (row["op"], row["case"]) == ("copy", case)]
    us = row["us"] if instead is None else row["baselines"][instead]
    return Found(sum(row["moved"].values()) / us / 1e3, "{:.1f} GB/s", wanted, f"{row['device']}, PCIe 5")

  return ours


def _overlap(first: int, last: int, wanted: float) -> Callable[[], Found]:
  """Points that the overlap with the last `last` steps is above that with the last `first`; budget 2,048."""

  def ours() -> Found:
    rows = [row for row in _summary(REFERENCE)["reuse"] if (row["tokens"], row["case"]) == (16384, "cuboid_mean 2048")]
    gain = statistics.mean(row["overlap"][str(last)] - row["overlap"][str(first)] for row in rows)
    return Found(100 * gain, "{:.2f} points", wanted, "4 H100, the reference model")

  return ours


def _cells(folder: str, rung: str) -> dict[float, dict[str, Any]]:
  """Cells of a rung of the ladder, by requests a second; 0: all at once."""
  cells = _rows(f"{folder}/cells.jsonl")
  return {cell["rate"]: cell for cell in cells if cell["rung"] == rung and cell["rate"] is not None}


def _first_token(folder: str, shape: str) -> Callable[[], Found]:
  """How many times sooner the first token comes than densely, at the lowest rate that dense does not serve within 2 s:
  at the 8B shape 1.1 times the one that it does."""

  def ours() -> Found:
    dense, sparse = (_cells(f"{folder}/arrivals", rung) for rung in ("dense", "sparse_serve"))
    at = min(rate for rate in sparse if dense[rate]["scheduling_delay_mean_s"] > 2)
    times = dense[at]["ttft_mean_s"] / sparse[at]["ttft_mean_s"]
    return Found(times, "{:.1f}x less", 9.26, f"NVIDIA H200, {shape}, {at:.2f} requests/s, against our dense")

  return ours


def _between_tokens() -> Found:
  """Percent more time between tokens than densely: at low load, and at the highest rate that dense serves well."""

  def more(folder: str, at: float) -> float:
    dense, sparse = (_cells(folder, rung)[at]["tbt_mean_s"] for rung in ("dense", "sparse_serve"))
    return 100 * (sparse / dense - 1)

  low, rates = f"{LADDER}/low", f"{RUNGS}/goodput"
  dense, sparse = (_cells(rates, rung) for rung in ("dense", "sparse_serve"))
  at, beyond = (
    max(rate for rate in sparse if rate in dense and dense[rate]["keeps_slo"]),
    max(dense.keys() & sparse.keys()),
  )
  device = f"NVIDIA H200, the 8B shape, 0.5 and {at:g} requests/s, against our dense"
  device += f"; {more(rates, beyond):+.1f} % at {beyond:g}, which dense does not serve well"
  return Found((more(low, 0.5), more(rates, at)), "{:+.1f} %", 20, device)


def _burst(folder: str, shape: str, wanted: float) -> Callable[[], Found]:
  """How many times the tokens/s of dense, of a burst with the lengths of LongBench."""

  def ours() -> Found:
    dense, sparse = (_cells(folder, rung)[0]["throughput_tok_s"] for rung in ("dense", "sparse_serve"))
    return Found(sparse / dense, "{:.2f}x", wanted, f"NVIDIA H200, {shape}, 64 requests at once, against our dense")

  return ours


def _goodput(rung: str, before: str, wanted: float, folder: str = RUNGS) -> Callable[[], Found]:
  """How many times the rate that the rung before serves well: between the rates that were tried."""

  def ours() -> Found:
    ends = []
    for of in (before, rung):
      tried = {rate: cell["keeps_slo"] for rate, cell in _cells(f"{folder}/goodput", of).items()}
      fails = min(rate for rate, well in tried.items() if not well)
      ends.append((max(rate for rate, well in tried.items() if well and rate < fails), fails))
    (low, high), (of_low, of_high) = ends
    return Found((of_low / high, of_high / low), "{:.2f}x", wanted, "NVIDIA H200, the 8B shape, 50 requests")

  return ours


def _tokens(rung: str, before: str, wanted: float) -> Callable[[], Found]:
  """How many times the tokens/s, at the highest rate that both were run at."""

  def ours() -> Found:
    of, to = (_cells(f"{RUNGS}/goodput", name) for name in (before, rung))
    at = max(of.keys() & to.keys())
    return Found(to[at][SPEED] / of[at][SPEED], "{:.2f}x", wanted, f"NVIDIA H200, the 8B shape, {at:g} requests/s")

  return ours


def _batch(key: str, of: str, to: str, form: str, wanted: float) -> Callable[[], Found]:
  """How many times as much it is with one way to batch as with another, 12 requests of 16k tokens at once."""

  def ours() -> Found:
    values = [_cells(f"{RUNGS}/batches", f"sparse_serve batch_control={way}")[0][key] for way in (of, to)]
    return Found(values[1] / values[0], form, wanted, "NVIDIA H200, the 8B shape, 12 requests at once")

  return ours


def _without_control() -> Found:
  """Percent of the tokens/s that batches of up to 12 lose without control by working sets."""
  times, _, _, device = _batch("throughput_tok_s", "working_set max_batch=12", "none max_batch=12", "", 0)()
  return Found(100 * (1 - times), "{:.1f} % less", 29.52, device)


def _loading(load: str, share: int) -> tuple[float, float]:
  """Of a step of 8 requests of 16k tokens of which so many percent of the blocks miss: the share of it that loads take,
  and their microseconds."""
  (row,) = [row for row in _rows(f"{RUNGS}/loads/step.jsonl") if row["case"] == f"topk{load} 8x16384 miss {share}%"]
  return row["loading_share"], row["loading_share"] * row["us"]


def _share_of_copies() -> Found:
  """Percent of a step that loads take by a copy a block."""
  few, many = (100 * _loading(" by per_block", share)[0] for share in (2, 10))
  return Found((few, many), "{:.1f} %", 69.94, "NVIDIA H200, PCIe 5, the 8B shape, 8 requests, 2 and 10 % missed")


def _loads(load: str) -> Callable[[], Found]:
  """How many times longer loads take by a copy a block than by another load."""

  def ours() -> Found:
    ends = sorted(_loading(" by per_block", share)[1] / _loading(load, share)[1] for share in (2, 10))
    device = "NVIDIA H200, PCIe 5, the 8B shape, 8 requests, 2 and 10 % missed"
    return Found((ends[0], ends[1]), "{:.1f}x less", 9.97, device)

  return ours


def _saves() -> Found:
  """How many times longer a prompt takes with its saves than without."""
  us = {row["case"]: row["us"] for row in _rows(PREFILLS)}
  times = us["1x32000 layer_segmented"] / us["1x32000 hbm_pool"]
  return Found(times, "{:.2f}x", 1.05, "NVIDIA H200, PCIe 5, the 8B shape, 32,000 tokens")


def _chunks() -> Found:
  """How many times longer attention of a prompt takes in chunks of 512 than whole, on two cards."""
  rows = [row for file in PREFILL_KERNELS for row in _rows(file) if row["case"] == "16384 in chunks of 512"]
  ends = sorted(row["times_whole"] for row in rows)
  return Found((ends[0], ends[-1]), "{:.2f}x slower", 1.51, f"{rows[0]['device']}, two cards, 16,384 tokens")


def _segments() -> Found:
  """How many times later first tokens come with layer segments than with chunks, by rate."""
  chunked, segmented = (_cells(f"{MORE_RUNGS}/segments", f"sparse_serve prefill={way}") for way in KINDS_OF_PREFILL)
  ends = sorted(segmented[rate]["ttft_mean_s"] / chunked[rate]["ttft_mean_s"] for rate in chunked)
  device = f"NVIDIA H200, the 8B shape, {' and '.join(f'{rate:g}' for rate in chunked)} requests/s"
  return Found((ends[0], ends[-1]), "{:.2f}x more", 1 / 8.68, device)


def _fewer(key: str, wanted: float, group: str, file: str) -> Callable[[], Found]:
  """How many times fewer blocks PSA reads at 98 % of dense accuracy, by the mean of a group's tasks: between what the
  next cheaper budget or threshold would say."""
  device = "4 H100, the reference model, PSA's rule" if file == REFERENCE else "H200, the reference model, our default"

  def ours() -> Found:
    rows = _summary(file)["psa_against_fixed"]
    (row,) = [row for row in rows if (row["of"], row["level"]) == (f"mean of {group}", 0.98)]
    if key == "dense_by_psa":
      cheaper = row["psa_fails"] and row["dense"]["blocks"] / row["psa_fails"]["blocks"]
      return Found((row[key]["blocks"], cheaper or math.inf), "{:.1f}x", wanted, device)
    ends = (of and of["blocks"] for of in (row["at_least"], row["at_most"]))
    low, high = (end or math.inf for end in ends)
    return Found((low, high), "{:.1f}x", wanted, device)

  return ours


def _claims_of_abstract(key: str, what: str, wanted: float) -> Iterator[Claim]:
  """A ratio of PSA's abstract beside ours: by PSA's rule and by our default for retrieval, then for other tasks."""
  first, rest = (f"{what}; ", f"up to {wanted}x less"), ("the same, ", "the same")
  for (said, value), tasks, group, file in (
    (first, "11 retrieval tasks", "retrieval", REFERENCE),
    (rest, "11 retrieval tasks", "retrieval", PRESENT),
    (rest, "frequent words", "global", REFERENCE),
    (rest, "2 tasks of long answers", "long_output", REFERENCE),
  ):
    command = ACCURACY_AGAIN if file == PRESENT else ACCURACY
    yield Claim("PSA", "abstract", said + tasks, value, command, _fewer(key, wanted, group, file))


KINDS_OF_PREFILL = "chunked", "layer_segmented"
SPEED, LOADED = "throughput_tok_s", "loaded_an_iteration"
B2_6, B12_6, B6_12 = (  # without control, the largest batch of one and of the other
  [f"none max_batch={n}" for n in of] for of in ((2, 6), (12, 6), (6, 12))
)
CLAIMS = (
  Claim("SparseServe", "Fig. 1", "throughput, batch 2 to 6", "2.07x", BATCHES, _batch(SPEED, *B2_6, "{:.2f}x", 2.07)),
  Claim(
    "SparseServe",
    "Fig. 1",
    "throughput, batch 6 to 12",
    "1.73x less",
    BATCHES,
    _batch(SPEED, *B12_6, "{:.2f}x less", 1.73),
  ),
  Claim(
    "SparseServe",
    "Fig. 1",
    "blocks loaded an iteration, batch 6 to 12",
    "21.36x",
    BATCHES,
    _batch(LOADED, *B6_12, "{:.2f}x", 21.36),
  ),
  Claim(
    "SparseServe",
    "motivation",
    "a copy a block of 16 KB",
    "< 4 GB/s",
    MOVES,
    _rate("load 1024", "memcpy each", 4),
    True,
  ),
  Claim("SparseServe", "Fig. 4a", "loads by one kernel", "> 20 GB/s", MOVES, _rate("load 1024", None, 20)),
  Claim(
    "SparseServe", "Fig. 4a", "loads by a copy a block", "< 5 GB/s", MOVES, _rate("load 1024", "memcpy each", 5), True
  ),
  Claim("SparseServe", "Fig. 4b", "saves (ours: by one kernel)", "> 23 GB/s", MOVES, _rate("store 1024", None, 23)),
  Claim(
    "SparseServe", "Fig. 4b", "saves by a copy a block", "< 6 GB/s", MOVES, _rate("store 1024", "memcpy each", 6), True
  ),
  Claim("SparseServe", "Fig. 8", "overlap of selections, window 1 to 12", "10.68 %", ACCURACY, _overlap(1, 12, 10.68)),
  Claim(
    "SparseServe", "Fig. 8", "overlap of selections, window 12 to 16", "0.31 %", ACCURACY, _overlap(12, 16, 0.31), True
  ),
  Claim(
    "SparseServe",
    "evaluation",
    "mean TTFT against vLLM, LWM-7B, 0.125 requests/s",
    "9.26x less",
    "`sparse-serve ladder`, LWM-arrivals",
    _first_token(LWM, "LWM-7B's shape"),
  ),
  Claim("SparseServe", "evaluation", "the same", "the same", ARRIVALS, _first_token(LADDER, "the 8B shape")),
  Claim(
    "SparseServe",
    "evaluation",
    "throughput against vLLM, LWM-7B",
    "2.93x",
    "`sparse-serve ladder`, LWM",
    _burst(f"{LWM}/burst", "LWM-7B's shape", 2.93),
  ),
  Claim(
    "SparseServe",
    "evaluation",
    "throughput against vLLM, Llama3-8B",
    "3.14x",
    BURST,
    _burst(f"{BURSTS}/W2", "the 8B shape", 3.14),
  ),
  Claim("SparseServe", "evaluation", "throughput against vLLM-S", "2.23x, 2.03x", GOODPUT),
  Claim("SparseServe", "evaluation", "throughput against vLLM-SO", "2.96x, 4.24x", GOODPUT),
  Claim("SparseServe", "evaluation", "mean TBT against vLLM", "within +20 %", LOW, _between_tokens, True),
  Claim(
    "SparseServe", "Fig. 13", "goodput by step of the ladder, LWM-7B", "1.20, 1.33, 1.88, 1.33, 1.25; 5.00x", GOODPUT
  ),
  Claim("SparseServe", "Fig. 13", "goodput by step of the ladder, Llama3-8B", "1.13, 1.12, 1.19, 1.11, 1.10", GOODPUT),
  Claim(
    "SparseServe",
    "Fig. 13",
    "the first of these: sparse",
    "1.13x",
    GOODPUT,
    _goodput("sparse", "dense", 1.13, FIRST_RUNGS),
  ),
  Claim(
    "SparseServe",
    "Fig. 13",
    "the last of these: layer segments (ours: and loads)",
    "1.10x",
    GOODPUT,
    _goodput("sparse_serve", "working_set", 1.10),
  ),
  Claim(
    "SparseServe",
    "Fig. 13",
    "goodput of the whole ladder, Llama3-8B",
    "1.83x",
    GOODPUT,
    _goodput("sparse_serve", "dense", 1.83),
  ),
  Claim(
    "SparseServe", "ablation", "share of loading in a batch of 8, a copy a block", "69.94 %", LOADS, _share_of_copies
  ),
  Claim(
    "SparseServe",
    "ablation",
    "loading by one kernel (`gather`), a copy a block",
    "9.97x less",
    LOADS,
    _loads(" by gather"),
  ),
  Claim("SparseServe", "ablation", "the same, within attention (`fused`, ours)", "9.97x less", LOADS, _loads("")),
  Claim("SparseServe", "ablation", "prefill over compute alone: copies; GPU-direct", "1.76x, 1.28x", PREFILL),
  Claim("SparseServe", "ablation", "the same: FlashD2H", "1.0x", PREFILL, _saves, True),
  Claim(
    "SparseServe",
    "ablation",
    "throughput without batch control, 0.25 to 0.3 requests/s",
    "29.52 % less",
    BATCHES,
    _without_control,
  ),
  Claim(
    "SparseServe",
    "ablation",
    "blocks loaded with batch control, 0.3 requests/s",
    "52.78x less",
    BATCHES,
    _batch(LOADED, "working_set max_batch=12", "none max_batch=12", "{:.1f}x less", 52.78),
  ),
  Claim(
    "SparseServe",
    "ablation",
    "mean TTFT, layer segments against chunks of 2,048",
    "8.68x less",
    SEGMENTS,
    _segments,
    True,
  ),
  Claim("SparseServe", "ablation", "attention of a chunked prefill, chunks of 512", "1.51x slower", CHUNKS, _chunks),
  Claim(
    "SparseServe", "appendix", "accuracy with 2,048 tokens, of full attention's", "99 % on all datasets", LONGBENCH_RUN
  ),
  *_claims_of_abstract("fixed_by_psa", "KV read against a fixed budget", 2.4),
  *_claims_of_abstract("dense_by_psa", "KV read against dense", 8.8),
  Claim(
    "PSA",
    "abstract",
    "throughput against sparse attention",
    "up to 1.4x",
    GOODPUT,
    _tokens("psa", "sparse_serve", 1.4),
  ),
  Claim("PSA", "abstract", "throughput against dense attention", "up to 2.0x", GOODPUT, _tokens("psa", "dense", 2.0)),
  Claim(
    "PSA",
    "motivation, second-hand",
    "GovReport, layer 32: blocks that a fifth of the tokens needs; another fifth",
    "< 50; > 100",
    TEXTS,
  ),
  Claim(
    "PSA", "motivation, second-hand", "QMSum: tokens that need < 50 blocks; layer 9, layer 14", "80 %, 40 %", TEXTS
  ),
  Claim("PSA", SECOND_HAND, "KV read against vLLM-sparse, mean; LWM-7B, Llama-3.1-8B", "2.1x, 2.4x less", TEXTS),
  Claim(
    "PSA", SECOND_HAND, "KV read against InfiniGen, mean, LWM-7B", "1.8x less", "InfiniGen is not implemented here"
  ),
  Claim("PSA", SECOND_HAND, "throughput against vLLM, strict and loose SLO, LWM-7B", "1.5x, up to 2.0x", GOODPUT),
  Claim("PSA", SECOND_HAND, "throughput against vLLM, strict and loose SLO, Llama-3.1-8B", "1.3x, up to 1.5x", GOODPUT),
  Claim(
    "PSA", SECOND_HAND, "throughput against vLLM-sparse, strict and loose SLO, LWM-7B", "up to 1.3x, 1.4x", GOODPUT
  ),
  Claim(
    "PSA",
    SECOND_HAND,
    "throughput against vLLM-sparse, strict and loose SLO, Llama-3.1-8B",
    "up to 1.2x, 1.3x",
    GOODPUT,
  ),
)

# LongBench by token budget, Appendix, Table 1: full, 512, 1,024, 1,536, 2,048; LWM-Text-Chat-1M, Llama-3-8B-262k.
LONGBENCH = {
  "HotpotQA": ((21.93, 22.22, 22.54, 22.16, 22.22), (17.79, 17.99, 17.70, 17.86, 17.83)),
  "2WikiMQA": ((18.01, 18.22, 17.67, 18.13, 18.47), (16.90, 16.51, 16.46, 16.70, 16.77)),
  "MuSiQue": ((10.36, 10.78, 10.37, 10.65, 10.25), (9.52, 9.17, 9.17, 9.42, 9.83)),
  "DuReader": ((25.68, 25.71, 27.02, 26.29, 26.03), (27.47, 27.25, 27.79, 27.76, 27.47)),
  "MultiFieldQA-en": ((43.05, 43.38, 43.77, 42.77, 42.51), (40.27, 40.24, 41.19, 40.56, 40.31)),
  "NarrativeQA": ((13.50, 13.15, 13.79, 13.64, 13.68), (16.99, 17.14, 16.60, 16.76, 16.95)),
  "Qasper": ((24.08, 24.12, 25.06, 24.62, 24.49), (26.21, 25.54, 25.59, 25.93, 26.23)),
  "GovReport": ((27.88, 26.36, 27.07, 27.35, 27.48), (33.61, 30.01, 31.95, 32.63, 33.19)),
  "QMSum": ((24.83, 24.30, 24.63, 24.85, 24.95), (25.51, 25.09, 25.80, 25.69, 25.54)),
  "MultiNews": ((24.38, 23.62, 23.98, 24.00, 24.32), (27.87, 27.34, 27.74, 27.90, 27.75)),
  "VCSUM": ((9.52, 11.09, 10.57, 10.66, 10.45), (14.54, 14.15, 13.89, 13.98, 14.36)),
  "TriviaQA": ((61.87, 60.57, 60.76, 62.01, 61.65), (85.83, 86.46, 86.41, 86.38, 86.44)),
  "SAMSum": ((39.91, 39.56, 39.77, 39.93, 39.68), (41.62, 40.48, 41.17, 41.29, 41.02)),
  "LSHT": ((24.00, 22.00, 23.00, 23.50, 24.00), (43.50, 35.50, 39.50, 42.00, 43.00)),
  "LCC": ((40.47, 39.15, 40.20, 40.14, 40.21), (51.04, 50.38, 51.14, 51.03, 51.02)),
  "RepoBench-P": ((42.78, 41.56, 42.75, 42.65, 42.84), (44.79, 44.46, 45.48, 45.04, 44.75)),
}
