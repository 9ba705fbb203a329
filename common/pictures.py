"""Pictures of a decoded frame: cropped, scaled, turned upright, in RGB."""
import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

PLANAR = ("yuv420p", "yuvj420p")                # what nearly all videos are; other formats are converted
BILINEAR = dict(interpolation=Interpolation.BILINEAR, threads=1)


def converter(frame, size, box):
    """-> a function: av.VideoFrame -> uint8 (H, W, 3), for frames shaped and turned as this one; size, box: of decode.

    Crop, planar scaling, then conversion of the few pixels left: about half the time of scaling and converting at once.
    """
    unify, scale, convert = VideoReformatter(), VideoReformatter(), VideoReformatter()      # each keeps its set-up
    if size is None:
        return lambda frame: np.rot90(as_rgb(frame, convert), quarter_turns(frame))

    sides = upright_shape(frame)
    height, width = (size, size) if box else (round(side * size / min(sides)) for side in sides)
    top, left, rows, columns = pixels(box or (0, 0, 1, 1), *sides)
    planar = frame.format.name if frame.format.name in PLANAR else "yuv420p"
    crop = av.VideoFrame(columns, rows, planar)                                 # filled anew with each frame
    crop.colorspace, crop.color_range = frame.colorspace, frame.color_range
    holes = [as_array(plane) for plane in crop.planes]

    def to_rgb(frame):
        if frame.format.name != planar:
            frame = unify.reformat(frame, format=planar, threads=1)
        copy_upright(frame, holes, top, left)
        return as_rgb(scale.reformat(crop, width, height, "yuv420p", **BILINEAR), convert)
    return to_rgb


def pixels(box, rows, columns):
    """A box as shares of a picture -> top, left, height, width in pixels, at least one, within the picture."""
    top, left, height, width = (round(share * side) for share, side in zip(box, (rows, columns) * 2))
    height, width = max(1, height), max(1, width)
    return min(top, rows - height), min(left, columns - width), height, width


def as_array(plane):
    """The pixels of a plane of a planar format, without a copy -> uint8 (height, width)."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, :plane.width]


def as_rgb(frame, reformatter):
    """-> uint8 (height, width, 3)"""
    plane = reformatter.reformat(frame, format="rgb24", **BILINEAR).planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, :3 * plane.width]
    return lines.reshape(plane.height, plane.width, 3)


def copy_upright(frame, holes, top=0, left=0):
    """Fill holes, the planes of a frame as arrays, with the pixels from (top, left) on of another one, upright.

    Both have the same planar format. Where top or left is odd, chroma, which has half as many pixels, is off by half of
    one of its own.
    """
    turns = quarter_turns(frame)
    for plane, hole, step in zip(frame.planes, holes, (1, 2, 2)):
        rows, columns = hole.shape
        shown = as_array(plane)
        if turns:
            shown = np.rot90(shown, turns)
        hole[:] = shown[top // step:, left // step:][:rows, :columns]


def quarter_turns(frame):
    """How players turn a frame, as its file asks them to -> anticlockwise quarter turns, 0 to 3."""
    return round(frame.rotation / 90) % 4


def upright_shape(frame):
    """-> height, width of a frame as players show it."""
    return (frame.width, frame.height) if quarter_turns(frame) % 2 else (frame.height, frame.width)


def upright(frame):
    """A frame as players show it -> itself, or, where it is to be turned, a copy in yuv420p with its time stamp."""
    if not quarter_turns(frame):
        return frame
    height, width = upright_shape(frame)
    copy = av.VideoFrame(width, height, "yuv420p")
    planar = frame.reformat(format="yuv420p", threads=1)
    copy.pts, copy.time_base = frame.pts, frame.time_base
    copy.colorspace, copy.color_range = planar.colorspace, planar.color_range
    copy_upright(planar, [as_array(plane) for plane in copy.planes])
    return copy
