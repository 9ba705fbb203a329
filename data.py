"""What Sec. 3 speaks of: temporal transformations, augmentations, and the batches that they make.

Shapes: B videos, 2 clips p and q, T frames, H x W pixels; frames are uint8 RGB.
"""
import functools
import os
import random
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from common.loading import load
from common.splits import unreadable
from common.video import VideoError, decode, reason


@dataclass(frozen=True)
class Tau:
    """A temporal transformation τ (Fig. 2): the first source frame, source frames a step, backwards or not."""
    start: int
    speed: int
    reverse: bool

    def frames(self, T: int = 16) -> list:
        """Source frames in playing order: T ints."""
        frames = [self.start + self.speed * t for t in range(T)]
        return frames[::-1] if self.reverse else frames

    def end(self, T: int = 16) -> int:
        """Last source frame, whatever the direction."""
        return self.start + self.speed * (T - 1)


def sample_tau(length: int, T: int = 16, speeds=(1, 2, 4, 8), rng=random) -> Tau:
    """τ ~ 𝒯 (Sec. 3.2): a speed that fits the video, a start, a direction, each uniform (# paper silent)."""
    feasible = [s for s in speeds if s * (T - 1) < length]
    if not feasible:
        raise ValueError(f"a video of {length} frames has no clip of {T} frames at any of the speeds {tuple(speeds)}")
    speed = rng.choice(feasible)
    return Tau(rng.randint(0, length - 1 - speed * (T - 1)), speed, rng.random() < 0.5)


def sample_pair(lengths, T=16, speeds=(1, 2, 4, 8), rng=random):
    """(τ_p, τ_q) for each video of a group, with ONE relative transformation pq for the whole group (Fig. 3).

    Speeds, directions and the shift from p to q are the group's; where the pair lies in a video is the video's own.
    lengths: frames of each video -> [(τ_p, τ_q), ...], labels: dict of what Sec. 3.1 and 3.2 learn to tell,
    speed and direction [p, q] as class numbers, order 0 before | 1 after | 2 overlap, pq an int that is equal
    exactly where the relative transformations are. ValueError: a video too short for T frames.
    """
    p, q = (sample_tau(min(lengths), T, speeds, rng) for _ in "pq")
    first, last = min(p.start, q.start), max(p.end(T), q.end(T))
    slides = [rng.randint(-first, n - 1 - last) for n in lengths]               # moves both clips of a video together
    pairs = [(replace(p, start=p.start + s), replace(q, start=q.start + s)) for s in slides]
    # paper silent: order is read on the source timeline; clips whose intervals touch overlap, whatever frames they show
    order = 0 if p.end(T) < q.start else 1 if q.end(T) < p.start else 2
    pq = q.start - p.start                                                      # the shift, in source frames ...
    for value in (p.speed, q.speed, p.reverse, q.reverse):
        pq = pq * 1024 + value                                                  # ... and what else makes pq, as digits
    labels = dict(speed=[speeds.index(t.speed) for t in (p, q)], direction=[int(t.reverse) for t in (p, q)],
                  order=order, pq=pq)
    return pairs, labels


def fitting_step(length: int, T: int = 16, step: int = 4) -> int:
    """Source frames a step in transfer learning: `step` (Sec. 3.4: 4), or the most that fits (# paper silent)."""
    return max(1, min(step, (length - 1) // (T - 1)))


def eval_windows(length: int, T: int = 16, step: int = 4, windows: int = 10) -> list:
    """Sec. 3.4: `windows` evenly spaced clips of T frames, `step` source frames apart, over the whole video.

    # paper silent: a video of fewer than T frames repeats its last frame.
    -> `windows` lists of T frame numbers.
    """
    step = fitting_step(length, T, step)
    room = max(0, length - 1 - step * (T - 1))
    starts = [round(room * k / max(1, windows - 1)) for k in range(windows)] if windows > 1 else [room // 2]
    return [[min(start + step * t, length - 1) for t in range(T)] for start in starts]


# ---- Batches for pre-training (Fig. 3) ----

@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, videos):
    """The order in which an epoch visits the videos, each once (# paper silent)."""
    return np.random.default_rng([seed, epoch]).permutation(videos)


class Videos(torch.utils.data.Dataset):
    """What the scan knows of some videos, in flat arrays that all loader processes share: files, shapes (frames,
    height, width), packets one after the other; zeros for what is not there. split, index: of load_split and scan."""

    def __init__(self, split, paths, index):
        entries = [index.get(path, (0, 0, 0, "", "")) for path in paths]
        self.files = np.array([os.fsencode(split.found.get(path, "")) for path in paths])
        self.shapes = np.array([entry[:3] for entry in entries])
        self.packets = torch.tensor(np.frombuffer("".join(entry[4] for entry in entries).encode(), np.uint8))
        self.bounds = np.cumsum([0, *(len(entry[4]) for entry in entries)])     # of each one's packets

    def __len__(self):
        return len(self.files)

    def decode(self, v, frames, size, boxes=None):
        """`decode` of video v"""
        packets = self.packets[self.bounds[v]:self.bounds[v + 1]].numpy().tobytes()
        return decode(os.fsdecode(self.files[v]), frames, size, boxes, packets)


class Pairs(Videos):
    """Groups of two videos under one relative transformation (Fig. 3), by (epoch, group).

    What is drawn is a function of (seed, epoch, group): workers and processes do not change it. equivariance (Table 1
    b-d): what the two videos of a group share; "temporal": pq; "spatial": the views (crop box and flip) of p and of q,
    with one τ for both clips of a video, each video its own, and no labels of τ; "both"; # paper silent: colour is each
    clip's own. clips: 2, p and q; or 4, p and q once more under another σ (Fig. 5).
    """

    def __init__(self, split, paths, index, T=16, size=128, speeds=(1, 2, 4, 8), seed=0, equivariance="temporal",
                 clips=2):
        super().__init__(split, paths, index)
        self.T, self.size, self.speeds, self.seed = T, size, speeds, seed
        self.equivariance, self.clips = equivariance, clips

    def __len__(self):
        return len(self.files) // 2

    def __getitem__(self, key):
        """-> dict: clips, 2n of uint8 (T, 3, H, W), n = self.clips; tensors, a row a video, colour seeds (2, n), video,
        pq and order (2,), and of p and q speed, direction and first source frame start (2, 2); failed: [(file,
        problem)] of the videos replaced."""
        epoch, group = key
        order = epoch_order(self.seed, epoch, len(self.files))
        videos, failed = list(order[2 * group:2 * group + 2]), []
        rng = random.Random(repr((self.seed, epoch, group)))
        while len(failed) < 10:
            lengths = [int(self.shapes[v, 0]) for v in videos]
            if self.equivariance == "spatial":                                  # Sec. 4.1: "consistent temporal ..."
                pairs, labels = [(tau, tau) for tau in (sample_tau(n, self.T, self.speeds, rng) for n in lengths)], {}
            else:
                pairs, labels = sample_pair(lengths, self.T, self.speeds, rng)
            if self.equivariance != "temporal":
                labels["pq"] = epoch * len(self) + group                        # continuous views: no two groups' agree
            shared = [rng.getrandbits(63) for _ in range(self.clips)]
            clips, seeds = [], []
            try:
                for v, pair in zip(videos, pairs):
                    own = [rng.getrandbits(63) for _ in range(self.clips)]
                    height, width = self.shapes[v if self.equivariance == "temporal" else videos[0], 1:]
                    views = [draw_view(int(height), int(width), seed)
                             for seed in (own if self.equivariance == "temporal" else shared)]
                    clips += self.read(v, pair, views)
                    seeds.append([rng.getrandbits(63) for _ in range(self.clips)])
            except VideoError as error:                                         # a deterministic replacement
                failed.append((os.fsdecode(self.files[v]), str(error)))
                others = [w for w in range(len(self.files)) if w not in videos]
                if not others:
                    break
                videos[videos.index(v)] = rng.choice(others)
                continue
            two = dict(clips=clips, seed=torch.tensor(seeds), video=torch.tensor([int(v) for v in videos]),
                       start=torch.tensor([[tau.start for tau in pair] for pair in pairs]))
            return two | {name: torch.tensor([label, label]) for name, label in labels.items()} | dict(failed=failed)
        raise VideoError(f"{len(failed)} videos in a row are unreadable, the last: {failed[-1][1]}")

    def read(self, v, pair, views):
        """All clips of video v from one decode, p, q and perhaps again p, q -> n of uint8 (T, 3, size, size)."""
        frames = [n for tau in pair for n in tau.frames(self.T)] * (self.clips // 2)    # nT frame numbers
        boxes = [box for box, _ in views for _ in range(self.T)]                # nT boxes: constant over a clip
        clips = self.decode(v, frames, self.size, boxes).unflatten(0, (-1, self.T))
        return [clip.flip(-1) if flip else clip for clip, (_, flip) in zip(clips, views)]


def collate(items):
    """The rows of all items -> one batch. A loader's process writes the clips only once, into memory that it shares.
    The three values of a pixel stay side by side, as decoded, until they are on the network's device: to sort them
    here would take 3 ms a pair."""
    batch = {name: torch.cat([item[name] for item in items]) for name in items[0] if name not in ("clips", "failed")}
    clips = torch.utils.data.default_collate([clip.movedim(1, 3) for item in items for clip in item["clips"]])
    clips = clips.movedim(4, 2).unflatten(0, batch["seed"].shape)               # (B, n, T, 3, H, W) or (B, T, 3, H, W)
    return batch | dict(clips=clips, failed=[video for item in items for video in item["failed"]])


def step_loader(dataset, items, first, last, workers=0, rank=0, world=1):
    """Batches of the steps first ... last - 1, over all epochs; process `rank` of `world` gets its share of each.

    items: groups (Pairs) or clips (Clips) in a global batch, which is the same whatever the number of processes.
    # paper silent: the rest of an epoch, fewer than `items`, is left out.
    """
    steps, share = len(dataset) // items, items // world                        # steps in an epoch, items of a process
    keys = ([(step // steps, step % steps * items + rank * share + k) for k in range(share)]
            for step in range(first, last))
    return load(dataset, workers, batch_sampler=keys, collate_fn=collate)


# ---- Clips for judging (Sec. 3.4, 4) ----

class Clips(Videos):
    """Labelled clips for fine-tuning, by (epoch, place): one random clip of each video an epoch, as in transfer:
    `step` source frames apart or what fits, forwards. What is drawn is a function of (seed, epoch, place)."""

    def __init__(self, split, paths, index, T=16, size=128, step=4, seed=0):
        super().__init__(split, paths, index)
        label = dict(zip(split.paths, split.labels))
        self.labels = np.array([label[path] for path in paths])
        self.T, self.size, self.step, self.seed = T, size, step, seed

    def __getitem__(self, key):
        """-> dict: clips [uint8 (T, 3, H, W)]; label, colour seed, video (1,); failed: [(file, problem)] replaced."""
        epoch, place = key
        v, failed = int(epoch_order(self.seed, epoch, len(self.files))[place]), []
        rng = random.Random(repr((self.seed, epoch, place)))
        while len(failed) < 10:
            length, height, width = map(int, self.shapes[v])
            step = fitting_step(length, self.T, self.step)
            start = rng.randint(0, max(0, length - 1 - step * (self.T - 1)))
            box, flip = draw_view(height, width, rng.getrandbits(63))
            try:
                frames = [min(start + step * t, length - 1) for t in range(self.T)]
                clip = self.decode(v, frames, self.size, [box] * self.T)
            except VideoError as error:
                failed.append((os.fsdecode(self.files[v]), str(error)))
                v = rng.randrange(len(self.files))
                continue
            return dict(clips=[clip.flip(-1) if flip else clip], label=torch.tensor([self.labels[v]]),
                        seed=torch.tensor([rng.getrandbits(63)]), video=torch.tensor([v]), failed=failed)
        raise VideoError(f"{len(failed)} videos in a row are unreadable, the last: {failed[-1][1]}")


class Windows(Videos):
    """Each video's evenly spaced test windows, all from one decode, whole frames at short side size * 8 / 7.

    # paper silent: 8/7, the field's 128 for 112; a frame is larger than the crop, so that the crops differ.
    """

    def __init__(self, split, index, T=16, size=128, step=4, windows=10):
        super().__init__(split, split.paths, index)
        bad = unreadable(split, index)
        self.problems = {v: bad[path] for v, path in enumerate(split.paths) if path in bad}
        self.T, self.side, self.step, self.windows = T, round(size * 8 / 7), step, windows

    def __getitem__(self, v):
        """-> v, uint8 (windows, T, 3, h, w) and "", or None and the problem: nothing is ever replaced."""
        if v in self.problems:
            return v, None, self.problems[v]
        frames = sum(eval_windows(int(self.shapes[v, 0]), self.T, self.step, self.windows), [])
        try:
            clips = self.decode(v, frames, self.side)
            return v, clips.unflatten(0, (-1, self.T)), ""
        except VideoError as error:
            return v, None, reason(error, os.fsdecode(self.files[v]))


# ---- Augmentation S (Sec. 3.4) ----

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)   # paper silent: torchvision's video networks'
# paper silent: no figures for crop and colour; area from the authors' earlier code, colour from SimCLR [10], no blur
CROP = v2.RandomResizedCrop(1, scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3))
JITTER, JITTERED, GREY = v2.ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8, 0.2            # the last two: probabilities


@contextmanager
def seeded(seed):
    """Inside, torch's random numbers on the CPU are a function of seed alone; afterwards they go on as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def draw_view(height, width, seed):
    """The spatial part of σ ~ S: a random resized crop and a flip -> (top, left, height, width) as shares, bool."""
    with seeded(seed):
        crop = CROP.make_params([torch.empty(1, height, width, device="meta")])
        flip = torch.rand(()).item() < 0.5
    return (crop["top"] / height, crop["left"] / width, crop["height"] / height, crop["width"] / width), flip


def brightness(x, factor):
    return x * factor


def contrast(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x).mean((-3, -2, -1), keepdim=True), x, factor)


def saturation(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x), x, factor)


def hue(x, shift):
    """Darkest and brightest value stay; the third follows from HSV's angle h, in sixths of a turn: red 0, green 2."""
    red, green, blue = x.split(1, dim=-3)
    high = torch.maximum(torch.maximum(red, green), blue)                       # amax is slow over so few
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    h = torch.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    h = torch.where(high == red, green - blue, h).div_(chroma.clamp(min=1e-6)).add_(6 * shift)
    away = torch.cat([h, h - 2, h - 4], dim=-3)                                 # from red, green and blue: a value is
    return away.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)   # high up to 1 away, low from 2 on

COLOURS = brightness, contrast, saturation, hue                                 # in the order of ColorJitter


def draw_colour(seed):
    """The colour part of σ, as torchvision's ColorJitter and RandomGrayscale draw it.

    -> [(place in COLOURS, factor or shift), ...] in the order in which they are applied: at most five.
    """
    with seeded(seed):
        steps = []
        if torch.rand(()) < JITTERED:
            drawn = JITTER.make_params([])
            steps = [(k, drawn[f"{COLOURS[k].__name__}_factor"]) for k in drawn["fn_idx"].tolist()]
        return steps + [(COLOURS.index(saturation), 0.0)] * (torch.rand(()).item() < GREY)


def colour(clips: torch.Tensor, seeds: list) -> torch.Tensor:
    """The colour part of σ ~ S, constant over a clip, drawn for each clip on its own; then the network's input.

    clips: uint8 (N, T, 3, H, W) on any device, which is not waited for; seeds: N ints -> float32 (N, 3, T, H, W).
    Equals torchvision's v2 on floats (on uint8, which v2 cuts off after each step, it is 1.1 of 255 darker on average).
    """
    few = max(1, 2 ** 20 // clips[0].numel()) if clips.device.type == "cpu" else len(clips)     # what fits its cache
    return torch.cat([normalise(jitter(part, seeds[few * k:])) for k, part in enumerate(clips.split(few))])


def jitter(clips, seeds):
    """`colour` before normalisation: in the n-th round, each clip's n-th step -> float32 (N, T, 3, H, W), 0 ... 255."""
    rounds = defaultdict(list)
    for clip, seed in zip(range(len(clips)), seeds):
        for n, (k, factor) in enumerate(draw_colour(seed)):
            rounds[n, k].append((clip, factor))
    drawn = sum(rounds.values(), [])
    drawn = torch.tensor(drawn, pin_memory=clips.is_cuda).view(len(drawn), 2).to(clips.device, non_blocking=True)
    parts = dict(zip(rounds, drawn.split([len(part) for part in rounds.values()])))
    x = clips.contiguous().float()                                              # colours apart are quicker to work on
    for n, k in sorted(rounds):
        row, factor = parts[n, k].unbind(1)
        row, factor = row.long(), factor.view(-1, 1, 1, 1, 1)
        x[row] = COLOURS[k](x[row], factor).clamp_(0, 255)
    return x


def augmented(clips, seeds):
    """The network's input, with the colour part of σ: uint8 (B, n, T, 3, H, W) -> float32 (B, n, 3, T, H, W).

    seeds: (B, n), one of the colours of each clip, on the CPU.
    """
    return colour(clips.flatten(0, 1), seeds.flatten().tolist()).unflatten(0, clips.shape[:2])


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """uint8 or float (N, T, 3, H, W) of 0 ... 255 -> float32 (N, 3, T, H, W), channels last in memory."""
    planes = [(x - 255 * mean) / (255 * std) for x, mean, std in zip(clips.unbind(2), MEAN, STD)]   # (N, T, H, W)
    return torch.stack(planes, dim=-1).movedim(-1, 1)
