"""The nine formats as diagrams, side by side in one SVG: disks are cores, lines bonds, open legs modes.

python examples/draw_formats.py [FILE]
"""

import re
import sys
from pathlib import Path

from decompositions import CP, TT, KroneckerSum, LowRank, Monarch, Network, TensorRing, Tree, TTMatrix, Tucker, draw

COLUMNS = 3


def networks() -> list[Network]:
    """One small weight of every format, rows (out) before columns (in)."""
    return [
        LowRank.random(row_modes=(6,), col_modes=(5,), rank=3),
        Tucker.random(row_modes=(6, 5), col_modes=(4, 7), rank=3),
        TT.random(row_modes=(4, 5), col_modes=(6, 7), rank=3),
        TTMatrix.random(row_modes=(4, 5, 6), col_modes=(4, 3, 5), rank=8),
        Tree.random(row_modes=(4, 5), col_modes=(6, 7), rank=3),
        CP.random(row_modes=(4, 5), col_modes=(6,), rank=12),
        TensorRing.random(row_modes=(4, 5), col_modes=(6, 7), rank=3),
        KroneckerSum.random(row_modes=(4, 5), col_modes=(3, 3), rank=5),
        Monarch.random(row_modes=(32, 32), col_modes=(32, 32), rank=1),
    ]


def gallery(nets: list[Network]) -> str:
    """Diagrams with their names, in rows of three."""
    pictures, sizes = [], []
    for net in nets:
        svg = draw(net)
        width, height = (int(re.search(rf'{key}="(\d+)"', svg)[1]) for key in ("width", "height"))
        pictures.append(svg)
        sizes.append((width, height))
    column = max(width for width, _ in sizes)
    parts, top = [], 0
    for first in range(0, len(nets), COLUMNS):
        tall = max(height for _, height in sizes[first : first + COLUMNS])
        for k in range(first, min(first + COLUMNS, len(nets))):
            left, (width, height) = (k - first) * column, sizes[k]
            parts.append(
                f'<text x="{left + column / 2}" y="{top + 18}" font-size="15" font-family="sans-serif" '
                f'text-anchor="middle">{type(nets[k]).__name__}</text>'
                f'<g transform="translate({left + (column - width) / 2},{top + 22 + (tall - height) / 2})">'
                f"{pictures[k].strip()}</g>"
            )
        top += tall + 26
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{COLUMNS * column}" height="{top}">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def main(quick: bool = False, file: str = "runs/formats.svg") -> dict[str, int]:
    """Write the gallery; how many cores each format has here."""
    nets = networks()
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(gallery(nets), encoding="utf-8")
    print(f"{len(nets)} formats drawn in {target}")
    return {type(net).__name__: len(net.cores) for net in nets}


if __name__ == "__main__":
    main(file=sys.argv[1] if len(sys.argv) > 1 else "runs/formats.svg")
