"""OUT/log.jsonl of pretrain.py or finetune.py as a picture: is my run healthy?

    python tools/curves.py runs/toy-r3d18_narrow --out curves.png
    python tools/curves.py runs/seed0 runs/seed1 runs/seed2/log.jsonl --out curves.png

Against steps: each term of the loss and, beside it, what its head gets right, with what chance would give as a dotted
line; the learning rate, clips a second, and the share of the time spent waiting for data.
"""
import argparse
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.flags import Formatter
from common.processes import run
from tools.pictures import WIDTH, check_picture, printable, pyplot, save, style

MARKS = 10                                                                      # markers on a curve


class Panel(NamedTuple):
    """What is drawn in one place: a value of the log, in which unit, and the value that chance would give."""
    key: str
    title: str
    unit: str
    chance: str = ""


PANELS = (                                      # in the log's words, left and right in turn
    Panel("inst", "L_inst (Eq. 3): instances", "nats"),
    Panel("phi_nearest", "nearest φ is of the same video", "%", "phi_chance"),
    Panel("equi", "L_equi (Eq. 1): equivariance", "nats"),
    Panel("psi_nearest", "nearest ψ has the same transformation pq", "%", "psi_chance"),
    Panel("speed", "L_speed (Sec. 3.2)", "nats"),
    Panel("speed_acc", "speed is right", "%", "speed_chance"),
    Panel("direction", "L_direction (Sec. 3.2)", "nats"),
    Panel("direction_acc", "direction is right", "%", "direction_chance"),
    Panel("order", "L_order (Sec. 3.2)", "nats"),
    Panel("order_acc", "order is right", "%", "order_chance"),
    Panel("distinct", "L_distinct (Fig. 5)", "nats"),
    Panel("loss", "loss, the sum of its terms", "nats"),
    Panel("train_acc", "class is right, training videos", "%"),
    Panel("knn", "1-NN among training videos", "%", "knn_chance"),
    Panel("lr", "learning rate", ""),
    Panel("clips_per_s", "clips a second, all processes", "1/s"),
    Panel("waiting_for_data", "time spent waiting for data", "%"))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="OUT", help="a run's folder, or its log.jsonl")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help="the picture: .png, .jpg, .pdf or .svg")
    return parser.parse_args(argv)


def read_log(path):
    """The lines of a log that tell of steps -> its name, list of dicts. ValueError: there is no such line.

    A run that goes on may be writing the last line; where a disk was full, another may be cut: they are passed over.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "log.jsonl"
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give the folder of a run of pretrain.py or finetune.py")
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    if not any("loss" in row for row in rows):
        raise ValueError(f"{file} has no line of a step yet: the first comes after --log-every steps")
    folder = file.parent if file.parent.name else file.parent.resolve()
    return printable(folder), rows


def curve(rows, key, unit):
    """The steps at which the log has a value, and the values, shares in per cent -> two lists."""
    factor = 100 if unit == "%" else 1
    found = [row for row in rows if key in row]
    return [row["step"] for row in found], [factor * row[key] for row in found]


def draw_panel(axes, panel, runs):
    """One value of all runs against their steps; what chance gives is dotted."""
    for number, (_, rows) in enumerate(runs):
        look = style(number)
        steps, values = curve(rows, panel.key, panel.unit)
        axes.plot(steps, values, **look, markevery=max(1, len(steps) // MARKS))
        if panel.chance:
            axes.plot(*curve(rows, panel.chance, panel.unit), color=look["color"], linestyle=":")
    axes.set_title(panel.title, loc="left")
    axes.set_ylabel(panel.unit)
    axes.margins(y=0.15)
    axes.autoscale_view()
    axes.set_ylim(bottom=0)


def draw(runs):
    """runs: [(name, rows)] as read_log gives them -> a figure with a panel for each value that a log has."""
    plt = pyplot()
    logged = {key for _, rows in runs for row in rows for key in row}
    panels = [panel for panel in PANELS if panel.key in logged]
    lines = math.ceil(len(panels) / 2)
    figure, axes = plt.subplots(lines, 2, figsize=(WIDTH, 0.7 + 1.3 * lines), sharex=True, squeeze=False)
    for place, panel in zip(axes.flat, panels):
        draw_panel(place, panel, runs)
    for place in axes.flat[len(panels):]:
        place.set_visible(False)
    for place in axes.flat[max(0, len(panels) - 2):len(panels)]:
        place.set_xlabel("step")
        place.tick_params(labelbottom=True)
    figure.align_ylabels()
    handles = [plt.Line2D([], [], **style(number), label=f"run {name}") for number, (name, _) in enumerate(runs)]
    handles.append(plt.Line2D([], [], color="black", linestyle=":", label="by chance"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    return figure


def main(argv=None):
    args = parse_args(argv)
    check_picture(args.out)
    runs = [read_log(path) for path in args.runs]
    save(draw(runs), args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
