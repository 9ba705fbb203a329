"""Frames from a video file: exactly those of a full sequential decode, and little else decoded."""
import base64
import itertools
import json
import os
import re
import time
import zlib
from collections import defaultdict
from contextlib import closing, contextmanager, suppress

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter

av.logging.set_level(None)                      # what goes wrong is raised as VideoError, not printed by FFmpeg

PATIENCE = 60                                   # seconds without a frame after which a decode is given up
VOP = b"\0\0\1\xb6"                             # MPEG-4's start code of a picture
DIVX_PACKED = re.compile(rb"DivX\d+(Build|b)\d+p")


class VideoError(Exception):
    """A video that does not give the frames asked of it; the message names the file and says why."""


def alone(codec):
    """A decoder in one thread, since frame threading hangs for ever on some corrupt files and loaders run many
    processes; its frames keep what their packets carry as `opaque`."""
    codec.thread_count, codec.thread_type, codec.copy_opaque = 1, "NONE", True
    return codec


@contextmanager
def open_video(path):
    """-> the decoder of a video's first stream, and its packets in file order. Packet k, and so the frame that it
    becomes, carries the tuple (k, is it a key frame) as `opaque`: a new tuple, since PyAV mixes up equal ints.

    VideoError, also for what goes wrong inside the `with`: the file, or the rest of it, is unreadable.
    """
    path = os.path.abspath(path)                # FFmpeg would take a name such as "concat:x" for a protocol
    try:
        with av.open(path, metadata_errors="ignore", timeout=PATIENCE,
                     options={"protocol_whitelist": "file"}) as container, \
                closing(container.demux(video=0)) as packets:                   # left open, it loses memory
            if not container.streams.video:
                raise VideoError(f"{path}: no video stream")
            codec = container.streams.video[0].codec_context
            if codec is None:
                raise VideoError(f"{path}: no decoder for the video stream")
            yield alone(codec), (setattr(packet, "opaque", (k, packet.is_keyframe)) or packet
                                 for k, packet in enumerate(packets))
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise VideoError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def read_frames(path):
    """av.VideoFrame after av.VideoFrame, as a full sequential decode numbers them, up to the first error.

    Time stamps play no part: in real files they are missing, repeated or out of order.
    VideoError: the file, or the rest of it, is unreadable.
    """
    last = time.monotonic()
    with open_video(path) as (codec, packets):
        for packet in packets:                                                  # the last is empty and ends the decode
            for frame in codec.decode(packet):
                yield frame
                last = time.monotonic()
            if time.monotonic() - last > PATIENCE:
                raise VideoError(f"{os.path.abspath(path)}: no frame within {PATIENCE} seconds")


def survey(path):
    """One full sequential decode -> (frames, height, width, problem: "" where nothing went wrong), and the packet of
    each frame; [] where the order of packets and frames, or a frame, is in doubt."""
    height, width, problem, order, sound = 0, 0, "", [], True
    try:
        for frame in read_frames(path):
            height, width = frame.height, frame.width
            packet, key = frame.opaque or (-1, False)
            order.append(packet)
            # with H.264's intra refresh a "key frame" is a P-frame, and a decode from there is whole some frames later
            sound = sound and not (packet < 0 or frame.is_corrupt or key and frame.pict_type != PictureType.I)
    except VideoError as error:
        problem = reason(error, path)
    counted = len(order), height, width, problem or ("" if order else "no frames")
    return counted, order if sound and not problem and len(set(order)) == len(order) else []


def count_frames(path):
    """-> frames, height, width, problem."""
    return survey(path)[0]


def examine(path):
    """-> frames, height, width, problem (`survey`), packets: what read_needed goes by (`locate`); "" where in doubt."""
    counted, packets = (0, 0, 0, ""), ""
    try:
        before = stamp(path)
        counted, order = survey(path)
        packets = locate(path, order, before) if order else ""
    except (VideoError, OSError) as error:
        counted = *counted[:3], reason(error, path)
    return *counted, packets


def stamp(file):
    """What tells whether a file is still the one that was scanned -> [size in bytes, time of its last change in ns]."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def locate(path, order, before):
    """-> what read_needed goes by, as text (`reopen` reads it): the decoder's set-up and five numbers of each packet;
    "" where a packet is not one piece of the file. order: the packet of each frame; before: the file's stamp.

    DivX puts two pictures into a packet, and an empty one into a packet after it: a decoder decodes the second when the
    next packet comes; if that has a picture, too, this one waits in turn. Here each picture has a packet of its own.
    """
    pieces, keys, end, waiting, packed = [], [], 0, [], None
    with open_video(path) as (codec, packets), open(path, "rb", buffering=0) as file:
        mpeg4, extra = codec.name == "mpeg4", codec.extradata or b""
        head = dict(file=before, codec=codec.name, extra=extra.decode("latin-1"), setup={
            name: getattr(codec, name) for name in ("codec_tag", "width", "height", "colorspace", "color_range")})
        for packet in packets:
            if not packet.size:                                                 # the last
                continue
            body = bytes(packet)
            at = next((near + found for near in (end, packet.pos or 0)          # perhaps after a header of a few bytes
                       if (found := os.pread(file.fileno(), len(body) + 64, near).find(body)) >= 0), None)
            if at is None or packet.opaque[0] != len(pieces):
                return ""
            end, pictures = at + len(body), [body]
            if mpeg4:
                if packed is None:
                    packed = bool(DIVX_PACKED.search(extra + body))
                if (second := body.find(VOP, body.find(VOP) + 4)) > 0:
                    pictures = [body[:second], body[second:]]
                elif waiting and len(body) <= 19 and picture_type(body) == 1:   # empty pictures call themselves P
                    pictures = []
                elif waiting and body.startswith(b"\0\0\1\xb0"):               # here decoders drop what waits
                    return ""
            for picture in pictures:
                waiting.append((at, len(picture), picture_type(picture) if mpeg4 else -1))
                at += len(picture)
            pieces.append(waiting.pop(0))
            keys.append(packet.opaque[1])
            if len(waiting) > 1 or waiting and not (packed and waiting[0][2] in (0, 2)):
                return ""
    if max(order) >= len(pieces):                                               # the file has just been replaced
        return ""
    numbers, (offset, size, kind) = np.arange(len(pieces)), np.array(pieces).T
    shown = np.full(len(pieces), -1)                                            # the frame that a packet becomes, or -1
    shown[order] = range(len(order))
    when = np.where(shown < 0, len(order), shown)
    clean = keys & (np.minimum.accumulate(when[::-1])[::-1] == when)            # none that follows it is shown earlier
    start = np.maximum.accumulate(np.where(clean, numbers, 0))                  # where a decode of this packet starts
    gap = np.diff(offset, prepend=0) - np.append(0, size[:-1])
    table = np.stack([np.diff(shown, prepend=0), np.diff(start, prepend=0), gap, size, kind == 2]).astype("<i8")
    return base64.b64encode(zlib.compress(json.dumps(head).encode() + b"\n" + table.tobytes())).decode()


def picture_type(packet):
    """Of MPEG-4: 0 I, 1 P, 2 B (no other picture refers to it), 3 S; -1: no picture."""
    after = packet.partition(VOP)[2]
    return after[0] >> 6 if after else -1


def reopen(packets):
    """What `locate` wrote -> a decoder as it was set up, the stamp of the file, and five lists, a number a packet: the
    frame it becomes, or -1; where its decode has to start; offset and size in bytes; is it of no use to other frames.
    """
    head, table = zlib.decompress(base64.b64decode(packets)).split(b"\n", 1)
    known, (shown, start, gap, size, spare) = json.loads(head), np.frombuffer(table, "<i8").reshape(5, -1)
    codec = av.CodecContext.create(known["codec"], "r")
    codec.extradata = known["extra"].encode("latin-1") or None
    for name, value in known["setup"].items():
        setattr(codec, name, value)
    offset = np.cumsum(gap + size) - size
    return alone(codec), known["file"], *(x.tolist() for x in (shown.cumsum(), start.cumsum(), offset, size, spare))


def read_needed(path, wanted, packets):
    """(n, av.VideoFrame) for the frames `wanted`, decoding little else: exactly read_frames' n-th, or left out.

    A decoder without a container gets its packets straight from the file: of each group of pictures with a wanted frame
    those up to the last wanted one, but for MPEG-4's pictures that no other refers to; such pictures of other codecs
    the decoder passes over itself (skip_frame). Without the container `decode` takes 0.85 of the time, on shrunk
    copies 0.75.
    """
    codec, scanned, shown, start, offset, size, spare = reopen(packets)
    if stamp(path) != scanned:
        return
    needed = [k for k, n in enumerate(shown) if n in wanted]
    with open(path, "rb", buffering=0) as file:
        for k, group in itertools.groupby(needed, start.__getitem__):
            for last in group:
                for k in range(k, last + 1):
                    if k < last and spare[k]:
                        continue
                    packet = av.Packet(size[k])                                 # padded: FFmpeg reads some bytes beyond
                    os.preadv(file.fileno(), [packet], offset[k])
                    codec.skip_frame = "NONREF"
                    if k == last:
                        codec.skip_frame, packet.opaque = "DEFAULT", (shown[k],)    # a tuple of its own: see open_video
                    for frame in codec.decode(packet):
                        if frame.opaque:
                            yield frame.opaque[0], frame
                k += 1
            for frame in codec.decode(None):                                    # what is still inside
                if frame.opaque:
                    yield frame.opaque[0], frame
            codec.flush_buffers()


def reason(error, path):
    """What a VideoError says about a file whose name is told beside it."""
    return str(error).removeprefix(f"{os.path.abspath(path)}: ")


def wanted_frames(path, wanted, packets=""):
    """(n, av.VideoFrame) for each number in `wanted`, in any order; without `packets`, or where they do not hold, all
    frames are counted from the first on. VideoError: the file does not give all of them."""
    left, n = set(wanted), -1
    if packets:
        with suppress(av.error.FFmpegError, OSError, ValueError), closing(read_needed(path, wanted, packets)) as stream:
            for n, frame in stream:
                left.remove(n)
                yield n, frame
    if left:
        with closing(read_frames(path)) as stream:
            for n, frame in enumerate(stream):
                if n in left:
                    left.remove(n)
                    yield n, frame
                if not left:
                    return
        raise VideoError(f"{os.path.abspath(path)}: frame {max(left)} was asked for, but only {n + 1} frames decode")


def decode(path, frames, size: int | None = None, boxes: list | None = None, packets: str = "") -> torch.Tensor:
    """Exactly the frames asked for, numbered as a full sequential decode numbers them -> uint8 (len(frames), 3, H, W).

    frames: ints in any order, repeats allowed. Only they are converted, and little more than they is decoded.
    size:   None: pixels as they are; else the short side is scaled to it (bilinear).
    boxes:  a crop for each frame, (top, left, height, width) as shares of the picture; each becomes size x size.
    packets: what the scan knows of the file (`examine`), which makes it faster and changes nothing else.
    VideoError: the file is unreadable or ends before the last frame asked for.
    """
    places = defaultdict(list)                                                  # frame number -> places in the output
    for place, n in enumerate(frames):
        places[n].append(place)
    if min(places, default=-1) < 0:
        raise ValueError(f"{path}: frames must be one or more numbers from 0 on, but are {list(frames)[:10]}")
    converters, out = {}, None
    with closing(wanted_frames(path, places, packets)) as stream:
        for n, frame in stream:
            images = {}                                                         # box -> (H, 3W), within this frame
            for place in places[n]:
                box = boxes[place] if boxes else None
                if box not in images:
                    kind = box, frame.height, frame.width, frame.format.name
                    if kind not in converters:
                        converters[kind] = converter(frame, size, box)
                    images[box] = converters[kind](frame)
                if out is None:
                    out = np.empty((len(frames), *images[box].shape), np.uint8)     # (len(frames), H, 3W)
                if out[place].shape != images[box].shape:
                    raise VideoError(f"{os.path.abspath(path)}: the picture size changes at frame {n}")
                out[place] = images[box]
    return torch.from_numpy(out).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)      # (len(frames), 3, H, W)


def converter(frame, size, box):
    """-> a function: av.VideoFrame -> uint8 (H, 3W), for frames of this one's size and format; size, box: of decode.

    Crop, planar scaling, then conversion of the few pixels left: about half the time of scaling and converting at once.
    Where a box starts at an odd pixel, chroma, which has half as many, is off by half of one of its own.
    """
    unify, scale, convert = (VideoReformatter() for _ in range(3))              # each keeps its set-up
    bilinear, sides = dict(interpolation=Interpolation.BILINEAR, threads=1), (frame.height, frame.width)
    planar = frame.format.name if frame.format.name in ("yuv420p", "yuvj420p") else "yuv420p"
    unlike = size is not None and frame.format.name != planar
    if box is None:
        height, width = (round(side * size / min(sides)) for side in sides) if size is not None else sides
    else:
        height, width = (max(1, round(share * side)) for share, side in zip(box[2:], sides))
        top, left = (min(round(share * side), side - part) for share, side, part in zip(box, sides, (height, width)))
        part, cuts = av.VideoFrame(width, height, planar), []                   # of each plane: first pixel, target
        part.colorspace, part.color_range = frame.colorspace, frame.color_range
        for plane, half in zip(part.planes, (1, 2, 2)):
            cuts.append((top // half, left // half, as_array(plane)[:, :-(-width // half)]))
        height = width = size

    def to_rgb(frame):
        if unlike:
            frame = unify.reformat(frame, format=planar, threads=1)
        if box is not None:
            for plane, (row, column, target) in zip(frame.planes, cuts):        # np.ndarray: the box, without a copy
                line = plane.line_size
                target[:] = np.ndarray(target.shape, np.uint8, plane, row * line + column, (line, 1))
            frame = part
        if size is not None:
            frame = scale.reformat(frame, width, height, "yuv420p", **bilinear)
        rgb = convert.reformat(frame, format="rgb24", **bilinear)
        return as_array(rgb.planes[0])[:, :3 * width]
    return to_rgb


def as_array(plane):
    """The bytes of a picture's plane, without a copy -> uint8 (height, line size), as wide as its lines or wider."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
