"""Temporal transformations, decoding, data sets and augmentation: everything between video files and a batch.

Shapes: B videos, 2 clips p and q, T frames, H x W pixels; frames are uint8 RGB.
"""
import argparse
import base64
import ctypes
import errno
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import zlib
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

av.logging.set_level(None)                      # what goes wrong is raised as VideoError, not printed by FFmpeg

# ---------------------------------------------------------------------- temporal transformations (Sec. 3.1, 3.2)


@dataclass(frozen=True)
class Tau:
    """A temporal transformation τ (Fig. 2): the first source frame, source frames a step, backwards or not."""
    start: int
    speed: int
    reverse: bool

    def frames(self, T: int = 16) -> list:
        """Source frames in playing order: T ints."""
        frames = [self.start + self.speed * t for t in range(T)]
        return frames[::-1] if self.reverse else frames

    def end(self, T: int = 16) -> int:
        """Last source frame, whatever the direction."""
        return self.start + self.speed * (T - 1)


def sample_tau(length: int, T: int = 16, speeds=(1, 2, 4, 8), rng=random) -> Tau:
    """τ ~ 𝒯 (Sec. 3.2): a speed that fits the video, a start, a direction, each uniform (# paper silent)."""
    feasible = [s for s in speeds if s * (T - 1) < length]
    if not feasible:
        raise ValueError(f"a video of {length} frames has no clip of {T} frames at any of the speeds {tuple(speeds)}")
    speed = rng.choice(feasible)
    return Tau(rng.randint(0, length - 1 - speed * (T - 1)), speed, rng.random() < 0.5)


def sample_pair(lengths, T=16, speeds=(1, 2, 4, 8), rng=random):
    """(τ_p, τ_q) for each video of a group, with ONE relative transformation pq for the whole group (Fig. 3).

    Speeds, directions and the shift from p to q are the group's; where the pair lies in a video is the video's own.
    lengths: frames of each video -> [(τ_p, τ_q), ...], labels: dict of what Sec. 3.1 and 3.2 learn to tell,
    speed and direction [p, q] as class numbers, order 0 before | 1 after | 2 overlap, pq an int that is equal
    exactly where the relative transformations are. ValueError: a video too short for T frames.
    """
    p, q = (sample_tau(min(lengths), T, speeds, rng) for _ in "pq")
    first, last = min(p.start, q.start), max(p.end(T), q.end(T))
    slides = [rng.randint(-first, n - 1 - last) for n in lengths]               # moves both clips of a video together
    pairs = [(replace(p, start=p.start + s), replace(q, start=q.start + s)) for s in slides]
    # paper silent: order is read on the source timeline; clips whose intervals touch overlap, whatever frames they show
    order = 0 if p.end(T) < q.start else 1 if q.end(T) < p.start else 2
    pq = q.start - p.start                                                      # the shift, in source frames ...
    for value in (p.speed, q.speed, p.reverse, q.reverse):
        pq = pq * 1024 + value                                                  # ... and what else makes pq, as digits
    labels = dict(speed=[speeds.index(t.speed) for t in (p, q)], direction=[int(t.reverse) for t in (p, q)],
                  order=order, pq=pq)
    return pairs, labels


def fitting_step(length: int, T: int = 16, step: int = 4) -> int:
    """Source frames a step in transfer learning: `step` (Sec. 3.4: 4), or the most that fits (# paper silent)."""
    return max(1, min(step, (length - 1) // (T - 1)))


def eval_windows(length: int, T: int = 16, step: int = 4, windows: int = 10) -> list:
    """Sec. 3.4: `windows` evenly spaced clips of T frames, `step` source frames apart, over the whole video.

    # paper silent: a video of fewer than T frames repeats its last frame.
    -> `windows` lists of T frame numbers.
    """
    step = fitting_step(length, T, step)
    room = max(0, length - 1 - step * (T - 1))
    starts = [round(room * k / max(1, windows - 1)) for k in range(windows)] if windows > 1 else [room // 2]
    return [[min(start + step * t, length - 1) for t in range(T)] for start in starts]


# ---------------------------------------------------------------------- decoding

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


# ---------------------------------------------------------------------- data sets, as their authors distribute them

MAX_BAD = 0.05                                  # a larger share of missing or unreadable videos stops a run
SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif", ".3gp"}
PUBLISHED = {                                   # videos in the official lists: (train, test)
    ("ucf101", 1): (9537, 3783), ("ucf101", 2): (9586, 3734), ("ucf101", 3): (9624, 3696),
    **{("hmdb51", split): (3570, 1530) for split in (1, 2, 3)}, ("diving48", 1): (15027, 1970)}


@dataclass(frozen=True)
class Split:
    """Some videos of a data set: paths below root, a class number for each (None: unlabelled), the class names.

    paths holds the official names; found maps each to the file that is there, missing names the rest.
    """
    title: str
    root: Path
    paths: list
    labels: list
    classes: list
    found: dict
    missing: list


def load_split(dataset: str, data, annotations=None, split: int = 1, part: str = "train") -> Split:
    """The videos of one part ("train" or "test") of one official split of a data set -> Split.

    dataset: toy, ucf101, hmdb51, diving48 (labels V2), diving48v1, kinetics400 or folder (any videos, recursively).
    data: the folder of the videos; annotations: the folder of the official lists, looked for beside data if None.
    ValueError: a list or folder is not there, or a line is not what the format says.
    """
    root = Path(data)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{dataset}: the video folder {root} {what} (--data)")
    if dataset in ("toy", "ucf101"):
        lists = find_lists(dataset, root, annotations, "ucfTrainTestlist", f"{part}list{split:02d}.txt")
        file = lists / "classInd.txt"
        classes = [two(line.split(maxsplit=1), file)[1] for line in read_lines(file)]
        paths = [line.rsplit(maxsplit=1)[0] if line[-1].isdigit() and " " in line else line
                 for line in read_lines(lists / f"{part}list{split:02d}.txt")]
        names = [path.split("/")[0] for path in paths]
    elif dataset == "hmdb51":
        lists = find_lists(dataset, root, annotations, "testTrainMulti_7030_splits", f"*_test_split{split}.txt")
        files = sorted(lists.glob(f"*_test_split{split}.txt"))
        classes = [file.name.removesuffix(f"_test_split{split}.txt") for file in files]
        keep = {"train": "1", "test": "2"}[part]
        rows = [(name, *two(line.rsplit(maxsplit=1), file)) for name, file in zip(classes, files)
                for line in read_lines(file)]
        names = [name for name, _, use in rows if use == keep]
        paths = [f"{name}/{path}" for name, path, use in rows if use == keep]
    elif dataset in ("diving48", "diving48v1"):
        file = f"Diving48_V2_{part}.json" if dataset == "diving48" else f"Diving48_{part}.json"
        lists = find_lists(dataset, root, annotations, ".", file)
        root = root / "rgb" if (root / "rgb").is_dir() else root
        classes = [str(k) for k in range(48)]                                   # class 30 has no V2 video: still 48
        try:
            rows = json.loads((lists / file).read_text())
            names, paths = [str(row["label"]) for row in rows], [f"{row['vid_name']}.mp4" for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{lists / file} is not a list of objects with vid_name and label: {error!r}") from None
    elif dataset in ("kinetics400", "folder"):
        paths = sorted(filter(is_video, list_tree(root)[1]))
        names = [path.split(os.sep)[0] if os.sep in path else None for path in paths]
        classes = sorted(set(names) - {None})
        if None in names or len(classes) < 2:                                   # no class folders: no labels
            names, classes = [None] * len(paths), []
    else:
        raise ValueError(f"unknown data set {dataset!r}")

    number = {name.lower(): k for k, name in enumerate(classes)} | {None: None}
    for path, name in zip(paths, names):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{dataset}: the list in {lists} names {path!r}, which lies outside {root}")
        if (name and name.lower()) not in number:
            raise ValueError(f"{dataset}: {path!r} is of class {name!r}, which the list of classes in {lists} lacks")
    found, missing = find_files(root, paths)
    labels = [number[name and name.lower()] for name in names]
    title = dataset if dataset in ("kinetics400", "folder") else f"{dataset} {part} split {split}"
    return Split(title, root, paths, labels, classes, found, missing)


def list_tree(root):
    """-> the folders and the files below root, links followed, as paths below it; {folder: (0, why it is not read)}."""
    folders, files, bad = [], [], {}
    for folder, names, here in os.walk(root, followlinks=True, onerror=lambda error: bad.update(
            {os.path.relpath(error.filename, root): (0, error.strerror)})):
        real = os.path.realpath(folder)                                         # a link to a folder above has no end
        names[:] = sorted(name for name in names if name != WORK and (
            not os.path.islink(path := os.path.join(folder, name))
            or os.path.commonpath([real, os.path.realpath(path)]) != os.path.realpath(path)))
        below = os.path.relpath(folder, root)
        folders.append(below)
        files += [os.path.normpath(os.path.join(below, name)) for name in sorted(here)]
    return folders, [path for path in files if path != REPORT], bad


def is_video(path):
    """Whether a file is one of a data set's videos, by its name ("._" begins what macOS adds)."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not os.path.basename(path).startswith("._")


def find_lists(dataset, root, annotations, folder, file):
    """The folder that holds the list `file` (a glob pattern): `annotations` or `folder` in it, or beside the videos."""
    bases = [Path(annotations)] if annotations else [root, root.parent]
    places = [place for base in bases for place in (base, base / folder)]
    for place in places:
        if any(place.glob(file)):
            return place
    raise ValueError(f"{dataset}: no list {file} in {' or '.join(dict.fromkeys(map(str, places)))} (--annotations)")


def read_lines(file):
    """Lines of a list file without line ends (CRLF copies circulate) or blank lines."""
    if not file.is_file():
        raise ValueError(f"the list {file} does not exist (--annotations)")
    return [line.strip() for line in file.read_text(errors="surrogateescape").splitlines() if line.strip()]


def two(words, file):
    """The two parts of a list's line, or a ValueError that says where there is but one."""
    if len(words) != 2:
        raise ValueError(f"the list {file} has a line of one word, {words[0]!r}, where two belong")
    return words


def find_files(root, paths):
    """-> {path: the file that is there}, [paths that are not]. Letter case is ignored where that is what it takes:
    UCF101's HandstandPushups is spelt two ways."""
    found, missing, listing = {}, [], None
    for path in paths:
        if (root / path).is_file():
            found[path] = root / path
            continue
        if listing is None:                                                     # one walk, and only if it is needed
            listing = {str((Path(folder) / name).relative_to(root)).lower(): Path(folder) / name
                       for folder, _, files in os.walk(root) for name in files}
        if path.lower() in listing:
            found[path] = listing[path.lower()]
        else:
            missing.append(path)
    return found, missing


def sources(dataset, paths):
    """What each clip was cut from, so that cross-validation can keep it together: UCF101's group gGG of a class,
    HMDB51's and Diving48's original video; elsewhere each video is its own -> list of str."""
    pattern = {"toy": r"(.*_g\d+)_c\d+\.\w+", "ucf101": r"(.*_g\d+)_c\d+\.\w+", "hmdb51": r"(([^/]*)/.*?)_\2_.*",
               "diving48": r"(.*)_\d+\.\w+", "diving48v1": r"(.*)_\d+\.\w+"}.get(dataset, r"(.*)")
    return [match[1] if (match := re.fullmatch(pattern, path, re.DOTALL)) else path for path in paths]


def default_index(root):
    """Where the index of a data set is remembered: the user's cache, since the data set may not be writable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "time-equivariance"
    return cache / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"


def scan(split: Split, index=None, workers: int = 1, progress: bool = True) -> dict:
    """Count the frames of every video of a split by decoding it once; remember them in the JSON file `index`.

    An entry holds for one file size and modification time; a lost index, or half of one, is only made anew.
    -> {path: (frames, height, width, problem, packets)} for the files found, as `examine` finds them.
    ValueError: too many files are missing (MAX_BAD), or all; `index` is another file, or cannot be written.
    """
    total, missing = len(split.paths), split.missing
    if not split.found or len(missing) > MAX_BAD * total:
        where = f"looked for {total} listed videos in {split.root}" if total else f"looked for videos in {split.root}"
        first = f"; the first missing: {', '.join(missing[:3])}" if missing else ""
        raise ValueError(f"{split.title}: {where}, found {len(split.found)}{first}")
    index = Path(index or default_index(split.root))
    known = read_index(index)
    stamps = {path: stamp(file) for path, file in split.found.items()}
    todo = [path for path in split.found if known.get(path, [None])[0] != stamps[path]]
    if todo:
        try:
            write_json(index, known)                                            # rather than fail after hours
        except OSError as error:
            raise ValueError(f"cannot write {index}: {error.strerror}; give another --index") from None
    saved = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:                                   # decoding releases Python's lock
        counts = pool.map(examine, [str(split.found[path]) for path in todo])
        for path, count in zip(todo, tqdm(counts, f"scan {split.title}", len(todo), unit="video",
                                          disable=not progress or not todo)):
            known[path] = [stamps[path], *count]
            if time.monotonic() - saved > 60:                                   # a killed scan goes on where it was
                write_json(index, known)
                saved = time.monotonic()
    if todo:
        write_json(index, known)
    return {path: tuple(known[path][1:]) for path in split.found}


def read_index(file):
    """-> {path: entry}, what `scan` wrote; {} where nothing is, or a part of it. ValueError: it is another file."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    try:
        known = json.loads(text)
    except ValueError:
        known = {} if text.strip("\0")[:1] in ("", "{") else None               # a machine that lost power leaves \0
    if not isinstance(known, dict) or not all(isinstance(entry, list) for entry in known.values()):
        raise ValueError(f"{file} is no index of a scan, which would be written over it: give another --index")
    return {path: entry for path, entry in known.items() if len(entry) == 6}


def write_json(file, value, indent=None):
    """Write beside, then rename: a reader never sees half a file. ValueError: a number that JSON has no word for."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(value, indent=indent, allow_nan=False))
    beside.replace(file)


def unreadable(split, index):
    """{path: problem} of the videos that are not there or give not one frame."""
    known = {path: index.get(path, (0, 0, 0, "not found", "")) for path in split.paths}
    return {path: problem for path, (n, _, _, problem, _) in known.items() if n == 0}


def usable(split, index, T=16):
    """Which videos of a split can be trained on, and a report of the others in words -> list of paths, str.

    # paper silent: videos of fewer than T frames are left out of pre-training.
    ValueError: more than MAX_BAD of the videos are missing or unreadable, or too few are left.
    """
    bad = {path: problem for path, (n, _, _, problem, _) in index.items() if problem and n < T}
    short = [path for path, (n, *_) in index.items() if n < T and path not in bad]
    good = [path for path in split.paths if path in index and path not in bad and index[path][0] >= T]
    totals = {f"{dataset} {part} split {number}": counts[k] for (dataset, number), counts in PUBLISHED.items()
              for k, part in enumerate(("train", "test"))} | {"kinetics400": "around 240000"}     # Sec. 4
    published = f" (published: {totals[split.title]})" if split.title in totals else ""
    report = f"{split.title}: {len(split.paths)} videos{published}, {len(good)} usable"
    for what, names in (("missing", split.missing), ("unreadable", [f"{p} ({bad[p]})" for p in bad]),
                        (f"shorter than {T} frames", short)):
        if names:
            report += f"; {len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    if len(split.missing) + len(bad) > MAX_BAD * len(split.paths) or len(good) < 2:
        raise ValueError(f"{report}; too few to train on (at most {MAX_BAD:.0%} may be missing or unreadable)")
    return good, report


# ---------------------------------------------------------------------- the toy data set


TOY_CLASSES = ("Diagonal", "Horizontal", "Orbit", "Spin", "Split", "Stretch", "Vertical", "Zoom")


def toy_video(cls, rng, size=32):
    """One generated video whose class is the motion of its sprite -> (N, size, size, 3) uint8, 112 to 144 frames.

    Shape, colours, sizes, place and stripes are random and tell nothing about the class. What the pretext tasks need is
    - speed: every motion has the same natural period, 32 frames;
    - direction: the stripes drift downwards, and only downwards (a motion that merely repeats itself does not do:
      small networks stay at chance for hundreds of steps);
    - order: stripes and swings die down, to a quarter at the end. Contrast jitter and shuffling hardly hide that.
    It can show, in minutes on a CPU, that speed, direction, order and psi are learned. It cannot show instance
    discrimination (once augmented, the videos look alike: L_inst hardly falls) or transfer: the stripes alone solve the
    pretext tasks, the sprite's motion does not matter to them. Order can be told from the contrast of a single frame.
    """
    t = np.arange(rng.integers(112, 145))[:, None, None]                        # (N, 1, 1)
    phase = 2 * np.pi * (t / 32 + rng.random())                                 # one natural period
    energy = np.exp(-t / 96)                                                    # everything dies down
    a, b = energy * np.cos(phase), energy * np.sin(phase)                       # (N, 1, 1)  swings of the class
    side = rng.choice([-1, 1])                                                  # a mirror image is the same class
    motions = {"Diagonal": dict(x=a, y=side * a), "Horizontal": dict(x=a), "Orbit": dict(x=a, y=side * b),
               "Spin": dict(angle=2 * a), "Split": dict(x=(1 + a) / 2), "Stretch": dict(wide=a, high=-a),
               "Vertical": dict(y=a), "Zoom": dict(wide=a, high=a)}
    move = dict(x=0, y=0, angle=0, wide=0, high=0) | motions[cls]

    grid = np.arange(size) - (size - 1) / 2
    X, Y = grid[None, None, :] - rng.uniform(-3, 3), grid[None, :, None] - rng.uniform(-3, 3)
    angle = np.pi * rng.random() + move["angle"]
    shape, radius, thin = rng.integers(3), rng.uniform(5, 7), rng.uniform(0.5, 0.8)
    mask = 0
    for sign in (1, -1) if cls == "Split" else (1,):                            # Split: two sprites, mirror images
        dx, dy = (X - sign * 8 * move["x"]) / (1 + 0.6 * move["wide"]), (Y - 8 * move["y"]) / (1 + 0.6 * move["high"])
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, (np.cos(angle) * dy - np.sin(angle) * dx) / thin
        r = [np.hypot(u, v), 1.1 * np.maximum(abs(u), abs(v)), 0.8 * (abs(u) + abs(v))][shape]  # disc, box, diamond
        mask = np.maximum(mask, np.clip(radius - r + 0.5, 0, 1))                # (N, H, W)  1 inside, soft edge

    stripes = energy * np.sin(rng.uniform(-0.2, 0.2) * X + rng.uniform(0.7, 1) * Y - phase)     # (N, H, W)
    back = 128 - rng.uniform(40, 60) + rng.uniform(-12, 12, 3)                  # (3,)  dark ground, bright sprite
    fore = 128 + rng.uniform(40, 80) + rng.uniform(-45, 45, 3)
    ground = back + 60 * stripes[..., None]                                     # (N, H, W, 3)
    video = ground + mask[..., None] * (fore - ground)
    return np.clip(video + rng.normal(0, 2, (len(t), size, size, 1)), 0, 255).astype(np.uint8)


def make_toy(root):
    """The toy data set as files, made on first use, in the layout and list format of UCF101: 8 classes of 50 videos,
    288 for training and 112, of other groups, for testing. Written beside and renamed: it is whole or not there."""
    root, lists = Path(root), defaultdict(list)
    lists["classInd.txt"] = [f"{k} {cls}" for k, cls in enumerate(TOY_CLASSES, 1)]
    if root.exists():
        known = root / "ucfTrainTestlist" / "classInd.txt"
        if not known.is_file() or known.read_text(errors="replace").splitlines() != lists["classInd.txt"]:
            raise ValueError(f"{root} is there, but is not the toy set: say with --dataset which it is, or give that "
                             "another --data")
        return
    beside = root.with_name(f"{root.name}.{os.getpid()}")
    try:
        for n in tqdm(range(400), f"make {root}", unit="video"):
            cls, group, clip = TOY_CLASSES[n % 8], n // 8 % 25 + 1, n // 200 + 1    # UCF101's test split 1: groups 1-7
            path = f"{cls}/v_{cls}_g{group:02d}_c{clip:02d}.avi"
            write_video(beside / path, toy_video(cls, np.random.default_rng(n)))
            lists["testlist01.txt" if group < 8 else "trainlist01.txt"].append(path)
        (beside / "ucfTrainTestlist").mkdir()
        for name, lines in lists.items():
            (beside / "ucfTrainTestlist" / name).write_text("\n".join(lines) + "\n")
        beside.replace(root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)                               # where it was interrupted


def write_video(file, frames, rate=25):
    """uint8 (N, H, W, 3) -> an MPEG-4 file of high quality."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate, options={"flags": "+qscale", "global_quality": "236"})    # q = 2
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


# ---------------------------------------------------------------------- augmentation S (Sec. 3.4)

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)   # paper silent: torchvision's video networks'

# paper silent: no figures for crop and colour; area from the authors' earlier code, colour from SimCLR [10], no blur
CROP = v2.RandomResizedCrop(1, scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3))
JITTER, JITTERED, GREY = v2.ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8, 0.2            # the last two: probabilities


@contextmanager
def seeded(seed):
    """Inside, torch's random numbers on the CPU are a function of seed alone; afterwards they go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def draw_view(height, width, seed):
    """The spatial part of σ ~ S: a random resized crop and a flip -> (top, left, height, width) as shares, bool."""
    with seeded(seed):
        crop = CROP.make_params([torch.empty(1, height, width, device="meta")])
        flip = torch.rand(()).item() < 0.5
    return (crop["top"] / height, crop["left"] / width, crop["height"] / height, crop["width"] / width), flip


def brightness(x, factor):
    return x * factor


def contrast(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x).mean((-3, -2, -1), keepdim=True), x, factor)


def saturation(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x), x, factor)


def hue(x, shift):
    """Darkest and brightest value stay; the third follows from HSV's angle h, in sixths of a turn: red 0, green 2."""
    red, green, blue = x.split(1, dim=-3)
    high = torch.maximum(torch.maximum(red, green), blue)                       # amax is slow over so few
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    h = torch.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    h = torch.where(high == red, green - blue, h).div_(chroma.clamp(min=1e-6)).add_(6 * shift)
    away = torch.cat([h, h - 2, h - 4], dim=-3)                                 # from red, green and blue: a value is
    return away.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)   # high up to 1 away, low from 2 on


COLOURS = brightness, contrast, saturation, hue                                 # in the order of ColorJitter


def draw_colour(seed):
    """The colour part of σ, as torchvision's ColorJitter and RandomGrayscale draw it.

    -> [(place in COLOURS, factor or shift), ...] in the order in which they are applied: at most five.
    """
    with seeded(seed):
        steps = []
        if torch.rand(()) < JITTERED:
            drawn = JITTER.make_params([])
            steps = [(k, drawn[f"{COLOURS[k].__name__}_factor"]) for k in drawn["fn_idx"].tolist()]
        return steps + [(COLOURS.index(saturation), 0.0)] * (torch.rand(()).item() < GREY)


def colour(clips: torch.Tensor, seeds: list) -> torch.Tensor:
    """The colour part of σ ~ S, constant over a clip, drawn for each clip on its own; then the network's input.

    clips: uint8 (N, T, 3, H, W) on any device, which is not waited for; seeds: N ints -> float32 (N, 3, T, H, W).
    Equals torchvision's v2 on floats (on uint8, which v2 cuts off after each step, it is 1.1 of 255 darker on average).
    """
    few = max(1, 2 ** 20 // clips[0].numel()) if clips.device.type == "cpu" else len(clips)     # what fits its cache
    return torch.cat([normalise(jitter(part, seeds[few * k:])) for k, part in enumerate(clips.split(few))])


def jitter(clips, seeds):
    """`colour` before normalisation: in the n-th round, each clip's n-th step -> float32 (N, T, 3, H, W), 0 ... 255."""
    rounds = defaultdict(list)
    for clip, seed in zip(range(len(clips)), seeds):
        for n, (k, factor) in enumerate(draw_colour(seed)):
            rounds[n, k].append((clip, factor))
    drawn = sum(rounds.values(), [])
    drawn = torch.tensor(drawn, pin_memory=clips.is_cuda).view(len(drawn), 2).to(clips.device, non_blocking=True)
    parts = dict(zip(rounds, drawn.split([len(part) for part in rounds.values()])))
    x = clips.contiguous().float()                                              # colours apart are quicker to work on
    for n, k in sorted(rounds):
        row, factor = parts[n, k].unbind(1)
        row, factor = row.long(), factor.view(-1, 1, 1, 1, 1)
        x[row] = COLOURS[k](x[row], factor).clamp_(0, 255)
    return x


def augmented(batch):
    """The network's input, with the colour part of σ: uint8 (B, n, T, 3, H, W) -> float32 (B, n, 3, T, H, W)."""
    clips, seeds = batch["clips"], batch["seed"].flatten().tolist()
    return colour(clips.flatten(0, 1), seeds).unflatten(0, clips.shape[:2])


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """uint8 or float (N, T, 3, H, W) of 0 ... 255 -> float32 (N, 3, T, H, W), channels last in memory."""
    planes = [(x - 255 * mean) / (255 * std) for x, mean, std in zip(clips.unbind(2), MEAN, STD)]   # (N, T, H, W)
    return torch.stack(planes, dim=-1).movedim(-1, 1)


# ---------------------------------------------------------------------- batches for pre-training


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, videos):
    """The order in which an epoch visits the videos, each once (# paper silent)."""
    return np.random.default_rng([seed, epoch]).permutation(videos)


class Videos(torch.utils.data.Dataset):
    """What the scan knows of some videos, in flat arrays that all loader processes share: files, shapes (frames,
    height, width), packets one after the other; zeros for what is not there. split, index: of load_split and scan."""

    def __init__(self, split, paths, index):
        entries = [index.get(path, (0, 0, 0, "", "")) for path in paths]
        self.files = np.array([os.fsencode(split.found.get(path, "")) for path in paths])
        self.shapes = np.array([entry[:3] for entry in entries])
        self.packets = torch.tensor(np.frombuffer("".join(entry[4] for entry in entries).encode(), np.uint8))
        self.bounds = np.cumsum([0, *(len(entry[4]) for entry in entries)])     # of each one's packets

    def __len__(self):
        return len(self.files)

    def decode(self, v, frames, size, boxes=None):
        """`decode` of video v"""
        packets = self.packets[self.bounds[v]:self.bounds[v + 1]].numpy().tobytes()
        return decode(os.fsdecode(self.files[v]), frames, size, boxes, packets)


class Pairs(Videos):
    """Groups of two videos under one relative transformation (Fig. 3), by (epoch, group).

    What is drawn is a function of (seed, epoch, group): workers and processes do not change it. equivariance (Table 1
    b-d): what the two videos of a group share; "temporal": pq; "spatial": the views (crop box and flip) of p and of q,
    with one τ for both clips of a video, each video its own, and no labels of τ; "both"; # paper silent: colour is each
    clip's own. clips: 2, p and q; or 4, p and q once more under another σ (Fig. 5).
    """

    def __init__(self, split, paths, index, T=16, size=128, speeds=(1, 2, 4, 8), seed=0, equivariance="temporal",
                 clips=2):
        super().__init__(split, paths, index)
        self.T, self.size, self.speeds, self.seed = T, size, speeds, seed
        self.equivariance, self.clips = equivariance, clips

    def __len__(self):
        return len(self.files) // 2

    def __getitem__(self, key):
        """-> dict: clips, 2n of uint8 (T, 3, H, W), n = self.clips; tensors, a row a video, colour seeds (2, n), video,
        pq and order (2,), and of p and q speed, direction and first source frame start (2, 2); failed: [(file,
        problem)] of the videos replaced."""
        epoch, group = key
        order = epoch_order(self.seed, epoch, len(self.files))
        videos, failed = list(order[2 * group:2 * group + 2]), []
        rng = random.Random(repr((self.seed, epoch, group)))
        while len(failed) < 10:
            lengths = [int(self.shapes[v, 0]) for v in videos]
            if self.equivariance == "spatial":                                  # Sec. 4.1: "consistent temporal ..."
                pairs, labels = [(tau, tau) for tau in (sample_tau(n, self.T, self.speeds, rng) for n in lengths)], {}
            else:
                pairs, labels = sample_pair(lengths, self.T, self.speeds, rng)
            if self.equivariance != "temporal":
                labels["pq"] = epoch * len(self) + group                        # continuous views: no two groups' agree
            shared = [rng.getrandbits(63) for _ in range(self.clips)]
            clips, seeds = [], []
            try:
                for v, pair in zip(videos, pairs):
                    own = [rng.getrandbits(63) for _ in range(self.clips)]
                    height, width = self.shapes[v if self.equivariance == "temporal" else videos[0], 1:]
                    views = [draw_view(int(height), int(width), seed)
                             for seed in (own if self.equivariance == "temporal" else shared)]
                    clips += self.read(v, pair, views)
                    seeds.append([rng.getrandbits(63) for _ in range(self.clips)])
            except VideoError as error:                                         # a deterministic replacement
                failed.append((os.fsdecode(self.files[v]), str(error)))
                others = [w for w in range(len(self.files)) if w not in videos]
                if not others:
                    break
                videos[videos.index(v)] = rng.choice(others)
                continue
            two = dict(clips=clips, seed=torch.tensor(seeds), video=torch.tensor([int(v) for v in videos]),
                       start=torch.tensor([[tau.start for tau in pair] for pair in pairs]))
            return two | {name: torch.tensor([label, label]) for name, label in labels.items()} | dict(failed=failed)
        raise VideoError(f"{len(failed)} videos in a row are unreadable, the last: {failed[-1][1]}")

    def read(self, v, pair, views):
        """All clips of video v from one decode, p, q and perhaps again p, q -> n of uint8 (T, 3, size, size)."""
        frames = [n for tau in pair for n in tau.frames(self.T)] * (self.clips // 2)    # nT frame numbers
        boxes = [box for box, _ in views for _ in range(self.T)]                # nT boxes: constant over a clip
        clips = self.decode(v, frames, self.size, boxes).unflatten(0, (-1, self.T))
        return [clip.flip(-1) if flip else clip for clip, (_, flip) in zip(clips, views)]


def collate(items):
    """The rows of all items -> one batch. A loader's process writes the clips only once, into memory that it shares.
    The three values of a pixel stay side by side, as decoded, until they are on the network's device: to sort them
    here would take 3 ms a pair."""
    batch = {name: torch.cat([item[name] for item in items]) for name in items[0] if name not in ("clips", "failed")}
    clips = torch.utils.data.default_collate([clip.movedim(1, 3) for item in items for clip in item["clips"]])
    clips = clips.movedim(4, 2).unflatten(0, batch["seed"].shape)               # (B, n, T, 3, H, W) or (B, T, 3, H, W)
    return batch | dict(clips=clips, failed=[video for item in items for video in item["failed"]])


def step_loader(dataset, items, first, last, workers=0, rank=0, world=1):
    """Batches of the steps first ... last - 1, over all epochs; process `rank` of `world` gets its share of each.

    items: groups (Pairs) or clips (Clips) in a global batch, which is the same whatever the number of processes.
    # paper silent: the rest of an epoch, fewer than `items`, is left out.
    """
    steps, share = len(dataset) // items, items // world                        # steps in an epoch, items of a process
    keys = ([(step // steps, step % steps * items + rank * share + k) for k in range(share)]
            for step in range(first, last))
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=torch.cuda.is_available(),
        timeout=10 * PATIENCE if workers else 0, worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """Schedulers send SIGTERM and SIGUSR1 to every process, terminals SIGINT; the main process alone decides what
    follows, and ends its loaders' processes itself (common.run)."""
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


# ---------------------------------------------------------------------- clips for judging (Sec. 3.4, 4)


class Clips(Videos):
    """Labelled clips for fine-tuning, by (epoch, place): one random clip of each video an epoch, as in transfer:
    `step` source frames apart or what fits, forwards. What is drawn is a function of (seed, epoch, place)."""

    def __init__(self, split, paths, index, T=16, size=128, step=4, seed=0):
        super().__init__(split, paths, index)
        label = dict(zip(split.paths, split.labels))
        self.labels = np.array([label[path] for path in paths])
        self.T, self.size, self.step, self.seed = T, size, step, seed

    def __getitem__(self, key):
        """-> dict: clips [uint8 (T, 3, H, W)]; label, colour seed, video (1,); failed: [(file, problem)] replaced."""
        epoch, place = key
        v, failed = int(epoch_order(self.seed, epoch, len(self.files))[place]), []
        rng = random.Random(repr((self.seed, epoch, place)))
        while len(failed) < 10:
            length, height, width = map(int, self.shapes[v])
            step = fitting_step(length, self.T, self.step)
            start = rng.randint(0, max(0, length - 1 - step * (self.T - 1)))
            box, flip = draw_view(height, width, rng.getrandbits(63))
            try:
                frames = [min(start + step * t, length - 1) for t in range(self.T)]
                clip = self.decode(v, frames, self.size, [box] * self.T)
            except VideoError as error:
                failed.append((os.fsdecode(self.files[v]), str(error)))
                v = rng.randrange(len(self.files))
                continue
            return dict(clips=[clip.flip(-1) if flip else clip], label=torch.tensor([self.labels[v]]),
                        seed=torch.tensor([rng.getrandbits(63)]), video=torch.tensor([v]), failed=failed)
        raise VideoError(f"{len(failed)} videos in a row are unreadable, the last: {failed[-1][1]}")


class Windows(Videos):
    """Each video's evenly spaced test windows, all from one decode, whole frames at short side size * 8 / 7.

    # paper silent: 8/7, the field's 128 for 112; a frame is larger than the crop, so that the crops differ.
    """

    def __init__(self, split, index, T=16, size=128, step=4, windows=10):
        super().__init__(split, split.paths, index)
        bad = unreadable(split, index)
        self.problems = {v: bad[path] for v, path in enumerate(split.paths) if path in bad}
        self.T, self.side, self.step, self.windows = T, round(size * 8 / 7), step, windows

    def __getitem__(self, v):
        """-> v, uint8 (windows, T, 3, h, w) and "", or None and the problem: nothing is ever replaced."""
        if v in self.problems:
            return v, None, self.problems[v]
        frames = sum(eval_windows(int(self.shapes[v, 0]), self.T, self.step, self.windows), [])
        try:
            clips = self.decode(v, frames, self.side)
            return v, clips.unflatten(0, (-1, self.T)), ""
        except VideoError as error:
            return v, None, reason(error, os.fsdecode(self.files[v]))


# ---------------------------------------------------------------------- python data.py preview


def preview(argv):
    """Figure 2 from a user's own videos: a group of two as the network gets them, what was drawn written beside."""
    from common import checked, list_and_scan, shared_parser                    # here, since common imports this module
    parser, _ = shared_parser(preview.__doc__, argv)
    parser.prog = "data.py preview"
    parser.set_defaults(out="figure2.png")
    parser.add_argument("--group", type=int, default=0, help="which group of two videos of the first epoch")
    args = checked(parser, argv)
    if not args.out.lower().endswith((".png", ".jpg")):
        parser.error(f"--out must end in .png or .jpg, but is {args.out}")
    split, index = list_and_scan(args, args.split, "train")
    paths, report = usable(split, index, args.frames)
    pairs = Pairs(split, paths, index, args.frames, args.size, seed=args.seed)
    if not 0 <= args.group < len(pairs):
        raise ValueError(f"--group must lie between 0 and {len(pairs) - 1}, but is {args.group}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    TF.to_pil_image(figure2(pairs, collate([pairs[0, args.group]]))).save(args.out)
    print(f"{report}\n{args.out}: group {args.group}")


def figure2(pairs, group, cell=96):
    """uint8 (3, height, width): for each video of a group its time line with clips p and q, and their frames below."""
    T, speeds = pairs.T, pairs.speeds
    width, clips = T * (cell + 2), colour(group["clips"].flatten(0, 1), group["seed"].flatten().tolist())
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (MEAN, STD))
    clips = ((clips * std + mean).clamp(0, 1) * 255).to(torch.uint8).transpose(1, 2).unflatten(0, (2, 2))
    order = ("p before q", "p after q", "p and q overlap")[group["order"][0]]
    shift = (group["start"][0, 1] - group["start"][0, 0]).item()
    rows = [caption(width, f"one relative transformation pq: shift from p to q {shift:+d} frames, {order}")]
    for n in range(2):
        v = group["video"][n].item()
        length = int(pairs.shapes[v, 0])
        line = torch.full((3, 34, width), 235, dtype=torch.uint8)               # the time line of the whole video
        taus = [Tau(start, speeds[speed], bool(direction)) for start, speed, direction in
                zip(*(group[name][n].tolist() for name in ("start", "speed", "direction")))]
        strips = []
        for k, (tau, name, tint) in enumerate(zip(taus, "pq", ((40, 90, 200), (220, 150, 0)))):
            left, right = (round(x / length * (width - 1)) for x in (tau.start, tau.end(T) + 1))
            line[:, 4 + 14 * k:16 + 14 * k, left:right + 1] = torch.tensor(tint, dtype=torch.uint8)[:, None, None]
            way = "<- backward" if tau.reverse else "forward ->"
            told = f"{name}: {tau.speed}x, {way}, source frames {tau.start} to {tau.end(T)}"
            strips.append(caption(width, told, tint))
            frames = TF.resize(clips[n, k], [cell, cell], InterpolationMode.NEAREST)            # (T, 3, cell, cell)
            strips.append(torch.cat([TF.pad(frame, [1, 1], fill=list(tint)) for frame in frames], dim=2))
        name = os.fsdecode(os.path.basename(pairs.files[v]))
        rows += [caption(width, f"{name}, {length} frames"), line, *strips, caption(width, "")]
    return torch.cat(rows, dim=1)


def caption(width, text, tint=(0, 0, 0), height=20):
    """A line of text on white -> uint8 (3, height, width)."""
    blank = torch.full((3, height, width), 255, dtype=torch.uint8)
    return draw_bounding_boxes(blank, torch.tensor([[0, 0, 1, 1]]), [text], ["white"], label_colors=[tint])


# ---------------------------------------------------------------------- python data.py shrink

REPORT, WORK = "shrink.jsonl", ".shrinking"     # in DST: settings and what went wrong; files that are not whole yet


def shrink(argv):
    """A data set once more, small and quick to read: same tree, same names, same frames; what is no video is copied.

    Each video becomes MPEG-4 in MP4, whatever its suffix says: FFmpeg, and so every reader here, goes by a file's
    content. The same command goes on where it was stopped. DST/shrink.jsonl lists what could not be read, and why.
    """
    from common import Formatter, log_json                                      # here, since common imports this module
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


if __name__ == "__main__":
    import data                                         # common's errors are those of `data`, not of `__main__`
    from common import run
    commands = dict(preview=data.preview, shrink=data.shrink)
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python data.py {{{','.join(commands)}}} ... (--help after the command says more)\n"
                 "preview: draw a group of two videos as the network gets it; shrink: make a data set small")
    run(lambda: commands[sys.argv[1]](sys.argv[2:]))
