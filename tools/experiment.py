"""Rows of Table 1 and Fig. 5 at a size that can be borne, from scratch, with several seeds, all judged alike.

    python tools/experiment.py --toy                        # the toy set, about an hour on two CPU cores
    python tools/experiment.py --small                      # UCF101-8, the paper's 400 epochs, hours on two CPU cores
    python tools/experiment.py                              # UCF101-8 with r3d18, on one GPU
    python tools/experiment.py --small --draw curves.png    # SVM and psi against steps, of what is there
    python tools/experiment.py --toy --draw table.png       # the table as a picture

Each row and seed runs pretrain.py and the judges in OUT/ROW-SEED, --jobs of them at a time, with their output in
OUT/ROW-SEED.txt. Whenever one ends, the table so far is written to OUT/table.md and OUT/table.json and printed. The
same command goes on where it was stopped (SIGTERM saves at once). All rows of a setting have the same flags. The videos
are decoded once, into memory, for all runs.
"""
import argparse
import contextlib
import fcntl
import functools
import itertools
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data
import finetune
import linear_probe
import pretrain
import retrieval
from common.files import write_json
from common.flags import Formatter
from common.pictures import pixels
from common.precision import cpu_has_bf16
from common.processes import run
from common.progress import processor
from common.splits import load_split, scan
from common.toy import make_toy
from common.video import decode
from tools.results import FINETUNED, FOLLOWED, ROWS, draw_curves, draw_table, read_json, write_table

FASTER = "bf16" if cpu_has_bf16() else "off"                                    # on a CPU

# What all rows of a setting have alike; side: short side of the frames in memory; order: rows and their seeds, what
# tells most first; finetune "": none
GPU = dict(
    dataset="ucf101", data="../shared/videos/ucf8_128/UCF-101", side=128, jobs=4,
    order=[("k e g random i j f h b c distinct l m n", [0, 1])],
    network="--arch r3d18 --frames 16 --size 112",
    pretrain="--batch-size 64 --epochs 120 --warmup-epochs 10 --lr 3e-4",
    judge="--windows 10",
    finetune="--batch-size 32 --epochs 30 --warmup-epochs 2 --lr 3e-4 --windows 5 --crops centre")
SMALL = dict(
    dataset="ucf101", data="../shared/videos/ucf8_128/UCF-101", side=64, jobs=2,
    order=[("k e g random", [0, 1]), ("i j f h", [0, 1]), ("b c distinct l m n", [0])],
    network=f"--arch r3d18_narrow --frames 8 --size 32 --amp {FASTER}",
    pretrain="--batch-size 24 --epochs 400 --warmup-epochs 10 --lr 1e-3 --log-every 50 --keep-every 1000",
    judge="--windows 10",
    finetune="--batch-size 32 --epochs 20 --warmup-epochs 1 --lr 1e-3 --windows 5 --crops centre")
TOY = dict(
    dataset="toy", data="toy-videos", side=32, jobs=2,
    order=[("k e g random i j f h b c distinct", [0, 1, 2])],
    network=f"--arch r3d18_narrow --frames 8 --size 24 --amp {FASTER}",
    pretrain="",
    judge="--windows 10",
    finetune="")


# ---- All videos in memory


def remember(settings, index):
    """Every video of the split, its short side settings["side"] -> {absolute path: uint8 (N, h, w, 3)}."""
    if settings["dataset"] == "toy":
        make_toy(settings["data"])
    found, known = {}, {}
    for part in ("train", "test"):
        split = load_split(settings["dataset"], settings["data"], part=part)
        known |= scan(split, index, os.cpu_count(), progress=False)
        found |= split.found

    def read(path):
        frames = decode(str(found[path]), range(known[path][0]), settings["side"], packets=known[path][4])
        return frames.permute(0, 2, 3, 1).contiguous()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        videos = list(tqdm(pool.map(read, found), "into memory", len(found), unit="video"))
    return {os.path.abspath(file): video for file, video in zip(found.values(), videos)}


def recall(memory, path, frames, size, boxes=None, packets=""):
    """What common.video.decode gives, from frames in memory, but for rounding and what `side` took of the pixels."""
    video = memory[os.path.abspath(path)]                                       # (N, h, w, 3)
    height, width = video.shape[1:3]
    if boxes is None:
        sides = [round(side * size / min(height, width)) for side in (height, width)]
        return resized(video[list(frames)], sides)
    clips = []
    for box, clip in itertools.groupby(zip(boxes, frames), lambda pair: pair[0]):
        top, left, rows, columns = pixels(box, height, width)
        numbers = [n for _, n in clip]
        clips.append(resized(video[:, top:top + rows, left:left + columns][numbers], [size, size]))
    return torch.cat(clips)


def resized(frames, sides):
    """uint8 (N, h, w, 3) -> uint8 (N, 3, *sides), as smooth as FFmpeg's."""
    return F.interpolate(frames.permute(0, 3, 1, 2), sides, mode="bilinear", antialias=True)


# ---- Runs


def data_flags(name, settings, out, workers):
    """The flags that all scripts of a run share."""
    return ["--dataset", settings["dataset"], "--data", settings["data"], "--seed", name.rsplit("-", 1)[1],
            "--workers", str(workers), "--index", str(out / "index.json")]


def commands(name, settings, out, workers):
    """The scripts that a run still needs, in order -> [(module, its arguments, the file that shows it is done)]."""
    row, dataset, folder = name.rsplit("-", 1)[0], settings["dataset"], out / name
    flags = data_flags(name, settings, out, workers) + shlex.split(settings["network"])
    judge = flags + shlex.split(settings["judge"])
    checkpoint = ["--checkpoint", "random" if ROWS[row] is None else str(folder / "backbone.pt")]
    found = []
    if ROWS[row] is not None:
        training = flags + shlex.split(settings["pretrain"]) + shlex.split(ROWS[row])
        found.append((pretrain, training + ["--out", str(folder)], folder / "pretrained"))
    found.append((linear_probe, judge + checkpoint + ["--out", str(folder)], folder / f"linear_probe-{dataset}.json"))
    found.append((linear_probe, judge + checkpoint + ["--C", "auto", "--out", str(folder / "auto")],
                  folder / "auto" / f"linear_probe-{dataset}.json"))
    found.append((retrieval, judge + checkpoint + ["--k", "1", "5", "--out", str(folder)],
                  folder / f"retrieval-{dataset}.json"))
    if settings["finetune"] and row in FINETUNED:
        tuning = flags + checkpoint + shlex.split(settings["finetune"])
        found.append((finetune, tuning + ["--out", str(folder)], folder / f"finetune-{dataset}-4x.json"))
    return [command for command in found if not command[2].exists()]


def on_the_way(name, settings, out, workers):
    """linear_probe.py for the backbones that a run kept on the way, if it is one of those that are followed."""
    if name.rsplit("-", 1)[0] not in FOLLOWED:
        return []
    judge = data_flags(name, settings, out, workers) + shlex.split(settings["judge"])
    found = []
    for backbone in sorted((out / name).glob("backbone-*.pt")):
        folder = backbone.with_suffix("")
        flags = judge + ["--checkpoint", str(backbone), "--out", str(folder)]
        found.append((linear_probe, flags, folder / f"linear_probe-{settings['dataset']}.json"))
    return [command for command in found if not command[2].exists()]


def work(name, settings, out, workers, memory):
    """Do what a run still needs, in a process of its own; its output goes to OUT/NAME.txt."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    log = os.open(out / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)
    if not (out / name / "made.json").exists():
        write_json(out / name / "made.json", made())
    data.decode = functools.partial(recall, memory)
    for plan in (commands, on_the_way):
        for module, argv, done in plan(name, settings, out, workers):
            sys.argv = [f"{module.__name__}.py", *argv]                         # results name their command
            print(f"$ python {shlex.join(sys.argv)}")
            run(module.main)
            if module is pretrain:
                done.touch()


def made():
    """Where and from what a run is begun: the processor (the GPU, where there is one), the commit, "+" if changed."""
    here, commit = Path(__file__).parent, ""
    with contextlib.suppress(OSError):                                          # no git
        asked = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=here, capture_output=True, text=True)
        commit = asked.stdout.strip()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a core of {processor()}"
    return dict(commit=commit, hardware=hardware)


def unfinished(names, settings, out, workers):
    """The runs that still have something to do."""
    return [name for name in names
            if commands(name, settings, out, workers) or on_the_way(name, settings, out, workers)]


def run_all(names, settings, args, out):
    """Do what is not done yet, --jobs runs at a time -> {name: the last line of its output} of those that failed."""
    waiting, running, failed = unfinished(names, settings, out, args.workers), {}, {}
    if not waiting:
        write_table(names, failed, settings, out)
        return failed
    memory = remember(settings, out / "index.json")
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                name = waiting.pop(0)
                process = multiprocessing.Process(target=work, args=(name, settings, out, args.workers, memory))
                process.start()
                running[process.sentinel] = name, process
            for sentinel in wait(list(running)):
                name, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    failed[name] = last_line(out / f"{name}.txt")
                write_table(names, failed, settings, out)
    finally:                                                                    # stopped: pre-training saves its step
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    return failed


def last_line(file):
    """The last line that a run's output has."""
    lines = file.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "no output")


def run_names(order, seeds=None):
    """ROW-SEED of each run, in order; seeds: these instead of the usual ones."""
    names = []
    for rows, usual in order:
        for seed in seeds or usual:
            names += [f"{row}-{seed}" for row in rows.split()]
    return names


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--toy", action="store_true", help="the toy set, on a CPU")
    size.add_argument("--small", action="store_true", help="UCF101-8 on a CPU")
    parser.add_argument("--data", help="folder of the videos; None: the setting's")
    parser.add_argument("--out", help="folder of all that is written; None: one below runs/")
    parser.add_argument("--rows", nargs="+", choices=ROWS, metavar="ROW",
                        help=f"of {' '.join(ROWS)}, in the order given; None: the setting's")
    parser.add_argument("--seeds", type=int, nargs="+", help="of each row; None: the setting's")
    parser.add_argument("--jobs", type=int, help="runs at a time; None: the setting's")
    parser.add_argument("--workers", type=int, default=0, help="loader processes of a run")
    parser.add_argument("--draw", metavar="FILE.png", help="only draw what is there (--toy: the table; else curves)")
    for name in ("network", "pretrain", "judge", "finetune"):
        parser.add_argument(f"--{name}", metavar="FLAGS", help="of all rows; None: the setting's")
    args = parser.parse_args(argv)
    name = "toy" if args.toy else "small" if args.small else "gpu"
    args.settings = dict({"toy": TOY, "small": SMALL, "gpu": GPU}[name])
    for key in ("data", "jobs", "network", "pretrain", "judge", "finetune"):
        if vars(args)[key] is not None:
            args.settings[key] = vars(args)[key]
    args.jobs = args.settings["jobs"]
    order = args.settings.pop("order")
    args.settings["seeds"] = args.seeds or sorted({seed for _, seeds in order for seed in seeds})
    if args.rows:
        order = [(" ".join(args.rows), args.settings["seeds"])]
    args.names = run_names(order, args.seeds)
    args.out = Path(args.out or f"runs/experiment-{name}")
    return args


def check_settings(out, settings):
    """Refuse to mix runs of different settings in one table."""
    file = out / "settings.json"
    fixed = {key: settings[key] for key in ("dataset", "side", "network", "pretrain", "judge", "finetune")}
    before = read_json(file) or fixed
    changed = [f"{key} {before[key]!r} -> {value!r}" for key, value in fixed.items() if before[key] != value]
    if changed:
        raise ValueError(f"{out} holds an experiment with other settings ({'; '.join(changed)}): give another --out")
    write_json(file, fixed)


def main(argv=None):
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.draw:
        draw = draw_table if args.toy else draw_curves
        draw(args.draw, args.settings, args.out)
        return
    multiprocessing.set_start_method("fork")                                    # runs find the frames in memory
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM: the same command goes on from here"))
    lock = (args.out / "lock").open("w")                                        # held by all processes of a run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"a run of this experiment is still writing to {args.out}: wait for it, or give another --out")
    check_settings(args.out, args.settings)
    failed = run_all(args.names, args.settings, args, args.out)
    if failed:
        sys.exit(f"{len(failed)} of {len(args.names)} runs failed")


if __name__ == "__main__":
    run(main)
