"""Nearest-neighbour retrieval and 1-NN classification on frozen features (Table 1, "1-NN"; Table 3).

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python retrieval.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE
    python retrieval.py --checkpoint BACKBONE --gallery MY_VIDEOS --query OTHER_VIDEOS --features found.npz

Cosine similarity; queries are the test videos, the gallery is the training set (Sec. 4.2). R@k is the share of queries
with a video of the same class among the k nearest; 1-NN accuracy is R@1. A query that cannot be read counts as wrong.
Writes OUT/retrieval-DATASET.json; with folders of one's own videos, in class folders or not, it names the nearest
videos of each query. A query's own file is not its neighbour: --gallery and --query may be one folder.
"""
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from common.files import check_writable
from common.flags import judging_parser, known_flags, parse_and_check
from common.judging import (average_crops, beside_random, count_videos, counts_sentence, extract_parts,
                            load_for_judging, random_beside, result_folder, scan_parts, write_result)
from common.processes import init_distributed, run, share_buffers
from common.splits import check_apart, sources, unreadable
from data import Windows

PARTS = {"train", "test"}                                                       # of a data set; else it is a folder


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = judging_parser(__doc__, argv)
    group = parser.add_argument_group("retrieval")
    group.add_argument("--gallery", default="train", help="train, test, or a folder of videos to search in (Table 3)")
    group.add_argument("--query", default="test", help="train, test, or a folder of videos to search for (Table 3)")
    group.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20], help="the k of R@k (Table 3)")
    group.add_argument("--features", metavar="FILE.npz", help="write features, paths, classes and neighbours here")
    known = known_flags(parser, argv)
    folders = not PARTS & {known.gallery, known.query}
    if not folders and not {known.gallery, known.query} <= PARTS and known.dataset == "toy":
        parser.error("of --gallery and --query one is a folder, the other part of the toy set: give a folder for both "
                     "(it may be the same), or --dataset")
    if folders:
        parser.set_defaults(data=known.gallery)
    args = parse_and_check(parser, argv)
    if min(args.k) < 1:
        parser.error(f"--k must be at least 1, but is {min(args.k)}")
    if args.features and not args.features.endswith(".npz"):
        parser.error(f"--features must end in .npz, but is {args.features}")
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
    none = torch.iinfo(torch.int64).max
    found = []
    for rows in torch.arange(len(query), device=query.device).split(max(1, cosines // len(gallery))):
        label, video = query_ids[:, rows, None]                                 # (c, 1) each
        cosine = (query[rows] @ gallery.T).round(decimals=9)                    # (c, G)  without the noise of summing
        cosine[video == gallery_ids[1]] = -torch.inf
        cosine, near = cosine.sort(dim=1, descending=True, stable=True)         # (c, G)  nearest first
        there = cosine > -torch.inf
        right = (gallery_ids[0][near] == label) & (label >= 0) & there          # (c, G)
        ranks = right.int().argmax(dim=1).masked_fill(~right.any(dim=1), none)  # (c,)
        nearest = near[:, :k].masked_fill(~there[:, :k], -1)                    # (c, k)
        found.append((ranks, nearest, cosine[:, :k].clone()))                   # not a view, which would keep (c, G)
    return [torch.cat(column).cpu() for column in zip(*found)]


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
    name: str | None                                                            # of its class


def readable(features):
    """Of judging.Features the videos that could be read -> list of Video, {network: (N, D)}."""
    split, read = features.split, features.read()
    videos = []
    for path, label, ok in zip(split.paths, split.labels, read):
        if ok:
            videos.append(Video(path, str(split.found[path]), None if label is None else split.classes[label]))
    return videos, {network: x[read] for network, x in features.x.items()}


def numbered(videos, classes, files):
    """Class and file of each video as numbers, equal where they are -> (2, N) ints; classes, files: numbers so far."""
    names = [classes.setdefault(video.name, len(classes)) for video in videos]
    places = [files.setdefault(os.path.realpath(video.file), len(files)) for video in videos]
    return np.array([names, places])


def compare(gallery, query, expected, ks, device):
    """R@k, expected of a random order too, and what the first network finds; gallery, query: see readable.

    -> {network or "chance": {"R@k": share}}, empty without classes, nearest and cosines (Q, k): see search.
    """
    (gallery_videos, gallery_x), (query_videos, query_x) = gallery, query
    classes, files = {None: -1}, {}
    gallery_ids = numbered(gallery_videos, classes, files)
    query_ids = numbered(query_videos, classes, files)
    ids = torch.tensor(gallery_ids, device=device), torch.tensor(query_ids, device=device)
    shares, found = {}, []
    for name in gallery_x:
        x = [torch.tensor(features[name], device=device) for features in (gallery_x, query_x)]
        ranks, *nearest = search(*standardise(*x), *ids, k=min(max(ks), len(gallery_videos)))
        found = found or nearest
        shares[name] = {f"R@{k}": recall(ranks, expected, k) for k in ks}
    shares["chance"] = {f"R@{k}": chance_recall(gallery_ids, query_ids, expected, k) for k in ks}
    labelled = None not in [video.name for video in gallery_videos + query_videos]
    return shares if labelled else {}, *found


def knn_accuracy(backbone, split, paths, index, args, device, most=2000):
    """1-NN accuracy (Table 1) among up to `most` training videos, so that a bad run is seen early; a video's own source
    (UCF101's group) does not count as a neighbour.

    -> {knn: accuracy, knn_chance: that of always naming the most frequent class}
    """
    paths = paths[::-(-len(paths) // most)]
    label = dict(zip(split.paths, split.labels))
    windows = Windows(replace(split, paths=paths), index, args.frames, args.size, windows=1)
    share_buffers(backbone.eval())
    x, failed = average_crops(backbone, windows, args.size, "centre", device, args.amp, args.workers, title="k-NN")
    backbone.train()
    read = [n for n in range(len(paths)) if n not in failed]
    source = sources(args.dataset, paths)
    ids = torch.tensor([[label[paths[n]] for n in read], [source.index(source[n]) for n in read]])  # class, source
    x, _ = standardise(x[read], x[read])
    ranks, *_ = search(x, x, ids, ids, k=1)
    accuracy = (ranks == 0).double().mean().item()
    return dict(knn=accuracy, knn_chance=(ids[0].bincount().max() / len(read)).item())


def save_features(file, gallery, query, nearest, cosines):
    """FILE.npz: of gallery and query features (N, D) of F before standardising, paths, files and classes ("" without);
    for each query the rows of the nearest gallery videos (-1: no more) and their cosines, (Q, k)."""
    arrays = dict(nearest=nearest.numpy(), cosines=cosines.numpy())
    for side, (videos, x) in (("gallery", gallery), ("query", query)):
        arrays[f"{side}_features"] = next(iter(x.values()))
        arrays[f"{side}_paths"] = np.array([video.path for video in videos])
        arrays[f"{side}_files"] = np.array([os.path.abspath(video.file) for video in videos])
        arrays[f"{side}_classes"] = np.array([video.name or "" for video in videos])
    np.savez(file, **arrays)


def neighbours(gallery, query, nearest, cosines):
    """{query: {gallery video: cosine}} of the nearest, by their names."""
    found = {}
    for video, row, near in zip(query, nearest.tolist(), cosines.tolist()):
        found[video.path] = {gallery[g].path: round(cosine, 4) for g, cosine in zip(row, near) if g >= 0}
    return found


def check_gallery(args, gallery, index, query):
    """ValueError: fewer videos to search in than neighbours asked for, or training and test lists that share files."""
    videos = len(gallery.paths) - len(unreadable(gallery, index))
    if args.k[-1] > videos:
        raise ValueError(f"--k {args.k[-1]} is larger than the gallery, {gallery.title}: {videos} videos")
    if {args.gallery, args.query} == PARTS and gallery.title != query.title:
        check_apart(gallery, query)


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    print(f"{device.type}: {vars(args)}")
    networks = random_beside(network, args, device)
    if rank == 0:
        check_writable(out=result_folder(args, args.checkpoint, args.arch) / "retrieval.json")
    if rank == 0 and args.features:
        check_writable(features=args.features)

    # Features
    scanned = scan_parts(args, (args.gallery, args.query))
    for (gallery, index), (query, _) in scanned:
        check_gallery(args, gallery, index, query)
    features = extract_parts(networks, args, scanned, device)
    if rank:
        return

    # Neighbours
    results = []
    for number, parts in zip(args.split, features):
        gallery, query = readable(parts[0]), readable(parts[1])
        shares, nearest, cosines = compare(gallery, query, len(parts[1].split.paths), args.k, device)
        counts = [count_videos(part.split, part.failed) for part in parts]
        results.append(dict(split=number, gallery=counts[0], query=counts[1], recall=shares))
        if number == args.split[0] and args.features:
            save_features(args.features, gallery, query, nearest, cosines)
        if number == args.split[0] and (args.dataset == "folder" or not {args.gallery, args.query} <= PARTS):
            results[0]["neighbours"] = neighbours(gallery[0], query[0], nearest, cosines)
    write_and_say(args, network, results)


def write_and_say(args, network, results):
    """The result file, and the lines that the user reads."""
    mean = {}
    for name, shares in results[0]["recall"].items():
        mean[name] = {k: float(np.mean([result["recall"][name][k] for result in results])) for k in shares}
    file = write_result(args, f"retrieval-{args.dataset}", network, "mean and standard deviation of the gallery",
                        recall=mean, splits=results)
    for result in results:
        print(counts_sentence(result["gallery"], "left out"))
        print(counts_sentence(result["query"], "count as wrong" if mean else "left out"))
    remark = "" if mean else ": no classes, so no R@k"
    print(f"retrieval on {args.dataset}, split {' '.join(map(str, args.split))}{remark} ({file})")
    for k in mean.get("chance", ()):
        figures = {name: mean[name][k] for name in mean if name != "chance"}
        also = " = 1-NN accuracy" if k == "R@1" else ""
        print(f"  {k}{also}: {beside_random(figures, mean['chance'][k])}")


if __name__ == "__main__":
    run(main)
