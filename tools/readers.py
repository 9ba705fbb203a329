"""Ways from a video file to frames: ours, an older checkout's, other libraries', and the floor; see benchmark.py.

A reader takes a video, frame numbers and a box for each frame, as common.video.decode does, and gives uint8
(N, 3, SIZE, SIZE); without boxes the frames as they are, (N, 3, H, W).
"""
import functools
import importlib
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import functional as TF

from common.pictures import converter
from common.video import decode, open_container
from data import draw_view, sample_pair

T, SIZE = 16, 128                                                               # of a clip (Sec. 3.4)


class Video(NamedTuple):
    path: str
    length: int                                                                 # frames
    height: int
    width: int
    packets: str                                                                # what the scan knows of the file
    kind: str                                                                   # its figures are averaged with others'


def draw_request(video, seed):
    """What a training step asks of a video (data.Pairs): 2T frame numbers, and a box for each."""
    rng = random.Random(seed)
    pairs, _ = sample_pair([video.length], T, rng=rng)
    frames, boxes = [], []
    for tau in pairs[0]:
        box, _ = draw_view(video.height, video.width, rng.getrandbits(63))
        frames += tau.frames(T)
        boxes += [box] * T
    return frames, boxes


# ---- Readers ----

def ours(video, frames, boxes=None):
    return decode(video.path, frames, SIZE if boxes else None, boxes, video.packets)


def older(checkout, video, frames, boxes=None):
    """The reader of another checkout of this project, in the folder `checkout`, with what its own scan knows."""
    packets = scanned_by(checkout, video.path)
    return reader_of(checkout).decode(video.path, frames, SIZE if boxes else None, boxes, packets)


@functools.cache
def reader_of(checkout):
    """The module of a checkout that has `examine` and `decode`: common.video, or data before there was one."""
    names = {"common/video.py": "common.video", "data.py": "data"}
    there = [name for file, name in names.items() if (Path(checkout) / file).is_file()]
    if not there:
        raise ValueError(f"{checkout} is no checkout of this project: it has neither common/video.py nor data.py")
    mine = {name: sys.modules.pop(name) for name in list(sys.modules) if is_of_a_checkout(name)}
    sys.path.insert(0, str(Path(checkout).resolve()))
    try:
        return importlib.import_module(there[0])
    finally:
        sys.path.pop(0)
        for name in filter(is_of_a_checkout, list(sys.modules)):
            del sys.modules[name]
        sys.modules.update(mine)


def is_of_a_checkout(module):
    """Whether a checkout has a module of its own by this name."""
    return module.split(".")[0] in ("common", "data")


@functools.cache
def scanned_by(checkout, path):
    return reader_of(checkout).examine(path)[4]


def naive(video, frames, boxes=None):
    """Decode everything, convert everything, then choose: what most published loaders do."""
    images = [frame.to_ndarray(format="rgb24") for frame in sequential(video.path)]
    return resized(channels_first(np.stack(images))[frames], boxes)


def sequential(path):
    """av.VideoFrame after av.VideoFrame, in one thread: all that PyAV makes of the first video stream."""
    with open_container(path) as container:
        container.streams.video[0].thread_type = "NONE"
        yield from container.decode(video=0)


def decord(video, frames, boxes=None):
    package = importlib.import_module("decord")
    numbers = sorted(set(frames))
    reader = package.VideoReader(video.path, ctx=package.cpu(0), num_threads=1)
    images = channels_first(reader.get_batch(numbers).asnumpy())
    return resized(images[[numbers.index(n) for n in frames]], boxes)


def torchcodec(video, frames, boxes=None):
    package = importlib.import_module("torchcodec.decoders")
    numbers = sorted(set(frames))
    reader = package.VideoDecoder(video.path, seek_mode="exact", num_ffmpeg_threads=1)
    images = reader.get_frames_at(numbers).data
    return resized(images[[numbers.index(n) for n in frames]], boxes)


def opencv(video, frames, boxes=None, smooth=True):
    """Stops at the last frame asked for, converts only those asked for, and scales them, smoothing as the others do,
    before it swaps the colours."""
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)
    found = opencv_frames(cv2, video.path, set(frames))
    images = []
    for place, n in enumerate(frames):
        image = found[n]
        if boxes:
            top, left, height, width = pixels(boxes[place], *image.shape[:2])
            how = cv2.INTER_AREA if smooth else cv2.INTER_LINEAR
            image = cv2.resize(image[top:top + height, left:left + width], (SIZE, SIZE), interpolation=how)
        images.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    return channels_first(np.stack(images))


def opencv_rough(video, frames, boxes=None):
    """cv2.resize at its default, which does not smooth: small pictures show patterns that are not there."""
    return opencv(video, frames, boxes, smooth=False)


def opencv_frames(cv2, path, wanted):
    """{n: BGR picture} of the frames wanted."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    found = {}
    for n in range(max(wanted) + 1):
        if not capture.grab():
            raise ValueError(f"frame {max(wanted)} was asked for, but only {n} frames come")
        if n in wanted:
            _, found[n] = capture.retrieve()
    return found


def channels_first(images):
    """uint8 (N, H, W, 3) of numpy -> (N, 3, H, W) of torch, without a copy."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def pixels(box, height, width):
    """A box in shares of the picture -> top, left, height, width in pixels."""
    return [round(share * side) for share, side in zip(box, (height, width, height, width))]


def resized(images, boxes):
    """uint8 (N, 3, H, W), clip after clip of T frames -> cropped and scaled by torchvision, a clip at a time."""
    if boxes is None:
        return images
    clips = []
    for clip, box in zip(images.split(T), boxes[::T]):
        clips.append(TF.resized_crop(clip, *pixels(box, *clip.shape[2:]), [SIZE, SIZE], antialias=True))
    return torch.cat(clips)


READERS = dict(ours=ours, naive=naive, decord=decord, torchcodec=torchcodec, opencv=opencv, opencv_rough=opencv_rough)
PACKAGES = dict(decord="decord", torchcodec="torchcodec.decoders", opencv="cv2", opencv_rough="cv2")


def installed(checkout=None):
    """The readers whose package loads, and that of an older checkout -> {name: reader}, {name: why it is left out}."""
    readers, absent = dict(READERS), {}
    for name in READERS.keys() & PACKAGES.keys():
        try:
            importlib.import_module(PACKAGES[name])
        except ModuleNotFoundError:
            absent[name] = "not installed"
        except (ImportError, OSError, RuntimeError):
            absent[name] = "installed, but does not load"
    for name in absent:
        del readers[name]
    if checkout:
        reader_of(checkout)
        readers["old"] = functools.partial(older, checkout)
    return readers, absent


def versions(readers):
    """{reader: the version of its package}"""
    packages = {name: PACKAGES[name].split(".")[0] for name in readers if name in PACKAGES}
    return {name: importlib.import_module(package).__version__ for name, package in packages.items()}


def exactness(reader, video, seeds):
    """Of the frames that these draws ask for, how many are those of a sequential decode -> right, asked.

    Conversions to RGB differ a little; a frame is the right one if it is within 3 grey levels, and not nearer to one
    of its neighbours, as far as these differ.
    """
    torch.set_num_threads(1)
    asked = sorted({n for seed in seeds for n in draw_request(video, seed)[0]})
    needed = {n + step for n in asked for step in (-1, 0, 1)}
    truth = {}
    for n, frame in enumerate(sequential(video.path)):
        if n in needed:
            truth[n] = frame.to_ndarray(format="rgb24").astype(np.int16)
    given = reader(video, asked).permute(0, 2, 3, 1).numpy()
    return sum(is_frame(image, n, truth) for n, image in zip(asked, given)), len(asked)


def is_frame(image, n, truth):
    """Whether a picture is frame n, and neither the one before nor the one after; truth: {number: picture}."""
    off = difference(image, truth[n])
    if off >= 3:
        return False
    for other in (n - 1, n + 1):
        if other in truth and off > difference(image, truth[other]) + difference(truth[n], truth[other]) / 2:
            return False
    return True


def difference(a, b):
    return float(np.abs(a - b).mean())


# ---- The floor ----

class Floor:
    """avcodec alone: packets kept in memory, a decoder that is open; of each group of pictures with a frame asked for,
    all up to the last of these; what neither is asked for nor referred to is passed over. No picture is touched; or,
    with `pictures`, those asked for are cropped, scaled and converted as common.video does it, and left where they are.
    """

    def __init__(self, video, pictures=False):
        self.pictures = pictures
        self.container = open_container(video.path)
        stream = self.container.streams.video[0]
        self.codec = stream.codec_context
        self.codec.thread_type, self.codec.copy_opaque = "NONE", True
        self.packets = [packet for packet in self.container.demux(stream) if packet.size]
        for k, packet in enumerate(self.packets):
            packet.opaque = (k,)                                                # the frame that it becomes has it, too
        self.packet_of = []                                                     # frame number -> packet number
        for packet in [*self.packets, None]:
            self.packet_of += [frame.opaque[0] if frame.opaque else -1 for frame in self.codec.decode(packet)]
        self.codec.flush_buffers()
        self.start = self.starts()

    def starts(self):
        """Where the decode of each packet starts: at a key frame after which nothing is shown that was before it."""
        shown = np.full(len(self.packets), len(self.packets))
        shown[self.packet_of] = np.arange(len(self.packet_of))
        first_after = np.minimum.accumulate(shown[::-1])[::-1]
        is_key = np.array([packet.is_keyframe for packet in self.packets])
        numbers = np.arange(len(self.packets))
        return np.maximum.accumulate(np.where(is_key & (first_after == shown), numbers, 0)).tolist()

    def gives(self, requests):
        """Whether all the frames of these requests come: not where a packet holds two pictures, as DivX packs them."""
        return all(self(None, frames, boxes) == len(set(frames)) for frames, boxes in requests)

    def __call__(self, video, frames, boxes):
        """-> how many of the frames came"""
        boxes_of = defaultdict(set)                                             # packet number -> boxes
        for n, box in zip(frames, boxes):
            boxes_of[self.packet_of[n]].add(box)
        came, converters = 0, {}
        for packet, frame in self.decoded(boxes_of.keys()):
            came += 1
            if self.pictures:
                for box in boxes_of[packet]:
                    if box not in converters:
                        converters[box] = converter(frame, SIZE, box)
                    converters[box](frame)
        return came

    def decoded(self, wanted):
        """(packet number, av.VideoFrame) for the packets wanted."""
        ends = {}                                                               # where a decode starts -> where it ends
        for k in sorted(wanted):
            ends[self.start[k]] = k
        for first, last in ends.items():
            for k in range(first, last + 1):
                self.codec.skip_frame = "DEFAULT" if k in wanted else "NONREF"
                yield from self.those(wanted, self.codec.decode(self.packets[k]))
            yield from self.those(wanted, self.codec.decode(None))              # what is still inside
            self.codec.flush_buffers()

    def those(self, wanted, frames):
        for frame in frames:
            if frame.opaque and frame.opaque[0] in wanted:
                yield frame.opaque[0], frame
