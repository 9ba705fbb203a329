"""What this machine can do: reading, loading, training, both together, extraction and retrieval.

    python tools/benchmark.py                                                  # all five parts; --help: how to run less
    python tools/benchmark.py --videos UCF-101 --shrunk UCF-101-small           # one's own videos and their shrunk copy
    python tools/benchmark.py --parts 1 --old CHECKOUT                          # beside the reader of an older commit
    python tools/benchmark.py --quick                                           # a rehearsal of a minute or two

1. CPU time for a clip pair on one core: common.video.decode against decord, torchcodec, OpenCV and naive PyAV (what is
   not installed is left out) and against the floor: the decoder alone on the fewest frames that must be decoded,
   without and with making pictures of those that are asked for; and how many frames are the right ones.
2. The loader. 3. The training step by itself. 4. Both together. 5. Extraction and retrieval.

What is compared is timed in turn, in one run; figures are medians, and their ratios can be compared between machines.
Part 1 counts CPU time, which other processes disturb less. Writes all numbers as JSON after each part. On Linux.
"""
import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from datetime import datetime
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.files import check_writable, write_json
from common.judging import average_crops
from common.precision import AMP, autocast, cpu_has_bf16, step_scaled
from common.processes import init_distributed, run
from common.progress import peak_memory, processor
from common.splits import Split, load_split, scan
from common.toy import make_toy
from data import Pairs, Windows, step_loader
from models import LOSSES, TimeEquivariant, new_backbone
from pretrain import forward_backward, new_model, to_device, wrapped
from retrieval import search
from tools.readers import T
from tools.reading import in_child, reading

SHARED = Path(__file__).resolve().parents[2] / "shared" / "videos"              # real videos; may be missing
REAL = ("ucf_original/**/*.avi", "odd/v_*.avi", "odd/test.avi",                 # UCF101
        "odd/hmdb51*.avi", "odd/cartwheel.avi", "odd/RATRACE*.avi", "odd/Truman*.avi",      # HMDB51
        "odd/R6l*.mp4", "odd/SOX*.mp4", "odd/test.mp4", "odd/flipping_a_pancake.mkv")       # of Kinetics' size
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
         "V100": 125e12, "4090": 165e12}                                        # FLOP/s, bf16 or fp16, dense
PAPER = dict(arch="r3d18", frames=16, size=128, batch=192, steps=400 * (9537 // 192))   # Sec. 4.1: UCF101, 400 epochs


# ---- How much is run ----

GPU = dict(
    arch="r3d18", amp="bf16", frames=16, size=128, batch=192,                   # parts 2, 4 and 5
    files=16, pairs=15,                                                         # 1: of a kind; of a file
    rounds=3, batches=6,                                                        # 2: batches a loader process
    archs=("r3d18", "r3d18_tv", "r2plus1d18", "s3dg"), step_batches=(16, 64), steps=8,
    row=4,                                                                      # steps timed as one: a GPU lags behind
    variants=(("off", False), ("bf16", False), ("fp16", False), ("bf16", True)),    # precision, compiled or not
    windows=10, extracted=(50, 100), galleries=(60000, 240000), queries=1000)
CPU = GPU | dict(
    arch="r3d18_narrow", amp="off", size=64, batch=16, archs=("r3d18_narrow",), step_batches=(8, 16), steps=5,
    row=1, variants=(("off", False), ("off", True)), extracted=(10, 20), galleries=(10000, 40000))
if cpu_has_bf16():                                                              # other CPUs take minutes a step
    CPU["variants"] += ("bf16", False),
QUICK = dict(
    frames=8, size=32, batch=4, files=1, pairs=2, rounds=1, batches=2, step_batches=(2, 4), steps=2, windows=2,
    variants=(("off", False),), extracted=(2, 4), galleries=(1000, 4000), queries=100)


def settings(quick, device):
    """How much is run: a rehearsal; on a CPU (about 15 minutes on two cores); on a GPU (not run yet)."""
    cores = len(os.sched_getaffinity(0))
    chosen = GPU if device.type == "cuda" else CPU
    workers = sorted({0} | {min(n, cores) for n in (1, 2, 4, 8, 16, 32)})
    if quick:
        chosen, workers = chosen | QUICK, [0, 1]
    return SimpleNamespace(workers=workers, **chosen)


def machine(device):
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return dict(cpu=processor(), cores=len(os.sched_getaffinity(0)), load=os.getloadavg(),
                date=f"{datetime.now():%F %T}", gpu=gpu, python=platform.python_version(), torch=torch.__version__,
                av=av.__version__, numpy=np.__version__)


# ---- Videos ----

def find_videos(places, most):
    """Files and folders of videos -> up to `most` files, evenly chosen."""
    files = []
    for place in map(Path, places):
        if place.is_dir():
            files += load_split("folder", place).found.values()
        elif place.is_file():
            files.append(place)
        else:
            raise ValueError(f"there is no {place}: --videos and --shrunk take files and folders of videos")
    if not files:
        raise ValueError(f"no videos in {', '.join(map(str, places))}")
    return files[::ceil(len(files) / most)]


def scanned(files, index):
    """-> Split of the files, what a scan found; of both only whole videos that are long enough for a clip."""
    found = {str(file): file for file in files}
    split = Split("benchmark", Path("/"), list(found), [None] * len(found), [], found, [])
    known = scan(split, index)
    paths = [path for path in split.paths if known[path][0] >= T and not known[path][3]]
    if len(paths) < 2:
        raise ValueError(f"fewer than two videos of {T} frames can be read: give more (--videos)")
    return replace(split, paths=paths, labels=[None] * len(paths)), known


def copies(split, folder):
    """The files in a folder of shrunk copies that are named as videos of a split."""
    by_name = {Path(file).name: file for file in load_split("folder", folder).found.values()}
    names = [Path(path).name for path in split.paths]
    files = [by_name[name] for name in names if name in by_name]
    if not files:
        raise ValueError(f"{folder} has no copy of these videos: it has to be made of them (tools/shrink.py)")
    return files


# ---- 2. The loader ----

def loading(sets, s):
    """Part 2; sets: {"originals" or "shrunk": Pairs} -> {name: {workers: clip pairs/s}}, medians of rounds in turn."""
    rates = {name: defaultdict(list) for name in sets}
    for _ in range(s.rounds):
        for workers in s.workers:
            for name, pairs in sets.items():
                rates[name][workers].append(loader_rate(pairs, workers, s.batches * max(1, workers)))
    for name, by_workers in rates.items():
        for workers, found in by_workers.items():
            by_workers[workers] = statistics.median(found)
            print(f"  {name}, {workers} workers: {by_workers[workers]:.1f} clip pairs/s")
    return rates


def loader_rate(pairs, workers, count):
    """Clip pairs/s of a loader, over `count` batches of four groups of two videos."""
    batches = step_loader(pairs, 4, 0, 1 + count + 4 * workers, workers)        # the rest keeps all processes busy
    for _ in range(max(1, workers)):
        next(batches)                                                           # to warm up: a batch of each process
    begun = time.perf_counter()
    for _ in range(count):
        next(batches)
    spent = time.perf_counter() - begun
    batches.close()
    return 8 * count / spent


# ---- 3. The training step ----

def noise(batch, frames, size):
    """A batch as the loader gives it, of noise; videos 2k and 2k + 1 are a group."""
    def classes(n, *shape):
        return torch.randint(n, (batch // 2, *shape)).repeat_interleave(2, dim=0)

    clips = torch.randint(256, (batch, 2, frames, size, size, 3), dtype=torch.uint8).movedim(5, 3)
    return dict(clips=clips, seed=torch.arange(2 * batch).view(batch, 2), video=torch.arange(batch),
                pq=torch.arange(batch // 2).repeat_interleave(2), order=classes(3), speed=classes(4, 2),
                direction=classes(2, 2))


def training_step(arch, amp, compiled, device):
    """-> function: a step of pretrain.py on a batch."""
    args = SimpleNamespace(arch=arch, losses=LOSSES, speeds=(1, 2, 4, 8), sync_bn=False, compile=compiled)
    model = new_model(args, device)
    network = wrapped(model, args, device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-4, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def step(batch):
        batch = to_device({name: value for name, value in batch.items() if name != "failed"}, device)
        optimizer.zero_grad()
        values = forward_backward(network, batch, 1, 0.1, autocast(amp, device), scaler)
        step_scaled(scaler, optimizer, values["loss"])
    return step


def flops_of_a_clip(arch, frames, size):
    """FLOPs of forward and backward, counted on the device "meta", where nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        outputs = TimeEquivariant(arch)(torch.empty(2, 2, 3, frames, size, size))
        sum(output.sum() for output in outputs.values()).backward()
    return counter.get_total_flops() / 4


def peak_flops(device, amp):
    """The device's peak in FLOP/s, and where it is from. Convolutions in float32 run as TF32 on a GPU: half of bf16."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    for known, peak in PEAKS.items():
        if known in name and "MIG" not in name:
            return peak / 2 if amp == "off" else peak, "published"
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=torch.float32 if amp == "off" else AMP[amp])
    torch.backends.cuda.matmul.allow_tf32 = True
    best = min(seconds(lambda: a @ a, device) for _ in range(6))                # the first warms up
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * n ** 3 / best, f"measured, matrices of {n}"


def seconds(function, device):
    """How long a call takes, with what it leaves the GPU to do."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - begun


def held(device):
    """GB that this process holds now; a GPU's peak counts from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def stepping(s, device):
    """Part 3 -> a list of dicts, one for each backbone, batch size, precision, with and without torch.compile."""
    rows = []
    peaks = {amp: peak_flops(device, amp) for amp, _ in s.variants}
    for arch in s.archs:
        frames = 32 if arch == "s3dg" else s.frames                             # Table 2
        size = 112 if arch == "r2plus1d18" else s.size
        flops = flops_of_a_clip(arch, frames, size)
        for batch in s.step_batches:
            for row in step_rates(arch, frames, size, batch, s, device):
                if "clips_per_s" in row:
                    peak, source = peaks[row["amp"]]
                    row |= dict(gflops_a_clip=flops / 1e9, share_of_peak=row["clips_per_s"] * flops / peak, peak=peak,
                                peak_source=source)
                rows.append(row)
                print(f"  {arch}, {frames} x {size} x {size}, batch {batch}, {row['amp']}"
                      f"{', compiled' if row['compiled'] else ''}: {step_in_words(row)}")
    return rows


def step_in_words(row):
    if "problem" in row:
        return row["problem"]
    return (f"{row['clips_per_s']:.1f} clips/s, {row['share_of_peak']:.0%} of the peak, "
            f"{row['peak_memory_gb']:.2f} GB")


def step_rates(arch, frames, size, batch, s, device):
    """A dict for each of s.variants, timed in turn on one batch of noise."""
    torch.manual_seed(0)
    torch.compiler.reset()                                                      # or it compiles for any batch size
    data = noise(batch, frames, size)
    if device.type == "cuda":                                                   # as the loader's batches
        data = {name: value.pin_memory() for name, value in data.items()}
    rows, steps = [], []
    for amp, compiled in s.variants:
        rows.append(dict(arch=arch, frames=frames, size=size, batch=batch, amp=amp, compiled=compiled))
        steps.append(warmed_up(rows[-1], data, device))
    spent = [[] for _ in steps]
    for _ in range(s.steps):
        for step, times in zip(steps, spent):
            if step:
                times.append(seconds(lambda: [step(data) for _ in range(s.row)], device) / s.row)
    for row, times in zip(rows, spent):
        if times:
            row["clips_per_s"] = 2 * batch / statistics.median(times)
    return rows


def warmed_up(row, data, device):
    """-> a step of row's settings that has run, or None; writes into row the time that takes, the memory of a step, or
    what went wrong."""
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = held(device)                                                   # of the variants beside it
    try:
        step = training_step(row["arch"], row["amp"], row["compiled"], device)
        row["warm_up_s"] = seconds(lambda: [step(data) for _ in range(2)], device)      # compiles
        held(device)                                                            # to choose among algorithms takes more
        step(data)
    except Exception as error:                                                  # memory is full, or no compiler is here
        row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None
    row["peak_memory_gb"] = peak_memory(device) - before
    return step


# ---- 4. Both together ----

def together(sets, s, device):
    """Part 4: real batches, real steps -> {name: {workers: dict}}: clips/s, those of the step by itself, and the share
    of the time in which the step waits for a batch."""
    step, result = training_step(s.arch, s.amp, False, device), {name: {} for name in sets}
    for name, pairs in sets.items():
        ready = next(step_loader(pairs, s.batch // 2, 0, 1))
        step(ready)
        for workers in [n for n in s.workers if n][-3:]:
            steps = max(s.steps, 3 * workers)                                   # batches come in bursts, one a process
            batches = step_loader(pairs, s.batch // 2, 0, steps + 3 * workers, workers)
            for _ in range(workers):                                            # to warm up
                step(next(batches))
            waits = []
            spent = seconds(lambda: train(step, batches, steps, waits, device), device)
            batches.close()
            times = [seconds(lambda: [step(ready) for _ in range(s.row)], device) for _ in range(s.steps)]
            rate, step_only = 2 * s.batch * steps / spent, 2 * s.batch * s.row / statistics.median(times)
            result[name][workers] = dict(clips_per_s=rate, step_only=step_only, waiting=sum(waits) / spent)
            print(f"  {name}, {workers} workers: {rate:.1f} clips/s, {rate / step_only:.2f} of the {step_only:.1f} "
                  f"without a loader; {sum(waits) / spent:.0%} of the time waiting for data")
    return result


def train(step, batches, steps, waits, device):
    """Some steps as pretrain.py takes them; waits: gets the seconds for which each had nothing to do."""
    work = None
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        if work is None or work.query():                                        # a GPU with work left does not wait
            waits.append(time.perf_counter() - asked)
        step(batch)
        work = torch.cuda.current_stream().record_event() if device.type == "cuda" else None


def verdict(step, loader, shrunk=None):
    """step: clip pairs/s of the step; loader, shrunk: {workers: clip pairs/s} -> what holds training back, in words."""
    most = max(loader)
    rate = loader[most]
    words = f"the step takes {step:.1f} clip pairs/s, the loader gives {rate:.1f} with {most} workers"
    if rate > 1.15 * step:
        return f"step-bound: {words}; {enough(step, loader)} would do"
    if rate > 0.95 * step:
        return f"balanced: {words}"
    copy = "a shrunk copy (tools/shrink.py)"
    if shrunk:
        copy = f"the shrunk copy, for which {enough(step, shrunk)} would do"
    return f"loader-bound: {words}; {enough(step, loader) - most} more workers or {copy}"


def enough(step, loader):
    """Workers that keep up with the step, each at the rate of one beside all others."""
    most = max(loader)
    return ceil(step / (loader[most] / most))


def paper_hours(rate, s):
    """GPU-hours of the paper's run at `rate` clips/s of s.arch, by FLOPs where that is not the paper's setting."""
    here = flops_of_a_clip(s.arch, s.frames, s.size)
    paper = flops_of_a_clip(PAPER["arch"], PAPER["frames"], PAPER["size"])
    return 2 * PAPER["steps"] * PAPER["batch"] / (rate * here / paper) / 3600


def concluded(result, s):
    """The verdict, and what the paper's ablation run would take here."""
    rates = [{n: rate for n, rate in by_workers.items() if n} for by_workers in result["part_2"].values()]
    both = result["part_4"]["originals"]
    step_only, best = both[max(both)]["step_only"], max(row["clips_per_s"] for row in both.values())
    words = verdict(step_only / 2, *rates)
    if not result["machine"]["gpu"]:
        words += " (each by itself: on a CPU they share the cores)"
    hours = dict(with_loader=paper_hours(best, s), step_only=paper_hours(step_only, s))
    print(f"{words}\nThe paper's run on UCF101 ({PAPER['arch']}, 400 epochs = {PAPER['steps']} steps of "
          f"{PAPER['batch']} videos, 2 clips of each): {hours['with_loader']:.1f} hours here, "
          f"{hours['step_only']:.1f} if the loader kept up; from steps of {s.batch} videos of {s.arch}, "
          f"{s.frames} x {s.size} x {s.size}, by FLOPs")
    return dict(verdict=words, paper_hours=hours)


# ---- 5. Extraction and retrieval ----

def judging(split, index, s, device):
    """Part 5 -> seconds a video of extraction, and of search among so many videos, each at two sizes."""
    result = dict(extraction=[extraction(split, index, videos, s, device) for videos in s.extracted], retrieval=[])
    for G in s.galleries:
        ours, plain = in_child(searching, [(G, s.queries, False), (G, s.queries, True)], timeout=600, anew=True)
        result["retrieval"].append(dict(gallery=G, queries=s.queries, search=ours, plain=plain))
        print(f"  {s.queries} queries among {G} videos: search {search_in_words(ours)}; plain {search_in_words(plain)}")
    return result


def search_in_words(found):
    return found if isinstance(found, str) else f"{found[0]:.2f} s, {found[1]:.2f} GB"


def extraction(split, index, videos, s, device):
    network = new_backbone(s.arch).to(device, memory_format=torch.channels_last_3d).eval()

    def features(count):
        some = replace(split, paths=(split.paths * count)[:count])
        windows = Windows(some, index, s.frames, s.size, windows=s.windows)
        average_crops(network, windows, s.size, "centre", device, s.amp, s.workers[-1], title="extraction")

    features(1)                                                                 # to warm up
    held(device)
    spent = seconds(lambda: features(videos), device)
    print(f"  extraction of {videos} videos, {s.windows} windows and their mirror images: {spent:.2f} s, "
          f"{spent / videos * 1e3:.0f} ms a video")
    return dict(videos=videos, seconds=spent, peak_memory_gb=peak_memory(device))


def searching(G, Q, plain, D=512):
    """retrieval.search, or the plain product of matrices, in a process of its own -> seconds, GB beyond features."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features, ids = [], []
    for first, n in ((0, G), (G, Q)):
        x = torch.randn(n, D, dtype=torch.float64, device=device)
        features.append(torch.nn.functional.normalize(x, dim=1))
        numbers = torch.arange(n, device=device)
        ids.append(torch.stack([numbers % 101, numbers + first]))               # classes, videos
    gallery, query = features

    def find(n):                                                                # for n queries
        if plain:
            (query[:n] @ gallery.T).topk(20)
        else:
            search(gallery, query[:n], ids[0], ids[1][:, :n], k=20)

    find(1)                                                                     # to warm up
    before = held(device)
    spent = seconds(lambda: find(Q), device)
    return spent, peak_memory(device) - before


# ---- The whole ----

TITLES = {1: "reading, one core", 2: "the loader", 3: "the training step by itself", 4: "both together",
          5: "extraction and retrieval"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 6), default=[1, 2, 3, 4, 5], metavar="N",
                        help="which of the five to run (default: all)")
    parser.add_argument("--videos", nargs="+", help="files and folders (default: those in ../shared, or the toy set)")
    parser.add_argument("--shrunk", metavar="FOLDER", help="of the copy that tools/shrink.py has made of the videos")
    parser.add_argument("--old", metavar="CHECKOUT", help="compare with the reader of this checkout of the project")
    parser.add_argument("--pairs", type=int, help="clip pairs read of each file in part 1 (default: 15)")
    parser.add_argument("--files", type=int, help="files of each kind and codec in part 1 (default: 16)")
    parser.add_argument("--out", default="benchmark.json", help="where the numbers go (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: everything once, small")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    _, _, device = init_distributed()
    out = Path(args.out)
    check_writable(out=out)
    s = settings(args.quick, device)
    s.pairs, s.files = args.pairs or s.pairs, args.files or s.files
    result = dict(machine=machine(device), command=sys.argv, settings=vars(s))
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print(f"parts 2, 4 and 5: {s.arch}, clips of {s.frames} x {s.size} x {s.size}, batch {s.batch}, {s.amp}")
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "sklearn", "av"])
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        videos = find_videos(args.videos or default_videos(), 20 if args.quick else 200)
        split, known = scanned(videos, Path(folder) / "videos.json")
        shrunk = None
        if args.shrunk:
            shrunk = scanned(copies(split, args.shrunk), Path(folder) / "shrunk.json")
        else:
            print("no --shrunk FOLDER (of tools/shrink.py): what it would gain is not measured")
        for part in sorted(set(args.parts)):
            print(f"{part}. {TITLES[part]}")
            since = time.perf_counter()
            result[f"part_{part}"] = run_part(part, split, known, shrunk, args.old, s, device)
            result[f"part_{part}_s"] = time.perf_counter() - since
            write_json(out, result, indent=1)                                   # should the next part fail
    if {2, 4} <= set(args.parts):
        result |= concluded(result, s)
    result["seconds"] = time.perf_counter() - begun
    write_json(out, result, indent=1)
    print(f"{out}: {result['seconds']:.0f} s")


def run_part(part, split, known, shrunk, checkout, s, device):
    """What one of the five parts found, for JSON; shrunk: Split and scan of the copies, or None."""
    if part == 1:
        return reading(split, known, shrunk, checkout, s.files, s.pairs)
    if part == 3:
        return stepping(s, device)
    if part == 5:
        return judging(split, known, s, device)
    sets = {"originals": some_pairs(split, known, s)}
    if shrunk:
        sets["shrunk"] = some_pairs(*shrunk, s)
    return loading(sets, s) if part == 2 else together(sets, s, device)


def some_pairs(split, known, s):
    """data.Pairs of these videos; of few each comes several times, so that they fill a batch."""
    most = max(s.batch, 8, len(split.paths))
    return Pairs(split, (split.paths * s.batch)[:most], known, s.frames, s.size)


def default_videos():
    """Real videos beside the repository, or the toy set."""
    files = [file for pattern in REAL for file in sorted(SHARED.glob(pattern))]
    if not files:
        make_toy("toy-videos")
        files = ["toy-videos"]
    return files


if __name__ == "__main__":
    run(main)
