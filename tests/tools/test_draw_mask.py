"""The drawn mask against the rule of strided blocks, stated token by token; the committed picture is today's."""

from pathlib import Path
from xml.etree import ElementTree

import draw_mask
import pytest

from megatron_ebft.layout.picture import COLORS, picture
from megatron_ebft.layout.strided import StridedLayout

PICTURE = Path(__file__).parents[2] / "megatron_ebft" / "layout" / "packed_row.svg"


def drawn(svg: str) -> dict[str, set[tuple[int, int]]]:
    """(query, key) of every square, by the colour's meaning."""
    groups = ElementTree.fromstring(svg).findall("{*}g")
    return {group.get("id"): {((int(square.get("y")) - draw_mask.TOP) // draw_mask.CELL,
                               (int(square.get("x")) - draw_mask.LEFT) // draw_mask.CELL) for square in group}
            for group in groups}


def rule(seq_length: int, context: int, stride: int, length: int, samples: int) -> dict[str, set[tuple[int, int]]]:
    """Gold tokens are causal; token (k, j, t) sees gold[0 : c + k·s] and (k, j, 0..t)."""
    cells = {"gold": {(query, key) for query in range(seq_length) for key in range(query + 1)},
             "context": set(), "own": set()}
    query = seq_length
    for anchor in range(context, seq_length - length + 1, stride):
        for _ in range(samples):
            for step in range(length):
                cells["context"] |= {(query, key) for key in range(anchor)}
                cells["own"] |= {(query, query - back) for back in range(step + 1)}
                query += 1
    return cells


@pytest.mark.parametrize("geometry", [(12, 3, 3, 3, 2), (16, 4, 2, 5, 3), (9, 1, 3, 1, 1)])
def test_cells_follow_the_rule(geometry):
    assert drawn(draw_mask.draw(StridedLayout(*geometry))) == rule(*geometry)


def test_pixels_follow_the_rule():
    """TensorBoard's picture: the first four blocks and samples of a row, also where rows are padded for FP8."""
    pixels, expected = picture(StridedLayout(48, 4, 4, 4, 8, pad_to=16)), rule(20, 4, 4, 4, 4)
    expected["hidden"] = {(y, x) for y in range(84) for x in range(84)} - set().union(*expected.values())
    size = len(pixels) // 84
    assert len(pixels) == 84 * size
    for kind, cells in expected.items():
        for y, x in cells:
            assert pixels[y * size, x * size].tolist() == [int(COLORS[kind][i:i + 2], 16) for i in (1, 3, 5)]


@pytest.mark.parametrize("length, stride, side", [
    (100, 400, 4 + 400 + 100 * 9), (300, 300, 4 + 300 + 300 * 5), (700, 700, 4 + 700 * 2), (1500, 1, None)])
def test_the_picture_has_a_size_limit(length, stride, side):
    """Two blocks of four samples, two of two, one of one, none."""
    pixels = picture(StridedLayout(8192, 4, stride, length, 8))
    assert (None if pixels is None else len(pixels)) == side


def test_committed_picture_is_todays(tmp_path):
    draw_mask.main(["--output", str(tmp_path / "mask.svg")])
    assert (tmp_path / "mask.svg").read_text(encoding="utf-8") == PICTURE.read_text(encoding="utf-8"), (
        f"draw it again: python tools/draw_mask.py --output {PICTURE.relative_to(PICTURE.parents[2])}")


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--output .*mask\.png: the picture is an SVG"):
        draw_mask.main(["--output", str(tmp_path / "mask.png")])
