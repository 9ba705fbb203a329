"""Nearest-neighbour retrieval and 1-NN classification on frozen features (Table 1, "1-NN"; Table 3).

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt --picture neighbours.png
    python retrieval.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE
    python retrieval.py --checkpoint BACKBONE --gallery MY_VIDEOS --query OTHER_VIDEOS --features found.npz
    python retrieval.py --checkpoint runs/toy-r3d18_narrow/checkpoint.pt --psi psi.png

Cosine similarity; queries are the test videos, the gallery is the training set (Sec. 4.2). R@k is the share of queries
with a video of the same class among the k nearest; 1-NN accuracy is R@1. A query that cannot be read counts as wrong.
Writes OUT/retrieval-DATASET.json; with folders of one's own videos, in class folders or not, it names the nearest
videos of each query. A query's own file is not its neighbour: --gallery and --query may be one folder.
--psi draws, besides, what ψ tells apart in the query videos (Sec. 3.1: the relative transformation, not the video).
"""
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes
from tqdm import tqdm

from common import (AMP, check_writable, checked, default_out, extract, in_words, init_distributed, judged,
                    list_and_scan, load_for_judging, on_first, random_beside, run, shared_parser, told, write_result)
from data import Pairs, VideoError, augmented, count_frames, decode, step_loader, unreadable, usable
from models import with_psi

PARTS = {"train", "test"}                                                       # of a data set; else it is a folder


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser, _ = shared_parser(__doc__, argv, judging="centre")
    group = parser.add_argument_group("retrieval")
    group.add_argument("--gallery", default="train", help="train, test, or a folder of videos to search in (Table 3)")
    group.add_argument("--query", default="test", help="train, test, or a folder of videos to search for (Table 3)")
    group.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20], help="the k of R@k (Table 3)")
    group.add_argument("--features", metavar="FILE.npz", help="write features, paths, classes and neighbours here")
    group.add_argument("--picture", metavar="FILE.png", help="draw queries and their nearest videos here")
    group.add_argument("--psi", metavar="FILE.png", help="draw here what psi of checkpoint.pt tells apart (Sec. 3.1)")
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    folders = not PARTS & {known.gallery, known.query}
    if not folders and not {known.gallery, known.query} <= PARTS and known.dataset == "toy":
        parser.error("of --gallery and --query one is a folder, the other part of the toy set: give a folder for both "
                     "(it may be the same), or --dataset")
    if folders:
        parser.set_defaults(data=known.gallery)
    args = checked(parser, argv)
    if min(args.k) < 1:
        parser.error(f"--k must be at least 1, but is {min(args.k)}")
    for name, suffixes in dict(features=(".npz",), picture=(".png", ".jpg"), psi=(".png", ".jpg")).items():
        if vars(args)[name] and not vars(args)[name].lower().endswith(suffixes):
            parser.error(f"--{name} must end in {' or '.join(suffixes)}, but is {vars(args)[name]}")
    args.k, args.dataset = sorted(set(args.k)), "folder" if folders else args.dataset
    return args


def standardise(gallery, query):
    """Sec. 3.4: "standardizing the result based on training set statistics", here the gallery's; then unit length.

    gallery: (G, D), query: (Q, D) float32 -> float64 of the same shapes; their inner products are cosines.
    """
    std, mean = (x.double() for x in torch.std_mean(gallery, 0, correction=0))
    std[std == 0] = 1
    both = [x.double().sub_(mean).div_(std) for x in (gallery, query)]
    return [x.div_(x.norm(dim=1, keepdim=True).clamp(min=1e-12)) for x in both]


def search(gallery, query, gallery_ids, query_ids, k, cosines=2 ** 24):
    """Exact search, `cosines` at a time: beside gallery and query, memory grows with neither.

    gallery: (G, D), query: (Q, D), unit rows; gallery_ids: (2, G), query_ids: (2, Q) ints, class (-1: none) and video.
    A query's own video is no neighbour. Of equally near videos the one that comes first in the gallery is nearer.
    -> ranks (Q,): how many videos are nearer than the nearest of the query's class (the largest int if there is none);
       nearest (Q, k): the numbers of the k nearest, -1 where no video is left; their cosines (Q, k).
    """
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    found, place = [], torch.arange(len(gallery), device=gallery.device)
    for rows in torch.arange(len(query), device=query.device).split(max(1, cosines // len(gallery))):
        label, video = query_ids[:, rows, None]                                 # (c, 1) each
        cosine = query[rows] @ gallery.T                                        # (c, G)
        key = (cosine * 2 ** 30).round().long() * 2 ** 32 - place               # (c, G)  no two of a row are equal
        key[video == gallery_ids[1]] = least
        right = (label == gallery_ids[0]) & (label >= 0) & (key > least)        # (c, G)
        best = key.masked_fill(~right, least).amax(1, keepdim=True)             # (c, 1)
        ranks = (key > best).sum(1).masked_fill(~right.any(1), most)            # (c,)
        top = key.topk(k)                                                       # (c, k)
        found.append((ranks, top.indices.masked_fill(top.values == least, -1), cosine.gather(1, top.indices)))
    return [torch.cat(parts).cpu() for parts in zip(*found)]


def recall(ranks, expected, k):
    """R@k (Table 3): the share of `expected` queries whose nearest right video has fewer than k before it."""
    return int((ranks < k).sum()) / expected


def chance_recall(gallery_ids, query_ids, expected, k):
    """R@k of a random order: 1 - C(G - n, k) / C(G, k), where n of a query's G possible neighbours are of its class."""
    classes, videos, both = Counter(gallery_ids[0]), Counter(gallery_ids[1]), Counter(zip(*gallery_ids))
    G = np.array([len(gallery_ids[1]) - videos[v] for v in query_ids[1]])       # (Q,)  its own video is not one of them
    n = np.array([classes[c] - both[c, v] for c, v in zip(*query_ids)])         # (Q,)
    miss = np.prod([np.where(j < G, (G - n - j).clip(0) / (G - j).clip(1), 1) for j in range(k)], axis=0)
    return float((1 - miss).sum() / expected)


class Video(NamedTuple):
    path: str                                                                   # its name in the data set
    file: str                                                                   # where it is
    name: str                                                                   # of its class, None without


def only_read(split, x, failed):
    """What common.extract gives, of the videos that could be read alone -> list of Video, {network: (N, D)}."""
    read = [path not in failed for path in split.paths]
    names = [None if label is None else split.classes[label] for label in split.labels]
    return ([Video(path, str(split.found[path]), name) for path, name, ok in zip(split.paths, names, read) if ok],
            {network: features[read] for network, features in x.items()})


def judge(gallery, query, expected, ks, device):
    """R@k, expected of a random order too, and what the first network finds; gallery, query: see only_read.

    -> {network or "chance": {"R@k": share}}, empty without classes, nearest and cosines (Q, k): see search.
    """
    classes, files = {None: -1}, {}                                             # -> numbers
    ids = [np.array([[classes.setdefault(video.name, len(classes)) for video in videos],
                     [files.setdefault(os.path.realpath(video.file), len(files)) for video in videos]])
           for videos, _ in (gallery, query)]                                   # (2, G), (2, Q)
    shares, found = {}, []
    for name in gallery[1]:
        features = standardise(*(torch.tensor(x[name], device=device) for _, x in (gallery, query)))
        ranks, *nearest = search(*features, *(torch.tensor(numbers, device=device) for numbers in ids),
                                 k=min(max(*ks, COLUMNS), len(gallery[0])))
        found = found or nearest
        shares[name] = {f"R@{k}": recall(ranks, expected, k) for k in ks}
    shares["chance"] = {f"R@{k}": chance_recall(*ids, expected, k) for k in ks}
    return {} if None in (video.name for videos, _ in (gallery, query) for video in videos) else shares, *found


def save_features(file, gallery, query, nearest, cosines):
    """FILE.npz: of gallery and query features (N, D) of F before standardising, paths and classes ("" without);
    for each query the rows of the nearest gallery videos (-1: no more) and their cosines, (Q, k)."""
    arrays = dict(nearest=nearest.numpy(), cosines=cosines.numpy())
    for side, (videos, x) in (("gallery", gallery), ("query", query)):
        arrays |= {f"{side}_features": next(iter(x.values())), f"{side}_paths": np.array([v.path for v in videos]),
                   f"{side}_classes": np.array([v.name or "" for v in videos])}
    np.savez(file, **arrays)


COLUMNS, CELL = 6, 160                                                          # of a contact sheet; pixels


def picture(file, gallery, query, nearest, rows=10):
    """A contact sheet: a row a query, its middle frame first, then those of its nearest videos.

    gallery, query: lists of Video; nearest: (Q, k). A right neighbour has a plain green frame and a "+" before its
    class, a wrong one a red frame, crossed out, and a "-": colour alone says nothing.
    """
    sheet = []
    for q in np.unique(np.linspace(0, len(query) - 1, min(rows, len(query))).round().astype(int)):
        row = [thumbnail(query[q], "query")]
        for video in (gallery[g] for g in nearest[q][:COLUMNS - 1].tolist() if g >= 0):
            row.append(thumbnail(video, None if None in (video.name, query[q].name) else video.name == query[q].name))
        blank = torch.full_like(row[0], 255)
        sheet.append(torch.cat(row + [blank] * (COLUMNS - len(row)), dim=2))
    TF.to_pil_image(torch.cat(sheet, dim=1)).save(file)


def thumbnail(video, verdict):
    """The middle frame of a video with its frame and its class, without one its name -> uint8 (3, CELL + 20, CELL)."""
    try:
        image = TF.center_crop(decode(video.file, [count_frames(video.file)[0] // 2], CELL)[0], CELL)
    except VideoError:
        image = torch.zeros(3, CELL, CELL, dtype=torch.uint8)
    colour = {"query": (60, 60, 200), True: (0, 140, 60), False: (200, 40, 40), None: (120, 120, 120)}[verdict]
    if verdict is False:                                                        # crossed out
        step = torch.arange(CELL)
        for shift in (-1, 0, 1):
            image[:, step, (step + shift).clamp(0, CELL - 1)] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    image = TF.pad(image, [0, 0, 0, 20], fill=255)
    image = draw_bounding_boxes(image, torch.tensor([[0, 0, CELL - 1, CELL - 1]]), colors=[colour], width=5)
    text = {"query": "? ", True: "+ ", False: "- ", None: ""}[verdict] + (video.name or Path(video.path).stem)
    return draw_bounding_boxes(image, torch.tensor([[0, CELL, CELL - 1, CELL + 19]]), [text], fill=True,
                               colors=[(255, 255, 255)], label_colors=[colour])


GROUPS = 512                                                                    # of two videos, for --psi


@torch.no_grad()
def encode(models, pairs, args, device):
    """ψ of GROUPS groups (or what fills the last batch), as pre-training draws them: τ, crops, colours.

    models: {network: F with ψ} -> {network: psi (N, D)}, labels {name: (N, ...)} of data.Pairs, {file: problem}.
    """
    items, batches, failed = min(8, len(pairs)), [], {}                         # items: groups of a batch
    steps = -(-GROUPS // items)
    for batch in tqdm(step_loader(pairs, items, 0, steps, args.workers), "psi", steps, unit="batch"):
        failed.update(batch.pop("failed"))
        clips = augmented(batch | dict(clips=batch.pop("clips").to(device)))    # (B, 2, 3, T, H, W)
        with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
            batches.append(batch | {name: model(clips)["psi"].float().cpu() for name, model in models.items()})
    labels = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    psi = {name: labels.pop(name) for name in models}
    if not all(x.isfinite().all() for x in psi.values()):
        raise ValueError("--psi: what the network makes of some clips is not finite")
    return psi, labels, failed


def tell_apart(psi, labels, speeds, T):
    """What ψ tells apart (Sec. 3.1): cosines of ψ_i^pq and ψ_k^rs, and the nearest ψ_k^rs of each ψ_i^pq, k ≠ i.

    psi: (N, D); labels: video, pq, order (N,), start, speed, direction (N, 2) as data.Pairs has them; speeds: what the
    classes of speed mean; shifts that differ by up to T source frames count as alike.
    -> partner: how often the nearest has the same pq, and a random one (share, chance); curves: mean cosine against one
    difference where the others are alike, a dict a step of the curve; kinds: share and chance of the same for parts of
    pq and for order, and matrix, a row a kind of anchor: the shares of the kinds of its nearest (None: no anchor).
    """
    cosine = (x := F.normalize(psi.double(), dim=1)) @ x.T                      # (N, N)
    other = labels["video"][:, None] != labels["video"]                         # (N, N)  k ≠ i
    nearest = cosine.masked_fill(~other, -2).argmax(1, keepdim=True)            # (N, 1)
    shift = labels["start"][:, 1] - labels["start"][:, 0]                       # (N,)  from p to q, in source frames
    octave = torch.tensor(speeds).double().log2()[labels["speed"]]              # (N, 2)
    shift = (shift[:, None] - shift).abs()                                      # (N, N) each: the differences
    octaves = (octave[:, None] - octave).abs().sum(2)
    turned = (labels["direction"][:, None] != labels["direction"]).sum(2)
    doubled = torch.where(shift > 0, 2 ** shift.double().clamp(min=1).log2().ceil(), 0)     # 0, 1, 2, 3-4, 5-8, ...

    def curve(difference, alike):
        alike = alike & other.triu(1)                                           # each two rows once
        steps, step = difference[alike].unique(return_inverse=True)
        pairs = step.bincount()
        means = step.bincount(cosine[alike]) / pairs
        return [dict(up_to=int(d), cosine=c, pairs=n) for d, c, n in zip(*(x.tolist() for x in (steps, means, pairs)))]

    def hits(label):
        match = label[:, None] == label                                         # (N, N)
        return dict(share=match.gather(1, nearest).double().mean().item(),
                    chance=((match & other).sum(1) / other.sum(1)).double().mean().item())

    kinds = {}
    for name, label, words in (
            ("speed", labels["speed"] @ torch.tensor([len(speeds), 1]), [f"{p}x {q}x" for p in speeds for q in speeds]),
            ("direction", labels["direction"] @ torch.tensor([2, 1]), ["> >", "> <", "< >", "< <"]),
            ("order", labels["order"], ["before", "after", "overlap"])):
        anchor = F.one_hot(label, len(words)).double()                          # (N, K)
        rows = (anchor.T @ anchor[nearest[:, 0]]).tolist()                      # K x K  counts
        kinds[name] = dict(words=words, **hits(label),
                           matrix=[[n / sum(row) for n in row] if sum(row) else None for row in rows])
    return dict(partner=hits(labels["pq"]), kinds=kinds, curves=dict(
        shift=curve(doubled, (octaves < 1e-9) & (turned == 0)),
        speed=curve((octaves - 1e-9).ceil(), (shift <= T) & (turned == 0)),
        direction=curve(turned, (shift <= T) & (octaves < 1e-9))))


BLUE, GREY, PALE = (40, 90, 200), (150, 150, 150), (225, 225, 225)


def psi_picture(file, found, told):
    """What tell_apart found, {network: ...}, the checkpoint first: curves of all above the checkpoint's matrices."""
    first, *beside = found.values()
    cells = len(first["kinds"]["speed"]["words"])
    sheet = torch.full((3, 410 + 18 * max(cells, 16), 27 * max(cells, 16) + 550), 255, dtype=torch.uint8)
    axes = ("mean cosine of psi of two videos against one difference between their transformations, the others alike; "
            "blue: checkpoint, grey: randomly initialised")
    texts = [(10, 6, axes, (0, 0, 0)), (10, 22, told, (0, 0, 0))]
    for n, (name, axis) in enumerate((("shift", "difference in shift, up to ... source frames"),
                                      ("speed", "difference in speed, octaves of p + octaves of q"),
                                      ("direction", "clips that differ in direction"))):
        texts += plot(sheet, 45 + 320 * n, 60, axis, [x["curves"][name] for x in (*beside, first)], (GREY, BLUE))
    for name, left, top, width in (("speed", 65, 390, 27), ("direction", 160 + 27 * cells, 390, 50),
                                   ("order", 160 + 27 * cells, 550, 50)):
        texts += table(sheet, left, top, width, name, first["kinds"][name])
    x, y, words, tints = zip(*texts)
    boxes = torch.tensor([x, y, x, y]).T + torch.tensor([0, 0, 1, 1])           # (n, 4)  at the corner of each text
    sheet = draw_bounding_boxes(sheet, boxes, list(words), ["white"] * len(x), label_colors=list(tints))
    TF.to_pil_image(sheet).save(file)


def paint(sheet, x, y, width, height, tint):
    sheet[:, y:y + height, x:x + width] = torch.tensor(tint, dtype=torch.uint8)[:, None, None]


def plot(sheet, left, top, axis, curves, tints, width=260, height=200):
    """Curves of tell_apart, drawn on sheet (3, H, W) -> the texts that belong to it, [(x, y, text, tint)]."""
    low = min(-0.1, *(step["cosine"] for curve in curves for step in curve))
    across = np.linspace(left + 12, left + width - 12, len(curves[0])).round().astype(int).tolist()
    texts = [(x - 6, top + height + 4, str(step["up_to"]), (0, 0, 0)) for x, step in zip(across, curves[0])]
    for cosine in (0, 0.5, 1):
        y = top + round((1 - cosine) / (1 - low) * height)
        paint(sheet, left, y, width, 1, PALE)
        texts.append((left - 30, y - 8, f"{cosine:.1f}", (0, 0, 0)))
    for curve, tint in zip(curves, tints):
        ys = [top + round((1 - step["cosine"]) / (1 - low) * height) for step in curve]
        for x in np.arange(across[0], across[-1], 0.1):
            paint(sheet, round(x), round(np.interp(x, across, ys)), 2, 2, tint)
        for x, y in zip(across, ys):
            paint(sheet, x - 2, y - 2, 6, 6, tint)
    return [*texts, (left, top + height + 22, axis, (0, 0, 0))]


def table(sheet, left, top, width, name, kinds):
    """A matrix of tell_apart, in per cent, drawn on sheet (3, H, W) -> its texts, [(x, y, text, tint)]."""
    texts = [(left - 57, top - 56, f"{name} of p and q: rows the anchor's, columns its nearest's, %", (0, 0, 0)),
             (left - 57, top - 42, f"the same: {kinds['share']:.1%} (chance: {kinds['chance']:.1%})", (0, 0, 0))]
    for k, (word, row) in enumerate(zip(kinds["words"], kinds["matrix"])):
        texts.append((left - 57, top + 18 * k - 1, word, (0, 0, 0)))
        texts += [(left - 1 + width * k, top - 27 + 12 * n, part, (0, 0, 0)) for n, part in enumerate(word.split())]
        for m, share in enumerate(row or ()):
            x, y = left + width * m, top + 18 * k
            paint(sheet, x, y, width - 1, 17, [round(255 - share * (255 - c)) for c in BLUE])
            texts.append((x - 1, y - 1, f"{100 * share:.0f}", (0, 0, 0) if share < 0.5 else (255, 255, 255)))
    return texts


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    print(f"{device.type}: {vars(args)}")
    networks = random_beside(network, args, device)
    models = {name: with_psi(net, args.checkpoint if net is network else None).to(device)
              for name, net in networks.items() if args.psi}
    if rank == 0:
        check_writable(out=default_out(args, args.checkpoint, args.arch) / "retrieval.json",
                       **{name: vars(args)[name] for name in ("features", "picture", "psi") if vars(args)[name]})
    splits = [[on_first(list_and_scan, args, number, part) for part in (args.gallery, args.query)]
              for number in args.split]
    for (gallery, index), _ in splits:
        videos = len(gallery.paths) - len(unreadable(gallery, index))
        if args.k[-1] > videos:
            raise ValueError(f"--k {args.k[-1]} is larger than the gallery, {gallery.title}: {videos} videos")
    if args.psi:
        (query, index), speeds = splits[0][1], network.args["speeds"]
        paths, report = usable(query, index, speeds[0] * (args.frames - 1) + 1)
        pairs = Pairs(query, paths, index, args.frames, args.size, speeds, args.seed)
        print(f"--psi: {report}")
    splits = [[extract(networks, args, *part, device) for part in parts] for parts in splits]
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return

    results, first = [], None
    for number, parts in zip(args.split, splits):
        gallery, query = (only_read(*part) for part in parts)
        shares, nearest, cosines = judge(gallery, query, len(parts[1][0].paths), args.k, device)
        results.append(dict(split=number, gallery=judged(*parts[0]), query=judged(*parts[1]), recall=shares))
        first = first or (gallery, query, nearest, cosines)
    gallery, query, nearest, cosines = first
    if args.dataset == "folder" or not {args.gallery, args.query} <= PARTS:
        results[0]["neighbours"] = {
            video.path: {gallery[0][g].path: round(cosine, 4) for g, cosine in zip(row, near) if g >= 0}
            for video, row, near in zip(query[0], nearest[:, :args.k[-1]].tolist(), cosines.tolist())}
    if args.psi:
        psi, labels, replaced = encode(models, pairs, args, device)
        psi = {name: tell_apart(x, labels, pairs.speeds, args.frames) for name, x in psi.items()}
        results[0]["psi"] = dict(psi, videos=len(pairs.files), pairs=len(labels["pq"]), replaced=replaced)
    mean = {name: {k: float(np.mean([result["recall"][name][k] for result in results])) for k in share}
            for name, share in results[0]["recall"].items()}
    file = write_result(args, f"retrieval-{args.dataset}", network, "mean and standard deviation of the gallery",
                        recall=mean, splits=results)

    for result in results:
        print(told(result["gallery"], "left out"),
              told(result["query"], "count as wrong" if mean else "left out"), sep="\n")
    print(f"retrieval on {args.dataset}, split {' '.join(map(str, args.split))}"
          f"{'' if mean else ': no classes, so no R@k'} ({file})")
    for k in mean.get("chance", ()):
        figures = in_words({name: mean[name][k] for name in networks}, mean["chance"][k])
        print(f"  {k}{' = 1-NN accuracy' if k == 'R@1' else ''}: {figures}")
    if args.features:
        save_features(args.features, gallery, query, nearest, cosines)
    if args.picture:
        picture(args.picture, gallery[0], query[0], nearest)
    if args.psi:
        for name, problem in replaced.items():
            print(f"--psi: replaced an unreadable video, {name}: {problem}")
        partner = {name: x["partner"] for name, x in psi.items()}
        said = ("the nearest psi of another video has the same shift, speeds and directions: "
                + in_words({name: x["share"] for name, x in partner.items()}, partner["checkpoint"]["chance"]))
        print(f"  {said}; {len(labels['pq'])} pairs of clips of {len(pairs.files)} videos ({args.psi})")
        psi_picture(args.psi, psi, said)


if __name__ == "__main__":
    run(main)
