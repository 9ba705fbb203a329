"""What ψ tells apart (Sec. 3.1): the relative transformation of two clips, not the video they are from.

    python tools/psi.py --checkpoint runs/toy-r3d18_narrow/checkpoint.pt --out psi.png
    python tools/psi.py --dataset ucf101 --data UCF-101 --checkpoint runs/ucf101-r3d18/checkpoint.pt --out psi.png

Pairs of clips are drawn from the test videos as in pre-training. Above, the similarity of ψ of two videos against one
difference between their transformations, the others alike; below, whose ψ is nearest. Beside FILE.png the numbers stand
in FILE.json. The randomly initialised network is shown for comparison. --windows, --step and --crops play no part.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.flags import default_arch, judging_parser, known_flags, parse_and_check
from common.judging import beside_random, load_for_judging, random_beside, write_result
from common.precision import autocast
from common.processes import init_distributed, run
from common.splits import list_and_scan, usable
from data import Pairs, augmented, step_loader
from models import LOSSES, TimeEquivariant, fill, plain_key, read_weights
from tools.pictures import WIDTH, check_picture, pyplot, save, style

GROUPS = 512                                                                    # of two videos
NETWORKS = dict(checkpoint="checkpoint", random="randomly initialised")         # in the picture's words
AXES = dict(shift="difference in shift, up to ... source frames", speed="difference in speed, octaves of p and q",
            direction="clips that differ in direction")


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = judging_parser(__doc__, argv, out="the picture: .png, .jpg, .pdf or .svg; its numbers beside as .json")
    known = known_flags(parser, argv)
    arch = known.arch or default_arch(known.dataset)
    parser.set_defaults(out="psi.png", checkpoint=f"runs/{known.dataset}-{arch}/checkpoint.pt")
    args = parse_and_check(parser, argv)
    if len(args.split) > 1:
        parser.error(f"--split must be one of 1, 2, 3, but is {args.split}")
    return args


# ---- ψ of a checkpoint ----

def with_psi(backbone, path=None):
    """F and its ψ (Sec. 3.1) in eval mode -> TimeEquivariant that gives psi alone.

    backbone: F as load_backbone gives it; path: where it is from, and ψ too; None: ψ is freshly initialised.
    ValueError: the file has no ψ.
    """
    model = TimeEquivariant(backbone.arch, ["equi"])
    model.backbone = backbone
    if path is not None:
        if "equi" not in backbone.args.get("losses", LOSSES):
            raise ValueError(f"{path} has no psi: the run that wrote it had no term equi (--losses of pretrain.py)")
        psi = stored_psi(path)
        if not psi or "speeds" not in backbone.args:
            raise ValueError(f"{path} has no psi: it is in checkpoint.pt of pretrain.py only (give that --checkpoint)")
        fill(model.heads["psi"], psi, path, f"the psi of {backbone.arch}")
    return model.eval()


def stored_psi(path):
    """The weights of ψ in checkpoint.pt of pretrain.py -> {key: tensor}, empty where another file has none."""
    if str(path) == "random":
        return {}
    psi = {}
    for key, value in read_weights(path)[0].items():
        key = plain_key(key)
        if key.startswith("heads.psi."):
            psi[key.removeprefix("heads.psi.")] = value
    return psi


@torch.no_grad()
def encode(models, pairs, args, device):
    """ψ of GROUPS groups (or what fills the last batch), as pre-training draws them: τ, crops, colours.

    models: {network: F with ψ} -> {network: psi (N, D)}, labels {name: (N, ...)} of data.Pairs, {file: problem}.
    """
    items = min(8, len(pairs))                                                  # groups of a batch
    steps = -(-GROUPS // items)
    rows, psi, failed = [], {name: [] for name in models}, {}
    for batch in tqdm(step_loader(pairs, items, 0, steps, args.workers), "psi", steps, unit="batch"):
        failed.update(batch.pop("failed"))
        clips = augmented(batch.pop("clips").to(device), batch["seed"])         # (B, 2, 3, T, H, W)
        rows.append(batch)
        for name, model in models.items():
            with autocast(args.amp, device):
                psi[name].append(model(clips)["psi"].float().cpu())             # (B, D)
    labels = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    psi = {name: torch.cat(parts) for name, parts in psi.items()}
    if not all(x.isfinite().all() for x in psi.values()):
        raise ValueError("what the network makes of some clips is not finite")
    return psi, labels, failed


# ---- What it tells apart ----

def tell_apart(psi, labels, speeds, T):
    """What ψ tells apart (Sec. 3.1): cosines of ψ_i^pq and ψ_k^rs, and the nearest ψ_k^rs of each ψ_i^pq, k ≠ i.

    psi: (N, D); labels: video, pq, order (N,), start, speed, direction (N, 2) as data.Pairs has them; speeds: what the
    classes of speed mean; shifts that differ by up to T source frames count as alike.
    -> partner: how often the nearest has the same pq, and a random one (share, chance); kinds: share and chance of the
    same for parts of pq and for order, and matrix, a row a kind of anchor: the shares of the kinds of its nearest
    (None: no anchor); curves: see similarities.
    """
    unit = F.normalize(psi.double(), dim=1)
    cosine = unit @ unit.T                                                      # (N, N)
    other = labels["video"][:, None] != labels["video"]                         # (N, N)  k ≠ i
    nearest = cosine.masked_fill(~other, -2).argmax(1)                          # (N,)
    p, q = labels["speed"].T
    speed_words = [f"{a}x {b}x" for a in speeds for b in speeds]
    direction = 2 * labels["direction"][:, 0] + labels["direction"][:, 1]
    return dict(
        partner=same_as_nearest(labels["pq"], nearest, other),
        kinds=dict(
            speed=kind_of_nearest(len(speeds) * p + q, nearest, other, speed_words),
            direction=kind_of_nearest(direction, nearest, other, ["→ →", "→ ←", "← →", "← ←"]),
            order=kind_of_nearest(labels["order"], nearest, other, ["before", "after", "overlap"])),
        curves=similarities(cosine, other, labels, speeds, T))


def same_as_nearest(label, nearest, other):
    """How often an anchor's nearest has its label, and how often a random one would -> dict(share=, chance=).

    label, nearest: (N,); other: bool (N, N), which may be an anchor's nearest.
    """
    same = label[:, None] == label                                              # (N, N)
    chance = (same & other).sum(1) / other.sum(1)                               # (N,)
    return dict(share=(label[nearest] == label).double().mean().item(), chance=chance.double().mean().item())


def kind_of_nearest(label, nearest, other, words):
    """Which labels the nearest of each label's anchors have -> dict(words=, share=, chance=, matrix=)."""
    matrix = []
    for kind in range(len(words)):
        found = label[nearest[label == kind]].bincount(minlength=len(words)).double()   # (kinds,)
        matrix.append((found / found.sum()).tolist() if found.sum() else None)
    return dict(words=words, **same_as_nearest(label, nearest, other), matrix=matrix)


def similarities(cosine, other, labels, speeds, T):
    """Mean cosine against one difference between two transformations, the others alike.

    -> {shift, speed, direction: a dict a step of the curve, in rising order of the difference}.
    """
    shift = labels["start"][:, 1] - labels["start"][:, 0]                       # (N,)  from p to q, in source frames
    octave = torch.tensor(speeds).double().log2()[labels["speed"]]              # (N, 2)
    shifts = (shift[:, None] - shift).abs()                                     # (N, N) each: the differences
    octaves = (octave[:, None] - octave).abs().sum(2)
    turns = (labels["direction"][:, None] != labels["direction"]).sum(2)

    doubled = 2 ** shifts.double().clamp(min=1).log2().ceil()                   # 1, 2, 4, 8, ...
    doubled[shifts == 0] = 0
    same_shift, same_speed, same_direction = shifts <= T, octaves < 1e-9, turns == 0
    once = other.triu(1)                                                        # each two rows once

    def curve(difference, alike):
        steps, step = difference[alike & once].unique(return_inverse=True)
        pairs = step.bincount()
        means = step.bincount(cosine[alike & once]) / pairs
        rows = zip(steps.tolist(), means.tolist(), pairs.tolist())
        return [dict(up_to=int(up_to), cosine=mean, pairs=n) for up_to, mean, n in rows]

    return dict(shift=curve(doubled, same_speed & same_direction),
                speed=curve((octaves - 1e-9).ceil(), same_shift & same_direction),
                direction=curve(turns, same_shift & same_speed))


# ---- The picture ----

def draw(found, title):
    """What tell_apart found, {network: ...}, the checkpoint first -> a figure: curves of all, the first's matrices."""
    plt = pyplot()
    figure = plt.figure(figsize=(WIDTH, 8.6))
    above, below = figure.subfigures(2, 1, height_ratios=[2.9, 5.7])
    for axes, (name, axis) in zip(above.subplots(1, 3, sharey=True), AXES.items()):
        draw_curves(axes, {network: x["curves"][name] for network, x in found.items()}, axis)
    above.axes[0].set_ylabel("mean cosine of ψ of two videos")
    above.axes[0].legend(loc="lower left")
    places = below.subplot_mosaic([["speed", "direction"], ["speed", "order"]], width_ratios=[1.6, 1])
    for name, kinds in next(iter(found.values()))["kinds"].items():
        draw_matrix(places[name], kinds, name)
    figure.suptitle(title)
    return figure


def draw_curves(axes, curves, axis):
    """curves: {network: a curve of similarities}, drawn over evenly spaced steps."""
    names = sorted({step["up_to"] for curve in curves.values() for step in curve})
    for number, (network, curve) in enumerate(curves.items()):
        places = [names.index(step["up_to"]) for step in curve]
        axes.plot(places, [step["cosine"] for step in curve], **style(number), label=NETWORKS[network])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel(axis)


def draw_matrix(axes, kinds, name):
    """Per cent of a row's anchors whose nearest is of the column's kind, left out below 0.5; a frame marks the same."""
    words, size = kinds["words"], len(kinds["words"])
    shares = 100 * np.array([row or [np.nan] * size for row in kinds["matrix"]])    # (kinds, kinds)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if size <= 16 and share >= 0.5:
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if share > 50 else "black")
    for k in range(size):
        axes.add_patch(pyplot().Rectangle((k - 0.5, k - 0.5), 1, 1, fill=False, linewidth=1))
    axes.set_xticks(range(size), [word.replace(" ", "\n") for word in words])
    axes.set_yticks(range(size), words)
    axes.grid(visible=False)
    axes.set_title(f"the same {name}: {kinds['share']:.1%}, chance {kinds['chance']:.1%}", loc="left")
    axes.set(xlabel=f"{name} of the nearest's p, q (% of a row)", ylabel=f"{name} of the anchor's p, q")


def main(argv=None):
    args = parse_args(argv)
    check_picture(args.out)
    file = Path(args.out)
    _, _, device = init_distributed()
    network = load_for_judging(args)
    models = {"checkpoint": with_psi(network, args.checkpoint)}
    models["random"] = with_psi(random_beside(network, args, device)["random"])
    models = {name: model.to(device) for name, model in models.items()}

    split, index = list_and_scan(args, args.split[0], "test")
    speeds = network.args["speeds"]
    paths, report = usable(split, index, speeds[0] * (args.frames - 1) + 1)
    print(report)
    pairs = Pairs(split, paths, index, args.frames, args.size, speeds, args.seed)
    psi, labels, replaced = encode(models, pairs, args, device)
    for name, problem in replaced.items():
        print(f"replaced an unreadable video, {name}: {problem}")

    found = {name: tell_apart(x, labels, pairs.speeds, args.frames) for name, x in psi.items()}
    beside = argparse.Namespace(**vars(args) | dict(out=str(file.parent)))
    numbers = write_result(beside, file.stem, network, None, psi=found, videos=len(pairs.files),
                           pairs=len(labels["pq"]), replaced=replaced)
    shares = {name: x["partner"]["share"] for name, x in found.items()}
    sentence = ("The nearest ψ of another video has the same shift, speeds and directions:\n"
                + beside_random(shares, found["checkpoint"]["partner"]["chance"]))
    save(draw(found, f"{sentence}; {len(labels['pq'])} pairs of clips of {len(pairs.files)} videos"), file)
    print(f"{sentence}\n{file}, {numbers}")


if __name__ == "__main__":
    run(main)
