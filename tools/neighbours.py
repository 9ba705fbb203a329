"""Contact sheet: queries and their nearest videos, as retrieval.py --features wrote them.

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt --features found.npz
    python tools/neighbours.py found.npz --out neighbours.png

A row a query, its middle frame first, then those of its nearest videos, each with its cosine. A neighbour of the
query's class has a solid frame and a plus sign; one of another class a dashed frame and a cross.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.flags import Formatter
from common.processes import run
from common.video import VideoError, decode, examine
from tools.pictures import WIDTH, check_picture, printable, pyplot, save

CELL = 160                                                                      # pixels of a frame's short side
NEEDED = {"gallery_files", "gallery_classes", "query_files", "query_classes", "nearest", "cosines"}
LOOKS = {                                                                       # sign, colour and line of a frame
    "query": ("", "#222222", "-"), "right": ("+", "#2a7d3f", "-"), "wrong": ("×", "#c1440e", "--"),
    "unknown": ("", "#777777", ":")}


class Cell(NamedTuple):
    """One picture of the sheet: a video, its class ("": none), how it stands to the query (LOOKS), and its cosine."""
    file: str
    name: str
    verdict: str
    cosine: float = float("nan")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("features", metavar="FILE.npz", help="what retrieval.py --features wrote")
    parser.add_argument("--out", default="neighbours.png", metavar="FILE", help="the picture: .png, .jpg, .pdf or .svg")
    parser.add_argument("--queries", type=int, default=6, help="rows: so many queries, evenly spaced")
    parser.add_argument("--neighbours", type=int, default=5, help="columns: the nearest videos of each")
    args = parser.parse_args(argv)
    for name, most in (("queries", 100), ("neighbours", 20)):
        if not 1 <= getattr(args, name) <= most:
            parser.error(f"--{name} must lie between 1 and {most}, but is {getattr(args, name)}")
    return args


def read_features(file):
    """What retrieval.py --features wrote -> {name: array}. ValueError: it is another file."""
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}: retrieval.py --features writes one")
    try:
        arrays = dict(np.load(file))
    except Exception as error:                  # np.load raises whatever it met, from ValueError to BadZipFile
        raise ValueError(f"{file} is no file that retrieval.py --features wrote: {error}") from None
    if not NEEDED <= arrays.keys():
        raise ValueError(f"{file} lacks {', '.join(sorted(NEEDED - arrays.keys()))}: write it anew with retrieval.py "
                         "--features")
    return arrays


def rows_of(arrays, queries, neighbours):
    """The sheet's rows: a query and its nearest videos -> lists of Cell."""
    count = len(arrays["query_files"])
    chosen = np.unique(np.linspace(0, count - 1, min(queries, count)).round().astype(int))
    rows = []
    for q in chosen:
        name = str(arrays["query_classes"][q])
        row = [Cell(str(arrays["query_files"][q]), name, "query")]
        for g, cosine in zip(arrays["nearest"][q][:neighbours], arrays["cosines"][q]):
            if g >= 0:                                                          # -1: no video is left
                found = str(arrays["gallery_classes"][g])
                row.append(Cell(str(arrays["gallery_files"][g]), found, verdict_of(name, found), float(cosine)))
        rows.append(row)
    return rows


def verdict_of(name, found):
    """How a neighbour's class stands to the query's: right, wrong, or unknown where one of them has none."""
    if not name or not found:
        return "unknown"
    return "right" if name == found else "wrong"


def middle_frame(file):
    """A video's middle frame, its centre -> uint8 (CELL, CELL, 3), or None where it cannot be read any more."""
    try:
        frames, *_, packets = examine(file)                                     # a damaged video has some frames, too
        frame = decode(file, [frames // 2], CELL, packets=packets)[0]           # (3, h, w), the short side CELL
    except VideoError:
        return None
    top, left = ((side - CELL) // 2 for side in frame.shape[1:])
    return frame[:, top:top + CELL, left:left + CELL].permute(1, 2, 0).numpy()


def draw_cell(axes, cell):
    """A middle frame in its frame, and below it what the video is."""
    sign, colour, line = LOOKS[cell.verdict]
    image = middle_frame(cell.file)
    if image is None:
        axes.text(0.5, 0.5, "cannot be read", ha="center", va="center", transform=axes.transAxes)
    else:
        axes.imshow(image, extent=(0, 1, 0, 1))
    if sign:
        axes.text(0.06, 0.94, sign, color=colour, fontsize=13, fontweight="bold", ha="left", va="top",
                  bbox=dict(facecolor="white", edgecolor="none", boxstyle="square,pad=0.1"))
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linestyle=line, linewidth=3)
    name = shortened(printable(cell.name or os.path.basename(cell.file)))
    cosine = "" if np.isnan(cell.cosine) else f"\ncosine {cell.cosine:.2f}"
    axes.set_xlabel(f"{sign} {name}{cosine}", color=colour)


def shortened(name, most=20):
    return name if len(name) <= most else f"{name[:most // 2 - 2]}...{name[2 - most // 2:]}"


def draw(rows):
    """rows: of rows_of -> the figure."""
    columns = max(len(row) for row in rows)
    cell = WIDTH / columns
    plt = pyplot()
    figure, axes = plt.subplots(len(rows), columns, figsize=(WIDTH, len(rows) * (cell + 0.4) + 0.5), squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for row, places in zip(rows, axes):
        for cell, place in zip(row, places):
            place.set_axis_on()
            draw_cell(place, cell)
    for place, title in zip(axes[0], ["query", *(f"nearest {n}" for n in range(1, columns))]):
        place.set_title(title)
    figure.suptitle("+ and a solid frame: of the query's class; × and a dashed frame: of another class")
    return figure


def main(argv=None):
    args = parse_args(argv)
    check_picture(args.out)
    rows = rows_of(read_features(args.features), args.queries, args.neighbours)
    save(draw(rows), args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
