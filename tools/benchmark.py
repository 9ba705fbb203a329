"""What this machine can do: reading, loading, training, both together, extraction and retrieval.

    python tests/benchmark.py                                                  # all five parts; --help: how to run less
    python tests/benchmark.py --videos UCF-101 --shrunk UCF-101-small           # one's own videos and their shrunk copy
    python tests/benchmark.py --quick                                           # a rehearsal of a minute or two

1. Clip pairs/s per core of data.decode against decord, torchcodec, OpenCV, naive PyAV (what is not installed is left
   out) and the floor, the decoder alone on the fewest frames that must be decoded, without and with making pictures of
   those that are asked for. 2. The loader. 3. The training step
   alone. 4. Both together. 5. Extraction and retrieval. What is compared is timed in turn, in one run; figures are
   medians, and their ratios can be compared between machines. Part 1 counts CPU time, which other processes disturb
   less. Prints a verdict in words and writes all numbers as JSON.
"""
import argparse
import importlib
import itertools
import multiprocessing
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from datetime import datetime
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (AMP, average_crops, init_distributed, next_batch, peak_memory, run, step_scaled,  # noqa: E402
                    work_of)
from data import (Pairs, Windows, converter, decode, draw_view, load_split, make_toy, read_frames, reopen,  # noqa: E402
                  sample_pair, scan, step_loader, write_json)
from models import TimeEquivariant, new_backbone  # noqa: E402
from pretrain import forward_backward  # noqa: E402
from retrieval import search  # noqa: E402

SHARED = ROOT.parent / "shared" / "videos"                                      # real videos; may be missing
REAL = ("ucf_original/**/*.avi", "odd/v_*.avi", "odd/test.avi", "odd/hmdb51*.avi", "odd/cartwheel.avi",
        "odd/RATRACE*.avi", "odd/Truman*.avi", "odd/R6l*.mp4", "odd/SOX*.mp4")
T, SIZE = 16, 128                                                               # of the clips of part 1 (Sec. 3.4)
TURN = 5                                                                        # pairs in a row: loaders read on and on
LONG = "Kinetics-size H.264"
GOALS = {                                       # of part 1: times as fast, share of the floor; on average, on each file
    "originals": dict(naive=(3, 2), decord=(2.8, 2.5), torchcodec=(1.6, 1.4), opencv=(1.6, 1.3), floor=(0.65, 0),
                      shrunk=(1.4, 0)),
    LONG: dict(naive=(2.4, 0), decord=(1.6, 0), torchcodec=(1.4, 0), opencv=(1.35, 0), floor=(0.85, 0), shrunk=(6, 0))}
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
         "V100": 125e12, "4090": 165e12}                                        # FLOP/s, bf16 or fp16, dense
PAPER = dict(arch="r3d18", frames=16, size=128, batch=192, steps=400 * (9537 // 192))   # Sec. 4.1: UCF101, 400 epochs


class Video(NamedTuple):
    path: str
    length: int
    group: str                                                                  # a key of GOALS, or "others"
    tag: str                                                                    # codec: UCF101 XVID, HMDB51 DX50
    known: tuple                                                                # what the scan knows of the file


# ---- Videos


def gather(places, folder, most=200):
    """Files and folders of videos -> Split, {path: what the scan knows}, of up to `most` of them, evenly chosen."""
    files = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"there is no {place}: --videos and --shrunk take files and folders of videos")
        split = load_split("folder", place) if place.is_dir() else None
        files += [split.found[path] for path in split.paths] if split else [place]
    if not files:
        raise ValueError(f"no videos in {', '.join(map(str, places))}")
    folder.mkdir()
    for n, file in enumerate(files[::ceil(len(files) / most)]):
        (folder / f"{n:05d}-{file.name}").symlink_to(file.resolve())
    split = load_split("folder", folder)
    return split, scan(split, folder.with_suffix(".json"))


def readable(split, index):
    """The paths of whole videos long enough for a clip."""
    paths = [path for path in split.paths if index[path][0] >= T and not index[path][3]]
    if len(paths) < 2:
        raise ValueError(f"{split.root}: fewer than two videos of {T} frames can be read: give more (--videos)")
    return paths


def described(path, known):
    """-> Video"""
    with av.open(path, metadata_errors="ignore") as container:
        codec = container.streams.video[0].codec_context
    group = "originals" if codec.name == "mpeg4" else LONG if codec.name == "h264" and known[0] >= 250 else "others"
    return Video(path, known[0], group, codec.codec_tag.upper(), known)


def long_h264(source, file, frames=300):
    """A file as Kinetics-400 has them, which cannot be had here: the frames of a real one, forwards and backwards (so
    that there is no cut), at 340 x 256, by x264 at its defaults."""
    images = [frame.reformat(340, 256, "rgb24").to_ndarray() for frame in itertools.islice(read_frames(source), frames)]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", 30, options=dict(preset="medium", crf="23", g="250", bf="3"))
        stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
        stream.codec_context.thread_count = 1
        for image in itertools.islice(itertools.cycle(images + images[-2:0:-1]), frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


# ---- 1. Routes from a file to clips. Each takes a video, frame numbers and a box for each frame, as data.decode, and
# gives uint8 (N, 3, SIZE, SIZE); without boxes, frames as they are, (N, 3, H, W).


def ours(video, frames, boxes=None):
    return decode(video.path, frames, SIZE if boxes else None, boxes, video.known[4])


def naive(video, frames, boxes=None):
    """Decode everything, convert everything, then choose: what most published loaders do."""
    with av.open(video.path, metadata_errors="ignore") as container:
        container.streams.video[0].thread_type = "NONE"
        images = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return resized(torch.from_numpy(images).permute(0, 3, 1, 2)[frames], boxes)


def decord(video, frames, boxes=None):
    from decord import VideoReader, cpu
    numbers = sorted(set(frames))
    images = torch.from_numpy(VideoReader(video.path, ctx=cpu(0), num_threads=1).get_batch(numbers).asnumpy())
    return resized(images.permute(0, 3, 1, 2)[[numbers.index(n) for n in frames]], boxes)


def torchcodec(video, frames, boxes=None):
    from torchcodec.decoders import VideoDecoder
    numbers = sorted(set(frames))
    images = VideoDecoder(video.path, seek_mode="exact", num_ffmpeg_threads=1).get_frames_at(numbers).data
    return resized(images[[numbers.index(n) for n in frames]], boxes)


def opencv(video, frames, boxes=None, smooth=True):
    """Stops at the last frame needed, converts only what is needed, and scales it, smoothing as the others do, before
    it swaps the colours."""
    import cv2
    cv2.setNumThreads(1)
    capture, found, last = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), {}, max(frames)
    wanted = set(frames)
    for n in range(last + 1):
        if not capture.grab():
            raise ValueError(f"frame {last} was asked for, but only {n} frames come")
        if n in wanted:
            found[n] = capture.retrieve()[1]
    images = []
    for n, box in zip(frames, boxes or [None] * len(frames)):
        image = found[n]
        if box:
            top, left, height, width = pixels(box, *image.shape[:2])
            image = cv2.resize(image[top:top + height, left:left + width], (SIZE, SIZE),
                               interpolation=cv2.INTER_AREA if smooth else cv2.INTER_LINEAR)
        images.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def opencv_rough(video, frames, boxes=None):
    """cv2.resize at its default, which does not smooth: small pictures show patterns that are not there."""
    return opencv(video, frames, boxes, smooth=False)


def pixels(box, height, width):
    return [round(share * side) for share, side in zip(box, (height, width) * 2)]


def resized(images, boxes):
    """uint8 (N, 3, H, W), clip after clip of T frames -> cropped and scaled by torchvision, a clip at a time."""
    if boxes is None:
        return images
    return torch.cat([TF.resized_crop(clip, *pixels(box, *clip.shape[2:]), [SIZE, SIZE], antialias=True)
                      for clip, box in zip(images.split(T), boxes[::T])])


class Floor:
    """avcodec alone: packets kept in memory, a decoder that is open; of each group of pictures with a frame needed, all
    up to the last of these; what neither is needed nor referred to is passed over. No picture is touched; or, with
    `pictures`, those needed are cropped, scaled and converted as data.decode does it, and left where they are."""

    def __init__(self, video, pictures=False):
        self.pictures = pictures
        self.codec, _, self.shown, self.start, offsets, sizes, self.spare = reopen(video.known[4])
        content, self.packets = Path(video.path).read_bytes(), [av.Packet(size) for size in sizes]
        for k, (packet, offset, size) in enumerate(zip(self.packets, offsets, sizes)):
            packet.update(content[offset:offset + size])
            packet.opaque = (k,)

    def __call__(self, video, frames, boxes=None):
        """-> how many of the frames came"""
        wanted, converters, came = defaultdict(set), {}, 0                      # wanted: frame number -> its boxes
        for n, box in zip(frames, boxes if self.pictures else itertools.repeat(None)):
            wanted[n].add(box)
        for n, frame in self.needed(wanted):
            came += 1
            for box in wanted[n] if self.pictures else ():
                if box not in converters:
                    converters[box] = converter(frame, SIZE, box)
                converters[box](frame)
        return came

    def needed(self, wanted):
        """(n, av.VideoFrame) for the frames wanted"""
        needed = [k for k, n in enumerate(self.shown) if n in wanted]
        for start, group in itertools.groupby(needed, self.start.__getitem__):
            group = set(group)
            for k in range(start, max(group) + 1):
                if k in group or not self.spare[k]:
                    self.codec.skip_frame = "DEFAULT" if k in group else "NONREF"
                    yield from self.those(group, self.codec.decode(self.packets[k]))
            yield from self.those(group, self.codec.decode(None))               # what is still inside
            self.codec.flush_buffers()

    def those(self, group, frames):
        return ((self.shown[frame.opaque[0]], frame) for frame in frames if frame.opaque[0] in group)


ROUTES = dict(ours=ours, naive=naive, decord=decord, torchcodec=torchcodec, opencv=opencv, opencv_rough=opencv_rough)


def installed():
    """The routes whose package loads -> {name: route}, {name: why not}."""
    routes, absent = dict(ROUTES), {}
    modules = dict(decord="decord", torchcodec="torchcodec.decoders", opencv="cv2", opencv_rough="cv2")
    for name, module in modules.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            routes.pop(name, None)
            absent[name] = "not installed" if isinstance(error, ModuleNotFoundError) else "installed, but does not load"
    return routes, absent


def drawn(video, seed):
    """What a training step asks of one video (data.Pairs.read): 2T frame numbers, a box for each."""
    rng = random.Random(seed)
    (pair,), _ = sample_pair([video.length], T, rng=rng)
    boxes = [draw_view(*map(int, video.known[1:3]), rng.getrandbits(63))[0] for _ in pair]
    return [n for tau in pair for n in tau.frames(T)], [box for box in boxes for _ in range(T)]


def exactness(route, video, seeds):
    """Of the frames that these draws ask for, how many are those of a sequential decode -> right, asked.

    Conversions to RGB differ a little; a frame is the right one if it is within 3 grey levels, and not nearer to one
    of its neighbours, as far as these differ.
    """
    torch.set_num_threads(1)
    right = sorted({n for seed in seeds for n in drawn(video, seed)[0]})
    truth = {n: frame.to_ndarray(format="rgb24").astype(np.int16) for n, frame in enumerate(read_frames(video.path))
             if {n - 1, n, n + 1} & set(right)}
    asked, given = len(right), route(video, right).permute(0, 2, 3, 1).numpy()

    def far(a, b):
        return np.abs(a - b).mean()

    def nearer(image, n, other):                                                # to a neighbour than to frame n
        return other in truth and far(image, truth[n]) > far(image, truth[other]) + far(truth[n], truth[other]) / 2

    return sum(bool(far(image, truth[n]) < 3) and not nearer(image, n, n - 1) and not nearer(image, n, n + 1)
               for n, image in zip(right, given)), asked


def in_child(function, jobs, timeout=120, anew=False):
    """function(*job) for each job in another process, which is started anew for the next if one hangs or crashes, or
    always -> results; str: an error."""
    context, told = multiprocessing.get_context("forkserver"), []
    while len(told) < len(jobs):
        results, far = context.Pipe(duplex=False)
        child = context.Process(target=serve, args=(function, jobs[len(told):], far), daemon=True)
        child.start()
        far.close()
        with suppress(EOFError):
            results.recv()
        while len(told) < len(jobs):
            try:
                told.append(results.recv() if results.poll(timeout) else "hangs")
            except EOFError:
                told.append("crashes")
            if anew or told[-1] in ("hangs", "crashes"):
                break
        child.kill()
        child.join()
    return told


def serve(function, jobs, results):
    results.send("ready")                                                       # its start does not count as a hang
    for job in jobs:
        try:
            results.send(function(*job))
        except Exception as error:                                              # any library's
            results.send(f"{type(error).__name__}: {error}"[:200])


def reading(videos, twins, count):
    """Part 1 -> {file: {route: numbers}}, ratios by group, what is not installed. twins: {path: shrunk Video}."""
    torch.set_num_threads(1)
    routes, absent = installed()
    exact = {name: in_child(exactness, [(route, video, range(4)) for video in videos])
             for name, route in routes.items()}
    files, ratios, cores = {}, defaultdict(lambda: defaultdict(list)), os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})                                       # some take all cores, whatever one says
    for k, video in enumerate(videos):
        spent = defaultdict(list)
        entrants = {name: (route, video) for name, route in routes.items() if not isinstance(exact[name][k], str)}
        asked = {seed: drawn(video, seed) for seed in range(-TURN, count)}
        if video.known[4]:
            entrants |= {name: (floor, video) for name, floor in
                         dict(floor=Floor(video), pictures=Floor(video, pictures=True)).items()
                         if all(floor(video, frames, boxes) == len(set(frames)) for frames, boxes in asked.values())}
        if video.path in twins:
            entrants["shrunk"] = ours, twins[video.path]
        for turn in range(-1, ceil(count / TURN)):                              # -1: to warm up
            for name, (route, file) in random.Random(turn).sample(sorted(entrants.items()), len(entrants)):
                for seed in range(turn * TURN, min(count, turn * TURN + TURN)):
                    frames, boxes = asked[seed]
                    begun, cpu = time.perf_counter(), time.process_time()
                    route(file, frames, boxes)
                    spent[name].append((time.process_time() - cpu, time.perf_counter() - begun))
        ms = {name: [statistics.median(x) * 1e3 for x in zip(*times[TURN:])] for name, times in spent.items()}
        files[Path(video.path).name] = {name: dict(
            cpu_ms=ms[name][0] if name in ms else None, wall_ms=ms[name][1] if name in ms else None,
            exact=exact[name][k] if name in exact else None) for name in {**ms, **routes}}
        print(f"  {Path(video.path).name}, {video.length} frames, {video.group}:")
        for name in {**ms, **routes}:
            right = exact[name][k] if name in exact else ""
            right = right if isinstance(right, str) else f"{right[0]} of {right[1]} frames right"
            print(f"    {name:12} " + (f"{ms[name][0]:7.1f} ms CPU {ms[name][1]:7.1f} ms a pair, "
                                       f"{ms[name][0] / ms['ours'][0]:5.2f} of ours; {right}" if name in ms else right))
            if name in ms and name != "ours":
                ratio = ms[name][0] / ms["ours"][0]
                ratios[video.group][name].append(1 / ratio if name == "shrunk" else ratio)
    os.sched_setaffinity(0, cores)
    summary = {group: {name: dict(mean=statistics.geometric_mean(x), least=min(x), files=len(x),
                                  goals=GOALS.get(group, {}).get(name)) for name, x in by_name.items()}
               for group, by_name in ratios.items()}
    for group, by_name in summary.items():
        for name, x in by_name.items():
            what = dict(floor="of the floor's speed", pictures="of the floor's speed with its pictures",
                        shrunk="times as fast on the shrunk copy").get(name, f"x {name}")
            told = [f"{part} {x[part]:.2f}" + f" (goal {goal}: {'met' if x[part] >= goal else 'MISSED'})" * (goal > 0)
                    for part, goal in zip(("mean", "least"), x["goals"] or (0, 0))]
            print(f"  {group}, {x['files']} files, {what}: geometric {', '.join(told)}")
    for name, why in absent.items():
        print(f"  {name}: {why}")
    return dict(files=files, ratios=summary, absent=absent)


# ---- 2. The loader


def loading(sets, s):
    """sets: {"originals" or "shrunk": Pairs} -> {name: {workers: clip pairs/s}}, the median of s.rounds in turn."""
    rates = defaultdict(list)
    for _ in range(s.rounds):
        for workers, (name, pairs) in itertools.product(s.workers, sets.items()):
            count = s.batches * max(1, workers)
            batches = iter(step_loader(pairs, 4, 0, 1 + count + 4 * workers, workers))     # the rest keeps workers busy
            for _ in range(max(1, workers)):
                next(batches)                                                   # to warm up: a batch of each worker
            begun = time.perf_counter()
            for _ in range(count):
                next(batches)
            rates[name, workers].append(8 * count / (time.perf_counter() - begun))
            del batches
    result = defaultdict(dict)
    for (name, workers), x in rates.items():
        result[name][workers] = statistics.median(x)
        print(f"  {name}, {workers} workers: {result[name][workers]:.1f} clip pairs/s")
    return dict(result)


# ---- 3. The training step


def synthetic(batch, frames, size):
    """A batch as data.collate gives it, of noise; videos 2k and 2k + 1 are a group."""
    def classes(n, *shape):
        return torch.randint(n, (batch // 2, *shape)).repeat_interleave(2, dim=0)
    return dict(clips=torch.randint(256, (batch, 2, frames, 3, size, size), dtype=torch.uint8),
                seed=torch.arange(2 * batch).view(batch, 2), video=torch.arange(batch),
                pq=torch.arange(batch // 2).repeat_interleave(2), order=classes(3), speed=classes(4, 2),
                direction=classes(2, 2))


def training_step(arch, amp, compiled, device):
    """-> function: one step of pretrain.main on a batch."""
    model = TimeEquivariant(arch).to(device, memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, weight_decay=1e-4, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    autocast = torch.autocast(device.type, AMP[amp], enabled=amp != "off")
    network = torch.compile(model) if compiled else model

    def step(batch):
        batch = {name: value if name == "seed" else value.to(device, non_blocking=True)
                 for name, value in batch.items() if name != "failed"}
        optimizer.zero_grad()
        step_scaled(scaler, optimizer, forward_backward(network, batch, 1, 0.1, autocast, scaler)["loss"])
    return step


def flops_of_a_clip(arch, frames, size):
    """FLOPs of forward and backward, counted on the device "meta", where nothing is computed."""
    with torch.device("meta"):
        model = TimeEquivariant(arch)
        clips = torch.empty(2, 2, 3, frames, size, size)
        with FlopCounterMode(display=False) as counter:
            sum(out.sum() for out in model(clips).values()).backward()
    return counter.get_total_flops() / 4


def peak_flops(device, amp):
    """The device's peak in FLOP/s, and where it is from. Convolutions in float32 run as TF32 on a GPU: half of bf16."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    for known, peak in PEAKS.items():
        if known in name and "MIG" not in name:
            return peak / 2 if amp == "off" else peak, "published"
    n = 8192 if device.type == "cuda" else 1024
    torch.backends.cuda.matmul.allow_tf32 = True                                # for this alone
    a = torch.randn(n, n, device=device, dtype=torch.float32 if amp == "off" else AMP[amp])
    a @ a                                                                       # to warm up
    best = min(seconds(lambda: a @ a, device) for _ in range(5))
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * n ** 3 / best, f"measured, matrices of {n}"


def seconds(function, device):
    """How long a call takes, with what it leaves the GPU to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def stepping(s, device):
    """Part 3 -> a list of dicts, one for each backbone, batch size, precision, with and without torch.compile."""
    rows, peaks = [], {amp: peak_flops(device, amp) for amp in s.amps}
    for arch, batch in itertools.product(s.archs, s.step_batches):
        torch.manual_seed(0)
        torch.compiler.reset()                                                  # or it compiles for any batch size
        frames = 32 if arch == "s3dg" else s.frames                             # Table 2
        size = 112 if arch == "r2plus1d18" else s.size
        flops, data, variants = flops_of_a_clip(arch, frames, size), synthetic(batch, frames, size), []
        if device.type == "cuda":                                               # as the loader's batches
            data = {name: value.pin_memory() for name, value in data.items()}
        for amp, compiled in s.variants:
            row = dict(arch=arch, frames=frames, size=size, batch=batch, amp=amp, compiled=compiled)
            rows.append(row)
            before = 0
            if device.type == "cuda":
                torch.cuda.empty_cache()
                before = held(device)                                           # of the variants beside it
            try:
                step = training_step(arch, amp, compiled, device)
                row["warm_up_s"] = seconds(lambda: [step(data) for _ in range(2)], device)      # compiles
                held(device)                                                    # to choose among algorithms takes more
                step(data)
            except Exception as error:                                          # memory is full, or no compiler is here
                row["problem"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            row["peak_memory_gb"] = peak_memory(device) - before
            variants.append((row, step, []))
        for _, (_, step, spent) in itertools.product(range(s.steps), variants):     # in turn
            spent.append(seconds(lambda: [step(data) for _ in range(s.row)], device) / s.row)
        for row, step, spent in variants:
            rate = 2 * batch / statistics.median(spent)
            row |= dict(clips_per_s=rate, gflops_a_clip=flops / 1e9, share_of_peak=rate * flops / peaks[row["amp"]][0],
                        peak=peaks[row["amp"]])
        variants.clear()                                                        # and their memory
        for row in rows[-len(s.variants):]:
            told = row.get("problem") or (f"{row['clips_per_s']:.1f} clips/s, {row['share_of_peak']:.0%} of the peak, "
                                          f"{row['peak_memory_gb']:.2f} GB")
            print(f"  {arch}, {frames} x {size} x {size}, batch {batch}, {row['amp']}"
                  f"{', compiled' if row['compiled'] else ''}: {told}")
    return rows


# ---- 4. Both together


def together(sets, s, device):
    """Real batches, real steps -> {name: {workers: dict}}: clips/s, also without a loader, and the share of waiting."""
    step, result = training_step(s.arch, s.amp, False, device), defaultdict(dict)
    for name, pairs in sets.items():
        ready = next(iter(step_loader(pairs, s.batch // 2, 0, 1)))
        step(ready)
        for workers in s.workers[1:][-3:]:
            steps, waits = max(s.steps, 3 * workers), []                        # batches come in bursts, one a worker
            batches = iter(step_loader(pairs, s.batch // 2, 0, steps + 3 * workers, workers))
            for _ in range(workers):                                            # to warm up
                step(next(batches))

            def train(batches=batches):                                         # as common.Progress
                work = None
                for _ in range(steps):
                    batch, waited = next_batch(batches, work)
                    step(batch)
                    work = work_of(device)
                    waits.append(waited)
            spent = seconds(train, device)
            del batches, train
            alone = 2 * s.batch * s.row / statistics.median(
                seconds(lambda: [step(ready) for _ in range(s.row)], device) for _ in range(s.steps))
            rate = 2 * s.batch * steps / spent
            result[name][workers] = dict(clips_per_s=rate, alone=alone, waiting=sum(waits) / spent)
            print(f"  {name}, {workers} workers: {rate:.1f} clips/s, {rate / alone:.2f} of the {alone:.1f} without a "
                  f"loader; {sum(waits) / spent:.0%} of the time waiting for data")
    return dict(result)


def verdict(step, loader, shrunk=None):
    """step: clip pairs/s of the step; loader, shrunk: {workers: clip pairs/s} -> what holds training back, in words."""
    def needed(rates):
        return ceil(step / (rates[max(rates)] / max(rates)))                    # at a worker's rate beside all others

    most, rate = max(loader), loader[max(loader)]
    told = f"the step takes {step:.1f} clip pairs/s, the loader gives {rate:.1f} with {most} workers"
    if rate > 1.15 * step:
        return f"step-bound: {told}; {needed(loader)} would do"
    if rate > 0.95 * step:
        return f"balanced: {told}"
    copy = "a shrunk copy (python data.py shrink)"
    if shrunk:
        copy = f"the shrunk copy, for which {needed(shrunk)} would do"
    return f"loader-bound: {told}; {needed(loader) - most} more workers or {copy}"


def paper_hours(rate, s):
    """GPU-hours of the paper's run at `rate` clips/s of s.arch, by FLOPs where that is not the paper's setting."""
    flops = [flops_of_a_clip(*setting) for setting in ((s.arch, s.frames, s.size),
                                                       (PAPER["arch"], PAPER["frames"], PAPER["size"]))]
    return 2 * PAPER["steps"] * PAPER["batch"] / (rate * flops[0] / flops[1]) / 3600


# ---- 5. Extraction and retrieval


def judging(split, index, paths, s, device):
    """Part 5 -> seconds a video of extraction, and of search among so many videos, each at two sizes."""
    network, result = new_backbone(s.arch).to(device, memory_format=torch.channels_last_3d).eval(), dict(
        extraction=[], retrieval=[])
    for videos in (1, *s.extracted):                                            # 1: to warm up
        some = split.__class__(**vars(split) | dict(paths=(paths * videos)[:videos]))
        windows = Windows(some, index, s.frames, s.size, windows=s.windows)
        held(device)                                                            # the peak anew
        spent = seconds(lambda: average_crops(network, windows, s.size, "centre", device, s.amp, s.workers[-1],
                                              title="extraction"), device)
        if videos == 1:
            continue
        result["extraction"].append(dict(videos=videos, seconds=spent, peak_memory_gb=peak_memory(device)))
        print(f"  extraction of {videos} videos, {s.windows} windows and their mirror images: {spent:.2f} s, "
              f"{spent / videos * 1e3:.0f} ms a video")
    for G in s.galleries:
        row = dict(gallery=G, queries=s.queries)
        for name, found in zip(("search", "plain"), in_child(searching, [(G, s.queries, False), (G, s.queries, True)],
                                                             timeout=600, anew=True)):
            row[name] = found if isinstance(found, str) else dict(zip(("seconds", "peak_memory_gb"), found))
        result["retrieval"].append(row)
        print(f"  {s.queries} queries among {G} videos: " + "; ".join(
            f"{name} {x if isinstance(x, str) else '{seconds:.2f} s, {peak_memory_gb:.2f} GB'.format(**x)}"
            for name, x in list(row.items())[2:]))
    return result


def searching(G, Q, plain, D=512):
    """retrieval.search, or the plain product of matrices, in a process of its own -> seconds, GB beyond features."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gallery, query = (torch.nn.functional.normalize(torch.randn(n, D, dtype=torch.float64, device=device), dim=1)
                      for n in (G, Q))
    ids = [torch.stack([torch.arange(n, device=device) % 101, torch.arange(n, device=device) + first])
           for n, first in ((G, 0), (Q, G))]
    def found(n):                                                               # for n queries
        return (query[:n] @ gallery.T).topk(20) if plain else search(gallery, query[:n], ids[0], ids[1][:, :n], k=20)
    found(1)                                                                    # to warm up
    before = held(device)
    spent = seconds(lambda: found(Q), device)
    return spent, peak_memory(device) - before


def held(device):
    """GB that this process holds now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


# ---- The whole


def settings(quick, device):
    """How much is run: a rehearsal, on a CPU (under 10 minutes on two cores), on a GPU (not run yet).
    row: steps that are timed as one, since a GPU is asked in advance."""
    cores = len(os.sched_getaffinity(0))
    workers = [0] + sorted({min(n, cores) for n in (1, 2, 4, 8, 16, 32)})
    gpu = dict(arch="r3d18", amp="bf16", frames=16, size=128, batch=192, pairs=15, rounds=3, batches=6, steps=8,
               archs=("r3d18", "r3d18_tv", "r2plus1d18", "s3dg"), step_batches=(16, 64), windows=10,
               extracted=(50, 100), galleries=(60000, 240000), queries=1000, amps=("off", "bf16", "fp16"), row=4,
               files=16,
               variants=[("off", False), ("bf16", False), ("fp16", False), ("bf16", True)])     # compiling takes long
    cpu = dict(arch="r3d18_narrow", amp="off", frames=16, size=64, batch=16, pairs=15, rounds=3, batches=6, steps=5,
               archs=("r3d18_narrow",), step_batches=(8, 16), windows=10, extracted=(10, 20), galleries=(10000, 40000),
               queries=1000, amps=("off",), files=16, row=1,
               variants=[("off", False), ("off", True)])                        # bf16 takes CPUs minutes a step
    less = dict(frames=8, size=32, batch=4, pairs=2, rounds=1, batches=2, steps=2, step_batches=(2, 4), windows=2,
                extracted=(2, 4), galleries=(1000, 4000), queries=100, files=1, amps=("off",),
                variants=[("off", False)])
    chosen = gpu if device.type == "cuda" else cpu
    return SimpleNamespace(**chosen | (less | dict(workers=[0, 1]) if quick else dict(workers=workers)))


def machine(device):
    """What the figures were measured on."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), load=os.getloadavg(), date=f"{datetime.now():%F %T}",
                gpu=torch.cuda.get_device_name() if device.type == "cuda" else None, python=platform.python_version(),
                torch=torch.__version__, av=av.__version__, numpy=np.__version__)


def part_1(split, index, paths, shrunk, s, folder):
    """The files of part 1, of each group and codec some, evenly by length; and part 1."""
    videos = [described(str(split.found[path]), index[path]) for path in paths]
    source = max(videos, key=lambda video: video.length)
    long_h264(source.path, folder / "made-340x256.mp4")
    made, known = gather([folder / "made-340x256.mp4"], folder / "made")
    videos += [described(str(made.found[path]), known[path]) for path in made.paths]
    print(f"  the last file is made of {Path(source.path).name}, forwards and backwards, by libx264")
    chosen = []
    for kind in dict.fromkeys((video.group, video.tag) for video in videos):
        some = sorted((video for video in videos if (video.group, video.tag) == kind), key=lambda video: video.length)
        chosen += [some[n] for n in sorted({int((k + 0.5) / s.files * len(some)) for k in range(s.files)})]
    twins = {}
    if shrunk:
        small, known, _ = shrunk
        by_name = {Path(path).stem.split("-", 1)[1]: path for path in small.paths}
        for video in chosen:
            path = by_name.get(Path(video.path).stem.split("-", 1)[-1])
            if path and known[path][0] == video.length:
                twins[video.path] = described(str(small.found[path]), known[path])
    return reading(chosen, twins, s.pairs)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, nargs="+", choices=range(1, 6), default=[1, 2, 3, 4, 5], metavar="N",
                        help="which of the five to run (default: all)")
    parser.add_argument("--videos", nargs="+", help="files and folders (default: those in ../shared, or the toy set)")
    parser.add_argument("--shrunk", help="folder of the same videos after `python data.py shrink`")
    parser.add_argument("--pairs", type=int, help="clip pairs read of each file in part 1 (default: 15)")
    parser.add_argument("--out", default="benchmark.json", help="where the numbers go (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: everything once, small")
    args = parser.parse_args(argv)
    _, _, device = init_distributed()
    s, threads = settings(args.quick, device), torch.get_num_threads()
    s.pairs = args.pairs or s.pairs
    if args.videos is None:
        args.videos = [file for pattern in REAL for file in sorted(SHARED.glob(pattern))]
        if not args.videos:
            make_toy("toy-videos")
            args.videos = ["toy-videos"]
    result = dict(machine=machine(device), command=sys.argv, quick=args.quick)
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "sklearn", "av"])
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        split, index = gather(args.videos, folder / "videos", 20 if args.quick else 200)
        paths, shrunk = readable(split, index), None
        if args.shrunk:
            small = gather([args.shrunk], folder / "shrunk", 10000)             # all: to find the copy of each video
            shrunk = *small, readable(*small)
        else:
            print("no --shrunk FOLDER (of python data.py shrink): what it would gain is not measured")
        sets = {}
        for name, part in dict(originals=(split, index, paths), shrunk=shrunk).items():
            if part:
                some = (part[2] * s.batch)[:max(s.batch, 8, len(part[2]))]      # few videos: each several times
                sets[name] = Pairs(part[0], some, part[1], s.frames, s.size)
        titles = {1: "reading, one core", 2: f"the loader, clips of {s.frames} x {s.size} x {s.size}",
                  3: "the training step alone", 4: f"both together, {s.arch}, {s.amp}, batch {s.batch}",
                  5: "extraction and retrieval"}
        parts = {1: lambda: part_1(split, index, paths, shrunk, s, folder), 2: lambda: loading(sets, s),
                 3: lambda: stepping(s, device), 4: lambda: together(sets, s, device),
                 5: lambda: judging(split, index, paths, s, device)}
        for part in sorted(set(args.parts)):
            print(f"{part}. {titles[part]}")
            torch.set_num_threads(threads)
            since = time.perf_counter()
            result[f"part_{part}"] = parts[part]()
            result[f"part_{part}_s"] = time.perf_counter() - since
            write_json(Path(args.out), result, indent=1)                        # should the next part fail
    if {2, 4} <= set(args.parts):
        result["verdict"] = concluded(result, s)
    result["seconds"] = time.perf_counter() - begun
    write_json(Path(args.out), result, indent=1)
    print(f"{args.out}: {result['seconds']:.0f} s")


def concluded(result, s):
    """The verdict, and what the paper's ablation run would take here."""
    loader, both = result["part_2"], result["part_4"]["originals"]
    alone = both[max(both)]["alone"]
    words = verdict(alone / 2, *({n: x for n, x in rates.items() if n} for rates in loader.values()))
    if not result["machine"]["gpu"]:
        words += " (each alone: on a CPU they share the cores)"
    best = max(row["clips_per_s"] for row in both.values())
    result["paper_hours"] = dict(with_loader=paper_hours(best, s), step_alone=paper_hours(alone, s))
    same = (s.arch, s.frames, s.size) == (PAPER["arch"], PAPER["frames"], PAPER["size"])
    print(f"{words}\nThe paper's run on UCF101 ({PAPER['arch']}, 400 epochs = {PAPER['steps']} steps of "
          f"{PAPER['batch']} videos, 2 clips of each): {result['paper_hours']['with_loader']:.1f} hours here, "
          f"{result['paper_hours']['step_alone']:.1f} if the loader kept up; from {s.steps} steps of {s.batch} videos"
          + ("" if same else f" of {s.arch}, {s.frames} x {s.size} x {s.size}, and the two networks' FLOPs"))
    return words


if __name__ == "__main__":
    import benchmark                                                            # other processes know it by this name
    run(benchmark.main)
