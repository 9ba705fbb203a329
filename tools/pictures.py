"""Pictures by matplotlib, an optional package: imported only where one is drawn."""
import os
from pathlib import Path

from common.files import check_writable

WIDTH = 9                                       # inches: at README's 900 pixels a point is 1.4 pixels
COLOURS = ("#1f4e9c", "#c1440e", "#2a7d3f", "#7a3c99", "#8a6d00", "#1b7f86", "#a12864", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)))
STYLE = {
    "figure.dpi": 150, "savefig.dpi": 150, "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "figure.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "lines.linewidth": 1.5, "lines.markersize": 4.5,
    "figure.constrained_layout.use": True, "text.parse_math": False}    # names of files may hold a $


def pyplot():
    """matplotlib.pyplot in this project's style, for files alone. ValueError: the package is not there."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update(STYLE)
    return plt


def check_picture(file):
    """Before any work: can this picture be drawn and written? ValueError says what is missing."""
    pyplot()
    if Path(file).suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .jpg, .pdf or .svg, but is {file}")
    check_writable(out=file)


def save(figure, file):
    """Write a figure to a file, whose suffix says what kind it is."""
    figure.savefig(file, facecolor="white")
    pyplot().close(figure)


def printable(name):
    """A file's name, which may be any bytes, as text that can be drawn -> str of one line."""
    text = os.fsencode(name).decode(errors="replace")
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def style(number):
    """Colour, marker and line of the number-th curve: each differs, so that colour alone tells nothing -> dict."""
    return dict(color=COLOURS[number % len(COLOURS)], marker=MARKERS[number % len(MARKERS)],
                linestyle=LINES[number % len(LINES)])
