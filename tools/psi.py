"""What ψ encodes (Sec. 3.1): the relative transformation of two clips, not their video.

    python tools/psi.py --checkpoint runs/toy-r3d18_narrow/checkpoint.pt --out psi.png
    python tools/psi.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist \\
        --checkpoint runs/ucf101-r3d18/checkpoint.pt --out psi.png

Draws pairs of clips from the test videos as in pre-training. Above, the similarity of ψ of two
videos against one difference between their transformations, the others equal; below, whose ψ is
nearest. Writes FILE.png and its numbers, FILE.json, with the random baseline.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import UserError
from common.distributed import init_distributed, run
from common.evaluation import load_network, with_random, write_result
from common.flags import default_arch, fill_defaults, pretraining_parser
from common.splits import load_and_scan, usable
from common.training import autocast
from data import Pairs, augment, step_loader
from models import TimeEquivariant, fill, read_weights
from tools import WIDTH, pyplot

GROUPS = 512                                                    # of two videos
AXES = dict(shift="difference in shift, up to ... source frames",
            speed="difference in speed, octaves of p and q",
            direction="clips that differ in direction")


def parse_args(argv=None):
    parser = pretraining_parser(__doc__, out="the picture: .png, .pdf, .svg ...")
    parser.set_defaults(out="psi.png")
    parser.add_argument("--checkpoint", help="checkpoint.pt of pretrain.py, of a run with the term "
                        "equi (default: that of the default run)")
    args = fill_defaults(parser, parser.parse_args(argv), {})
    arch = args.arch or default_arch(args.dataset)
    args.checkpoint = args.checkpoint or f"runs/{args.dataset}-{arch}/checkpoint.pt"
    return args


# ---- ψ of a checkpoint ----

def with_psi(backbone, path):
    """F and the ψ of checkpoint.pt -> TimeEquivariant. UserError: there is no ψ."""
    _, state, _ = read_weights(path)
    psi = {key.removeprefix("heads.psi."): value for key, value in state.items()
           if key.startswith("heads.psi.")}
    if not psi:
        raise UserError(f"{path} has no psi: give checkpoint.pt of a run with the term equi")
    model = TimeEquivariant(backbone.arch, ["equi"])
    model.backbone = backbone
    fill(model.heads["psi"], psi, path)
    return model


@torch.no_grad()
def encode(models, pairs, args, device):
    """ψ of GROUPS groups (or what fills the last batch), drawn as in pre-training, in eval mode.

    models: {network: F with ψ} -> {network: (N, D), label of `Pairs`: (N, ...)}
    """
    for model in models.values():
        model.eval()
    items = min(8, len(pairs))                                  # groups of a batch
    steps = -(-GROUPS // items)
    rows, loader = [], step_loader(pairs, items, 0, steps, args.workers)
    for batch in tqdm(loader, "psi", steps, unit="batch"):
        clips = augment(batch.pop("clips").to(device), batch.pop("colour"))
        with autocast(args.amp, device):
            batch |= {name: model(clips)["psi"].float().cpu() for name, model in models.items()}
        rows.append(batch)
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


# ---- Nearest ψ, and similarity against differences ----

def statistics(psi, labels, speeds, T):
    """Cosines of ψ_i^pq and ψ_k^rs, k ≠ i, and the nearest ψ_k^rs of each ψ_i^pq (Sec. 3.1).

    psi: (N, D); labels: of `Pairs`; speeds: of the classes of speed.
    -> pq: accuracy of the nearest, and chance; kinds: the same for speeds, directions and order,
    with the confusion matrix; curves: of `similarities`
    """
    x = F.normalize(psi.double(), dim=1)
    cosine = x @ x.T                                                        # (N, N)
    other = labels["video"][:, None] != labels["video"]                     # (N, N)  k ≠ i
    nearest = cosine.masked_fill(~other, -2).argmax(1)                      # (N,)

    speed, direction = (labels[name].T for name in ("speed", "direction"))  # (2, N)
    kinds = dict(
        speed=(len(speeds) * speed[0] + speed[1], [f"{a}x {b}x" for a in speeds for b in speeds]),
        direction=(2 * direction[0] + direction[1], ["→ →", "→ ←", "← →", "← ←"]),
        order=(labels["order"], ["before", "after", "overlap"]))
    results = {}
    for name, (label, names) in kinds.items():
        matrix = confusion_matrix(label, label[nearest], labels=range(len(names)), normalize="true")
        results[name] = accuracy(label, nearest, other) | dict(names=names, matrix=matrix.tolist())
    return dict(pq=accuracy(labels["pq"], nearest, other), kinds=results,
                curves=similarities(cosine, other, labels, speeds, T))


def accuracy(label, nearest, other):
    """How often the nearest has an anchor's label, and how often a random candidate would.

    label, nearest: (N,); other: bool (N, N), the candidates of each anchor
    """
    same = label[:, None] == label                                          # (N, N)
    chance = (same & other).sum(1) / other.sum(1)                           # (N,)
    return dict(accuracy=(label[nearest] == label).double().mean().item(),
                chance=chance.double().mean().item())


def similarities(cosine, other, labels, speeds, T):
    """Mean cosine against one difference between two transformations, the others equal.

    Shifts that differ by up to T source frames count as equal.
    -> {shift, speed, direction: [dict(up_to=, cosine=, pairs=), ...]}, differences rising
    """
    shift = labels["start"][:, 1] - labels["start"][:, 0]                   # (N,)  from p to q
    octave = torch.tensor(speeds).double().log2()[labels["speed"]]          # (N, 2)
    shifts = (shift[:, None] - shift).abs()                                 # (N, N) each
    octaves = (octave[:, None] - octave).abs().sum(2).round(decimals=9)
    turns = (labels["direction"][:, None] != labels["direction"]).sum(2)

    doubled = 2 ** shifts.double().log2().ceil()                            # 0, 1, 2, 4, 8, ...
    same_shift, same_speed, same_direction = shifts <= T, octaves == 0, turns == 0
    once = other.triu(1)                                                    # each two rows once

    def curve(difference, equal):
        steps, step = difference[equal & once].unique(return_inverse=True)
        pairs = step.bincount()
        means = step.bincount(cosine[equal & once]) / pairs
        return [dict(up_to=int(up_to), cosine=mean, pairs=n)
                for up_to, mean, n in zip(steps.tolist(), means.tolist(), pairs.tolist())]

    return dict(shift=curve(doubled, same_speed & same_direction),
                speed=curve(octaves.ceil(), same_shift & same_direction),
                direction=curve(turns, same_shift & same_speed))


# ---- Picture ----

def draw(results, title):
    """results: {network: statistics} -> a figure: curves of all, matrices of the first"""
    figure = pyplot().figure(figsize=(WIDTH, 8.6))
    above, below = figure.subfigures(2, 1, height_ratios=[2.9, 5.7])
    for axes, name in zip(above.subplots(1, 3, sharey=True), AXES):
        curves = {network: x["curves"][name] for network, x in results.items()}
        steps = sorted({step["up_to"] for curve in curves.values() for step in curve})
        for network, curve in curves.items():
            places = [steps.index(step["up_to"]) for step in curve]         # evenly spaced
            axes.plot(places, [step["cosine"] for step in curve], label=network)
        axes.set_xticks(range(len(steps)), steps)
        axes.set_xlabel(AXES[name])
    above.axes[0].set_ylabel("mean cosine of ψ of two videos")
    above.axes[0].legend()
    places = below.subplot_mosaic([["speed", "direction"], ["speed", "order"]],
                                  width_ratios=[1.6, 1])
    for name, kind in next(iter(results.values()))["kinds"].items():
        draw_matrix(places[name], name, kind)
    figure.suptitle(title)
    return figure


def draw_matrix(axes, name, kind):
    """Per cent of a row's anchors whose nearest is of the column's kind, from 1 on."""
    percent = 100 * np.array(kind["matrix"])
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(percent.round().astype(int)):
        axes.text(column, row, value or "", ha="center", va="center", fontsize=7,
                  color="white" if value > 50 else "black")
    names = kind["names"]
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.set_title(f"the same {name}: {kind['accuracy']:.1%}, chance {kind['chance']:.1%}")
    axes.set(xlabel=f"{name} of the nearest's p, q (% of a row)", ylabel=f"{name} of p, q")


def main(argv=None):
    args = parse_args(argv)
    pyplot()                                                    # fail before the work
    picture, args.out = Path(args.out), Path(args.out).parent
    _, device = init_distributed()
    network = load_network(args)
    models = dict(checkpoint=with_psi(network, args.checkpoint).to(device),
                  random=TimeEquivariant(args.arch, ["equi"]).to(device))

    split, speeds = load_and_scan(args, args.split, "test"), network.args["speeds"]
    paths, report = usable(split, speeds[0] * (args.frames - 1) + 1)
    print(report)
    pairs = Pairs(split, paths, args.frames, args.size, speeds, args.seed)
    rows = encode(models, pairs, args, device)
    results = {name: statistics(rows[name], rows, speeds, args.frames) for name in models}

    numbers = write_result(args, picture.stem, network, psi=results, videos=len(paths),
                           pairs=len(rows["pq"]))
    accuracies = {name: x["pq"]["accuracy"] for name, x in results.items()}
    sentence = ("The nearest ψ of another video has the same shift, speeds and directions:\n"
                f"{with_random(accuracies, results['checkpoint']['pq']['chance'])}")
    title = f"{sentence}; {len(rows['pq'])} pairs of clips of {len(paths)} videos"
    draw(results, title).savefig(picture)
    print(f"{sentence}\n{picture}, {numbers}")


if __name__ == "__main__":
    run(main)
