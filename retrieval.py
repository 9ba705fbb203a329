"""Nearest-neighbour retrieval and 1-NN classification on frozen features (Table 1, "1-NN"; Table 3).

    python retrieval.py --checkpoint runs/toy-r3d18_narrow/backbone.pt --picture neighbours.png
    python retrieval.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE
    python retrieval.py --checkpoint BACKBONE --gallery MY_VIDEOS --query OTHER_VIDEOS --features found.npz

Cosine similarity; queries are the test videos, the gallery is the training set (Sec. 4.2). R@k is the share of queries
with a video of the same class among the k nearest; 1-NN accuracy is R@1. Writes OUT/retrieval-DATASET.json.
"""
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision.io import write_png
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes

from common import (checked, extract, in_words, init_distributed, judged, load_for_judging, random_beside, run,
                    shared_parser, write_result)
from data import VideoError, count_frames, decode


def parse_args(argv=None):
    parser, _ = shared_parser(__doc__, sys.argv[1:] if argv is None else argv, judging="centre")
    group = parser.add_argument_group("retrieval")
    group.add_argument("--gallery", default="train", help="train, test, or a folder of videos to search in (Table 3)")
    group.add_argument("--query", default="test", help="train, test, or a folder of videos to search for (Table 3)")
    group.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20], help="the k of R@k (Table 3)")
    group.add_argument("--features", metavar="FILE.npz", help="write features, paths and classes of both here")
    group.add_argument("--picture", metavar="FILE.png", help="draw queries and their nearest videos here")
    args = checked(parser, argv)
    if min(args.k) < 1:
        parser.error(f"--k must be at least 1, but is {min(args.k)}")
    args.k = sorted(set(args.k))
    return args


def standardise(gallery, query):
    """Sec. 3.4: "standardizing the result based on training set statistics", here the gallery's; then unit length.

    gallery: (G, D), query: (Q, D) float tensors -> the same shapes; their inner products are cosines.
    """
    mean, std = gallery.mean(0), gallery.std(0, correction=0)
    std = torch.where(std > 0, std, 1)
    return F.normalize((gallery - mean) / std, dim=1), F.normalize((query - mean) / std, dim=1)


def search(gallery, query, gallery_ids, query_ids, k, chunk=256):
    """Exact search by cosine, `chunk` queries at a time: memory grows with the gallery, not with queries x gallery.

    gallery: (G, D), query: (Q, D), unit rows; gallery_ids: (2, G), query_ids: (2, Q) ints, class (-1: none) and video.
    A query's own video is no neighbour. Of equally near videos the one that comes first in the gallery is nearer.
    -> rank (Q,): how many videos are nearer than the first one of the query's class (G if there is none);
       nearest (Q, k): the numbers of the k nearest.
    """
    ranks, nearest, place = [], [], torch.arange(len(gallery), device=gallery.device)
    for rows in torch.arange(len(query), device=query.device).split(chunk):
        label, video = query_ids[:, rows, None]                                 # (c, 1) each
        sim = query[rows] @ gallery.T                                           # (c, G)
        sim = sim.masked_fill(video == gallery_ids[1], -torch.inf)
        right = (label == gallery_ids[0]) & (label >= 0) & (sim > -torch.inf)   # (c, G)
        best = sim.masked_fill(~right, -torch.inf).amax(1, keepdim=True)        # (c, 1)
        first = (right & (sim == best)).int().argmax(1, keepdim=True)           # (c, 1)  in the gallery's order
        rank = ((sim > best) | (sim == best) & (place < first)).sum(1)          # (c,)
        ranks.append(torch.where(right.any(1), rank, len(gallery)))
        nearest.append(sim.topk(k).indices)
    return torch.cat(ranks).cpu(), torch.cat(nearest).cpu()


def recall(ranks, expected, k):
    """R@k (Table 3): the share of `expected` queries whose first right video has fewer than k before it."""
    return float((ranks < k).sum() / expected)


def chance_recall(gallery_class, query_class, k):
    """R@k of a random order: 1 - C(G - n, k) / C(G, k), where n of G videos are of the query's class; the mean."""
    G, n = len(gallery_class), (query_class[:, None] == gallery_class).sum(1)   # (Q,)
    miss = np.prod([(G - n - j).clip(0) / (G - j) for j in range(k)], axis=0)
    return float(np.mean(1 - miss))


def judge(gallery, query, networks, args, device):
    """R@k of each network, and what the first one finds; gallery, query: (Split, {network: features}, failed).

    -> dict for the result file, nearest (Q', k), lists of (file, class) of the queries and the gallery that were read.
    """
    sides = []
    for split, x, failed in (gallery, query):
        read = np.array([path not in failed for path in split.paths])
        files = [str(split.found[path]) for path in split.paths if path not in failed]
        names = [label if label is None else split.classes[label] for label in split.labels]
        sides.append((read, files, [name for name, ok in zip(names, read) if ok]))
    (g_read, g_files, g_names), (q_read, q_files, q_names) = sides
    if max(args.k) > len(g_files):
        raise ValueError(f"--k {max(args.k)} is larger than the gallery, {gallery[0].title}: {len(g_files)} videos")
    class_id = {name: n for n, name in enumerate(dict.fromkeys(g_names + q_names))} | {None: -1}
    video_id = {file: n for n, file in enumerate(dict.fromkeys(map(os.path.realpath, g_files + q_files)))}
    g_ids, q_ids = (np.array([[class_id[name] for name in names], [video_id[os.path.realpath(file)] for file in files]])
                    for files, names in ((g_files, g_names), (q_files, q_names)))
    result = dict(gallery=judged(gallery[0], gallery[2]), query=judged(query[0], query[2]))
    found = None
    for name in networks:
        g, q = standardise(*(torch.tensor(x[name][read], device=device) for x, read in
                             ((gallery[1], g_read), (query[1], q_read))))
        ranks, nearest = search(g, q, *(torch.tensor(ids, device=device) for ids in (g_ids, q_ids)), max(args.k))
        found = nearest if found is None else found
        if (q_ids[0] >= 0).any():
            result[name] = {f"R@{k}": recall(ranks, len(query[0].paths), k) for k in args.k}
    result["chance"] = {f"R@{k}": chance_recall(g_ids[0], q_ids[0], k) for k in args.k}
    return result, found, list(zip(q_files, q_names)), list(zip(g_files, g_names))


def picture(file, query, gallery, nearest, rows=10, columns=6, cell=160):
    """A contact sheet: a row a query, its middle frame first, then those of its nearest videos.

    query, gallery: lists of (file, class name or None); nearest: (Q, k). A right neighbour has a plain green frame
    and a "+" before its class, a wrong one a red frame, crossed out, and a "-": colour alone says nothing.
    """
    chosen = np.unique(np.linspace(0, len(query) - 1, min(rows, len(query))).round().astype(int))
    sheet = []
    for q in chosen:
        row = [thumbnail(*query[q], "query", cell)]
        for g in nearest[q][:columns - 1].tolist():
            path, name = gallery[g]
            verdict = None if name is None or query[q][1] is None else name == query[q][1]
            row.append(thumbnail(path, name, verdict, cell))
        blank = torch.full((3, cell + 20, cell), 255, dtype=torch.uint8)
        sheet.append(torch.cat(row + [blank] * (columns - len(row)), dim=2))
    write_png(torch.cat(sheet, dim=1), str(file))


def thumbnail(path, name, verdict, cell):
    """The middle frame of a video, cell x cell, with its frame and its class -> uint8 (3, cell + 20, cell)."""
    try:
        image = TF.center_crop(decode(path, [count_frames(path)[0] // 2], cell)[0], cell)
    except VideoError:
        image = torch.zeros(3, cell, cell, dtype=torch.uint8)
    colour = {"query": (60, 60, 200), True: (0, 140, 60), False: (200, 40, 40), None: (120, 120, 120)}[verdict]
    if verdict is False:                                                        # crossed out
        step = torch.arange(cell)
        for shift in (-1, 0, 1):
            image[:, step, (step + shift).clamp(0, cell - 1)] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    image = torch.nn.functional.pad(image, (0, 0, 0, 20), value=255)
    image = draw_bounding_boxes(image, torch.tensor([[0, 0, cell - 1, cell - 1]]), colors=[colour], width=5)
    sign = {"query": "? ", True: "+ ", False: "- ", None: ""}[verdict]
    return draw_bounding_boxes(image, torch.tensor([[0, cell, cell - 1, cell + 19]]), [sign + (name or "")],
                               colors=[(255, 255, 255)], label_colors=[colour], fill=True)


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    networks = {name: net.to(device) for name, net in random_beside(network, args).items()}
    parts = [(number, *(extract(networks, args, number, part, device) for part in (args.gallery, args.query)))
             for number in args.split]
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return

    results = []
    for number, gallery, query in parts:
        result, nearest, queries, found = judge(gallery, query, networks, args, device)
        results.append(dict(split=number, **result))
        if number == args.split[0] and args.picture:
            picture(args.picture, queries, found, nearest)
        if number == args.split[0] and args.features:
            save_features(args.features, gallery, query)
    mean = {name: {k: float(np.mean([result[name][k] for result in results])) for k in results[0][name]}
            for name in (*networks, "chance") if name in results[0]}
    file = write_result(args, f"retrieval-{args.dataset}", network, recall=mean, splits=results)
    print(f"{results[0]['query']['title']} in {results[0]['gallery']['title']} ({file})")
    for k in mean["chance"]:
        if len(mean) > 1:
            print(f"  {k}: {in_words({name: mean[name][k] for name in networks}, mean['chance'][k])}")


def save_features(file, gallery, query):
    """FILE.npz: features (N, D) of F, before standardising, NaN where a video failed; paths, classes ("" if none)."""
    np.savez(file, **{f"{side}_{what}": value for side, (split, x, _) in (("gallery", gallery), ("query", query))
                      for what, value in dict(
                          features=next(iter(x.values())), paths=np.array(split.paths),
                          classes=np.array(["" if c is None else split.classes[c] for c in split.labels])).items()})


if __name__ == "__main__":
    run(main)
