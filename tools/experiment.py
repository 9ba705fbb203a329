"""The small experiment: rows of Table 1 on UCF101-8, pre-trained from scratch with several seeds and judged alike.

    python tests/experiment.py --data ../shared/videos/ucf8_128 --out runs/experiment                       # one GPU
    python tests/experiment.py --data ../shared/videos/ucf8_128 --rows random e g k --small --out runs/small    # a CPU

DATA holds UCF-101 and ucfTrainTestlist; official split 1. Each row and seed runs pretrain.py, linear_probe.py,
retrieval.py and finetune.py, --jobs of them at a time, in OUT/ROW-SEED, with its output in OUT/ROW-SEED.txt. Whenever
one ends, the table so far is printed and written to OUT/table.md and OUT/table.json. The same command goes on where it
was stopped (SIGTERM saves at once). All rows have the same settings. The videos are decoded once, into memory: 7 GB.
"""
import argparse
import fcntl
import json
import multiprocessing
import os
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common                                                                   # noqa: E402
import data                                                                     # noqa: E402
import finetune                                                                 # noqa: E402
import linear_probe                                                             # noqa: E402
import pretrain                                                                 # noqa: E402
import retrieval                                                                # noqa: E402

ROWS = {                                                                        # Table 1: flags of pretrain.py
    "random": None,                                                             # no pre-training
    "e": "--losses inst", "f": "--losses equi", "g": "--losses speed direction order",
    "h": "--losses inst equi", "i": "--losses inst speed direction order", "j": "--losses equi speed direction order",
    "k": "", "b": "--equivariance spatial --losses inst equi", "c": "--equivariance both",
    "l": "--losses inst equi speed", "m": "--losses inst equi speed order", "n": "--losses inst equi speed direction",
    "distinct": "--losses inst distinct speed direction order"}                 # Fig. 5
FINETUNED = ("random", "e", "g", "k")

# What all rows have alike; finetune "": none. lr: the paper's; on the CPU 1e-3 beat 3e-3 in 200 steps of row g
GPU = dict(network="--arch r3d18 --frames 16 --size 112",
           pretrain="--batch-size 64 --epochs 120 --warmup-epochs 10 --lr 3e-4", judge="--windows 10",
           finetune="--batch-size 32 --epochs 30 --warmup-epochs 2 --lr 3e-4 --windows 5 --crops centre")
SMALL = dict(network="--arch r3d18_narrow --frames 8 --size 64",
             pretrain="--batch-size 16 --epochs 9 --warmup-epochs 1 --lr 1e-3", judge="--windows 4",
             finetune="--batch-size 32 --epochs 10 --warmup-epochs 1 --lr 1e-3 --windows 4 --crops centre")

# ---- All videos in memory

MEMORY = {}                                                                     # path -> template, frames, error


def planes(frame):
    """The planes of an av.VideoFrame without the padding -> views, uint8 (height, width) each."""
    return [data.as_array(plane)[:, :plane.width] for plane in frame.planes]


def remember(path):
    """Decode a video -> its first av.VideoFrame, the planes of all, uint8 (N, bytes), and the VideoError that ended it.

    The frames themselves would take twice the memory. ValueError: not one size, or not 8-bit planes.
    """
    template, frames, problem = None, [], None
    try:
        for frame in data.read_frames(path):
            template = template or frame
            if (frame.format.name, frame.width, frame.height) != ("yuv420p", template.width, template.height):
                raise ValueError(f"{path}: frame {len(frames)} is {frame.format.name}, {frame.width}x{frame.height}; "
                                 "this experiment keeps videos of one size in yuv420p alone")
            frames.append(np.concatenate([plane.ravel() for plane in planes(frame)]))
    except data.VideoError as error:
        problem = error
    return template, np.array(frames), problem


def recall_frames(path):
    """What data.read_frames gives, from memory. Each frame is the template, filled anew: only so does it have all that
    its scaling depends on, such as where chroma lies, which av does not let one set."""
    template, frames, problem = MEMORY[os.path.abspath(path)]
    targets = planes(template) if template else []
    ends = np.cumsum([target.size for target in targets])[:-1]
    for frame in frames:
        for target, part in zip(targets, np.split(frame, ends)):
            target[:] = part.reshape(target.shape)
        yield template
    if problem:
        raise problem


def load(root, index):
    """Fill MEMORY with the videos of split 1, let every script read from it, and count frames."""
    splits = [data.load_split("ucf101", root, part=part) for part in ("train", "test")]
    files = [os.path.abspath(file) for split in splits for file in split.found.values()]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        MEMORY.update(zip(files, tqdm(pool.map(remember, files), "into memory", len(files), unit="video")))
    data.read_frames = recall_frames
    for split in splits:
        data.scan(split, index, progress=False)


# ---- Runs


def commands(run, settings, args):
    """The scripts that a run still needs, in order -> [(module, its arguments, the file that shows it is done)]."""
    row, seed = run.rsplit("-", 1)
    out = Path(args.out) / run
    flags = ["--dataset", "ucf101", "--data", str(Path(args.data) / "UCF-101"), "--out", str(out), "--seed", seed,
             "--index", str(Path(args.out) / "index.json"), "--workers", str(args.workers),
             *shlex.split(settings["network"])]
    checkpoint = ["--checkpoint", "random" if ROWS[row] is None else str(out / "backbone.pt")]
    judge = flags + checkpoint + shlex.split(settings["judge"])
    found = [(linear_probe, judge, out / "linear_probe-ucf101.json"),
             (retrieval, judge + ["--k", "1", "5"], out / "retrieval-ucf101.json")]
    if ROWS[row] is not None:                                                   # is done when it has been judged
        found.insert(0, (pretrain, flags + shlex.split(settings["pretrain"]) + shlex.split(ROWS[row]), found[0][2]))
    if settings["finetune"] and row in FINETUNED:
        flags += checkpoint + shlex.split(settings["finetune"])
        found.append((finetune, flags, out / "finetune-ucf101-4x.json"))
    return [command for command in found if not command[2].exists()]


def work(todo, out):
    """Do what `commands` gave, in a process of its own; its output goes to OUT.txt."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)                                                    # there are many processes
    log = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)
    features = {}

    def extract_once(networks, args, split, index, device):
        """linear_probe.py and retrieval.py ask for the same features."""
        if split.title not in features:
            features[split.title] = common.extract(networks, args, split, index, device)
        return features[split.title]

    def alone(network, args, device):
        """The random initialisation is a row of its own, so it is not judged again beside every other."""
        beside = argparse.Namespace(checkpoint="random")
        name = "random" if args.checkpoint == "random" else "checkpoint"
        return {name: common.random_beside(network, beside, device)["random"]}

    for module in (linear_probe, retrieval):
        module.extract, module.random_beside = extract_once, alone
    for module, argv, _ in todo:
        sys.argv = [f"{module.__name__}.py", *argv]                             # results name their command
        print(f"$ python {shlex.join(sys.argv)}")
        common.run(module.main)
    for file in [*out.rglob("checkpoint.pt"), *out.rglob("*.previous.pt")]:     # large, and of no more use
        file.unlink()


def run_all(runs, settings, args):
    """Do what is not done yet, --jobs runs at a time -> {run: the last line of its output} of those that failed."""
    out, running, failed = Path(args.out), {}, {}
    waiting = [(run, todo) for run in runs if (todo := commands(run, settings, args))]
    if waiting:
        load(Path(args.data) / "UCF-101", out / "index.json")
    else:
        tell(runs, failed, settings, args)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                run, todo = waiting.pop(0)
                process = multiprocessing.Process(target=work, args=(todo, out / run))
                process.start()
                running[process.sentinel] = run, process
            for sentinel in wait(list(running)):
                run, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    said = (out / f"{run}.txt").read_text(errors="replace").splitlines()
                    failed[run] = next((line for line in reversed(said) if line.strip()), f"status {process.exitcode}")
                tell(runs, failed, settings, args)
    finally:                                                                    # stopped: pre-training saves its step
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()
    return failed


# ---- The table

JUDGED = {"linear SVM": ("linear", "linear_chance"), "1-NN": ("R@1", "R@1_chance"), "R@5": ("R@5", "R@5_chance"),
          "fine-tuned": ("finetune", "finetune_chance")}                        # title: key, its chance; shares
PRETEXT = {"speed": ("speed_acc", "speed_chance"), "direction": ("direction_acc", "direction_chance"),
           "order": ("order_acc", "order_chance"), "ψ's nearest": ("psi_nearest", "psi_chance"),
           "φ's nearest": ("phi_nearest", "phi_chance")}
LAST = 5                                                                        # lines of the log whose mean is told


def figures(run, out):
    """What is known of a run, from what the scripts wrote -> {name: number}, and device, a name."""
    files = dict(linear="linear_probe-ucf101", retrieval="retrieval-ucf101", finetune="finetune-ucf101-4x")
    result = {name: json.loads(file.read_text()) for name, file in
              ((name, out / run / f"{file}.json") for name, file in files.items()) if file.exists()}
    name, found = "random" if ROWS[run.rsplit("-", 1)[0]] is None else "checkpoint", {}
    for script in {"linear", "finetune"} & result.keys():
        found |= {script: result[script]["top1"][name], f"{script}_chance": result[script]["chance"]}
    for k in ("R@1", "R@5") if "retrieval" in result else ():
        found |= {k: result["retrieval"]["recall"][name][k], f"{k}_chance": result["retrieval"]["recall"]["chance"][k]}
    if "linear" in result:
        found["device"] = result["linear"]["device"]
    if "linear" in result and name == "checkpoint":                             # pre-training is over
        lines = [json.loads(line) for line in (out / run / "log.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "loss" in line]
        trained = result["linear"]["checkpoint"]["trained_with"]
        clips = trained["batch_size"] * (4 if "distinct" in trained["losses"] else 2)
        steps = np.diff([line["step"] for line in lines], prepend=0)
        found["seconds"] = float(np.sum(clips * steps / [line["clips_per_s"] for line in lines]))
        found |= {key: float(np.mean([line[key] for line in lines[-LAST:]])) for key in lines[-1]}
        found |= dict(steps=lines[-1]["step"], terms=" ".join(trained["losses"]))
        if trained["equivariance"] != "temporal":
            found["terms"] += f" ({trained['equivariance']})"
    return found


def spread(values, form="{:.1%}"):
    """Mean and half the range over the seeds that have a value, in words."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    half = f" ± {form.format((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + half


def tell(runs, failed, settings, args):
    """Print the table so far; write OUT/table.md and OUT/table.json."""
    out, rows, chances = Path(args.out), {}, {}
    for run in runs:
        found = figures(run, out)
        if found:
            rows.setdefault(run.rsplit("-", 1)[0], []).append(found)
        chances |= {key: value for key, value in found.items() if key.endswith("_chance")}
    devices = sorted({found["device"] for row in rows.values() for found in row if "device" in found})
    lines = [f"UCF101-8, split 1, on {', '.join(devices)}{', the small version' if args.small else ''}: mean ± half "
             f"the range over seeds; {args.jobs} runs at a time; the same for every row: "
             + ", ".join(f"{name} `{flags}`" for name, flags in settings.items() if flags), "",
             "| row | terms | seeds | steps | seconds | " + " | ".join(JUDGED) + " |",
             "|---|---|---|---|---|" + "---|" * len(JUDGED)]
    for row, found in rows.items():
        lines.append(f"| {row} | {found[0].get('terms', '-')} | {len(found)} | {found[0].get('steps', 0)} | "
                     f"{spread([x.get('seconds') for x in found], '{:.0f}')} | "
                     + " | ".join(spread([x.get(key) for x in found]) for key, _ in JUDGED.values()) + " |")
    lines += ["| chance | | | | | " + " | ".join(spread([chances.get(chance)]) for _, chance in JUDGED.values()) + " |",
              "", f"Pre-training, means of the last {LAST} lines of the log (by chance):", "",
              "| row | " + " | ".join(PRETEXT) + " | L_inst | L_equi |", "|---|" + "---|" * (len(PRETEXT) + 2)]
    for row, found in rows.items():
        if any("steps" in x for x in found):
            cells = [spread([x.get(key) for x in found]) for key, _ in PRETEXT.values()]
            cells = [cell and f"{cell} ({spread([np.mean([x[chance] for x in found if chance in x])])})"
                     for cell, (_, chance) in zip(cells, PRETEXT.values())]
            cells += [spread([x.get(key) for x in found], "{:.2f}") for key in ("inst", "equi")]
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{run} failed: {line}" for run, line in failed.items())]
    (out / "table.md").write_text("\n".join(lines))
    data.write_json(out / "table.json", indent=1, value=dict(
        settings=settings, small=args.small, failed=failed, runs={run: figures(run, out) for run in runs}))
    print("\n".join(lines), flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Formatter)
    parser.add_argument("--data", default="../shared/videos/ucf8_128", help="folder of UCF-101 and ucfTrainTestlist")
    parser.add_argument("--out", default="runs/experiment", help="folder of all that is written")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {' '.join(ROWS)} (Table 1; distinct: Fig. 5)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of each row")
    parser.add_argument("--jobs", type=int, help="runs at a time; None: 4, with --small 2")
    parser.add_argument("--workers", type=int, help="loader processes of a run; None: the cores shared out, with "
                        "--small 0")
    parser.add_argument("--small", action="store_true", help="the version for a CPU")
    for name in GPU:
        parser.add_argument(f"--{name}", metavar="FLAGS", help=f"of {name} for all rows; None: "
                            f"{GPU[name]!r}, with --small {SMALL[name]!r}")
    args = parser.parse_args()
    args.jobs = args.jobs or (2 if args.small else 4)
    if args.workers is None:
        args.workers = 0 if args.small else max(1, len(os.sched_getaffinity(0)) // args.jobs)
    return args


def main():
    args = parse_args()
    multiprocessing.set_start_method("fork")                                    # loaders' processes find MEMORY, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM: the same command goes on from here"))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / "lock").open("w")                                             # held by all processes of a run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"a run of this experiment is still writing to {out}: wait for it, or give another --out")
    settings = {name: flags if vars(args)[name] is None else vars(args)[name]
                for name, flags in (SMALL if args.small else GPU).items()}
    file = out / "settings.json"
    was = json.loads(file.read_text()) if file.exists() else settings
    changed = [f"{name} {was[name]!r} -> {flags!r}" for name, flags in settings.items() if was[name] not in ("", flags)]
    if changed:
        raise ValueError(f"{out} holds an experiment with other settings ({'; '.join(changed)}): give another --out")
    data.write_json(file, settings)
    runs = [f"{row}-{seed}" for seed in args.seeds for row in args.rows]
    failed = run_all(runs, settings, args)
    sys.exit(f"{len(failed)} of {len(runs)} runs failed" if failed else None)


if __name__ == "__main__":
    common.run(main)
