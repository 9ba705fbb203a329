"""Measure this machine: training step, loader, both together, and hours of the paper's run.

    python tools/benchmark.py                               # the toy set
    python tools/benchmark.py --videos UCF-101 --archs r3d18 --batch-sizes 24 192
    python tools/benchmark.py --quick                       # a rehearsal

First the training step by itself, for each backbone, batch size and precision. Then, for the first
of each, the loader by itself and both together, with 0, 1, 2, 4, ... worker processes. What is
compared is timed in turn, in one run. Rates are medians, in clips/s: two for each pair of clips.
"""
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product, repeat
from math import ceil
from pathlib import Path

import av
import numpy as np
import torch
from torch.optim import AdamW

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import write_json
from common.distributed import init_distributed, run
from common.flags import Parser, paper_defaults, positive_int, usable_cores
from common.splits import PUBLISHED, load_split, scan, usable
from common.toy import make_toy
from common.training import AMP, autocast, default_amp, peak_memory, step_scaled
from data import Pairs, step_loader
from models import BACKBONES, TimeEquivariant
from pretrain import gather_keys, objective, scores, to_device

TOY = "r3d18_narrow"                                    # takes clips of the toy set's shape


def parse_args(argv=None):
    cuda = torch.cuda.is_available()
    archs = ["r3d18", "r3d18_tv", "r2plus1d18", "s3dg"] if cuda else [TOY]
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--videos", help="folder of videos, of which 200 are read (default: the toy set)")
    add("--archs", nargs="+", choices=BACKBONES, default=archs, metavar="ARCH", help="backbones")
    add("--batch-sizes", nargs="+", type=positive_int, default=[24 if cuda else 32], metavar="N",
        help="videos in a step; 24: the paper's 192 on 8 GPUs")
    add("--out", default="benchmark.json", help="file of the results")
    add("--quick", action="store_true", help="a rehearsal: one round, few steps and workers")
    args = parser.parse_args(argv)
    args.amps = list(dict.fromkeys([default_amp(), "off"]))
    args.workers = [n for n in (0, 1, 2, 4, 8, 16) if n <= usable_cores()]
    args.rounds, args.steps = 3, 10
    if args.quick:
        args.workers, args.rounds, args.steps = [0, 1], 1, 2
    return args


def load_videos(folder):
    """Up to 200 videos of a folder, or of the toy set -> Split, scanned"""
    if folder is None:
        folder = "toy-videos"
        make_toy(folder)
    split = load_split("folder", folder)
    paths = split.paths[::ceil(len(split.paths) / 200)]
    files = {path: split.files[path] for path in paths}
    return scan(replace(split, paths=paths, files=files), workers=usable_cores())


def make_pairs(split, arch, batch_size):
    """Pairs with the clips of pre-training; few videos are repeated to fill a batch."""
    clips = paper_defaults("toy" if arch == TOY else "ucf101", arch)
    paths, _ = usable(split, clips["frames"])
    return Pairs(split, paths * ceil(batch_size / len(paths)), clips["frames"], clips["size"])


def training_step(arch, device):
    """-> function of a batch and a precision: one step of pretrain.py"""
    model = TimeEquivariant(arch).to(device, memory_format=torch.channels_last_3d)
    optimizer = AdamW(model.parameters(), 3e-4, weight_decay=1e-4, fused=device.type == "cuda")
    scalers = {amp: torch.amp.GradScaler(device.type, enabled=amp == "fp16") for amp in AMP}

    def step(batch, amp):
        batch = to_device(dict(batch), device)
        optimizer.zero_grad()
        with autocast(amp, device):
            out = model(batch["clips"])
        keys = gather_keys(out, batch)
        loss = sum(objective(out, batch, keys, lam=0.1).values())
        scalers[amp].scale(loss).backward()
        scores(out, batch, keys)
        step_scaled(scalers[amp], optimizer, loss)
    return step


# ---- Measurements ----

def measure(batches, warm_up, count, step, device):
    """Take `count` batches after a warm-up

    -> clips/s, fraction of the time waiting for data, GB: of the GPU, or of this process so far
    """
    cuda = device.type == "cuda"
    for _ in range(warm_up):
        step(next(batches))
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begun, waited, work = time.perf_counter(), 0.0, None
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        if work is None or work.query():                # a GPU with nothing left to do waits
            waited += time.perf_counter() - asked
        step(batch)
        work = torch.cuda.current_stream().record_event() if cuda else None
    if cuda:
        torch.cuda.synchronize()
    spent = time.perf_counter() - begun
    return 2 * len(batch["video"]) * count / spent, waited / spent, peak_memory(device)


def measure_loader(pairs, batch_size, workers, steps, step, device):
    """The same with a loader, which gives its batches in bursts, one of each worker."""
    warm_up, count = max(1, workers), max(steps, 3 * workers)
    last = 3 * warm_up + count                          # so that no worker rests
    loader = step_loader(pairs, batch_size // 2, 0, last, workers)
    return measure(loader, warm_up, count, step, device)


def compare(functions, rounds):
    """Call {name: function} in turn, and print medians and ratios to the first -> {name: dict}"""
    results = [[function() for function in functions.values()] for _ in range(rounds)]
    rows = {}
    for name, (rate, waiting, memory) in zip(functions, np.median(results, axis=0).tolist()):
        rows[name] = dict(clips_per_s=rate, waiting_for_data=waiting, peak_memory_gb=memory)
        ratio = rate / next(iter(rows.values()))["clips_per_s"]
        print(f"{name:50} {rate:8.1f} clips/s  {ratio:5.2f} of the first  "
              f"{waiting:4.0%} waiting for data  {memory:6.2f} GB")
    return rows


def compare_steps(arch, split, args, device):
    """The step by itself, for each batch size and precision"""
    step, functions = training_step(arch, device), {}
    for batch_size, amp in product(args.batch_sizes, args.amps):
        pairs = make_pairs(split, arch, batch_size)
        batch = next(step_loader(pairs, batch_size // 2, 0, 1))
        functions[f"{arch}, {pairs.T} x {pairs.size}², {batch_size} videos, {amp}"] = partial(
            measure, repeat(batch), 2, args.steps, partial(step, amp=amp), device)
    return compare(functions, args.rounds)


def compare_workers(split, args, device):
    """The step by itself, the loader by itself, and both together, for each number of workers"""
    arch, batch_size, amp = args.archs[0], args.batch_sizes[0], args.amps[0]
    pairs, step = make_pairs(split, arch, batch_size), partial(training_step(arch, device), amp=amp)
    batch = next(step_loader(pairs, batch_size // 2, 0, 1))
    functions = {"step": partial(measure, repeat(batch), 2, args.steps, step, device)}
    for workers in args.workers:
        for name, take in (("loader", lambda batch: None), ("both", step)):
            functions[f"{name}, {workers} workers"] = partial(
                measure_loader, pairs, batch_size, workers, args.steps, take, device)
    return compare(functions, args.rounds)


# ---- Conclusions ----

def verdict(step, both):
    """What limits training, in words; step: clips/s by itself, both: {workers: clips/s}"""
    best = max(both, key=both.get)
    rates = f"{both[best]:.0f} clips/s with {best} workers, {step:.0f} without a loader"
    enough = [workers for workers, rate in both.items() if rate >= 0.9 * step]
    if enough:
        return f"step-bound: {rates}; {min(enough)} workers would do"
    needed = ceil(max(1, best) * step / both[best])
    return (f"loader-bound: {rates}; about {needed} workers would do, each on a core of its own, "
            "or a copy made by tools/shrink.py")


def paper_hours(rate):
    """Hours of the ablation run (Sec. 4.1): 400 epochs of 9,537 videos in batches of 192"""
    paper = paper_defaults("ucf101", "r3d18")
    steps = paper["epochs"] * (PUBLISHED["ucf101 train split 1"] // paper["batch_size"])
    return 2 * steps * paper["batch_size"] / rate / 3600


def main(argv=None):
    args = parse_args(argv)
    _, device = init_distributed()
    result = dict(
        machine=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        cores=usable_cores(), torch=torch.__version__, av=av.__version__, settings=vars(args))
    print(result)
    split = load_videos(args.videos)
    result["steps"] = {}
    for arch in args.archs:
        result["steps"] |= compare_steps(arch, split, args, device)
    print(f"\nWith the first of these, {next(iter(result['steps']))}:")
    result["workers"] = rows = compare_workers(split, args, device)
    both = {n: rows[f"both, {n} workers"]["clips_per_s"] for n in args.workers}
    result["verdict"] = verdict(rows["step"]["clips_per_s"], both)
    result["paper_hours"] = paper_hours(max(both.values()))
    print(f"{result['verdict']}\nThe paper's ablation run, 7.5 million clips, would take "
          f"{result['paper_hours']:.1f} hours at this rate")
    write_json(args.out, result, indent=1)


if __name__ == "__main__":
    run(main)
