"""Fig. 2 from your own videos: a group of two as the network gets it.

    python tools/preview.py --group 2 --out figure2.png
    python tools/preview.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist \\
        --out figure2.png

For each video a time line with a mark for each source frame of the clips p and q, and their frames
in playing order, cropped, flipped and coloured as in training.
"""
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import UserError
from common.distributed import run
from common.flags import default_arch, fill_defaults, paper_defaults, pretraining_parser
from common.splits import load_and_scan, usable
from data import MEAN, STD, Pairs, Tau, augment, collate
from tools import WIDTH, printable, pyplot

ORDER = ("p before q", "p after q", "p and q overlap")
MOST = 16                                                       # frames of a clip that are shown
LOOKS = (dict(color="#1f4e9c", marker="o"), dict(color="#c1440e", marker="s"))      # of p, q


def parse_args(argv=None):
    parser = pretraining_parser(__doc__, out="the picture: .png, .pdf, .svg ...")
    parser.set_defaults(out="figure2.png")
    parser.add_argument("--group", type=int, default=0, help="number of a group of epoch 0")
    args = parser.parse_args(argv)
    arch = args.arch or default_arch(args.dataset)
    defaults = paper_defaults(args.dataset, arch)
    return fill_defaults(parser, args, {name: defaults[name] for name in ("frames", "size")})


def pictures_of(group):
    """What the network gets, as pictures: a batch of one group -> uint8 (2, 2, T, H, W, 3)"""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    x = augment(group["clips"], group["colour"]) * std + mean   # (2, 2, 3, T, H, W)
    return (255 * x).round().to(torch.uint8).movedim(2, -1).numpy()


def taus_of(group, n, speeds):
    """[τ_p, τ_q] of the n-th video of a group, from its labels."""
    labels = zip(*(group[name][n].tolist() for name in ("start", "speed", "direction")))
    return [Tau(start, speeds[speed], bool(reverse)) for start, speed, reverse in labels]


def title_of(p, q, order):
    """The relative transformation pq in words."""
    return (f"One relative transformation pq for both videos: {q.start - p.start:+d} source frames "
            f"from p to q,\np {in_words(p)}, q {in_words(q)}; {ORDER[order]}")


def in_words(tau):
    return f"{tau.speed}x {'backwards' if tau.reverse else 'forwards'}"


def draw_time_line(axes, clips, length):
    """A mark for each frame of p and q, an arrow for the last; clips: their source frames."""
    axes.axvspan(-0.5, length - 0.5, color="#eeeeee", zorder=0)
    for row, (frames, look) in enumerate(zip(clips, LOOKS)):
        axes.plot(frames, [row] * len(frames), linestyle="-", **look)
        arrow = "<" if frames[-1] < frames[0] else ">"
        axes.plot(frames[-1], row, linestyle="", markersize=9, **look | dict(marker=arrow))
    axes.set(ylim=(1.6, -0.6), yticks=[0, 1], yticklabels=["p", "q"], xlabel="source frame")
    axes.grid(visible=False)


def draw_frames(axes, pictures, frames, label, color):
    """Pictures (T, H, W, 3) from left to right, each above the number of its source frame."""
    shown = np.linspace(0, len(frames) - 1, min(MOST, len(frames))).round().astype(int)
    width = pictures.shape[2]
    gap = max(1, width // 24)
    columns = np.pad(pictures[shown], [(0, 0), (0, 0), (0, gap), (0, 0)], constant_values=255)
    axes.imshow(np.hstack(columns))
    axes.set_xticks(width / 2 + (width + gap) * np.arange(len(shown)), [frames[n] for n in shown])
    axes.set_yticks([pictures.shape[1] / 2], [label])
    axes.tick_params(length=0, labelcolor=color)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def draw(pairs, group):
    """group: a batch of one group of pairs -> the figure"""
    cell = WIDTH / min(MOST, pairs.T)                           # inches
    figure = pyplot().figure(figsize=(WIDTH, 4 * cell + 3.4))
    pictures, lengths = pictures_of(group), pairs.shapes[group["video"], 0]
    for n, part in enumerate(figure.subfigures(2, 1)):
        line, *strips = part.subplots(3, 1, height_ratios=[0.5, cell, cell])
        taus = taus_of(group, n, pairs.speeds)
        clips = [tau.frames(pairs.T) for tau in taus]
        draw_time_line(line, clips, lengths[n])
        line.set_xlim(-0.5, max(lengths) - 0.5)                 # one scale for both videos
        name = os.path.basename(pairs.files[group["video"][n]])
        line.set_title(f"{printable(name)}, {lengths[n]} frames")
        for k, axes in enumerate(strips):
            label = f"{'pq'[k]}\n{in_words(taus[k])}".replace(" ", "\n")
            draw_frames(axes, pictures[n, k], clips[k], label, LOOKS[k]["color"])
    figure.suptitle(title_of(*taus, group["order"][0]))
    return figure


def main(argv=None):
    args = parse_args(argv)
    split = load_and_scan(args, args.split, "train")
    paths, report = usable(split, args.frames)
    print(report)
    pairs = Pairs(split, paths, args.frames, args.size, seed=args.seed)
    if not 0 <= args.group < len(pairs):
        raise UserError(f"--group must lie between 0 and {len(pairs) - 1}, but is {args.group}")
    draw(pairs, collate([pairs[0, args.group]])).savefig(args.out)
    print(f"{args.out}: group {args.group}")


if __name__ == "__main__":
    run(main)
