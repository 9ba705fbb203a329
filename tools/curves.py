"""Draw OUT/log.jsonl of pretrain.py or finetune.py: is my run healthy?

    python tools/curves.py runs/toy-r3d18_narrow --out curves.png
    python tools/curves.py runs/seed0 runs/seed1 runs/seed2/log.jsonl --out curves.png

Against steps: each term of the loss with the accuracy of its head, chance dotted; the learning
rate, clips per second, and the fraction of time spent waiting for data.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.distributed import run
from common.flags import Parser
from tools import WIDTH, printable, pyplot

TITLES = {                                      # key of the log -> title, left and right in turn
    "inst": "L_inst (Eq. 3): instances", "phi_nearest": "Nearest φ is of the same video",
    "equi": "L_equi (Eq. 1): equivariance", "psi_nearest": "Nearest ψ has the same pq",
    "speed": "L_speed (Sec. 3.2)", "speed_acc": "Accuracy of speed",
    "direction": "L_direction (Sec. 3.2)", "direction_acc": "Accuracy of direction",
    "order": "L_order (Sec. 3.2)", "order_acc": "Accuracy of order",
    "distinct": "L_distinct (Fig. 5)", "loss": "Loss, the sum of its terms",
    "train_acc": "Training accuracy", "lr": "Learning rate",
    "clips_per_s": "Clips per second, all processes",
    "waiting_for_data": "Fraction of time waiting for data"}


def read_log(path):
    """A run's folder, or its log.jsonl -> name, list of dicts"""
    file = Path(path, "log.jsonl") if Path(path).is_dir() else Path(path)
    return printable(file.parent), [json.loads(line) for line in file.read_text().splitlines()]


def draw_panel(axes, key, runs):
    """One value of all runs against steps; its chance, where logged, is dotted."""
    chance = re.sub("_(nearest|acc)$", "_chance", key)
    for name, rows in runs:
        rows = [row for row in rows if key in row]
        steps = [row["step"] for row in rows]
        line, = axes.plot(steps, [row[key] for row in rows], markevery=0.1, label=name)
        if chance != key and rows and chance in rows[0]:
            axes.plot(steps, [row[chance] for row in rows], color=line.get_color(), marker="",
                      linestyle=":")
    axes.set_title(TITLES[key])
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax or 1)          # all zero: to 1


def draw(runs):
    """runs: of `read_log` -> a figure with a panel for each value logged"""
    keys = [key for key in TITLES if any(key in row for _, rows in runs for row in rows)]
    lines = -(-len(keys) // 2)
    figure = pyplot().figure(figsize=(WIDTH, 0.7 + 1.4 * lines))
    for n, key in enumerate(keys, 1):
        draw_panel(figure.add_subplot(lines, 2, n), key, runs)
    figure.supxlabel("step; dotted: chance", fontsize=9)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    return figure


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="OUT", help="a run's folder, or its log.jsonl")
    parser.add_argument("--out", default="curves.png", help="the picture: .png, .pdf, .svg ...")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    draw([read_log(path) for path in args.runs]).savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    run(main)
