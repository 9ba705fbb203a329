"""Run by hand, from the repository's root: python tools/NAME.py"""
import os
import signal

from common import UserError

WIDTH = 9                                       # of a figure, in inches
CURVES = """cycler(color=["#1f4e9c", "#c1440e", "#2a7d3f", "#7a3c99", "#8a6d00", "#1b7f86"],
                   marker=["o", "s", "^", "D", "v", "P"],
                   linestyle=["-", "--", "-.", "-", "--", "-."])"""
STYLE = {
    "figure.dpi": 150, "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd", "lines.markersize": 4.5,
    "axes.prop_cycle": CURVES, "figure.constrained_layout.use": True, "text.parse_math": False}


def pyplot():
    """matplotlib.pyplot in this style, for files. UserError: matplotlib is not installed."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        raise UserError("pictures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("Agg")
    plt.rcParams.update(STYLE)
    return plt


def interrupt_on_signals():
    """Let SIGTERM and a terminal that closes act as Ctrl-C; under nohup the latter is ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def printable(name):
    """A file's name, which may be any bytes, as text that can be drawn."""
    return os.fsencode(name).decode(errors="replace")
