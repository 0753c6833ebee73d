"""Draw the attention mask of a packed row as an SVG: gold tokens, then the rollouts of every block.

    python tools/draw_mask.py --output megatron_ebft/layout/packed_row.svg
    python tools/draw_mask.py --seq-length 16 --ebft-stride 2 --output mask.svg

The cells come from the code that attention kernels use (layout/packed_row.py and layout/visible_keys.py), so the
picture cannot disagree with training. It shows an encoder row, which has all G tokens of each rollout; a training row
leaves out the last one. Keep the geometry small: the picture is a square of T + NB·n·G cells.
"""

import argparse
import sys
from pathlib import Path

from megatron_ebft.common.disk import aside
from megatron_ebft.layout.packed_row import RowLayout, split_blocks
from megatron_ebft.layout.picture import COLORS, KINDS, cells
from megatron_ebft.layout.strided import StridedLayout

CELL, GAP = 17, 1.5
"""Pixels from cell to cell, and between two cells."""
LEFT, TOP, RIGHT, BOTTOM = 132, 128, 224, 96
"""Margins, in pixels."""
MEANINGS = {"gold": "a gold token sees gold tokens up to itself",
            "context": "a rollout token sees the gold tokens before its anchor",
            "own": "and the tokens of its own rollout up to itself: nothing else"}
INK, FAINT, HIDDEN = "#24292f", "#6e7781", COLORS["hidden"]


def visible_cells(row: RowLayout) -> dict[str, list[list[int]]]:
    """(query, key) pairs of the row, both as places in it: gold → gold, rollout → gold context, rollout → itself."""
    kind_of = cells(row)
    return {kind: (kind_of == KINDS.index(kind)).nonzero().tolist() for kind in MEANINGS}


def place(index: int, margin: int) -> int:
    """Pixels from the picture's edge to a row or column of cells."""
    return margin + CELL * index


def text(x: float, y: float, words: str, *, color: str = INK, size: int = 12, anchor: str = "middle",
         weight: str = "normal", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x:g} {y:g})"' if turned else ""
    return (f'<text x="{x:g}" y="{y:g}" fill="{color}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}"{turn}>{words}</text>')


def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}" stroke-width="{width:g}"/>'


def squares(kind: str, places: list[list[int]]) -> list[str]:
    """One group of squares, whose id is the kind."""
    side = CELL - GAP
    return [f'<g id="{kind}" fill="{COLORS[kind]}">',
            *(f'<rect x="{place(key, LEFT)}" y="{place(query, TOP)}" width="{side:g}" height="{side:g}" rx="2"/>'
              for query, key in places), "</g>"]


def bars(start: int, count: int, depth: int, color: str, words: str, size: int) -> list[str]:
    """A label above the keys and the same one left of the queries, each with a bar; where the words have no room, only
    the last one (the number). depth: pixels off the cells."""
    x, y = place(start, LEFT), place(start, TOP)
    length, middle = CELL * count - GAP, (CELL * count - GAP) / 2
    words = words if 0.6 * size * len(words) < length else words.split()[-1]
    return [line(x, TOP - depth, x + length, TOP - depth, color, 3),
            text(x + middle, TOP - depth - 6, words, size=size),
            line(LEFT - depth, y, LEFT - depth, y + length, color, 3),
            text(LEFT - depth - 6, y + middle, words, size=size, turned=True)]


def labels(row: RowLayout) -> list[str]:
    """Blocks, samples and position ids along both axes, and beside the queries what each block is for."""
    layout, gold, steps = row.layout, row.layout.seq_length, row.steps
    parts = bars(0, gold, 46, COLORS["gold"], "gold tokens", 13)
    for index, position in enumerate(row.positions(None, batch=1)[0].tolist()):
        middle = (CELL - GAP) / 2
        parts += [text(place(index, LEFT) + middle, TOP - 6, str(position), color=FAINT, size=10),
                  text(LEFT - 6, place(index, TOP) + middle + 4, str(position), color=FAINT, size=10, anchor="end")]
    for block, anchor in enumerate(layout.anchors().tolist()):
        start, count = gold + block * layout.num_samples * steps, layout.num_samples * steps
        parts += bars(start, count, 46, COLORS["context"], f"block {block}", 13)
        for sample in range(layout.num_samples):
            parts += bars(start + sample * steps, steps, 22, COLORS["own"], f"sample {sample}", 10)
        notes = [f"block {block}: anchor {anchor}", f"continues gold[0:{anchor}],",
                 f"compared with gold[{anchor}:{anchor + layout.rollout_length}]"]
        notes = notes if CELL * count > 17 * len(notes) else notes[:1]
        y = place(start, TOP) + CELL * count / 2 + 5 - 17 * (len(notes) - 1) / 2
        parts += [text(place(row.end, LEFT) + 14, y + 17 * number, note, anchor="start",
                       weight="normal" if number else "bold") for number, note in enumerate(notes)]
    return parts


def separators(row: RowLayout) -> list[str]:
    """Lines between gold tokens, blocks and samples."""
    samples, end, parts = row.layout.num_samples, CELL * row.end - GAP, []
    for number in range(row.num_rollouts):
        index = row.layout.seq_length + number * row.steps
        color, width = (INK, 1.2) if number == 0 else (FAINT, 1) if number % samples == 0 else ("#c9ced6", 0.8)
        x, y = place(index, LEFT) - GAP / 2, place(index, TOP) - GAP / 2
        parts += [line(x, TOP, x, TOP + end, color, width), line(LEFT, y, LEFT + end, y, color, width)]
    return parts


def draw(layout: StridedLayout) -> str:
    """The SVG of an encoder row of this geometry."""
    row = split_blocks(layout, 0, layout.rollout_length)[0]
    side = CELL * row.end - GAP
    width, height = place(row.end, LEFT) + RIGHT, place(row.end, TOP) + BOTTOM
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
             f'height="{height}" font-family="Helvetica, Arial, sans-serif">',
             f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
             text(LEFT, 30, "One packed row: which keys (across) each query (down) sees", size=16, anchor="start",
                  weight="bold"),
             f'<rect x="{LEFT}" y="{TOP}" width="{side:g}" height="{side:g}" fill="{HIDDEN}"/>',
             text(LEFT, 50, f"T = {layout.seq_length}, c = {layout.context_length}, s = {layout.stride}, "
                  f"G = {layout.rollout_length}, n = {layout.num_samples}. The small numbers are position ids.",
                  color=FAINT, anchor="start")]
    for kind, places in visible_cells(row).items():
        parts += squares(kind, places)
    parts += separators(row) + labels(row)
    for number, (kind, meaning) in enumerate(MEANINGS.items()):
        y = place(row.end, TOP) + 18 + 22 * number
        parts += [f'<rect x="{LEFT}" y="{y}" width="14" height="14" rx="2" fill="{COLORS[kind]}"/>',
                  text(LEFT + 22, y + 12, meaning, anchor="start", size=13)]
    return "\n".join([*parts, "</svg>", ""])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tools/draw_mask.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.svg", help="the picture")
    for flag, default, meaning in (("--seq-length", 12, "T, gold tokens of the row"),
                                   ("--ebft-context-length", 3, "c, the first anchor"),
                                   ("--ebft-stride", 3, "s, gold tokens from anchor to anchor"),
                                   ("--ebft-rollout-length", 3, "G, tokens of a rollout"),
                                   ("--ebft-num-samples", 2, "n, rollouts of a block")):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{meaning} (default: {default})")
    flags = parser.parse_args(argv)
    if flags.output.suffix != ".svg":
        raise ValueError(f"--output {flags.output}: the picture is an SVG, so the name must end in .svg")
    layout = StridedLayout(flags.seq_length, flags.ebft_context_length, flags.ebft_stride, flags.ebft_rollout_length,
                           flags.ebft_num_samples)
    with aside(flags.output) as file:
        file.write_text(draw(layout), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
