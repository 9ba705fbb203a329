"""Nearest-neighbour retrieval and 1-NN classification on frozen features (Table 1, "1-NN"; Table 3).

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python retrieval.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE
    python retrieval.py --checkpoint BACKBONE --gallery MY_VIDEOS --query OTHER_VIDEOS --features found.npz
    python retrieval.py --checkpoint runs/toy-r3d18_narrow/checkpoint.pt --psi psi.png

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
import torch.distributed as dist

from common.files import check_writable
from common.flags import judging_parser, known_flags, parse_and_check
from common.judging import (average_crops, default_out, extract, in_words, judged, load_for_judging, random_beside,
                            told, write_result)
from common.processes import init_distributed, on_first, run, share_buffers
from common.splits import list_and_scan, sources, unreadable
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
                                 k=min(max(ks), len(gallery[0])))
        found = found or nearest
        shares[name] = {f"R@{k}": recall(ranks, expected, k) for k in ks}
    shares["chance"] = {f"R@{k}": chance_recall(*ids, expected, k) for k in ks}
    return {} if None in (video.name for videos, _ in (gallery, query) for video in videos) else shares, *found


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
    """FILE.npz: of gallery and query features (N, D) of F before standardising, paths and classes ("" without);
    for each query the rows of the nearest gallery videos (-1: no more) and their cosines, (Q, k)."""
    arrays = dict(nearest=nearest.numpy(), cosines=cosines.numpy())
    for side, (videos, x) in (("gallery", gallery), ("query", query)):
        arrays |= {f"{side}_features": next(iter(x.values())), f"{side}_paths": np.array([v.path for v in videos]),
                   f"{side}_classes": np.array([v.name or "" for v in videos])}
    np.savez(file, **arrays)


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    print(f"{device.type}: {vars(args)}")
    networks = random_beside(network, args, device)
    if rank == 0:
        check_writable(out=default_out(args, args.checkpoint, args.arch) / "retrieval.json",
                       **({"features": args.features} if args.features else {}))
    splits = [[on_first(list_and_scan, args, number, part) for part in (args.gallery, args.query)]
              for number in args.split]
    for (gallery, index), _ in splits:
        videos = len(gallery.paths) - len(unreadable(gallery, index))
        if args.k[-1] > videos:
            raise ValueError(f"--k {args.k[-1]} is larger than the gallery, {gallery.title}: {videos} videos")
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


if __name__ == "__main__":
    run(main)
