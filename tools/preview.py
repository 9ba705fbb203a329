"""Figure 2 from one's own videos: a group of two as the network gets it, and what was drawn for it.

    python tools/preview.py --group 2 --out figure2.png
    python tools/preview.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --out figure2.png

Of both videos of the group the time line with the clips p and q, each source frame that a clip takes as a mark, and
below it the frames of p and q in playing order, cropped, flipped and coloured as in training.
"""
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.flags import parse_and_check, pretraining_parser
from common.processes import run
from common.splits import list_and_scan, usable
from data import MEAN, STD, Pairs, Tau, augmented, collate
from tools.pictures import WIDTH, check_picture, printable, pyplot, save

ORDER = ("p before q", "p after q", "p and q overlap")
MOST = 16                                                                       # frames of a clip that are shown
CLIPS = (dict(color="#1f4e9c", marker="o", hatch="///"), dict(color="#c1440e", marker="s", hatch="\\\\\\"))     # p, q


class Clip(NamedTuple):
    """One clip as the network gets it: its transformation τ and its frames in playing order."""
    name: str
    tau: Tau
    frames: list                                                                # T source frames
    images: np.ndarray                                                          # uint8 (T, H, W, 3)


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = pretraining_parser(__doc__, argv, out="the picture: .png, .jpg, .pdf or .svg")
    parser.set_defaults(out="figure2.png")
    parser.add_argument("--group", type=int, default=0, help="which group of two videos of the first epoch")
    return parse_and_check(parser, argv)


def pictures_of(clips, seeds):
    """What the network gets, once more as pictures: uint8 (1, n, T, 3, H, W), seeds (1, n) -> (n, T, H, W, 3)."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    x = augmented(clips, seeds)[0] * std + mean                                 # (n, 3, T, H, W)
    return (x.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def clips_of(pairs, group, n):
    """The clips p and q of the n-th video of a group -> two Clip."""
    images = pictures_of(group["clips"][n:n + 1], group["seed"][n:n + 1])
    clips = []
    for k, name in enumerate("pq"):
        start, speed, direction = (group[label][n, k].item() for label in ("start", "speed", "direction"))
        tau = Tau(start, pairs.speeds[speed], bool(direction))
        clips.append(Clip(name, tau, tau.frames(pairs.T), images[k]))
    return clips


def title_of(group, clips):
    """The relative transformation pq, which both videos share, in words."""
    p, q = (clip.tau for clip in clips)
    return (f"One relative transformation pq for both videos: {q.start - p.start:+d} source frames from p to q,\n"
            f"p {p.speed}x {way(p)}, q {q.speed}x {way(q)}; {ORDER[group['order'][0]]}")


def way(tau):
    return "backwards" if tau.reverse else "forwards"


def draw_time_line(axes, clips, length, longest):
    """The whole video from left to right, p and q as bars, a mark for each frame that is taken, an arrow for the last.

    length: of this video; longest: of both, so that one shift looks the same in both.
    """
    axes.axvspan(-0.5, length - 0.5, color="#eeeeee", zorder=0)
    for row, (clip, look) in enumerate(zip(clips, CLIPS)):
        first, last = min(clip.frames), max(clip.frames)
        axes.barh(row, last - first + 1, left=first - 0.5, height=0.76, facecolor="white", edgecolor=look["color"],
                  hatch=look["hatch"], hatch_linewidth=0.4)
        axes.plot(clip.frames, [row] * len(clip.frames), color=look["color"], marker=look["marker"], markersize=3.5)
        axes.plot(clip.frames[-1], row, color=look["color"], marker="<" if clip.tau.reverse else ">", markersize=9)
    axes.set(xlim=(-0.5, longest - 0.5), ylim=(1.6, -0.6), yticks=[0, 1], yticklabels=["p", "q"],
             xlabel="source frame")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw_frames(axes, clip, color):
    """A clip's frames from left to right in playing order, each over the number of its source frame."""
    shown = np.linspace(0, len(clip.frames) - 1, min(MOST, len(clip.frames))).round().astype(int)
    height, width = clip.images.shape[1:3]
    gap = max(1, width // 24)
    strip = np.full((height, len(shown) * (width + gap) - gap, 3), 255, np.uint8)
    for place, n in enumerate(shown):
        left = place * (width + gap)
        strip[:, left:left + width] = clip.images[n]
    axes.imshow(strip, interpolation="nearest")
    axes.set_xticks(width / 2 + (width + gap) * np.arange(len(shown)), [clip.frames[n] for n in shown])
    axes.set_yticks([height / 2], [f"{clip.name}\n{clip.tau.speed}x\n{way(clip.tau)}"])
    axes.tick_params(length=0, labelcolor=color)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def draw(pairs, group):
    """pairs: data.Pairs; group: a batch of one of its groups -> the figure."""
    plt = pyplot()
    cell = WIDTH / min(MOST, pairs.T)                                           # inches
    heights = [0.5, cell, cell]
    figure = plt.figure(figsize=(WIDTH, 2 * sum(heights) + 2.4))
    lengths = pairs.shapes[group["video"], 0].tolist()
    for n, part in enumerate(figure.subfigures(2, 1)):
        line, *strips = part.subplots(3, 1, gridspec_kw=dict(height_ratios=heights))
        clips = clips_of(pairs, group, n)
        draw_time_line(line, clips, lengths[n], max(lengths))
        name = os.path.basename(os.fsdecode(pairs.files[group["video"][n]]))
        line.set_title(f"{printable(name)}, {lengths[n]} frames", loc="left")
        for strip, clip, look in zip(strips, clips, CLIPS):
            draw_frames(strip, clip, look["color"])
    figure.suptitle(title_of(group, clips))
    return figure


def main(argv=None):
    args = parse_args(argv)
    check_picture(args.out)
    split, index = list_and_scan(args, args.split, "train")
    paths, report = usable(split, index, args.frames)
    pairs = Pairs(split, paths, index, args.frames, args.size, seed=args.seed)
    if not 0 <= args.group < len(pairs):
        raise ValueError(f"--group must lie between 0 and {len(pairs) - 1}, but is {args.group}")
    group = collate([pairs[0, args.group]])
    save(draw(pairs, group), args.out)
    print(report)
    for file, problem in group["failed"]:
        print(f"replaced an unreadable video, {file}: {problem}")
    print(f"{args.out}: group {args.group}")


if __name__ == "__main__":
    run(main)
