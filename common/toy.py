"""The toy data set: generated videos, as files, on which the method can be seen at work in minutes on a CPU.

The class of a video is one of 4 patterns in one of 8 flows of the whole picture: what is seen times how it moves, as in
UCF101. Pitch, places, angle, grey and contrast are drawn anew for each video. What the pretext tasks need is the flow's
- speed: the strokes of every flow take 32 frames;
- direction: each stroke starts fast and slows down;
and fading contrast, which tells order. Grey and without a background, since L_inst is solved by colours or backgrounds
where there are any, and nothing else is learned then.

It can show that the temporal tasks bring the flow, L_inst the pattern, and all together both: Table 1 in miniature, in
minutes on a CPU. It cannot show what is learned of natural videos, or which of two rows is better by a few points.
What one middle frame tells, by logistic regression on its pixels, and on the magnitude of its Fourier transform: the
class of 5.7 % and 17.7 % of the test videos (chance 3.1 %), the pattern 27 % and 98 % (25 %), the flow 14 % and 13 %
(12.5 %): to know the flow is to see the motion.
"""
import math
import os
import shutil
from collections import defaultdict
from itertools import product
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

PATTERNS = ("Blobs", "Checks", "Rings", "Stripes")
FLOWS = ("Drift", "Orbit", "Shear", "Stretch", "Sway", "Swirl", "Wobble", "Zoom")
MADE_OF = {pattern + flow: (pattern, flow) for pattern in PATTERNS for flow in FLOWS}
TOY_CLASSES = tuple(MADE_OF)
VIDEOS = tuple(product(TOY_CLASSES, range(1, 9), range(1, 3)))      # class, group, clip
TEST_GROUPS = 3                                 # the first groups are for testing, as in UCF101
STROKE = 32                                     # frames of one stroke of any flow: natural speed
EASE = 1.2                                      # a stroke ends e^EASE times slower than it starts: direction
FADE = 110                                      # frames in which contrast falls to 1/e: order
TILE = 24                                       # pixels after which blobs and rings repeat


def toy_video(cls, rng, size=32):
    """One video of a class of TOY_CLASSES -> uint8 (N, size, size, 3), 112 to 144 grey frames.

    Points are complex numbers z = x + iy: to turn them is to multiply them.
    """
    pattern, flow = MADE_OF[cls]
    t = np.arange(rng.integers(112, 145), dtype=np.float32)[:, None, None]      # (N, 1, 1)
    done, swing = strokes(t / STROKE + rng.random())
    pixels = np.arange(size, dtype=np.float32) - (size - 1) / 2
    z = pixels - rng.uniform(-4, 4) + 1j * (pixels[:, None] - rng.uniform(-4, 4))       # (H, W)
    z = rng.choice([z.conj(), z])                                               # a mirror image is the same class
    turn, turn_pattern = np.exp(2j * np.pi * rng.random(2)).tolist()
    z = flow_back(flow, z * turn, done, swing) * turn_pattern                   # (N, H, W)
    contrast = rng.uniform(45, 65) * np.exp(-t / FADE)
    grey = rng.uniform(110, 145) + contrast * paint(pattern, z, rng)
    grey += 2 * rng.standard_normal(grey.shape, np.float32)
    return np.clip(grey, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)


def strokes(clock):
    """How far a flow has come: strokes done, and a swing from -1/2 to 1/2 and back. clock: the same at even speed."""
    begun = np.floor(clock)
    share = np.expm1(EASE * (begun - clock)) / math.expm1(-EASE)                # of a stroke: from 0 fast, to 1 slowly
    return begun + share, np.where(begun % 2 == 0, share, 1 - share) - 0.5


def flow_back(flow, z, done, swing):
    """Which points of the pattern are seen at the points z of the picture: complex (H, W) -> (N, H, W)."""
    grow = np.exp(0.7 * swing)
    return {
        "Drift": z - 10 * done,
        "Orbit": z - 6 * np.exp(0.5j * np.pi * done),
        "Shear": z + swing * z.imag,
        "Stretch": grow * z.real + 1j * z.imag / grow,
        "Sway": z - 12 * swing,
        "Swirl": z * np.exp(0.9j * done),
        "Wobble": z * np.exp(1.1j * swing),
        "Zoom": z * grow,
    }[flow]


def paint(pattern, z, rng):
    """A pattern's brightness at its points z, about -1 ... 1; its pitch, or where its blobs are, is drawn."""
    x, y, pitch = z.real, z.imag, rng.uniform(0.55, 0.75)
    if pattern == "Checks":
        return 0.8 * np.tanh(3 * np.sin(pitch * x)) * np.tanh(3 * np.sin(pitch * y))
    if pattern == "Stripes":
        return np.sin(1.2 * pitch * x) * (0.75 + 0.5 * np.sin(0.5 * pitch * y))
    if pattern == "Rings":
        return np.cos(1.3 * pitch * radius(z))
    blobs = [(rng.uniform(0, TILE), rng.uniform(0, TILE), rng.choice([-1, 1])) for _ in range(5)]
    return sum(1.3 * int(sign) * np.exp(-radius(z - (a + 1j * b)) ** 2 / 14) for a, b, sign in blobs)


def radius(z):
    """The distance of points from the middle of the tile in which they lie."""
    return abs(z - TILE * np.rint(z / TILE))


def make_toy(root):
    """The toy data set as files, made on first use, in the layout and list format of UCF101: of each class 6 videos
    (groups 1 to 3) for testing, 10 (groups 4 to 8) for training. The two clips of a group have nothing in common but
    the class. Written beside and renamed: it is whole or not there. ValueError: something else is there."""
    root = Path(root)
    lists = defaultdict(list, {"classInd.txt": [f"{k} {cls}" for k, cls in enumerate(TOY_CLASSES, 1)]})
    if root.exists():
        known = root / "ucfTrainTestlist" / "classInd.txt"
        if known.is_file() and known.read_text(errors="replace").splitlines() == lists["classInd.txt"]:
            return
        raise ValueError(f"{root} is not the toy set: say with --dataset what it is, give another --data, or remove it")
    beside = root.with_name(f"{root.name}.{os.getpid()}")
    try:
        for seed, (cls, group, clip) in enumerate(tqdm(VIDEOS, f"make {root}", unit="video")):
            path = f"{cls}/v_{cls}_g{group:02d}_c{clip:02d}.avi"
            write_video(beside / path, toy_video(cls, np.random.default_rng(seed)))
            lists["testlist01.txt" if group <= TEST_GROUPS else "trainlist01.txt"].append(path)
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
