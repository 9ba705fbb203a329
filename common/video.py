"""Frames from a video file: exactly those of a full sequential decode, upright, and little else is decoded."""
import base64
import json
import os
import time
import zlib
from collections import defaultdict
from contextlib import closing, contextmanager, suppress
from itertools import islice

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from common.pictures import PLANAR, as_array, as_rgb, converter, quarter_turns, upright_shape

av.logging.set_level(None)                      # what goes wrong is raised as VideoError, not printed by FFmpeg

PATIENCE = 60                                   # seconds without a frame after which a decode is given up
# PyAV 19 accepts metadata that is not UTF-8; PyAV 18 does so only when told.
METADATA = dict(metadata_errors="ignore") if av.__version__.startswith("18.") else {}


class VideoError(Exception):
    """A video that does not give the frames asked of it; the message names the file and says why."""


def reason(error, path):
    """What a VideoError says about a file whose name is told beside it."""
    return str(error).removeprefix(f"{os.path.abspath(path)}: ")


@contextmanager
def video_errors(path):
    """What FFmpeg, PyAV (ValueError, IndexError) or the system says of a file becomes a VideoError."""
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        raise VideoError(f"{os.path.abspath(path)}: {getattr(error, 'strerror', None) or error}") from None


# ---- All frames, one after the other ----

def open_container(path):
    """Open a local file -> PyAV's container, which the caller closes."""
    path = os.path.abspath(path)                # FFmpeg would take a name such as "concat:x" for a protocol
    return av.open(path, timeout=PATIENCE, options={"protocol_whitelist": "file"}, **METADATA)


def video_stream(container, path):
    """FFmpeg's own choice; where that is a single picture (a cover, a thumbnail), the first stream that holds more."""
    streams = container.streams.video
    if not streams:
        raise VideoError(f"{os.path.abspath(path)}: no video stream")
    best = container.streams.best("video") or streams[0]
    if len(streams) == 1:
        return best
    for stream in (best, *streams):
        with open_container(path) as again, closing(again.demux(again.streams[stream.index])) as packets:
            pictures = [packet for packet in islice(packets, 2) if packet.size]
        if len(pictures) > 1:
            return stream
    return best


@contextmanager
def open_video(path):
    """-> the decoder of a file's video stream, and the stream's packets in file order, the last one empty.

    VideoError, also for what goes wrong inside the `with`: the file, or the rest of it, is unreadable.
    """
    with video_errors(path), open_container(path) as container:
        stream = video_stream(container, path)
        codec = stream.codec_context
        if codec is None:
            raise VideoError(f"{os.path.abspath(path)}: no decoder for the video stream")
        codec.thread_type = "NONE"              # frame threads hang for ever on some corrupt files
        codec.thread_count = 1
        codec.copy_opaque = True                # what a packet carries, its frame does: tuples, since ints get mixed up
        with closing(container.demux(stream)) as packets:                       # left open, it loses memory
            yield codec, packets


def read_frames(path):
    """av.VideoFrame after av.VideoFrame, as a full sequential decode numbers them, up to the first error.

    Time stamps play no part: in real files they are missing, repeated or out of order. A frame's opaque is (number of
    its packet, is it a key frame). VideoError: the file, or the rest of it, is unreadable.
    """
    last = time.monotonic()
    with open_video(path) as (codec, packets):
        for k, packet in enumerate(packets):
            packet.opaque = (k, packet.is_keyframe)
            for frame in codec.decode(packet):
                yield frame
                last = time.monotonic()
            if time.monotonic() - last > PATIENCE:
                raise VideoError(f"{os.path.abspath(path)}: no frame within {PATIENCE} seconds")


# ---- The scan ----

def examine(path):
    """Decode a whole video -> frames, height, width (upright), problem ("": none), packets: what `read_needed` goes by.

    packets: as text, the packet that becomes each frame and the packet where its decode may start; "" where the file is
    irregular, or where reading by it, which is tried for every frame, does not give the same pixels. The trial takes
    twice as long as the decode.
    """
    order, keys, sums, sound = [], [], [], True
    height, width, problem, packets = 0, 0, "", ""
    try:
        with video_errors(path):
            scanned = stamp(path)
            for frame in read_frames(path):
                height, width = upright_shape(frame)
                packet, key = frame.opaque or (-1, False)
                order.append(packet)
                keys.append(key)
                sums.append(checksum(frame))
                if frame.is_corrupt:
                    sound = False
                if key and frame.pict_type != PictureType.I:                    # H.264's intra refresh: whole later
                    sound = False
    except VideoError as error:
        problem = reason(error, path)
    if order and sound and not problem and sorted(order) == list(range(len(order))):
        starts = decode_starts(np.array(order), np.array(keys))
        entry = [scanned, np.diff(order, prepend=0).tolist(), np.diff(starts, prepend=0).tolist()]
        packets = base64.b64encode(zlib.compress(json.dumps(entry).encode())).decode()
        if not as_decoded(path, packets, starts, sums):
            packets = ""
    return len(order), height, width, problem or ("" if order else "no frames"), packets


def unpack(packets):
    """-> the stamp of the scanned file, the packet of each frame, the packet where its decode may start."""
    scanned, order, starts = json.loads(zlib.decompress(base64.b64decode(packets)))
    return scanned, np.cumsum(order).tolist(), np.cumsum(starts).tolist()


def stamp(file):
    """What tells whether a scan still holds -> [size in bytes, time of the last change in ns, FFmpeg's version]."""
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns, ".".join(map(str, av.library_versions["libavcodec"]))]


def decode_starts(order, keys):
    """The packet where each frame's decode may start: the last key frame before it that is shown before all that is
    sent after it. order: the packet of each frame; keys: is it a key frame; int and bool (frames,)."""
    shown = np.argsort(order)                                                   # the frame that packet k becomes
    first = np.minimum.accumulate(shown[::-1])[::-1]                            # of the frames from packet k on
    clean = keys[shown] & (shown == first)
    return np.maximum.accumulate(np.where(clean, np.arange(len(order)), 0))[order]


def as_decoded(path, packets, starts, sums):
    """Whether `packets` lead to the frames of a sequential decode: each is read once, every other frame of every other
    group of pictures at a time.

    Decoders keep from one packet, or group, to the next what no rule here knows of: palettes, headers, pictures packed
    two and two, what conceals a damage.
    """
    _, groups = np.unique(starts, return_inverse=True)
    numbers = np.arange(len(groups))
    for group in (0, 1):
        for number in (0, 1):
            wanted = np.flatnonzero((groups % 2 == group) & (numbers % 2 == number)).tolist()
            try:
                found = {n: checksum(frame) for n, frame in read_needed(path, wanted, packets)}
            except VideoError:
                return False
            if found != {n: sums[n] for n in wanted}:
                return False
    return True


def checksum(frame):
    """Of a frame's pixels."""
    planar = frame.format.name in PLANAR
    images = [as_array(plane) for plane in frame.planes] if planar else [as_rgb(frame, VideoReformatter())]
    return [zlib.crc32(np.ascontiguousarray(image)) for image in images]


# ---- Only what is needed ----

def read_needed(path, wanted, packets):
    """(n, av.VideoFrame) for the frames `wanted`, decoding little else: exactly read_frames' n-th, or left out.

    Of each group of pictures with a wanted frame, the packets up to the last wanted one are sent; those that become no
    wanted frame, the decoder passes over where no other picture refers to them (skip_frame).
    """
    scanned, order, starts = unpack(packets)
    if not wanted or max(wanted) >= len(order) or stamp(path) != scanned:
        return
    becomes = {order[n]: n for n in wanted}                                     # packet -> frame
    ends = {}                                                                   # first packet to send -> last
    for n in wanted:
        ends[starts[n]] = max(ends.get(starts[n], 0), order[n])
    end = -1
    with open_video(path) as (codec, packets):
        for k, packet in enumerate(packets):
            end = ends.pop(k, end)
            if k > end:
                continue
            codec.skip_frame = "NONREF"
            if k in becomes:
                codec.skip_frame = "DEFAULT"
                packet.opaque = (becomes[k],)
            frames = codec.decode(packet)
            if k == end:
                frames += codec.decode(None)                                    # what is still inside
                codec.flush_buffers()
            for frame in frames:
                if frame.opaque:
                    yield frame.opaque[0], frame
            if k == end and not ends:
                return


def wanted_frames(path, wanted, packets=""):
    """(n, av.VideoFrame) for each number in `wanted`, in any order; without `packets`, or where they do not hold, all
    frames are counted from the first on. VideoError: the file does not give all of them."""
    left, n = set(wanted), -1
    if packets:
        with suppress(VideoError, OSError), closing(read_needed(path, set(wanted), packets)) as frames:
            for n, frame in frames:
                left.remove(n)
                yield n, frame
    if left:
        with closing(read_frames(path)) as frames:
            for n, frame in enumerate(frames):
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
    Pictures are upright, and so are H, W and boxes: turned as the file asks of players.
    VideoError: the file is unreadable or ends before the last frame asked for.
    """
    places = defaultdict(list)                                                  # frame number -> places in the output
    for place, n in enumerate(frames):
        places[n].append(place)
    if min(places, default=-1) < 0:
        raise ValueError(f"{path}: frames must be one or more numbers from 0 on, but are {list(frames)[:10]}")
    converters, out = {}, None
    with closing(wanted_frames(path, places, packets)) as needed:
        for n, frame in needed:
            shape = frame.height, frame.width, frame.format.name, quarter_turns(frame)
            images = {}                                                         # box -> (H, W, 3), within this frame
            for place in places[n]:
                box = boxes[place] if boxes else None
                if box not in images:
                    if (box, shape) not in converters:
                        converters[box, shape] = converter(frame, size, box)
                    with video_errors(path):
                        images[box] = converters[box, shape](frame)
                if out is None:
                    out = np.empty((len(frames), *images[box].shape), np.uint8)     # (len(frames), H, W, 3)
                if out[place].shape != images[box].shape:
                    raise VideoError(f"{os.path.abspath(path)}: the picture size changes at frame {n}")
                out[place] = images[box]
    return torch.from_numpy(out).permute(0, 3, 1, 2)                            # (len(frames), 3, H, W)
