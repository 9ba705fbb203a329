"""The toy data set: generated videos, as files, on which the pretext tasks can be learned in minutes on a CPU."""
import os
import shutil
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

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
