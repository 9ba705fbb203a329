"""Copy a data set small and quick to read: same tree, names, frames and frame times.

    python tools/shrink.py UCF-101 UCF-101-128
    python tools/shrink.py K400 K400-144 --size 144 --quality 3

Each video becomes MPEG-4 in MP4, whatever its suffix: FFmpeg, and so every reader here, goes by a
file's content. Other files are copied byte for byte; names that begin with . or @ are left out. The
same command resumes. DST/shrink.jsonl lists what could not be read, and why.
"""
import io
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import UserError, write_json
from common.distributed import ignore_signals, run
from common.flags import Parser, positive_int, usable_cores
from common.splits import MAX_BAD, is_video, listed, walk
from common.video import VideoError, copy_upright, orientation, probe, read_frames, upright_shape
from tools import interrupt_on_signals

REPORT, TMP = "shrink.jsonl", ".shrinking-"             # in DST
# swscale's ACCURATE_RND, FULL_CHR_H_INT and FULL_CHR_H_INP, which PyAV 17 does not name: without
# them colours are 2/255 off
EXACT = int(Interpolation.BILINEAR) | 0x40000 | 0x2000 | 0x4000


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="folder of the data set; nothing in it is changed")
    add("target", metavar="DST", help="folder of the copy, new or left by the same command")
    add("--size", type=positive_int, default=128, metavar="PIXELS",
        help="short side; never enlarged")
    add("--quality", type=int, choices=range(1, 32), default=4, metavar="Q",
        help="MPEG-4's quantiser, 1 (best) to 31")
    add("--intra", action="store_true", help="key frames only")
    add("--workers", type=positive_int, default=usable_cores(), help="processes")
    return parser.parse_args(argv)


# ---- One video ----

def encode(original, copy, size, quality, intra):
    """Encode a video small and verify the copy -> frames of the copy, why it is not whole or "".

    Frames become upright, and colours BT.601 of limited range, which readers assume without tags.
    """
    options = dict(g="1" if intra else "33", bf="0", qmin=str(quality), qmax=str(quality))
    file, packets, stamps, reason = io.BytesIO(), [], [], ""
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", 25, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        scaler = VideoReformatter()
        try:
            for frame in read_frames(original):
                if not stamps:
                    stream.height, stream.width = small_shape(*upright_shape(frame), size)
                    unit = frame.time_base
                small = shrink(frame, stream.height, stream.width, scaler)
                small.pts, small.time_base = len(stamps), Fraction(1, 25)   # replaced below
                packets += stream.encode(small)
                stamps.append(frame.pts)
        except VideoError as error:
            reason = error.reason
        except av.error.FFmpegError as error:
            return 0, f"cannot be encoded: {error}"
        if not stamps:
            return 0, reason or "no frames"
        packets += stream.encode()
        stream.time_base = unit
        for packet, time in zip(packets, times_of(stamps)):
            packet.time_base, packet.pts, packet.dts = unit, time, time
            container.mux(packet)

    copy.write_bytes(file.getvalue())
    probed, expected = probe(copy), (len(stamps), stream.height, stream.width, "")
    if probed != expected:
        return 0, f"the copy is wrong: {probed}, not {expected}"
    return len(stamps), reason


def small_shape(height, width, size):
    """Scale the short side to `size`, never up; even, as yuv420p needs -> height, width"""
    short = min(height, width)
    return [max(2, side * min(size, short) // short // 2 * 2) for side in (height, width)]


def shrink(frame, height, width, scaler):
    """Scale a frame and turn it upright -> av.VideoFrame"""
    turn = orientation(frame)
    sides = (height, width) if turn[0] else (width, height)
    scaled = scaler.reformat(frame, *sides, "yuv420p", dst_colorspace=Colorspace.ITU601,
                             dst_color_range=ColorRange.MPEG, interpolation=EXACT, threads=1)
    small = av.VideoFrame(width, height, "yuv420p")
    copy_upright(scaled, turn, small)
    return small


def times_of(stamps):
    """Sort time stamps and start from 0; space them evenly if one is missing or repeated."""
    known = sorted(set(stamps) - {None}) or [0]
    times = [pts - known[0] for pts in known]
    if len(times) < len(stamps):
        step = max(1, round(times[-1] / (len(stamps) - 1)))
        times = range(0, step * len(stamps), step)
    return times


# ---- All files ----

def copy_file(source, target, folder, settings, path):
    """Copy a file by way of `folder`, unless it is done, as the time of its copy shows.

    -> frames that are kept of a damaged video, why the copy is not whole or ""
    """
    original, copy, tmp = source / path, target / path, folder / str(os.getpid())
    if not original.is_file() or not os.access(original, os.R_OK):
        return 0, "not a readable file"
    time = original.stat().st_mtime_ns
    if copy.exists() and abs(copy.stat().st_mtime_ns - time) < 2e9:
        return 0, ""
    frames, reason = 0, ""
    if is_video(path):
        frames, reason = encode(original, tmp, **settings)
        if not frames:
            return 0, reason
    else:
        shutil.copyfile(original, tmp)
    if reason:
        time -= 10 ** 12                                # the next run tries and lists it again
    os.utime(tmp, ns=(time, time))
    tmp.replace(copy)
    return frames, reason


def copy_files(source, target, settings, files, workers):
    """Copy all files in several processes -> {path: (frames, reason)} of those not whole."""
    failed = {}
    with tempfile.TemporaryDirectory(dir=target, prefix=TMP) as folder:
        copy = partial(copy_file, source, target, Path(folder), settings)
        pool = ProcessPoolExecutor(workers, initializer=ignore_signals, initargs=(None,))
        try:
            rows = zip(files, pool.map(copy, files))
            for path, result in tqdm(rows, f"shrink {source.name}", len(files), unit="file"):
                if result[1]:
                    failed[path] = result
        finally:
            pool.shutdown(cancel_futures=True)
    return failed


def prepare(source, target, settings):
    """Make DST with the folders of SRC, links followed -> sorted paths of all files below SRC.

    UserError: SRC is missing, one lies in the other, or DST holds something else.
    """
    if not source.is_dir():
        raise UserError(f"the folder {source} does not exist")
    if source in (target, *target.parents) or target in source.parents:
        raise UserError(f"{source} and {target} must not lie in one another")
    if target.exists() and any(target.iterdir()):
        report = target / REPORT
        if not report.exists() or json.loads(report.read_text("utf-8").split("\n")[0]) != settings:
            raise UserError(f"{target} is not a copy with {settings}: give another DST")
    for left in target.glob(f"{TMP}*"):                 # by a killed run
        shutil.rmtree(left)
    write_report(target, settings, {})
    paths = []
    for folder, files in walk(source):
        (target / folder).mkdir(exist_ok=True)
        paths += files
    return sorted(set(paths) - {REPORT})


def write_report(target, settings, failed):
    """DST/shrink.jsonl: the settings, then a line for each file that is not whole."""
    rows = [dict(file=path, frames=frames, reason=reason)
            for path, (frames, reason) in failed.items()]
    write_json(target / REPORT, settings, *rows)


def main(argv=None):
    args = parse_args(argv)
    interrupt_on_signals()
    source, target = Path(args.source).resolve(), Path(args.target).resolve()
    settings = dict(size=args.size, quality=args.quality, intra=args.intra)
    files = prepare(source, target, settings)
    videos = set(filter(is_video, files))
    failed = copy_files(source, target, settings, files, args.workers)
    write_report(target, settings, failed)
    print(f"{target}: {len(videos)} videos, {len(files) - len(videos)} other files")
    if failed:
        reasons = {path: f"{reason}, {n} frames kept" for path, (n, reason) in failed.items()}
        print(f"{len(failed)} not whole, named in {target / REPORT}: {listed(reasons)}")
    lost = [path for path, (frames, _) in failed.items() if path in videos and not frames]
    if len(lost) > MAX_BAD * len(videos):
        raise UserError(f"{len(lost)} of {len(videos)} videos unreadable, more than {MAX_BAD:.0%}")


if __name__ == "__main__":
    run(main)
