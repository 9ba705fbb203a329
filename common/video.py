"""Read frames of a video file: exactly those of a full sequential decode, upright.

Decoding stops at the last requested frame; only requested frames are converted to RGB.
"""
import os
from collections import defaultdict
from contextlib import closing, contextmanager

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from common import UserError

av.logging.set_level(None)                                  # VideoError replaces printed errors

TIMEOUT = 60                                                # seconds to wait for a slow disk
PLANAR = ("yuv420p", "yuvj420p")                            # most videos; others are converted
BILINEAR = dict(interpolation=Interpolation.BILINEAR, threads=1)
# PyAV 19 accepts metadata that is not UTF-8; older versions need this option.
METADATA = {} if int(av.__version__.split(".")[0]) >= 19 else dict(metadata_errors="ignore")


class VideoError(UserError):
    """A video that lacks requested frames. The message names the file; `reason` does not."""

    def __init__(self, message, reason=""):
        super().__init__(message)
        self.reason = reason


# ---- Decoding ----

@contextmanager
def naming(path):
    """Inside, what FFmpeg, PyAV or the system says of a file becomes a VideoError."""
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{os.path.abspath(path)}: {reason}", reason) from None


def open_container(path):
    """Open a local file -> PyAV's container; the caller closes it."""
    path = os.path.abspath(path)                            # "concat:x" is a file, not a protocol
    return av.open(path, timeout=TIMEOUT, **METADATA)


def read_frames(path):
    """Yield each av.VideoFrame of a full sequential decode, up to the first error.

    Time stamps are ignored: in real files they are missing, repeated or out of order.
    VideoError: the file, or the rest of it, does not decode.
    """
    with naming(path), open_container(path) as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video stream that FFmpeg decodes")
        stream.codec_context.thread_count = 1               # frame threads hang on broken files
        cut_off = False
        with closing(container.demux()) as packets:         # an unclosed generator leaks memory
            for packet in packets:
                if packet.stream_index == stream.index:
                    yield from packet.decode()
                cut_off = packet.is_corrupt if packet.size else cut_off
        if cut_off:
            raise ValueError("the file ends inside a frame")


def probe(path):
    """Decode a whole video -> frames, upright height and width, the error at the end or ""."""
    frames, height, width = 0, 0, 0
    try:
        for frame in read_frames(path):
            if not frames:
                height, width = upright_shape(frame)
            frames += 1
    except VideoError as error:
        return frames, height, width, error.reason
    return frames, height, width, "" if frames else "no frames"


def decode(path, frames, size: int | None = None, boxes: list | None = None) -> torch.Tensor:
    """Decode the requested frames, numbered as in a full sequential decode -> uint8 (N, 3, H, W).

    frames: N ints in any order, repeats allowed.
    size:   short side of the output in pixels (bilinear); None: original size. Frames of another
            shape than the first, as in WebRTC, are scaled to that.
    boxes:  N crops (top, left, height, width) as fractions of the upright frame, each scaled to
            size x size.
    VideoError: the file does not decode, or ends before the last requested frame.
    """
    places = defaultdict(list)                              # frame -> indices in the output
    for place, n in enumerate(frames):
        places[n].append(place)
    last, converters, pictures = max(places), {}, [None] * len(frames)
    n, shape = -1, None
    with naming(path), closing(read_frames(path)) as decoded:
        for n, frame in zip(range(last + 1), decoded):
            shape = shape or upright_shape(frame)               # of the first
            for place in places.pop(n, ()):
                box = boxes[place] if boxes else None
                key = box, frame.height, frame.width, frame.format.name, orientation(frame)
                if key not in converters:
                    converters[key] = converter(frame, shape, size, box)
                pictures[place] = converters[key](frame)    # (H, W, 3)
        if places:
            raise ValueError(f"only {n + 1} frames decode")
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# ---- From a frame to RGB ----

def converter(frame, shape, size, box):
    """Build a function for frames like this one: av.VideoFrame -> uint8 (H, W, 3).

    shape: of the first frame, upright; size, box: as in `decode`. Cropping and scaling the planes
    before the conversion to RGB takes half the time of the reverse order.
    """
    unify, scale, convert = VideoReformatter(), VideoReformatter(), VideoReformatter()
    turn = orientation(frame)
    if size is None:
        height, width = reversed(shape) if turn[0] else shape
        return lambda frame: upright(rgb(frame, convert, height, width), turn)

    top, left, rows, columns = pixels(box or (0, 0, 1, 1), *upright_shape(frame))
    height, width = (size, size) if box else (round(side * size / min(shape)) for side in shape)
    planar = frame.format.name if frame.format.name in PLANAR else "yuv420p"
    crop = av.VideoFrame(columns, rows, planar)             # overwritten by each frame
    crop.colorspace, crop.color_range = frame.colorspace, frame.color_range

    def to_rgb(frame):
        if frame.format.name != planar:
            frame = unify.reformat(frame, format=planar, threads=1)
        copy_upright(frame, turn, crop, top, left)
        return rgb(scale.reformat(crop, width, height, "yuv420p", **BILINEAR), convert)
    return to_rgb


def pixels(box, rows, columns):
    """Convert a box from fractions to pixels, inside the frame -> top, left, height, width."""
    top, left, height, width = (round(x * side) for x, side in zip(box, (rows, columns) * 2))
    height, width = max(1, height), max(1, width)
    return min(top, rows - height), min(left, columns - width), height, width


def rgb(frame, reformatter, height=None, width=None):
    """Convert an av.VideoFrame to RGB -> uint8 (height, width, 3), by default of its own shape"""
    plane = reformatter.reformat(frame, width, height, "rgb24", **BILINEAR).planes[0]
    return as_array(plane, 3 * plane.width).reshape(plane.height, plane.width, 3)


def as_array(plane, width=None):
    """View the bytes of a plane, without a copy -> uint8 (height, width)"""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, :width or plane.width]


def copy_upright(frame, turn, target, top=0, left=0):
    """Copy the planes of a yuv420p frame, turned upright and cropped at (top, left), to `target`.

    Chroma has half the resolution: an odd top or left shifts it by half a chroma pixel.
    """
    for source, plane, step in zip(frame.planes, target.planes, (1, 2, 2)):
        picture = upright(as_array(source), turn)
        as_array(plane)[:] = picture[top // step:, left // step:][:plane.height, :plane.width]


def orientation(frame):
    """How to turn a frame upright -> whether to transpose it, then flip its rows, its columns.

    The file's display matrix maps column x and row y to column a x + c y and row b x + d y.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def upright(picture, turn):
    """Turn a picture, (H, W) or (H, W, 3), upright, as a view; turn: from `orientation`."""
    transpose, flip_rows, flip_columns = turn
    picture = picture.swapaxes(0, 1) if transpose else picture
    return picture[::-1 if flip_rows else 1, ::-1 if flip_columns else 1]


def upright_shape(frame):
    """Height and width of a frame as a player shows it."""
    return (frame.width, frame.height) if orientation(frame)[0] else (frame.height, frame.width)
