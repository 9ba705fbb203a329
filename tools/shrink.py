"""HEAD"""
import argparse
import ctypes
import errno
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from tqdm import tqdm

from common.files import log_json
from common.flags import Formatter
from common.splits import MAX_BAD, REPORT, WORK, is_video, list_tree
from common.video import VideoError, count_frames, read_frames, reason



def shrink(argv):
    """A data set once more, small and quick to read: same tree, same names, same frames; what is no video is copied.

    Each video becomes MPEG-4 in MP4, whatever its suffix says: FFmpeg, and so every reader here, goes by a file's
    content. The same command goes on where it was stopped. DST/shrink.jsonl lists what could not be read, and why.
    """
    parser = argparse.ArgumentParser("data.py shrink", description=shrink.__doc__, formatter_class=Formatter,
                                     allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", help="folder of the data set; nothing in it is changed")
    parser.add_argument("target", metavar="DST", help="folder of the copy, new or left by the same command")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="short side; never enlarged")
    parser.add_argument("--quality", type=int, default=4, metavar="Q", help="MPEG-4's quantiser, 1 (best) to 31")
    parser.add_argument("--intra", action="store_true", help="key frames only")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse_args(argv)
    for name, least, most in (("size", 8, 1024), ("quality", 1, 31), ("workers", 1, 1024)):
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} must lie between {least} and {most}, but is {getattr(args, name)}")
    if args.size % 2:
        parser.error(f"--size must be even, since most videos' colours have half the resolution, but is {args.size}")
    source, target = Path(args.source).resolve(), Path(args.target).resolve()
    for folder in (source, target):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: SRC and DST are folders")
    if not source.is_dir():
        raise ValueError(f"the folder {source} does not exist")
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"{source} and {target} must not lie in one another")
    settings = dict(size=args.size, quality=args.quality, intra=args.intra)
    before = listed_before(target, settings)
    folders, files, bad = list_tree(source)                                     # bad: {path: (frames kept, problem)}
    todo, bar = [], tqdm(files, "compare", unit="file")
    sizes = np.zeros(2, np.int64)                                               # bytes of the videos, before and after
    for path in bar:
        try:
            was = os.stat(source / path)
            if not (source / path).is_file():                                   # a pipe would be waited for
                raise OSError(errno.EINVAL, "not a regular file")
        except OSError as error:
            bad[path] = 0, error.strerror
            continue
        now = os.stat(target / path) if (target / path).exists() else None
        if now and os.path.samestat(was, now):
            raise ValueError(f"{target / path} is {source / path} itself: give another DST")
        if now and abs(now.st_mtime - was.st_mtime) < 2 and (is_video(path) or now.st_size == was.st_size):
            bad |= {path: before[path]} if path in before else {}               # done, as its time stamp says
            sizes += (was.st_size, now.st_size) if is_video(path) else 0
        else:
            todo.append((path, was.st_size, was.st_mtime_ns))
    work = target / WORK

    def stop(number, _):
        sys.exit(f"{signal.Signals(number).name}: the same command goes on from here")
    handlers = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork"), end_with_parent)
    try:
        shutil.rmtree(work, ignore_errors=True)                                 # a killed run left it
        for folder in (work, *(target / folder for folder in folders)):
            folder.mkdir(parents=True, exist_ok=True)
        (work / REPORT).write_text("")
        log_json(work / REPORT, **settings)
        for path, (frames, problem) in bad.items():
            log_json(work / REPORT, file=path, frames=frames, problem=problem)
        (work / REPORT).replace(target / REPORT)
        jobs, waiting = enumerate(todo), {}                                     # waiting: future -> its file
        bar = tqdm(total=len(files), initial=len(files) - len(todo), desc=f"shrink {source.name}", unit="file")
        while True:
            for n, (path, size, mtime) in itertools.islice(jobs, 2 * args.workers - len(waiting)):
                beside = work / f"{os.getpid()}-{n}{os.path.splitext(path)[1][:5]}"
                waiting[pool.submit(shrink_one, source / path, beside, mtime, settings)] = path, size, beside
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                try:
                    frames, problem = future.result()
                except BrokenProcessPool:
                    raise ValueError(f"a process was killed (memory full, or a video that FFmpeg dies of) while one of "
                                     f"these was read: {', '.join(path for path, *_ in waiting.values())}") from None
                path, size, beside = waiting.pop(future)
                if problem:
                    bad[path] = frames, problem
                    log_json(target / REPORT, file=path, frames=frames, problem=problem)
                if beside.exists():
                    sizes += (size, beside.stat().st_size) if is_video(path) else 0
                    beside.replace(target / path)
                else:
                    (target / path).unlink(missing_ok=True)                     # of a source that was readable once
                bar.set_postfix_str(f"{sizes[0] / 1e6:.0f} -> {sizes[1] / 1e6:.0f} MB", refresh=False)
                bar.update()
    except OSError as error:
        raise OSError(f"cannot write to {target} (disk full?): {error}; the same command goes on from here") from None
    finally:
        bar.close()
        for child in multiprocessing.active_children():
            child.kill()
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(work, ignore_errors=True)
        for name, handler in handlers.items():
            signal.signal(name, handler)

    videos = sum(map(is_video, files))
    lost = {path: problem for path, (frames, problem) in bad.items() if not frames}
    short = [f"{path} (after {frames} frames: {problem})" for path, (frames, problem) in bad.items() if frames]
    told = f"{target}: {videos} videos, {sizes[0] / 1e6:.1f} -> {sizes[1] / 1e6:.1f} MB; {len(files) - videos} others"
    for what, names in (("could not be read", [f"{path} ({problem})" for path, problem in lost.items()]),
                        ("end early", short)):
        if names:
            told += f"; {len(names)} {what}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
    if sum(map(is_video, lost)) > MAX_BAD * videos:
        raise ValueError(f"{told}; {target / REPORT} names all (at most {MAX_BAD:.0%} of the videos may be unreadable)")
    print(told + (f"; {target / REPORT} names all" if bad else ""))


def listed_before(target, settings):
    """What the run that this one goes on with wrote to DST/shrink.jsonl -> {path: (frames kept, problem)}.

    ValueError: DST holds something else, or a copy made with other settings.
    """
    rows = []
    if target.exists() and not (target / REPORT).exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty and no copy made by this command: give another DST")
    for line in (target / REPORT).read_text().splitlines() if (target / REPORT).exists() else []:
        with suppress(ValueError):                                              # a line that a full disk cut
            rows.append(json.loads(line))
    if rows and rows[0] != settings:
        raise ValueError(f"{target / REPORT} says {rows[0]}, but asked for is {settings}: give another DST")
    return {row["file"]: (row["frames"], row["problem"]) for row in rows[1:]}


def end_with_parent():
    """In a process of the pool: the parent alone decides on signals, and where it is killed, this process ends too."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)                                  # PR_SET_PDEATHSIG


def shrink_one(source, beside, mtime, settings):
    """Write the copy of one file to `beside`, with the source's time -> frames kept, problem ("": none).

    Where nothing can be read, `beside` is not there. OSError: it cannot be written.
    """
    frames, problem = 0, ""
    if is_video(source):
        try:
            content, frames, height, width, problem = shrunk(source, **settings)
        except (av.error.FFmpegError, ValueError, MemoryError) as error:        # of the encoder
            frames, problem = 0, f"cannot be encoded: {error}"
        if not frames:
            return frames, problem
        beside.write_bytes(content)
        if (found := count_frames(beside)) != (frames, height, width, ""):
            beside.unlink()
            return 0, f"the copy is wrong: {found} for {frames, height, width}"
    else:
        try:
            open(source, "rb").close()
        except OSError as error:
            return 0, error.strerror
        shutil.copyfile(source, beside)
    os.utime(beside, ns=(mtime, mtime))
    return frames, problem


def shrunk(path, size, quality, intra):
    """Encode a video's frames small -> an MP4 file's bytes, frames, height, width, problem (as count_frames has it).

    Every 33rd frame is a key frame, and between two frames that others refer to lie 7 that none does, so a reader that
    asks for few frames need not decode the rest. Time stamps are kept from 0 on, sorted; where some are missing or
    repeated, the frames are evenly spaced. Colours become BT.601's of limited range, what every reader takes a file
    without tags for.
    """
    options = dict(qmin=str(quality), qmax=str(quality), g="1", bf="0") if intra else dict(
        qmin=str(quality), qmax=str(quality), g="33", bf="7", flags="+cgop", sc_threshold="1000000000")
    exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP    # else 2/255 off
    file, scaler, stamps, packets, problem = io.BytesIO(), VideoReformatter(), [], [], ""
    with av.open(file, "w", format="mp4") as container, closing(read_frames(path)) as frames:
        stream = container.add_stream("mpeg4", 25, options=options)
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        try:
            for frame in frames:
                if not stamps:
                    unit, short = frame.time_base or Fraction(1, 25), min(frame.height, frame.width)
                    stream.height, stream.width = (max(2, side * min(size, short) // short // 2 * 2)   # even: yuv420p
                                                   for side in (frame.height, frame.width))
                stamps.append(frame.pts)
                small = scaler.reformat(
                    frame, stream.width, stream.height, "yuv420p", dst_colorspace=Colorspace.ITU601,
                    dst_color_range=ColorRange.MPEG, interpolation=Interpolation.BILINEAR | exact, threads=1)
                small.pts, small.time_base, small.pict_type = len(stamps) - 1, Fraction(1, 25), PictureType.NONE
                packets += stream.encode(small)
        except VideoError as error:
            problem = reason(error, path)
        if not stamps:
            return b"", 0, 0, 0, problem or "no frames"
        packets += stream.encode()
        stream.time_base = unit
        stamped = sorted((pts, n) for n, pts in enumerate(stamps) if pts is not None) or [(0, 0)]
        (first, i), (last, j) = stamped[0], stamped[-1]
        step = max(1, round((last - first) / (j - i) if j > i else Fraction(1, 25) / unit))
        times = sorted({pts - first for pts, _ in stamped})
        if len(times) < len(stamps):
            times = range(0, step * len(stamps), step)
        for packet in packets:                                                  # numbered until now: pts, dts of frames
            pts, dts = packet.pts, packet.dts
            packet.time_base, packet.duration, packet.pts = unit, step, times[pts]
            packet.dts = times[dts] if dts >= 0 else dts * step
            container.mux(packet)
    return file.getvalue(), len(stamps), stream.height, stream.width, problem
