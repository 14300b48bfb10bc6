"""The picture of a decode step: boxes and arrows, as SVG."""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT = 940, 400
Box = tuple[int, int, int, int, str, str, str]  # x, y, width, height, fill, title, what is below it; "|" breaks lines

ZONES: tuple[Box, ...] = (
  (10, 30, 920, 232, "#f4f7fb", "HBM of the GPU: one jitted program a step", ""),
  (10, 292, 920, 98, "#fbf5ec", "DRAM of the host, pinned", ""),
)
BOXES: tuple[Box, ...] = (
  (30, 70, 130, 66, "#ffffff", "query", "one token of|every row"),
  (190, 70, 140, 66, "#dbe9f6", "1. score", "query x digest of|every block"),
  (360, 70, 140, 66, "#dbe9f6", "2. select", "top-k, or a ranked|list (PSA)"),
  (530, 70, 140, 66, "#dbe9f6", "3. look up", "hit: its slot|miss: a place"),
  (700, 70, 210, 66, "#bcd6ee", "4. attend, in one kernel", "hits from slots, misses|from DRAM, and the tail"),
  (190, 176, 140, 60, "#ffffff", "digests", "2 vectors a block,|of all blocks"),
  (530, 176, 140, 60, "#ffffff", "maps", "which block is in|which slot, and since"),
  (360, 176, 140, 60, "#ffffff", "tails", "the unfinished block|of every lane"),
  (700, 176, 210, 60, "#ffffff", "slots", "copies of hot blocks; least|recently used goes first"),
  (
    190,
    326,
    720,
    48,
    "#ffffff",
    "pool: every finished block of every request, layer and KV head",
    "16 KiB a block (32 tokens)",
  ),
)
ARROWS = (  # from, to, label, whether it crosses PCIe
  ((160, 103), (190, 103), "", False),
  ((330, 103), (360, 103), "", False),
  ((500, 103), (530, 103), "", False),
  ((670, 103), (700, 103), "", False),
  ((260, 176), (260, 136), "", False),
  ((600, 176), (600, 136), "", False),
  ((730, 176), (730, 136), "hits", False),
  ((690, 326), (690, 120), "", True),
  ((690, 120), (700, 120), "", True),
  ((815, 136), (815, 176), "misses stay", True),
  ((430, 236), (430, 326), "a tail that is full is saved", True),
)


def decode_step() -> str:
  """The SVG's text."""
  lines = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    ' font-family="Helvetica, Arial, sans-serif" font-size="12" role="img">',
    "<title>A decode step: score, select, look up, attend</title>",
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    *(_marker(name, color) for name, color in (("near", "#333333"), ("far", "#b8560b"))),
  ]
  for x, y, width, height, fill, title, _ in ZONES:
    lines += [_rect(x, y, width, height, fill, "#c8c8c8"), _text(x + 12, y + 22, title, "start", bold=True)]
  for (x0, y0), (x1, y1), label, far in ARROWS:
    end = "" if (x1, y1) == (690, 120) else f' marker-end="url(#{"far" if far else "near"})"'
    color = "#b8560b" if far else "#333333"
    lines.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{color}" stroke-width="1.6"{end}/>')
    if label:
      lines.append(_text(x1 + 8, (y0 + y1) // 2 + 4 + (24 if y1 > 300 else 0), label, "start", color=color))
  lines.append(_text(682, 282, "a miss, over PCIe", "end", color="#b8560b"))
  for x, y, width, height, fill, title, below in BOXES:
    lines.append(_rect(x, y, width, height, fill, "#555555"))
    for i, line in enumerate([title, *below.split("|")]):
      lines.append(_text(x + width // 2, y + 18 + 17 * i, line, "middle", bold=not i))
  return "\n".join([*lines, "</svg>"]) + "\n"


def _rect(x: int, y: int, width: int, height: int, fill: str, stroke: str) -> str:
  return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{stroke}"/>'


def _text(x: int, y: int, text: str, anchor: str, bold: bool = False, color: str = "#222222") -> str:
  weight = ' font-weight="bold"' if bold else ""
  return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{color}"{weight}>{escape(text)}</text>'


def _marker(name: str, color: str) -> str:
  return (
    f'<marker id="{name}" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    f'<path d="M0,0 L9,4 L0,8 z" fill="{color}"/></marker>'
  )
