"""The toy data set: generated videos on which a CPU shows the method at work in minutes.

The class of a video is one of 4 patterns moving in one of 8 flows of the whole frame: appearance
times motion, as in UCF101. Pitch, positions, angle, grey level and contrast are drawn for each
video. The flow holds what the pretext tasks need:
- speed: a stroke of any flow takes 32 frames;
- direction: a stroke starts fast and slows down;
- order: contrast fades, whatever the flow.
Videos are grey and have no background: colours or backgrounds alone would solve L_inst, and the
network would learn nothing else.

One frame does not give away the flow: see docs/results.md.
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

from common import UserError

PATTERNS = ("Blobs", "Checks", "Rings", "Stripes")
FLOWS = ("Drift", "Orbit", "Shear", "Stretch", "Sway", "Swirl", "Wobble", "Zoom")
MADE_OF = {pattern + flow: (pattern, flow) for pattern in PATTERNS for flow in FLOWS}
TOY_CLASSES = tuple(MADE_OF)
VIDEOS = tuple(product(TOY_CLASSES, range(1, 9), range(1, 3)))  # class, group, clip
TEST_GROUPS = 3                                                 # the first groups, as in UCF101
STROKE = 32                                                     # frames of a stroke: speed
EASE = 1.2                                                      # slowdown e^EASE: direction
FADE = 110                                                      # frames to 1/e of contrast: order
TILE = 24                                                       # period of blobs, rings in pixels


def toy_video(cls, rng, size=32):
    """Draw one video of a class of TOY_CLASSES -> uint8 (N, size, size, 3), N = 112 to 144, grey.

    Points are complex numbers z = x + iy, so a multiplication rotates them.
    """
    pattern, flow = MADE_OF[cls]
    t = np.arange(rng.integers(112, 145), dtype=np.float32)[:, None, None]
    done, swing = strokes(t / STROKE + rng.random())            # (N, 1, 1)
    pixels = np.arange(size, dtype=np.float32) - (size - 1) / 2
    z = pixels - rng.uniform(-4, 4) + 1j * (pixels[:, None] - rng.uniform(-4, 4))
    z = rng.choice([z.conj(), z])                               # (H, W)  mirroring keeps the class
    turn, turn_pattern = np.exp(2j * np.pi * rng.random(2)).tolist()
    z = flow_back(flow, z * turn, done, swing) * turn_pattern   # (N, H, W)
    contrast = rng.uniform(45, 65) * np.exp(-t / FADE)
    grey = rng.uniform(110, 145) + contrast * paint(pattern, z, rng)
    grey += 2 * rng.standard_normal(grey.shape, np.float32)
    return np.clip(grey, 0, 255).astype(np.uint8)[..., None].repeat(3, axis=-1)


def strokes(clock):
    """Progress of a flow: strokes done, and a swing from -1/2 to 1/2 and back.

    clock: strokes done at constant speed
    """
    begun = np.floor(clock)
    # fraction of the stroke: fast from 0, slow to 1
    fraction = np.expm1(EASE * (begun - clock)) / math.expm1(-EASE)
    return begun + fraction, np.where(begun % 2 == 0, fraction, 1 - fraction) - 0.5


def flow_back(flow, z, done, swing):
    """Map points z of the frame to points of the pattern: complex (H, W) -> (N, H, W)."""
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
    """Brightness of a pattern at its points z, about -1 ... 1. Pitch and blobs are drawn."""
    x, y, pitch = z.real, z.imag, rng.uniform(0.55, 0.75)
    if pattern == "Checks":
        return 0.8 * np.tanh(3 * np.sin(pitch * x)) * np.tanh(3 * np.sin(pitch * y))
    if pattern == "Stripes":
        return np.sin(1.2 * pitch * x) * (0.75 + 0.5 * np.sin(0.5 * pitch * y))
    if pattern == "Rings":
        return np.cos(1.3 * pitch * radius(z))
    blobs = [(rng.uniform(0, TILE), rng.uniform(0, TILE), rng.choice([-1, 1])) for _ in range(5)]
    return sum(1.3 * int(sign) * np.exp(-radius(z - (a + 1j * b)) ** 2 / 14)
               for a, b, sign in blobs)


def radius(z):
    """Distance of points from the centre of their tile."""
    return abs(z - TILE * np.rint(z / TILE))


def make_toy(root):
    """Generate the toy set on first use, in the folder layout and list format of UCF101.

    Each class has 6 test videos (groups 1 to 3) and 10 training videos (groups 4 to 8). The two
    clips of a group have nothing in common but their class.
    Written to a temporary folder and renamed, so that it is complete or absent.
    UserError: `root` holds something else.
    """
    root = Path(root)
    classes = [f"{k} {cls}" for k, cls in enumerate(TOY_CLASSES, 1)]
    lists = defaultdict(list, {"classInd.txt": classes})
    if root.exists():
        file = root / "ucfTrainTestlist" / "classInd.txt"
        if file.is_file() and file.read_text(errors="replace").splitlines() == classes:
            return
        raise UserError(f"{root} is not the toy set: say with --dataset what it is, "
                        f"give another --data, or remove it")
    tmp = root.with_name(f"{root.name}.{os.getpid()}")
    try:
        for seed, (cls, group, clip) in enumerate(tqdm(VIDEOS, f"make {root}", unit="video")):
            path = f"{cls}/v_{cls}_g{group:02d}_c{clip:02d}.avi"
            write_video(tmp / path, toy_video(cls, np.random.default_rng(seed)))
            lists["testlist01.txt" if group <= TEST_GROUPS else "trainlist01.txt"].append(path)
        (tmp / "ucfTrainTestlist").mkdir()
        for name, lines in lists.items():
            (tmp / "ucfTrainTestlist" / name).write_text("\n".join(lines) + "\n")
        tmp.replace(root)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)                  # left by an interruption


def write_video(file, frames, rate=25):
    """Write uint8 (N, H, W, 3) to an MPEG-4 file of high quality."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        # constant quantiser q = 2; global_quality is 118 q
        options = {"flags": "+qscale", "global_quality": "236"}
        stream = container.add_stream("mpeg4", rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
