"""The slow part of test_faults.py: broken files without end, and decodes without end.

    python tests/soak.py                                                        # all of it; --help: how to run less

1. Files cut at every eighth and with bits flipped, each decoded in a worker process: every one must give frames or a
   VideoError within BOUND seconds.
2. Decodes in loader processes that are started anew: resident memory and open files, measured in the middle and at the
   end, must not grow.
Prints figures; exit status 1 where something is wrong.
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

import av
import numpy as np
import torch
from conftest import SHARED, forkserver

from data import Pairs, VideoError, count_frames, decode, load_split, scan, step_loader, toy_video, write_video

VIDEOS = SHARED / "videos"
BOUND = 60                                                                      # seconds for a file, on a busy machine
FLAT = 2048                                                                     # kB of growth that are no leak


# ---- 1. Mutated files


def originals(folder):
    """Whole files to be broken: generated MPEG-4 in AVI and H.264 in MP4, and real ones where they are -> paths."""
    folder.mkdir(parents=True, exist_ok=True)
    frames = toy_video("Spin", np.random.default_rng(0), 48)[:60]
    write_video(folder / "mpeg4.avi", frames)
    for name, of_the_file, of_the_stream in (("h264.mp4", {}, dict(bf="2")),
                                             ("fast.mp4", dict(movflags="faststart"), {})):
        with av.open(str(folder / name), "w", options=of_the_file) as container:
            stream = container.add_stream("libx264", 25, options=dict(g="12") | of_the_stream)
            stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
            stream.codec_context.thread_count = 1
            for image in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
    real = [next(iter(sorted(VIDEOS.glob(pattern))), None) for pattern in
            ("ucf8_128/**/*.avi", "odd/v_BabyCrawling_g02_c01.avi", "odd/TrumanShow*.avi", "odd/realshort.mp4",
             "odd/h265_video.mp4", "odd/no_duration.webm")]
    return sorted(folder.iterdir()) + [file for file in real if file and file.stat().st_size < 2 ** 20]


def mutations(files, count, seed=0):
    """`count` ways to break files: first every one cut at every eighth, then bits flipped at random, in the whole file
    or in its first kB, where the container's header lies -> [(file, what, a number)]."""
    jobs, rng = [(file, "cut", eighth) for file in files for eighth in range(8)], random.Random(seed)
    while len(jobs) < count:
        what = rng.choice(("flip 1", "flip 16", "flip 256", "head 16"))
        jobs.append((files[len(jobs) % len(files)], what, len(jobs)))
    return jobs[:count]


def mutated(file, what, number):
    """The broken file's bytes, the same each time."""
    content = bytearray(file.read_bytes())
    if what == "cut":
        return content[:len(content) * number // 8]
    rng, end = random.Random(number), min(1024, len(content)) if what.startswith("head") else len(content)
    for _ in range(int(what.split()[1])):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return content


def work(jobs, results):
    """A worker process: break a file, count it, decode of it, tell what came of it; then the next."""
    with tempfile.TemporaryDirectory() as folder:
        for file, what, number in jobs:
            path, begun = Path(folder) / f"{number}{file.suffix}", time.monotonic()
            path.write_bytes(mutated(file, what, number))
            frames, *_ = count_frames(path)
            verdict = "all frames"
            try:
                clip = decode(path, [0, 7, max(7, frames)], 32, [(0.1, 0.2, 0.5, 0.6)] * 3) if frames % 2 else \
                    decode(path, range(min(16, max(1, frames))), 32)
                assert clip.dtype == torch.uint8 and clip.shape[1] == 3
            except VideoError as error:
                assert str(error).startswith(str(path)), error
                verdict = "some frames, then VideoError" if frames else "VideoError"
            path.unlink()
            results.send((verdict, time.monotonic() - begun))


def verdicts(jobs, bound=BOUND):
    """What came of each job, in a worker process, started anew if it crashes or hangs -> [(verdict, seconds)]."""
    context, told = multiprocessing.get_context("forkserver"), []
    while len(told) < len(jobs):
        results, far = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(jobs[len(told):], far), daemon=True)
        worker.start()
        far.close()
        while len(told) < len(jobs):
            try:
                told.append(results.recv() if results.poll(bound) else ("HANG", bound))
            except EOFError:
                worker.join()
                told.append((f"CRASH, exit status {worker.exitcode}", 0))
            if told[-1][0].startswith(("HANG", "CRASH")):
                break
        worker.kill()
        worker.join()
    return told


def break_files(count, workers):
    """Part 1 -> what is wrong, in words."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = mutations(originals(Path(folder) / "files"), count)
        begun = time.monotonic()
        with ThreadPoolExecutor(workers) as pool:
            told = [None] * len(jobs)
            for k, part in enumerate(pool.map(verdicts, [jobs[k::workers] for k in range(workers)])):
                told[k::workers] = part
    print(f"{len(jobs)} broken files of {len({file for file, *_ in jobs})} in {time.monotonic() - begun:.0f} s, the "
          f"slowest {max(seconds for _, seconds in told):.2f} s: {dict(Counter(verdict for verdict, _ in told))}")
    return [f"{file.name} {what} {number}: {verdict}" for (file, what, number), (verdict, _) in zip(jobs, told)
            if verdict.startswith(("HANG", "CRASH"))]


# ---- 2. Memory and open files


def held():
    """kB of resident memory, open files, of this process."""
    with open("/proc/self/statm") as file:                                      # Path would add names to Python's own
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") // 1024, len(os.listdir("/proc/self/fd"))


class Measured(Pairs):
    """Pairs that tell what the process that decodes them holds."""

    def __getitem__(self, key):
        item = super().__getitem__(key)
        return item | dict(held=torch.tensor([[torch.utils.data.get_worker_info().id, *held()]]))


def decode_on(decodes, restarts, workers):
    """Part 2 -> what is wrong, in words."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "videos"
        root.mkdir()
        files = sorted(VIDEOS.glob("ucf8_128/**/*.avi"))[::20] or originals(Path(folder) / "files")[:1] * 24
        for n, file in enumerate(files):
            (root / f"{n:03d}.avi").symlink_to(file)
        split = load_split("folder", root)
        pairs = Measured(split, split.paths, scan(split, Path(folder) / "index.json", progress=False), 8, 64, (1, 2, 4))
        (root / "000.avi").unlink()                                             # broken after the scan: errors leak too
        (root / "000.avi").write_bytes(files[0].read_bytes()[:2000])
        steps, told, wrong, begun = decodes // 2 // restarts, [], [], time.monotonic()
        rows = np.ones((steps, 3), np.int64)                                    # written anew: no memory of its own
        for restart in range(restarts):
            for row, batch in zip(rows, step_loader(pairs, 1, restart * steps, (restart + 1) * steps, workers)):
                row[:] = batch["held"][0].tolist()                              # a tensor would keep a file open
            for worker in range(workers):
                mine = rows[rows[:, 0] == worker, 1:]                           # (steps / workers, 2)  kB, files
                middle, end = (np.median(mine[at - len(mine) // 20 - 1:at], axis=0)
                               for at in (len(mine) // 2, len(mine)))
                told.append((*middle.tolist(), *end.tolist()))
            parent = held()
            print(f"restart {restart + 1}: {(restart + 1) * steps * 2} decodes, {time.monotonic() - begun:.0f} s; the "
                  f"parent holds {parent[0]} kB, {parent[1]} files; workers (kB, files in the middle, at the end): "
                  + " ".join(f"({a:.0f}, {b:.0f}; {c:.0f}, {d:.0f})" for a, b, c, d in told[-workers:]), flush=True)
            if restart == restarts // 2 - 1:
                half = parent
    told = np.array(told)
    growth = told[:, 2] - told[:, 0]
    print(f"{decodes} decodes over {restarts} worker restarts: parent {parent[0] - half[0]:+d} kB and "
          f"{parent[1] - half[1]:+d} files from half to all; workers {np.median(growth):+.0f} kB (median; most "
          f"{growth.max():+.0f}) and {np.abs(told[:, 3] - told[:, 1]).max():.0f} files from the middle to the end")
    if parent[0] - half[0] > FLAT or np.median(growth) > FLAT:
        wrong.append("resident memory grows")
    if parent[1] > half[1] or (told[:, 3] > told[:, 1]).any():
        wrong.append("open files grow")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="broken files; 0: none (default: 2000)")
    parser.add_argument("--decodes", type=int, default=50000, help="decodes; 0: none (default: 50000)")
    parser.add_argument("--restarts", type=int, default=8, help="how often the workers are started (default: 8)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    with forkserver():
        wrong = break_files(args.files, args.workers) if args.files else []
    wrong += decode_on(args.decodes, args.restarts, args.workers) if args.decodes else []
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
