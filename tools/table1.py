"""Rows of Table 1 and Fig. 5 on a small data set: several seeds, the same settings for all rows.

    python tools/table1.py                                              # the toy set
    python tools/table1.py --data UCF-101 --annotations ucfTrainTestlist            # UCF101-8
    python tools/table1.py --large-batch --rows g i j k distinct inst-distinct
    python tools/table1.py --data UCF-101 --picture table.png           # draw the results so far

UCF101-8 is split 1 of UCF101 restricted to eight classes; OUT gets its lists and a shrunk copy of
its videos. --large-batch takes 192 videos, as the paper. The toy set is too small for it, so OUT
gets more generated videos, for pre-training alone.

A run is a row with a seed: pretrain.py, linear_probe.py with C fixed and with C cross-validated,
retrieval.py and, for four rows of UCF101-8, finetune.py. It writes to OUT/ROW-SEED and
OUT/ROW-SEED.txt. After each run the table so far is printed and written to OUT/table.md, and below
it what the heads get right at the end of pre-training. The same command resumes.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UserError, write_json, write_text
from common.distributed import run
from common.flags import Parser, non_negative_int, positive_int, usable_cores
from common.splits import find_lists, read_lines
from common.toy import TOY_CLASSES, VIDEOS, make_toy, toy_video, write_video
from common.training import default_amp, locked
from tools import WIDTH, interrupt_on_signals, pyplot, shrink

ROOT = Path(__file__).resolve().parents[1]
ROWS = {                                                        # flags of pretrain.py
    "random": None,                                             # no pre-training
    "e": "--losses inst",
    "f": "--losses equi",
    "g": "--losses speed direction order",
    "h": "--losses inst equi",
    "i": "--losses inst speed direction order",
    "j": "--losses equi speed direction order",
    "k": "--losses inst equi speed direction order",
    "b": "--losses inst equi --equivariance spatial",
    "c": "--losses inst equi speed direction order --equivariance both",
    "l": "--losses inst equi speed",
    "m": "--losses inst equi speed order",
    "n": "--losses inst equi speed direction",
    "distinct": "--losses distinct",                            # Fig. 5
    "inst-distinct": "--losses inst distinct",
    "distinct-aux": "--losses inst distinct speed direction order"}             # not in the paper
FINETUNED = ("random", "e", "g", "k")
UCF101_8 = ("BabyCrawling", "BodyWeightSquats", "BoxingPunchingBag", "JugglingBalls",
            "JumpingJack", "Lunges", "Punch", "PushUps")

# Settings of every row; TOY: the defaults of the scripts; videos: how many train
TOY = dict(
    videos=320,
    clips="--arch r3d18_narrow --frames 8 --size 24",
    batch_size=32, epochs=200, warmup_epochs=10, pretrain="--lr 2e-3")
CPU = dict(
    videos=743,
    shrink="64",                                                # their short side
    clips="--arch r3d18_narrow --frames 8 --size 32",
    batch_size=24, epochs=400, warmup_epochs=10, pretrain="--lr 1e-3 --log-every 50",
    finetune="--batch-size 32 --epochs 20 --warmup-epochs 1 --lr 1e-3 --windows 5 --crops centre")
GPU = dict(
    videos=743,
    shrink="128",
    clips="--arch r3d18 --frames 16 --size 112",
    batch_size=64, epochs=120, warmup_epochs=10, pretrain="--lr 3e-4",
    finetune="--batch-size 32 --epochs 30 --warmup-epochs 2 --lr 3e-4 --windows 5 --crops centre")
# With --large-batch
TOY_192 = TOY | dict(videos=1920, batch_size=192, epochs=100)
CPU_192 = CPU | dict(batch_size=192, epochs=600, pretrain="--lr 2e-3")
GPU_192 = GPU | dict(batch_size=192, epochs=360)

COLUMNS = {                                                     # result file, R@k of retrieval
    "linear SVM": ("linear_probe-{}.json", None),
    "C cross-validated": ("auto/linear_probe-{}.json", None),
    "1-NN": ("retrieval-{}.json", "R@1"),
    "R@5": ("retrieval-{}.json", "R@5"),
    "fine-tuned": ("finetune-{}-4x.json", None)}
TASKS = "speed_acc", "direction_acc", "order_acc", "psi_nearest", "phi_nearest"  # of the log
LAST = 10                                                       # lines of the log


def parse_args(argv=None):
    parser = Parser(__doc__)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--data", help="folder of UCF101's videos (default: the toy set)")
    add("--annotations", help="folder of UCF101's lists (default: beside the videos)")
    add("--out", help="folder of what this command writes (default: below runs/)")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
        help=f"of {' '.join(ROWS)} (Table 1; distinct and inst-distinct: Fig. 5; distinct-aux, not "
        "in the paper, adds L_aux)")
    add("--seeds", nargs="+", type=non_negative_int, help="default: 0 1 2 on the toy set, else 0 1")
    add("--large-batch", action="store_true", help="192 videos, as the paper (Sec. 4.1)")
    add("--jobs", type=positive_int, default=4 if gpu else usable_cores(), help="runs at a time")
    add("--epochs", type=positive_int, help="fewer, without warm-up, for a rehearsal")
    add("--picture", metavar="FILE.png", help="only draw the results so far")
    args = parser.parse_args(argv)
    args.dataset = "ucf101" if args.data else "toy"
    name = f"{args.dataset}-192" if args.large_batch else args.dataset
    args.out = Path(args.out or f"runs/table1-{name}")
    args.seeds = args.seeds or ([0, 1] if args.data else [0, 1, 2])
    args.videos = args.out / "UCF-101" if args.data else Path("toy-videos")
    args.generated = args.out / "videos" if args.large_batch and not args.data else None
    args.workers = usable_cores() // args.jobs if gpu else 0
    settings = (TOY, TOY_192) if not args.data else (GPU, GPU_192) if gpu else (CPU, CPU_192)
    args.settings = settings[args.large_batch] | dict(amp=default_amp())
    if args.epochs:
        args.settings |= dict(epochs=args.epochs, warmup_epochs=0)
        if args.data:
            args.settings["finetune"] += f" --epochs {args.epochs} --warmup-epochs 0"
    return args


# ---- Data ----

def make_ucf101_8(args):
    """Write the lists and a shrunk copy of the videos of UCF101-8 to OUT, unless they are there."""
    lists = args.out / "ucfTrainTestlist"
    if (lists / "classInd.txt").exists():                       # written last
        return
    rows = {"classInd.txt": [f"{k} {name}" for k, name in enumerate(UCF101_8, 1)]}
    for name in ("trainlist01.txt", "testlist01.txt"):
        (file,) = find_lists(Path(args.data), args.annotations, lists.name, name)
        rows[name] = [line for line in read_lines(file) if line.split("/")[0] in UCF101_8]
    for name in UCF101_8:
        folders = str(Path(args.data, name)), str(args.videos / name)
        shrink.main([*folders, "--size", args.settings["shrink"]])
    for name in reversed(rows):
        write_text(lists / name, "\n".join(rows[name]))


def make_more_toy(args):
    """Write unlabelled videos, whose seeds follow those of the toy set, unless they are there."""
    if args.generated.exists():
        return
    tmp = args.generated.with_suffix(".tmp")
    shutil.rmtree(tmp, ignore_errors=True)                      # left by an interruption
    for k in tqdm(range(args.settings["videos"]), f"make {args.generated}", unit="video"):
        cls, rng = TOY_CLASSES[k % len(TOY_CLASSES)], np.random.default_rng(len(VIDEOS) + k)
        write_video(tmp / f"{k:04d}.avi", toy_video(cls, rng))
    tmp.replace(args.generated)


def check_settings(args):
    """UserError: OUT holds runs of other settings, which do not belong in one table."""
    file = args.out / "settings.json"
    if file.exists() and json.loads(file.read_text()) != args.settings:
        raise UserError(f"{file} differs from {args.settings}: give another --out")
    write_json(file, args.settings, indent=1)


# ---- Runs ----

def steps(args, row, seed):
    """The commands of a run -> [(argv, the file whose existence shows that it is done), ...]"""
    folder = args.out / f"{row}-{seed}"
    probe, auto, neighbours, _, tuned = (
        folder / name.format(args.dataset) for name, _ in COLUMNS.values())
    data = ["--dataset", args.dataset, "--data", args.videos]
    unlabelled = ["--dataset", "folder", "--data", args.generated]
    shared = ["--seed", seed, "--workers", args.workers, *args.settings["clips"].split()]
    network = "random" if row == "random" else folder / "backbone.pt"
    test = [*data, *shared, "--checkpoint", network]
    commands = [
        ("linear_probe.py", test, probe),
        ("linear_probe.py", [*test, "--C", "auto"], auto),
        ("retrieval.py", [*test, "--k", 1, 5], neighbours)]
    if row != "random":                                         # once probed, it is done
        train = [*(unlabelled if args.generated else data), *shared]
        commands.insert(0, ("pretrain.py", [*train, *pretrain_flags(args, row)], probe))
    if row in FINETUNED and args.dataset != "toy":
        commands.append(("finetune.py", [*test, *args.settings["finetune"].split()], tuned))
    return [([*map(str, (sys.executable, ROOT / script, *flags, "--out", done.parent))], done)
            for script, flags, done in commands]


def pretrain_flags(args, row):
    """The flags of pretrain.py for a row, with as many clips per step and as many steps for all.

    Fig. 5's rows take four clips of a video instead of two, so half the videos per batch. An epoch
    then has about twice the steps.
    """
    settings = args.settings
    videos, batch_size = settings["videos"], settings["batch_size"]
    longer = 1                                                  # an epoch, in steps
    if "distinct" in ROWS[row]:
        longer = (videos // (batch_size // 2)) / (videos // batch_size)
        batch_size //= 2
    epochs = max(1, round(settings["epochs"] / longer))
    warmup = settings["warmup_epochs"] / longer
    return [*ROWS[row].split(), "--batch-size", batch_size, "--epochs", epochs,
            "--warmup-epochs", f"{warmup:.3g}", *settings["pretrain"].split()]


def execute(args, row, seed, children, stopping):
    """Run the steps of a run that are not done -> False if one fails."""
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1"}
    for argv, done in steps(args, row, seed):
        if done.exists():
            continue
        with open(args.out / f"{row}-{seed}.txt", "a") as log:
            print(f"$ {shlex.join(argv)}", file=log, flush=True)
            child = subprocess.Popen(argv, stdout=log, stderr=log,
                                     env=os.environ | threads | {"TQDM_MININTERVAL": "60"})
        children.append(child)
        if stopping.is_set():                                   # while the child was started
            child.terminate()
        if child.wait():
            return False
    return True


def execute_all(args, runs):
    """Execute the runs, --jobs at a time, with the table after each -> names of those that failed.

    An interruption reaches the children as SIGTERM, on which training saves a checkpoint.
    """
    failed, children, stopping = [], [], threading.Event()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(execute, args, *each, children, stopping): each for each in runs}
        try:
            for future in as_completed(futures):
                name = "{}-{}".format(*futures[future])
                if not future.result():
                    failed.append(name)
                    log = (args.out / f"{name}.txt").read_text(errors="replace")
                    print(f"{name} failed: {log.splitlines()[-1]}", file=sys.stderr)
                write_table(args)
        finally:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.terminate()
    return failed


# ---- Results ----

def accuracies(args, row, column, network=None):
    """Of the seeds that have a result; network: checkpoint, random or chance, None: the row's."""
    name, k = COLUMNS[column]
    network = network or ("random" if row == "random" else "checkpoint")
    found = []
    for seed in args.seeds:
        file = args.out / f"{row}-{seed}" / name.format(args.dataset)
        if file.exists():
            result = json.loads(file.read_text("utf-8"))
            if k:
                found.append(result["recall"][network][k])
            else:
                found.append(result["chance"] if network == "chance" else result["top1"][network])
    return found


def chance(args, column):
    """The same number in every run -> a list of one, or of none if no run has a result."""
    return [x for row in ROWS for x in accuracies(args, row, column, "chance")][:1]


def last_lines(args, row):
    """Means over the last lines of the log, of each seed that is trained -> [{key: mean}, ...]"""
    found = []
    for seed in args.seeds:
        folder = args.out / f"{row}-{seed}"
        probed = folder / COLUMNS["linear SVM"][0].format(args.dataset)
        log = folder / "log.jsonl"
        if probed.exists() and log.exists():                    # random has no log
            lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()[-LAST:]]
            found.append({key: sum(line[key] for line in lines) / len(lines) for key in lines[0]})
    return found


def spread(values):
    """Mean ± half the range, in per cent."""
    if len(values) < 2:
        return "".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * sum(values) / len(values):.1f} ± {50 * (max(values) - min(values)):.1f}"


def write_table(args):
    """Print the tables so far and write them to OUT/table.md."""
    lines = [f"| row | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in ROWS:
        cells = [spread(accuracies(args, row, column)) for column in COLUMNS]
        if any(cells):
            seeds = len(accuracies(args, row, "linear SVM"))
            lines.append(f"| {row} | {seeds} | {' | '.join(cells)} |")
    cells = [spread(chance(args, column)) for column in COLUMNS]
    lines.append(f"| chance | | {' | '.join(cells)} |")
    lines += ["", f"| row (chance) | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for row in ROWS:
        means, cells = last_lines(args, row), []
        for key in TASKS:
            right = [mean[key] for mean in means if key in mean]
            chance_key = key.split("_")[0] + "_chance"
            cells.append(f"{spread(right)} ({spread([means[0][chance_key]])})" if right else "")
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    write_text(args.out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def draw(args):
    """Linear SVM and 1-NN of each row, one mark per seed, with the random baseline and chance."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.6), sharey=True)
    for axis, column in zip(axes, ("linear SVM", "1-NN")):
        rows = {row: accuracies(args, row, column) for row in ROWS}
        rows = {row: values for row, values in rows.items() if values}
        for place, values in enumerate(rows.values()):
            figures = [100 * value for value in values]
            axis.plot([place] * len(values), figures, "_k", markersize=9, markeredgewidth=2)
        baselines = {"random initialisation": rows.get("random"), "chance": chance(args, column)}
        for (label, values), style in zip(baselines.items(), ("--", ":")):
            if values:
                mean = 100 * sum(values) / len(values)
                axis.axhline(mean, color="grey", linestyle=style, marker="", label=label, zorder=1)
        axis.set(title=column, xlabel="row of Table 1", xticks=range(len(rows)))
        axis.set_xticklabels(rows, rotation=45)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend()
    figure.savefig(args.picture)


def main(argv=None):
    args = parse_args(argv)
    if args.picture:
        draw(args)
        return
    interrupt_on_signals()
    with locked(args.out):
        check_settings(args)
        if args.data:
            make_ucf101_8(args)
        else:
            make_toy(args.videos)
        if args.generated:
            make_more_toy(args)
        runs = [(row, seed) for seed in args.seeds for row in args.rows]
        todo = [each for each in runs if not all(done.exists() for _, done in steps(args, *each))]
        print(f"{len(todo)} of {len(runs)} runs to do, {args.jobs} at a time, in {args.out}")
        if not todo:
            write_table(args)
        failed = execute_all(args, todo)
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {' '.join(failed)}")


if __name__ == "__main__":
    run(main)
