"""Broken files without end, and decodes without end; on Linux.

    python tools/soak.py                                        # 2,000 broken files and 50,000 decodes
    python tools/soak.py --files 0 --decodes 320000 --restarts 2 --workers 1

1. Files cut at every eighth and with bits flipped, each decoded in a process of its own: every one must give
   frames or a VideoError within BOUND seconds.
2. Decodes in loader processes that are started anew: resident memory and open files, measured in the middle and at the
   end, must not grow.
Prints figures; exit status 1, and what is wrong, where something is.
"""
import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.flags import Formatter
from common.processes import run
from common.splits import load_split, scan
from common.toy import write_video
from common.video import VideoError, decode, examine
from data import Pairs, step_loader

VIDEOS = ROOT.parent / "shared" / "videos"                                      # real ones; may be missing
BOUND = 60                                                                      # seconds for a file, on a busy machine
FLAT = 2048                                                                     # kB of growth that are no leak
BOX = (0.1, 0.2, 0.5, 0.6)                                                      # a crop, in shares of the picture


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("--files", type=int, default=2000, help="broken files; 0: none")
    parser.add_argument("--decodes", type=int, default=50000, help="decodes; 0: none")
    parser.add_argument("--restarts", type=int, default=8, help="how often the loader processes are started")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    for name, least in (("files", 0), ("decodes", 0), ("restarts", 2), ("workers", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, but is {getattr(args, name)}")
    if 0 < args.decodes < 200 * args.restarts * args.workers:
        parser.error(f"--decodes must be at least {200 * args.restarts * args.workers}, 200 a process and restart, but "
                     f"is {args.decodes}")
    return args


# ---- 1. Broken files ----

class Job(NamedTuple):
    """One way to break one file."""
    file: Path
    what: str                                                                   # "cut" or "flip 16", "head 16" ...
    number: int                                                                 # an eighth, or a seed


class Outcome(NamedTuple):
    """What came of a job."""
    verdict: str
    seconds: float = 0.0

    def is_wrong(self):
        return self.verdict.startswith(("HANG", "CRASH"))


def originals(folder):
    """Whole files to be broken: generated MPEG-4 in AVI and H.264 in MP4, and real ones where they are -> paths."""
    texture = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(texture, n, axis=1) for n in range(60)])         # (60, 48, 48, 3)
    write_video(folder / "mpeg4.avi", frames)
    write_h264(folder / "h264.mp4", frames, options=dict(g="12", bf="2"))
    write_h264(folder / "fast.mp4", frames, options=dict(g="12"), movflags="faststart")
    found = sorted(folder.iterdir())
    for pattern in ("ucf8_128/**/*.avi", "odd/v_BabyCrawling_g02_c01.avi", "odd/TrumanShow*.avi", "odd/realshort.mp4",
                    "odd/h265_video.mp4", "odd/no_duration.webm"):
        real = sorted(VIDEOS.glob(pattern))[:1]
        found += [file for file in real if file.stat().st_size < 2 ** 20]
    return found


def write_h264(path, frames, options, **of_the_file):
    """uint8 (N, 48, 48, 3) -> an MP4 file."""
    with av.open(str(path), "w", options=of_the_file) as container:
        stream = container.add_stream("libx264", 25, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def mutations(files, count, seed=0):
    """`count` ways to break files: first every one cut at every eighth, then bits flipped at random, in the whole file
    or in its first kB, where the container's header lies -> list of Job."""
    rng = random.Random(seed)
    jobs = [Job(file, "cut", eighth) for file in files for eighth in range(8)]
    while len(jobs) < count:
        what = rng.choice(("flip 1", "flip 16", "flip 256", "head 16"))
        jobs.append(Job(files[len(jobs) % len(files)], what, len(jobs)))
    return jobs[:count]


def mutated(job):
    """The broken file's bytes, the same each time."""
    content = bytearray(job.file.read_bytes())
    if job.what == "cut":
        return content[:len(content) * job.number // 8]
    where, bits = job.what.split()
    end = min(1024, len(content)) if where == "head" else len(content)
    rng = random.Random(job.number)
    for _ in range(int(bits)):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return content


def decode_broken(path):
    """Count a file's frames and decode some of them -> what came of it, in words."""
    frames = examine(path)[0]
    try:
        if frames % 2:
            clip = decode(path, [0, 7, max(7, frames)], 32, [BOX] * 3)          # the last is not there
        else:
            clip = decode(path, range(min(16, max(1, frames))), 32)
    except VideoError as error:
        assert str(error).startswith(str(path)), error
        return "some frames, then VideoError" if frames else "VideoError"
    assert clip.dtype == torch.uint8 and clip.shape[1] == 3
    return "all frames"


def work(jobs, results):
    """In a process of its own: break a file, decode of it, send what came of it; then the next."""
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            path = Path(folder) / f"{job.number}{job.file.suffix}"
            path.write_bytes(mutated(job))
            begun = time.monotonic()
            verdict = decode_broken(path)
            results.send(Outcome(verdict, time.monotonic() - begun))
            path.unlink()


def verdicts(jobs, bound=BOUND):
    """What came of each job, in a process that is started anew if it crashes or hangs -> list of Outcome."""
    found = []
    while len(found) < len(jobs):
        found += verdicts_of_a_process(jobs[len(found):], bound)
    return found


def verdicts_of_a_process(jobs, bound):
    """The same up to the first crash or hang, which is the last of the list."""
    context = multiprocessing.get_context("forkserver")
    results, far_end = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(jobs, far_end), daemon=True)
    worker.start()
    far_end.close()
    found = []
    while len(found) < len(jobs) and not (found and found[-1].is_wrong()):
        try:
            found.append(results.recv() if results.poll(bound) else Outcome("HANG", bound))
        except EOFError:
            worker.join()
            found.append(Outcome(f"CRASH, exit status {worker.exitcode}"))
    worker.kill()
    worker.join()
    return found


def break_files(count, workers):
    """Part 1 -> what is wrong, in words."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs = mutations(originals(Path(folder) / "files"), count)
        shares = [jobs[k::workers] for k in range(workers)]
        found = []
        with ThreadPoolExecutor(workers) as pool:
            for share, part in zip(shares, pool.map(verdicts, shares)):
                found += zip(share, part)
    slowest = max(outcome.seconds for _, outcome in found)
    counts = Counter(outcome.verdict for _, outcome in found)
    print(f"{count} broken files of {len({job.file for job in jobs})} in {time.monotonic() - begun:.0f} s, the slowest "
          f"{slowest:.2f} s: {dict(counts)}")
    return [f"{job.file.name} {job.what} {job.number}: {outcome.verdict}" for job, outcome in found
            if outcome.is_wrong()]


# ---- 2. Memory and open files ----

class Held(NamedTuple):
    """What a process holds."""
    memory: float                                                               # kB, resident
    files: float                                                                # open

    def __str__(self):
        return f"{self.memory:.0f} kB and {self.files:.0f} files"


def held():
    """What this process holds -> Held."""
    with open("/proc/self/statm") as file:                                      # Path would add names to Python's own
        pages = int(file.read().split()[1])
    return Held(pages * os.sysconf("SC_PAGESIZE") // 1024, len(os.listdir("/proc/self/fd")))


class Measured(Pairs):
    """Pairs that say what the process that decodes them holds."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        worker = torch.utils.data.get_worker_info().id
        return item | dict(held=torch.tensor([[worker, *held()]]))


def videos_to_decode(folder):
    """A data set of some short videos, one of them broken after the scan, since errors leak too -> Measured."""
    root = folder / "videos"
    root.mkdir()
    files = sorted(VIDEOS.glob("ucf8_128/**/*.avi"))[::20] or originals(folder / "files")[:1] * 24
    for n, file in enumerate(files):
        (root / f"{n:03d}.avi").symlink_to(file)
    split = load_split("folder", root)
    index = scan(split, folder / "index.json", progress=False)
    (root / "000.avi").unlink()
    (root / "000.avi").write_bytes(files[0].read_bytes()[:2000])
    return Measured(split, split.paths, index, 8, 64, (1, 2, 4))


def middle_and_end(rows, workers):
    """What each loader process held halfway and at the end -> [(Held, Held)]; rows: (steps, 3) worker, kB, files."""
    found = []
    for worker in range(workers):
        mine = rows[rows[:, 0] == worker, 1:]                                   # (steps of this worker, 2)
        quarter = len(mine) // 4
        found.append((typical(mine[quarter:2 * quarter]), typical(mine[-quarter:])))
    return found


def typical(rows):
    """rows: (n, 2) kB, files -> Held: the median memory; the fewest files, since batches on their way hold some."""
    return Held(float(np.median(rows[:, 0])), int(rows[:, 1].min()))


def decode_on(decodes, restarts, workers):
    """Part 2 -> what is wrong, in words."""
    steps, parents, processes = decodes // 2 // restarts, [], []
    rows = np.ones((steps, 3), np.int64)                                        # written anew: no memory of its own
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        pairs = videos_to_decode(Path(folder))
        for restart in range(restarts):
            batches = step_loader(pairs, 1, restart * steps, (restart + 1) * steps, workers)
            for row, batch in zip(rows, batches):
                row[:] = batch["held"][0].tolist()                              # a tensor would keep a file open
            parents.append(held())
            processes += middle_and_end(rows, workers)
            print(f"start {restart + 1}: {(restart + 1) * steps * 2} decodes in {time.monotonic() - begun:.0f} s; the "
                  f"parent holds {parents[-1]}")
            for middle, end in processes[-workers:]:
                print(f"    a loader process held {middle} halfway, {end} at the end", flush=True)
    return what_grew(parents, processes)


def what_grew(parents, processes):
    """parents: Held after each start; processes: of middle_and_end -> what is wrong, in words."""
    half, last = parents[len(parents) // 2 - 1], parents[-1]
    growth = [end.memory - middle.memory for middle, end in processes]
    opened = [end.files - middle.files for middle, end in processes]
    print(f"the parent from half to all: {last.memory - half.memory:+d} kB, {last.files - half.files:+d} files; loader "
          f"processes from the middle to the end: {np.median(growth):+.0f} kB (median; most {max(growth):+.0f}), "
          f"{max(opened):+.0f} files")
    wrong = []
    if last.memory - half.memory > FLAT or np.median(growth) > FLAT:
        wrong.append("resident memory grows")
    if last.files > half.files or max(opened) > 0:
        wrong.append("open files grow")
    return wrong


def main(argv=None):
    args = parse_args(argv)
    if not Path("/proc/self/statm").exists():
        raise ValueError("this needs /proc, which Linux has")
    wrong = []
    if args.files:
        wrong += break_files(args.files, args.workers)
    if args.decodes:
        wrong += decode_on(args.decodes, args.restarts, args.workers)
    if wrong:
        raise ValueError("; ".join(wrong))


if __name__ == "__main__":
    run(main)
