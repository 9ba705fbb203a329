"""Judging F: crops and their averages (Sec. 3.4), features of a split, the result and what is said of it."""
import argparse
import hashlib
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import sklearn
import torch
import torch.distributed as dist
import torchvision
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common.files import write_json, write_json_lines
from common.flags import default_arch, paper_defaults
from common.loading import load
from common.precision import autocast
from common.processes import gather_objects, on_first, rank_and_world
from common.splits import Split, list_and_scan
from data import Windows, normalise
from models import check_clips, load_backbone

BEST = 5                                                                        # classes that a prediction names


class Features(NamedTuple):
    """F(x) of every video of a split: {name of the network: float32 array (V, D)}, NaN rows where a video failed."""
    split: Split
    x: dict
    failed: dict                                                                # {path: problem}

    def read(self):
        """Which videos could be read -> bool (V,)."""
        return np.array([path not in self.failed for path in self.split.paths])


# ---- Crops ----

def views_of(windows, size, crops):
    """Test crops (Sec. 3.4): "centre" is the centre crop and its mirror image, "ten" five crops and theirs.

    # paper silent: how many, and which.
    windows: uint8 (W, T, 3, h, w) -> uint8 (C * W, T, 3, size, size), C = 2 or 10.
    """
    if crops == "ten":
        return torch.cat(TF.ten_crop(windows, size))
    centre = TF.center_crop(windows, size)
    return torch.cat([centre, TF.horizontal_flip(centre)])


@torch.no_grad()
def average_crops(network, windows, size, crops, device, amp="off", workers=0, softmax=False, title="test"):
    """Sec. 3.4: "averaging predictions of multiple temporal and spatial crops", and features in the same way.

    network: (N, 3, T, H, W) -> (N, K), in eval mode; windows: data.Windows. Videos are shared out over the processes
    and each is run on its own: its result depends on nothing else. softmax: average probabilities, not the outputs.
    -> float32 (V, K) in the order of the videos, NaN where a video failed, and {v: problem}; on every process.
    """
    rank, world = rank_and_world()
    mine = range(rank, len(windows), world)
    videos = load(windows, workers, batch_size=None, sampler=mine)
    outputs, failed = {}, {}
    for v, clips, problem in tqdm(videos, title, len(mine), unit="video", disable=rank > 0):
        if problem:
            failed[v] = problem
            continue
        clips = normalise(views_of(clips.to(device, non_blocking=True), size, crops))   # (C * W, 3, T, H, W)
        with autocast(amp, device):
            output = network(clips).float()                                     # (C * W, K)
        outputs[v] = (output.softmax(1) if softmax else output).mean(0).cpu()   # (K,)
    for others, problems in gather_objects((outputs, failed)):
        outputs |= others
        failed |= problems
    if not outputs:
        raise ValueError(f"{title}: not one of {len(windows)} videos could be read, the first: {failed[0]}")
    strange = sum(not output.isfinite().all() for output in outputs.values())
    if strange:
        raise ValueError(f"{title}: what the network makes of {strange} of {len(windows)} videos is not finite")
    nothing = torch.full_like(next(iter(outputs.values())), float("nan"))
    return torch.stack([outputs.get(v, nothing) for v in range(len(windows))]), dict(sorted(failed.items()))


# ---- Networks and their features ----

def load_for_judging(args):
    """F from --checkpoint; fills in what it decides: args.arch, args.frames, args.size -> module.

    The clips are those of pre-training, where the file says what they were, else the paper's for --dataset and --arch.
    """
    file = Path(args.checkpoint)
    content = None
    if args.checkpoint == "random":
        args.arch = args.arch or default_arch(args.dataset)
    elif file.is_file():
        content = file.read_bytes()                                             # it may change later
    torch.manual_seed(args.seed)                                                # of the random initialisation
    network = load_backbone(args.checkpoint, args.arch)
    network.sha256 = content and hashlib.sha256(content).hexdigest()
    clips = paper_defaults(args.dataset, network.arch) | network.args
    args.arch, args.frames, args.size = network.arch, args.frames or clips["frames"], args.size or clips["size"]
    check_clips(args)
    return network


def random_beside(network, args, device):
    """{"checkpoint": F} and, where F has learned anything, {"random": the same network, initialised with --seed}."""
    networks = {"random": network}
    if args.checkpoint != "random":
        beside = argparse.Namespace(**vars(args) | dict(checkpoint="random"))
        networks = {"checkpoint": network, "random": load_for_judging(beside)}
    return {name: net.to(device, memory_format=torch.channels_last_3d) for name, net in networks.items()}


def scan_parts(args, parts):
    """Two parts of each of --split, listed and scanned by the first process -> a pair of (Split, index) for each."""
    first, second = parts
    return [(on_first(list_and_scan, args, number, first), on_first(list_and_scan, args, number, second))
            for number in args.split]


def extract(networks, args, split, index, device):
    """Features of every video: mean over windows and crops (Sec. 3.4); networks: {name: F} -> Features."""
    def all_at_once(clips):                                                     # one decode for all networks
        return torch.cat([network(clips) for network in networks.values()], dim=1)

    windows = Windows(split, index, args.frames, args.size, args.step, args.windows)
    x, failed = average_crops(all_at_once, windows, args.size, args.crops, device, args.amp, args.workers,
                              title=split.title)
    columns = x.split([network.dim for network in networks.values()], dim=1)
    features = {name: column.numpy() for name, column in zip(networks, columns)}
    return Features(split, features, {split.paths[v]: problem for v, problem in failed.items()})


def extract_parts(networks, args, scanned, device):
    """Features of what `scan_parts` found -> a pair of Features for each split.

    The processes leave their group: what follows is the first one's work and may take longer than the others wait.
    """
    found = []
    for first, second in scanned:
        found.append((extract(networks, args, *first, device), extract(networks, args, *second, device)))
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


# ---- The result, and what is said of it ----

def most_frequent(split):
    """Accuracy by chance: the share of the most frequent class, which one gets who always answers with it."""
    return max(Counter(split.labels).values()) / len(split.labels)


def count_videos(split, failed):
    """What was asked for and what could be read, for a result file; failed: {path: problem}."""
    return dict(title=split.title, expected=len(split.paths), scored=len(split.paths) - len(failed), failed=failed)


def counts_sentence(counts, fate):
    """What `count_videos` found, in words; fate: what became of the videos that could not be read."""
    names = [f"{path} ({problem})" for path, problem in counts["failed"].items()]
    sentence = f"{counts['title']}: {counts['scored']} of {counts['expected']} videos scored"
    if names:
        more = ", ..." if len(names) > 10 else ""
        sentence += f"; {len(names)} could not be read and {fate}: {', '.join(names[:10])}{more}"
    return sentence


def beside_random(figures, chance):
    """{"checkpoint": share, "random": share}, chance -> "71.2% (randomly initialised: 15.3%, chance: 1.2%)"."""
    if "checkpoint" not in figures:
        return f"{figures['random']:.1%} randomly initialised (chance: {chance:.1%})"
    random = f"{figures['random']:.1%}" if "random" in figures else "not run"
    return f"{figures['checkpoint']:.1%} (randomly initialised: {random}, chance: {chance:.1%})"


def per_class(split, right):
    """right: bool (V,) -> {class name: share of its videos that are right}"""
    labels = np.array(split.labels)
    return {split.classes[k]: float(right[labels == k].mean()) for k in np.unique(labels)}


def predictions(videos, scores, failed, classes, measure, **more):
    """For each video its class and the BEST classes that were found, best first -> rows for a file of JSON lines.

    videos: Split; scores: float array (V, K), -inf where a class cannot be found; failed: {path: problem}; classes:
    the K names; measure: what the scores are, in words; more: what each row says besides.
    """
    rows = []
    for path, label, score in zip(videos.paths, videos.labels, scores):
        row = more | dict(path=path, label=None if label is None else videos.classes[label], predicted=None)
        if path in failed:
            row["problem"] = failed[path]
        else:
            best = [k for k in np.argsort(-score, kind="stable")[:BEST] if np.isfinite(score[k])]
            row["predicted"] = classes[best[0]]
            row[measure] = {classes[k]: round(float(score[k]), 4) for k in best}
        rows.append(row)
    return rows


def result_folder(args, checkpoint, arch):
    """Where a judging script writes: --out, or beside the checkpoint -> Path."""
    if args.out:
        return Path(args.out)
    return Path(f"runs/random-{arch}") if checkpoint == "random" else Path(checkpoint).parent


def write_result(args, name, network, standardised, **result):
    """OUT/name.json: the result and all that says what it is. Returns the file."""
    protocol = {key: value for key, value in vars(args).items() if key not in ("out", "checkpoint")}
    file = result_folder(args, args.checkpoint, network.arch) / f"{name}.json"
    write_json(file, indent=1, value=result | dict(
        protocol=protocol | dict(standardised=standardised),
        checkpoint=dict(path=args.checkpoint, sha256=network.sha256, arch=network.arch, trained_with=network.args),
        command=sys.argv, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                      av=av.__version__, numpy=np.__version__, sklearn=sklearn.__version__)))
    return file


def write_accuracy(args, classifier, name, network, standardised, top1, results, rows):
    """What a classifier comes to, in OUT/name.json, OUT/name-predictions.jsonl and the lines that the user reads.

    top1: {"checkpoint" or "random": mean over the splits}; results: a dict a split; rows: of `predictions`.
    """
    chance = float(np.mean([result["chance"] for result in results]))
    file = write_result(args, name, network, standardised, top1=top1, chance=chance, splits=results)
    write_json_lines(file.with_name(f"{name}-predictions.jsonl"), rows)
    for result in results:
        print(counts_sentence(result["train"], "left out"))
        print(counts_sentence(result["test"], "count as wrong"))
    print(f"{classifier} on {args.dataset}, split {' '.join(map(str, args.split))}: {beside_random(top1, chance)} "
          f"({file})")
