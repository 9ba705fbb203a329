"""Contact sheet: queries and their nearest videos, from retrieval.py --features.

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt --features features.npz
    python tools/neighbours.py features.npz --out neighbours.png

One row a query: its middle frame, then those of its nearest videos with their cosines. A plus and
a solid border: of the query's class; a cross and a dashed border: of another class.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.distributed import run
from common.flags import Parser, positive_int
from common.video import VideoError, decode, probe
from tools import WIDTH, printable, pyplot

SIDE = 160                                                      # pixels of a frame
SIGN = {None: ("", "#555555", "-"), True: ("+ ", "#2a7d3f", "-"), False: ("× ", "#c1440e", "--")}


def middle_frame(file):
    """The centre of a video's middle frame -> uint8 (SIDE, SIDE, 3)"""
    frames, *_ = probe(file)                                    # of a damaged video, those before
    frame = decode(file, [frames // 2], SIDE)[0]                # (3, h, w), short side SIDE
    top, left = ((side - SIDE) // 2 for side in frame.shape[1:])
    return frame[:, top:top + SIDE, left:left + SIDE].permute(1, 2, 0).numpy()


def draw_video(axes, file, name, right=None, note=""):
    """A middle frame above its class; right: whether it is the query's class, None: not known."""
    sign, colour, line = SIGN[right]
    try:
        axes.imshow(middle_frame(file), extent=(0, 1, 0, 1))
    except VideoError:
        axes.text(0.5, 0.5, "cannot be read", ha="center", va="center")
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set(visible=True, color=colour, linestyle=line, linewidth=3)
    label = printable(name or Path(file).name)[:22]             # what fits
    axes.set_xlabel(f"{sign}{label}{note}", color=colour, fontsize=8)


def draw(arrays, queries, neighbours):
    """arrays: of retrieval.py --features -> a figure of so many rows and neighbours at most"""
    count = len(arrays["query_files"])
    rows = np.linspace(0, count - 1, min(queries, count)).round().astype(int)
    columns = 1 + min(neighbours, arrays["nearest"].shape[1])
    size = WIDTH, len(rows) * (WIDTH / columns + 0.3) + 0.3
    figure, grid = pyplot().subplots(len(rows), columns, squeeze=False, figsize=size)
    for q, (first, *places) in zip(rows, grid):
        name = arrays["query_classes"][q]
        draw_video(first, arrays["query_files"][q], name)
        for axes, g, cosine in zip(places, arrays["nearest"][q], arrays["cosines"][q]):
            if g < 0:                                           # no video is left
                axes.set_axis_off()
                continue
            other = arrays["gallery_classes"][g]
            right = other == name if other and name else None
            draw_video(axes, arrays["gallery_files"][g], other, right, f"\ncosine {cosine:.2f}")
    for axes, title in zip(grid[0], ["query", *(f"nearest {n}" for n in range(1, columns))]):
        axes.set_title(title)
    return figure


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("features", metavar="FILE.npz", help="of retrieval.py --features")
    parser.add_argument("--out", default="neighbours.png", help="the picture: .png, .pdf, .svg ...")
    parser.add_argument("--queries", type=positive_int, default=6, help="rows, evenly spaced")
    parser.add_argument("--neighbours", type=positive_int, default=5, help="nearest of each query")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw(dict(np.load(args.features)), args.queries, args.neighbours).savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
