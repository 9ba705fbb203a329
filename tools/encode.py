"""One file of a data set once more: a video small and quick to read, any other file byte for byte."""
import io
import os
import shutil
from contextlib import closing
from fractions import Fraction
from typing import NamedTuple

import av
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from common.pictures import upright
from common.tree import is_video
from common.video import VideoError, examine, read_frames, reason

EXACT = (Interpolation.BILINEAR | Interpolation.ACCURATE_RND                    # else colours are 2/255 off
         | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP)


class File(NamedTuple):
    """A file of SRC that is still to be copied."""
    path: str                                                                   # below SRC
    size: int                                                                   # bytes
    mtime: int                                                                  # ns


class Copy(NamedTuple):
    """What came of a file."""
    frames: int                                                                 # kept of a video
    problem: str                                                                # "": none
    before: int = 0                                                             # bytes
    after: int = 0


def copy_one(source, file, beside, settings):
    """Write the copy of one file to `beside`, with the file's time -> Copy. OSError: it cannot be written."""
    beside.touch()                                                              # says that this file is being read
    try:
        if is_video(file.path):
            frames, problem = copy_video(source / file.path, beside, settings)
        else:
            frames, problem = copy_other(source / file.path, beside)
    except (av.error.FFmpegError, ValueError, MemoryError) as error:            # of the encoder
        frames, problem = 0, f"cannot be encoded: {error}"
    os.utime(beside, ns=(file.mtime, file.mtime))
    return Copy(frames, problem, file.size, beside.stat().st_size)


def copy_other(source, beside):
    """A file that is no video, byte for byte -> frames, of which it has none, and problem."""
    try:
        open(source, "rb").close()
    except OSError as error:
        return 0, error.strerror
    shutil.copyfile(source, beside)
    return 0, ""


def copy_video(source, beside, settings):
    """A video's frames once more, small; the copy is decoded and compared -> frames, problem."""
    content, frames, height, width, problem = shrunk(source, **settings)
    if not frames:
        return 0, problem
    beside.write_bytes(content)
    found = examine(beside)[:4]
    if found != (frames, height, width, ""):
        return 0, f"the copy is wrong: {found} for {frames, height, width}"
    return frames, problem


def shrunk(path, size, quality, intra):
    """Encode a video's frames small -> an MP4 file's bytes, frames, height, width, problem ("": none).

    Every 33rd frame is a key frame, and between two frames that others refer to lie 7 that none does, so a reader that
    asks for few frames need not decode the rest. Pictures become upright, so that no reader need turn them. Time stamps
    are kept from 0 on. Colours become BT.601's of limited range, what every reader takes a file without tags for.
    """
    options = dict(qmin=str(quality), qmax=str(quality))
    if intra:
        options |= dict(g="1", bf="0")
    else:
        options |= dict(g="33", bf="7", flags="+cgop", sc_threshold="1000000000")
    file, stamps, packets, problem = io.BytesIO(), [], [], ""
    with av.open(file, "w", format="mp4") as container, closing(read_frames(path)) as frames:
        stream = container.add_stream("mpeg4", 25, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        scaler = VideoReformatter()
        try:
            for frame in map(upright, frames):
                if not stamps:
                    unit = frame.time_base or Fraction(1, 25)
                    stream.height, stream.width = small_shape(frame.height, frame.width, size)
                small = smaller(frame, stream, scaler)
                small.pts, small.time_base = len(stamps), Fraction(1, 25)       # numbers, until all stamps are known
                packets += stream.encode(small)
                stamps.append(frame.pts)
        except VideoError as error:
            problem = reason(error, path)
        if not stamps:
            return b"", 0, 0, 0, problem or "no frames"
        packets += stream.encode()
        stream.time_base = unit
        write_packets(container, packets, stamps, unit)
    return file.getvalue(), len(stamps), stream.height, stream.width, problem


def small_shape(height, width, size):
    """Short side `size`, never enlarged; even, since yuv420p has one colour for 2 x 2 pixels -> height, width."""
    short = min(height, width)
    return [max(2, side * min(size, short) // short // 2 * 2) for side in (height, width)]


def smaller(frame, stream, scaler):
    """A frame as the stream takes it -> av.VideoFrame."""
    small = scaler.reformat(frame, stream.width, stream.height, "yuv420p", dst_colorspace=Colorspace.ITU601,
                            dst_color_range=ColorRange.MPEG, interpolation=EXACT, threads=1)
    small.pict_type = PictureType.NONE
    return small


def write_packets(container, packets, stamps, unit):
    """Give packets, whose pts and dts are numbers of frames, their times, and write them."""
    times, step = times_of(stamps, unit)
    for packet in packets:
        number, order = packet.pts, packet.dts
        packet.time_base, packet.duration = unit, step
        packet.pts = times[number]
        packet.dts = times[order] if order >= 0 else order * step
        container.mux(packet)


def times_of(stamps, unit):
    """Time stamps from 0 on, sorted; evenly spaced where some are missing or repeated -> times, their mean distance."""
    known = sorted((pts, n) for n, pts in enumerate(stamps) if pts is not None) or [(0, 0)]
    (first, i), (last, j) = known[0], known[-1]
    step = Fraction(last - first, j - i) if j > i else Fraction(1, 25) / unit
    step = max(1, round(step))
    times = sorted({pts - first for pts, _ in known})
    if len(times) < len(stamps):
        times = range(0, step * len(stamps), step)
    return times, step
