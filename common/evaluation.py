"""Evaluate F: crops and their averages (Sec. 3.4), features of a split, and the result file."""
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import sklearn
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from common import UserError, write_json
from common.distributed import gather_objects, ignore_signals, on_rank0, rank_and_world
from common.flags import default_arch, paper_defaults
from common.splits import Split, listed, load_and_scan
from common.training import autocast
from data import Windows, normalise
from models import load_backbone

BEST = 5                                                        # classes that a prediction names


class Features(NamedTuple):
    """F(x) of every video of a split: {network: float32 (V, D)}, NaN rows where a video failed."""
    split: Split
    x: dict
    failed: dict                                                # {path: reason}

    def readable(self):
        """Which videos could be read -> bool (V,)"""
        return np.array([path not in self.failed for path in self.split.paths])


# ---- Crops ----

def views_of(windows, size, crops):
    """Sec. 3.4: "centre": centre crop and its mirror image; "ten": five crops and theirs.

    # paper silent: how many, and which.
    windows: uint8 (W, T, 3, h, w) -> uint8 (C * W, T, 3, size, size), C = 2 or 10
    """
    if crops == "ten":
        return torch.cat(TF.ten_crop(windows, size))
    centre = TF.center_crop(windows, size)
    return torch.cat([centre, TF.horizontal_flip(centre)])


@torch.no_grad()
def average_crops(network, split, args, device, softmax=False):
    """Sec. 3.4: "averaging predictions of multiple temporal and spatial crops", features likewise.

    network: (N, 3, T, H, W) -> (N, K), in eval mode; softmax: average probabilities, not outputs.
    The videos are divided among the processes; each runs on its own and so depends on no other.
    -> float32 (V, K), NaN where a video failed, and {path: reason}; on every process
    """
    rank, world = rank_and_world()
    windows = Windows(split, args.frames, args.size, args.step, args.windows)
    videos = torch.utils.data.DataLoader(
        windows, batch_size=None, sampler=range(rank, len(windows), world),
        num_workers=args.workers, worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available())
    outputs, failed = {}, {}
    for v, clips, reason in tqdm(videos, split.title, unit="video", disable=rank > 0):
        if reason:
            failed[v] = reason
            continue
        clips = normalise(views_of(clips.to(device, non_blocking=True), args.size, args.crops))
        with autocast(args.amp, device):
            output = network(clips).float()                     # (C * W, K)
        outputs[v] = (output.softmax(1) if softmax else output).mean(0).cpu()       # (K,)
    for others, reasons in gather_objects((outputs, failed)):
        outputs |= others
        failed |= reasons
    finite = sum(output.isfinite().all().item() for output in outputs.values())
    if not outputs or finite < len(outputs):
        raise UserError(f"{split.title}: {len(outputs)} of {len(windows)} videos can be read, and "
                        f"the network's output is finite for {finite} of these")
    nan = torch.full_like(next(iter(outputs.values())), float("nan"))
    x = torch.stack([outputs.get(v, nan) for v in range(len(windows))])
    return x, {split.paths[v]: failed[v] for v in sorted(failed)}


# ---- Networks and their features ----

def load_network(args):
    """F of --checkpoint; sets args.checkpoint, arch, frames and size where they are None.

    The clips are those of pre-training, if the file says what they were, else the paper's for
    --dataset and --arch.
    """
    arch = args.arch or default_arch(args.dataset)
    args.checkpoint = args.checkpoint or f"runs/{args.dataset}-{arch}/backbone.pt"
    torch.manual_seed(args.seed)                                # of the random initialisation
    network = load_backbone(args.checkpoint, arch if args.checkpoint == "random" else args.arch)
    clips = paper_defaults(args.dataset, network.arch) | network.args
    args.arch = network.arch
    args.frames, args.size = args.frames or clips["frames"], args.size or clips["size"]
    return network


def load_networks(args, device):
    """{"checkpoint": F, "random": the random baseline of the same arch}, on the device."""
    networks = {"checkpoint": load_network(args)}
    if args.checkpoint == "random":
        networks = {"random": networks["checkpoint"]}
    else:
        torch.manual_seed(args.seed)
        networks["random"] = load_backbone("random", args.arch)
    return {name: network.to(device, memory_format=torch.channels_last_3d)
            for name, network in networks.items()}


def load_parts(args, parts):
    """Two parts of each of --split, scanned by rank 0 -> [(Split, Split), ...]"""
    rows = []
    for number in args.split:
        splits = [on_rank0(load_and_scan, args, number, part) for part in dict.fromkeys(parts)]
        rows.append((splits[0], splits[-1]))                    # one folder is scanned once
    return rows


def extract(networks, split, args, device):
    """Features of every video: mean over windows and crops (Sec. 3.4); networks: {name: F}"""
    def all_at_once(clips):                                     # one decode for all networks
        return torch.cat([network(clips) for network in networks.values()], dim=1)

    x, failed = average_crops(all_at_once, split, args, device)
    columns = x.split([network.dim for network in networks.values()], dim=1)
    features = {name: column.numpy() for name, column in zip(networks, columns)}
    return Features(split, features, failed)


# ---- Results ----

def most_frequent(split):
    """Accuracy by chance: the frequency of the most frequent class."""
    return max(Counter(split.labels).values()) / len(split.labels)


def per_class(split, right):
    """right: bool (V,) -> {class name: accuracy}"""
    labels = np.array(split.labels)
    return {split.classes[k]: float(right[labels == k].mean()) for k in np.unique(labels)}


def counts(split, failed):
    """The videos expected, scored and failed {path: reason}, for a result file."""
    scored = len(split.paths) - len(failed)
    return dict(title=split.title, expected=len(split.paths), scored=scored, failed=failed)


def print_counts(counts, fate):
    """fate: what happens to unreadable videos"""
    failed = counts["failed"]
    sentence = f"{counts['title']}: {counts['scored']} of {counts['expected']} videos scored"
    if failed:
        sentence += f"; {len(failed)} could not be read and {fate}: {listed(failed)}"
    print(sentence)


def with_random(figures, chance):
    """{"checkpoint": x, "random": y}, chance -> "71% (randomly initialised: 15%, chance: 1%)"."""
    if "checkpoint" not in figures:
        return f"{figures['random']:.1%} randomly initialised (chance: {chance:.1%})"
    random = f"randomly initialised: {figures['random']:.1%}, " if "random" in figures else ""
    return f"{figures['checkpoint']:.1%} ({random}chance: {chance:.1%})"


def predictions(videos, scores, failed, classes, measure, **more):
    """One row per video: its class and the BEST predicted ones, best first.

    videos: Split; scores: float (V, K), -inf where a class cannot be predicted; failed: {path:
    reason}; classes: the K names; measure: what the scores are; more: what each row says besides.
    """
    rows = []
    for path, label, score in zip(videos.paths, videos.labels, scores):
        name = None if label is None else videos.classes[label]
        row = more | dict(path=path, label=name, predicted=None)
        if path in failed:
            row["problem"] = failed[path]
        else:
            best = [k for k in np.argsort(-score, kind="stable")[:BEST] if np.isfinite(score[k])]
            row["predicted"] = classes[best[0]]
            row[measure] = {classes[k]: round(float(score[k]), 4) for k in best}
        rows.append(row)
    return rows


def result_folder(args, arch):
    """Where an evaluation writes: --out, or the checkpoint's folder -> Path"""
    if args.out:
        return Path(args.out)
    if args.checkpoint == "random":
        return Path(f"runs/random-{arch}")
    return Path(args.checkpoint).parent


def write_result(args, name, network, **result):
    """Write OUT/name.json: the result and its provenance -> the file"""
    protocol = {key: value for key, value in vars(args).items() if key not in ("out", "checkpoint")}
    packages = dict(torch=torch, torchvision=torchvision, av=av, numpy=np, sklearn=sklearn)
    versions = {package: module.__version__ for package, module in packages.items()}
    result |= dict(
        protocol=protocol,
        checkpoint=dict(path=args.checkpoint, sha256=network.sha256, arch=network.arch,
                        trained_with=network.args),
        command=sys.argv,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        versions=dict(python=platform.python_version()) | versions)
    file = result_folder(args, network.arch) / f"{name}.json"
    write_json(file, result, indent=1)
    return file


def write_accuracy(args, classifier, name, backbone, results, rows):
    """Write OUT/name.json and OUT/name-predictions.jsonl, and print the summary.

    results: for each split dict(train=, test=, chance=, {network: dict(top1=, ...)}); rows: from
    `predictions`.
    """
    networks = [network for network in ("checkpoint", "random") if network in results[0]]
    top1 = {network: float(np.mean([result[network]["top1"] for result in results]))
            for network in networks}
    chance = float(np.mean([result["chance"] for result in results]))
    file = write_result(args, name, backbone, top1=top1, chance=chance, splits=results)
    write_json(file.with_name(f"{name}-predictions.jsonl"), *rows)
    for result in results:
        print_counts(result["train"], "are left out")
        print_counts(result["test"], "count as errors")
    print(f"{classifier} on {args.dataset}, split {' '.join(map(str, args.split))}: "
          f"{with_random(top1, chance)} ({file})")
