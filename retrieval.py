"""Nearest-neighbour retrieval and 1-NN on frozen features (Table 1, "1-NN"; Table 3).

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python retrieval.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist \\
        --checkpoint BACKBONE
    python retrieval.py --checkpoint BACKBONE --gallery MY_VIDEOS --query OTHERS --features f.npz

Cosine similarity; queries are the test videos, the gallery is the training set (Sec. 4.2). R@k is
the fraction of queries with a video of the same class among the k nearest; 1-NN accuracy is R@1.
Unreadable queries count as errors. Writes OUT/retrieval-DATASET.json; with own folders, in class
folders or not, it names the nearest of each query, which tools/neighbours.py draws from
OUT/features.npz. A query's own file is not its neighbour: --gallery and --query may be one folder.
"""
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import evaluation
from common.distributed import init_distributed, run
from common.flags import evaluation_defaults, evaluation_parser, fill_defaults, positive_int

PARTS = {"train", "test"}                                       # of a data set; others are folders


def parse_args(argv=None):
    parser = evaluation_parser(__doc__)
    add = parser.add_argument_group("retrieval").add_argument
    add("--gallery", default="train", help="train, test, or a folder to search in (Table 3)")
    add("--query", default="test", help="train, test, or a folder to search for (Table 3)")
    add("--k", type=positive_int, nargs="+", default=[1, 5, 10, 20], help="the k of R@k (Table 3)")
    add("--features", metavar="FILE.npz", help="write features, paths, classes, neighbours here "
        "(own folders: by default features.npz in the folder of the results)")
    args = parser.parse_args(argv)
    args.k = sorted(set(args.k))
    if not PARTS & {args.gallery, args.query}:                  # both are folders
        args.dataset, args.data = "folder", args.gallery
    elif args.dataset == "toy" and not {args.gallery, args.query} <= PARTS:
        parser.error("--gallery and --query are a folder each, or one goes with --dataset, --data")
    return fill_defaults(parser, args, evaluation_defaults(args.dataset))


# ---- Search ----

def standardise(gallery, query):
    """Sec. 3.4: "standardizing the result based on training set statistics", here the gallery's.

    gallery: (G, D), query: (Q, D) float32 -> unit rows in float64; inner products are cosines
    """
    std, mean = (x.double() for x in torch.std_mean(gallery, 0, correction=0))
    std[std == 0] = 1
    both = [x.double().sub_(mean).div_(std) for x in (gallery, query)]
    return [x.div_(x.norm(dim=1, keepdim=True).clamp(min=1e-12)) for x in both]


def search(gallery, query, gallery_ids, query_ids, k, cosines=2 ** 24):
    """Exact search, `cosines` at a time, so that memory grows with neither G nor Q.

    gallery: (G, D), query: (Q, D), unit rows; gallery_ids: (2, G), query_ids: (2, Q) ints, class
    (-1: none) and video. A query's own video is excluded; ties go to the earlier gallery video.
    -> ranks (Q,): number of videos nearer than the first of the query's class (maxint: none);
       nearest (Q, k): gallery rows, -1 if fewer than k; cosines (Q, k)
    """
    none = torch.iinfo(torch.int64).max
    chunks, size = [], max(1, cosines // len(gallery))
    for rows in torch.arange(len(query), device=query.device).split(size):
        label, video = query_ids[:, rows, None]                         # (c, 1) each
        cosine = (query[rows] @ gallery.T).round(decimals=9)            # (c, G)  ties stay ties
        cosine[video == gallery_ids[1]] = -torch.inf
        cosine, near = cosine.sort(dim=1, descending=True, stable=True)
        there = cosine > -torch.inf
        right = (gallery_ids[0][near] == label) & (label >= 0) & there  # (c, G)
        ranks = right.int().argmax(dim=1).masked_fill(~right.any(dim=1), none)
        nearest = near[:, :k].masked_fill(~there[:, :k], -1)            # (c, k)
        chunks.append((ranks, nearest, cosine[:, :k].clone()))
    return [torch.cat(column).cpu() for column in zip(*chunks)]


def recall(ranks, expected, k):
    """R@k (Table 3): fraction of `expected` queries whose nearest same-class video ranks < k."""
    return int((ranks < k).sum()) / expected


def chance_recall(gallery_ids, query_ids, expected, k):
    """R@k of a random order: 1 - C(G - n, k) / C(G, k), n of the G neighbours are of the class."""
    classes, videos = Counter(gallery_ids[0]), Counter(gallery_ids[1])
    both = Counter(zip(*gallery_ids))
    G = np.array([len(gallery_ids[1]) - videos[v] for v in query_ids[1]])       # (Q,)  not its own
    n = np.array([classes[c] - both[c, v] for c, v in zip(*query_ids)])         # (Q,)
    miss = [np.where(j < G, (G - n - j).clip(0) / (G - j).clip(1), 1) for j in range(k)]
    return float((1 - np.prod(miss, axis=0)).sum() / expected)


# ---- Features of a gallery and of queries ----

class Side(NamedTuple):
    """The readable videos of a gallery or of queries; classes: names, "" for none."""
    paths: list
    files: list
    classes: list
    x: dict                                                     # {network: (N, D)}


def readable(features):
    """evaluation.Features -> Side"""
    split, mask = features.split, features.readable()
    kept = [(path, label) for path, label, ok in zip(split.paths, split.labels, mask) if ok]
    return Side(
        paths=[path for path, _ in kept],
        files=[os.path.abspath(split.files[path]) for path, _ in kept],
        classes=["" if label is None else split.classes[label] for _, label in kept],
        x={network: x[mask] for network, x in features.x.items()})


def ids_of(gallery, query):
    """Class and file of each video as ints, equal where they are -> (2, G), (2, Q); -1: no class"""
    classes, files, ids = {"": -1}, {}, []
    for side in (gallery, query):
        names = [classes.setdefault(name, len(classes)) for name in side.classes]
        places = [files.setdefault(os.path.realpath(file), len(files)) for file in side.files]
        ids.append(np.array([names, places]))
    return ids


def retrieve(gallery, query, expected, ks, device):
    """Search with each network.

    -> {network or "chance": {"R@k": fraction}}, empty if videos lack classes; {network: (nearest,
    cosines)}, each (Q, k), see `search`
    """
    ids = ids_of(gallery, query)
    on_device = [torch.tensor(x, device=device) for x in ids]
    recalls, neighbours = {}, {}
    for name in gallery.x:
        x = [torch.tensor(side.x[name], device=device) for side in (gallery, query)]
        most = min(ks[-1], len(gallery.paths))
        ranks, nearest, cosines = search(*standardise(*x), *on_device, most)
        recalls[name] = {f"R@{k}": recall(ranks, expected, k) for k in ks}
        neighbours[name] = nearest, cosines
    recalls["chance"] = {f"R@{k}": chance_recall(*ids, expected, k) for k in ks}
    if "" in gallery.classes + query.classes:
        recalls = {}
    return recalls, neighbours


def save_features(file, gallery, query, nearest, cosines):
    """FILE.npz: features (N, D) of F before standardising, paths, files and classes ("": none) of
    gallery and query; for each query nearest (rows of the gallery, -1: none) and cosines (Q, k).
    """
    arrays = dict(nearest=nearest.numpy(), cosines=cosines.numpy())
    for name, side in (("gallery", gallery), ("query", query)):
        arrays[f"{name}_features"] = next(iter(side.x.values()))
        arrays[f"{name}_paths"] = np.array(side.paths)
        arrays[f"{name}_files"] = np.array(side.files)
        arrays[f"{name}_classes"] = np.array(side.classes)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as npz:                               # a name would get a suffix
        np.savez(npz, **arrays)


def named(gallery, query, nearest, cosines):
    """{query: {gallery video: cosine}} of the nearest."""
    return {path: {gallery.paths[g]: round(cosine, 4) for g, cosine in zip(row, near) if g >= 0}
            for path, row, near in zip(query.paths, nearest.tolist(), cosines.tolist())}


def print_results(args, results, mean, file):
    for result in results:
        evaluation.print_counts(result["gallery"], "are left out")
        evaluation.print_counts(result["query"], "count as errors" if mean else "are left out")
    print(f"retrieval on {args.dataset}, split {' '.join(map(str, args.split))} ({file})")
    for k in mean.get("chance", ()):
        figures = {name: mean[name][k] for name in mean if name != "chance"}
        also = " = 1-NN accuracy" if k == "R@1" else ""
        print(f"  {k}{also}: {evaluation.with_random(figures, mean['chance'][k])}")
    if not mean:
        print("  no classes, so no R@k; the nearest of the first queries, with cosines:")
        for query, near in [*results[0]["neighbours"].items()][:3]:
            names = (f"{name} {cosine:.2f}" for name, cosine in [*near.items()][:3])
            print(f"  {query}: {', '.join(names)}")
    if args.features:
        print(f"next: python tools/neighbours.py {shlex.quote(args.features)} --out neighbours.png")


def main(argv=None):
    args = parse_args(argv)
    rank, device = init_distributed()
    networks = evaluation.load_networks(args, device)

    # Features
    parts = evaluation.load_parts(args, (args.gallery, args.query))
    features = []
    for gallery, query in parts:
        extracted = evaluation.extract(networks, gallery, args, device)
        other = extracted if query is gallery else evaluation.extract(networks, query, args, device)
        features.append((extracted, other))
    if rank:
        return

    # Neighbours
    results, first = [], next(iter(networks))                   # the checkpoint, if there is one
    own = args.dataset in ("folder", "kinetics400") or not {args.gallery, args.query} <= PARTS
    if own and not args.features:
        folder = evaluation.result_folder(args, networks[first].arch)
        args.features = f"{folder}/features.npz"
    for number, pair in zip(args.split, features):
        gallery, query = map(readable, pair)
        expected = len(pair[1].split.paths)
        recalls, neighbours = retrieve(gallery, query, expected, args.k, device)
        nearest, cosines = neighbours[first]
        results.append(dict(
            split=number, gallery=evaluation.counts(pair[0].split, pair[0].failed),
            query=evaluation.counts(pair[1].split, pair[1].failed), recall=recalls))
        if number == args.split[0] and args.features:
            save_features(args.features, gallery, query, nearest, cosines)
        if number == args.split[0] and own:
            results[0]["neighbours"] = named(gallery, query, nearest, cosines)

    # Result
    mean = {}
    for name, recalls in results[0]["recall"].items():
        mean[name] = {k: float(np.mean([result["recall"][name][k] for result in results]))
                      for k in recalls}
    name = f"retrieval-{args.dataset}"
    file = evaluation.write_result(args, name, networks[first], recall=mean, splits=results)
    print_results(args, results, mean, file)


if __name__ == "__main__":
    run(main)
