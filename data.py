"""What Sec. 3 speaks of: temporal transformations, augmentations, and the batches that they make.

Shapes: B videos, 2 clips p and q, T frames, H x W pixels; frames are uint8 RGB.
"""
import functools
import os
import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torchvision.transforms import v2

from common.colour import jitter, seeded
from common.loading import load
from common.splits import unreadable
from common.video import VideoError, decode, reason

LONGEST = 2 ** 24                                                               # frames of a video: days


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
    p = sample_tau(min(lengths), T, speeds, rng)
    q = sample_tau(min(lengths), T, speeds, rng)
    first, last = min(p.start, q.start), max(p.end(T), q.end(T))
    slides = [rng.randint(-first, n - 1 - last) for n in lengths]               # moves both clips of a video together
    pairs = [(replace(p, start=p.start + s), replace(q, start=q.start + s)) for s in slides]
    labels = dict(speed=[speeds.index(p.speed), speeds.index(q.speed)], direction=[int(p.reverse), int(q.reverse)],
                  order=order_of(p, q, T), pq=id_of(p, q))
    return pairs, labels


def order_of(p, q, T):
    """Sec. 3.2: 0 τ_p(x) comes entirely before τ_q(x) | 1 entirely after | 2 they overlap.

    # paper silent: on the source timeline; clips whose intervals touch overlap, whatever frames they show.
    """
    if p.end(T) < q.start:
        return 0
    if q.end(T) < p.start:
        return 1
    return 2


def id_of(p, q):
    """The relative transformation pq as one int: shift from p to q in source frames, speeds and directions."""
    shift = q.start - p.start
    values = shift + LONGEST, p.speed, q.speed, p.reverse, q.reverse
    return int(np.ravel_multi_index(values, (2 * LONGEST, 1024, 1024, 2, 2)))


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
    starts = np.linspace(0, room, windows).round().astype(int).tolist() if windows > 1 else [room // 2]
    return [clip_frames(length, start, T, step) for start in starts]


def clip_frames(length, start, T, step):
    """T source frames, `step` apart; a video that ends before repeats its last frame."""
    return [min(start + step * t, length - 1) for t in range(T)]


# ---- Batches for pre-training (Fig. 3) ----

@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, videos):
    """The order in which an epoch visits the videos, each once (# paper silent)."""
    return np.random.default_rng([seed, epoch]).permutation(videos)


class Videos(torch.utils.data.Dataset):
    """Some videos and what the scan knows of them, in flat arrays, which loader processes share instead of copying.

    split, paths, index: of load_split, usable and scan. files: (V,) bytes; shapes: (V, 3) frames, height, width, zeros
    for what is not there; packets: what `decode` goes by, one video's after the other's.
    """

    def __init__(self, split, paths, index):
        entries = [index.get(path, (0, 0, 0, "", "")) for path in paths]
        packets = [entry[4].encode() for entry in entries]
        self.files = np.array([os.fsencode(split.found.get(path, "")) for path in paths])
        self.shapes = np.array([entry[:3] for entry in entries])
        self.packets = torch.tensor(np.frombuffer(b"".join(packets), np.uint8))
        self.bounds = np.cumsum([0] + [len(text) for text in packets])

    def __len__(self):
        return len(self.files)

    def decode(self, v, frames, size, boxes=None):
        """`decode` of video v. VideoError: its file does not give these frames; the error's video is v."""
        packets = self.packets[self.bounds[v]:self.bounds[v + 1]].numpy().tobytes()
        try:
            return decode(os.fsdecode(self.files[v]), frames, size, boxes, packets)
        except VideoError as error:
            error.video = v
            raise

    def with_replacements(self, videos, rng, read):
        """What read(videos) gives, where a video that cannot be read is replaced by another, at most ten times.

        What replaces it is a function of rng. -> read's dict, and failed: [(file, problem)] of the videos replaced.
        """
        failed = []
        while len(failed) < 10:
            try:
                return read(videos) | dict(failed=failed)
            except VideoError as error:
                failed.append((os.fsdecode(self.files[error.video]), str(error)))
                others = [w for w in range(len(self.files)) if w not in videos]
                if not others:
                    break
                videos[videos.index(error.video)] = rng.choice(others)
        raise VideoError(f"{len(failed)} videos in a row are unreadable, the last: {failed[-1][1]}")


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
        videos = order[2 * group:2 * group + 2].tolist()
        rng = random.Random(repr((self.seed, epoch, group)))

        def read(videos):
            pairs, labels = self.draw_taus(videos, rng)
            if self.equivariance != "temporal":
                labels["pq"] = epoch * len(self) + group                        # continuous views: no two groups' agree
            views, seeds = self.draw_sigmas(videos, rng)
            clips = []
            for row in zip(videos, pairs, views):
                clips += self.read(*row)
            starts = [[p.start, q.start] for p, q in pairs]
            both = {name: torch.tensor([label, label]) for name, label in labels.items()}
            return both | dict(clips=clips, seed=torch.tensor(seeds), video=torch.tensor(videos),
                               start=torch.tensor(starts))

        return self.with_replacements(videos, rng, read)

    def draw_taus(self, videos, rng):
        """(τ_p, τ_q) of each video, and their labels: see sample_pair."""
        lengths = self.shapes[videos, 0].tolist()
        if self.equivariance == "spatial":                                      # Sec. 4.1: "consistent temporal ..."
            taus = [sample_tau(n, self.T, self.speeds, rng) for n in lengths]
            return [(tau, tau) for tau in taus], {}
        return sample_pair(lengths, self.T, self.speeds, rng)

    def draw_sigmas(self, videos, rng):
        """σ ~ S of each clip (Sec. 3.1) -> views and colour seeds, a row a video: see draw_view, draw_colour."""
        shared = draw_seeds(rng, self.clips)
        views, colours = [], []
        for v in videos:
            seeds, shape = draw_seeds(rng, self.clips), self.shapes[v, 1:]
            if self.equivariance != "temporal":                                 # in shares of the first one's picture
                seeds, shape = shared, self.shapes[videos[0], 1:]
            views.append([draw_view(*shape.tolist(), seed) for seed in seeds])
            colours.append(draw_seeds(rng, self.clips))
        return views, colours

    def read(self, v, pair, views):
        """All clips of video v from one decode, p, q and perhaps again p, q -> n of uint8 (T, 3, size, size)."""
        p, q = pair
        frames = (p.frames(self.T) + q.frames(self.T)) * (self.clips // 2)      # nT frame numbers
        boxes = [box for box, _ in views for _ in range(self.T)]                # nT boxes: constant over a clip
        clips = self.decode(v, frames, self.size, boxes).unflatten(0, (-1, self.T))
        return [clip.flip(-1) if flip else clip for clip, (_, flip) in zip(clips, views)]


def draw_seeds(rng, n):
    """n ints, of which each makes one draw of torch's (see seeded)."""
    return [rng.getrandbits(63) for _ in range(n)]


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
    keys = step_keys(len(dataset) // items, items, first, last, rank, items // world)
    return load(dataset, workers, batch_sampler=keys, collate_fn=collate)


def step_keys(steps_an_epoch, items, first, last, rank, share):
    """For each step the (epoch, number) of this process's share of the batch."""
    for step in range(first, last):
        epoch, place = divmod(step, steps_an_epoch)
        mine = place * items + rank * share
        yield [(epoch, number) for number in range(mine, mine + share)]


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
        v = int(epoch_order(self.seed, epoch, len(self.files))[place])
        rng = random.Random(repr((self.seed, epoch, place)))

        def read(videos):
            v = videos[0]
            length, height, width = self.shapes[v].tolist()
            step = fitting_step(length, self.T, self.step)
            start = rng.randint(0, max(0, length - 1 - step * (self.T - 1)))
            box, flip = draw_view(height, width, rng.getrandbits(63))
            clip = self.decode(v, clip_frames(length, start, self.T, step), self.size, [box] * self.T)
            return dict(clips=[clip.flip(-1) if flip else clip], label=torch.tensor([self.labels[v]]),
                        seed=torch.tensor([rng.getrandbits(63)]), video=torch.tensor([v]))

        return self.with_replacements([v], rng, read)


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
        windows = eval_windows(int(self.shapes[v, 0]), self.T, self.step, self.windows)
        frames = [n for window in windows for n in window]
        try:
            clips = self.decode(v, frames, self.side)
            return v, clips.unflatten(0, (-1, self.T)), ""
        except VideoError as error:
            return v, None, reason(error, os.fsdecode(self.files[v]))


# ---- Augmentation S (Sec. 3.4) ----

MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)   # paper silent: torchvision's video networks'
# paper silent: no figures; the area is that of the authors' earlier code
CROP = v2.RandomResizedCrop(1, scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3))


def draw_view(height, width, seed):
    """The spatial part of σ ~ S: a random resized crop and a flip -> (top, left, height, width) as shares, bool."""
    with seeded(seed):
        crop = CROP.make_params([torch.empty(1, height, width, device="meta")])
        flip = torch.rand(()).item() < 0.5
    return (crop["top"] / height, crop["left"] / width, crop["height"] / height, crop["width"] / width), flip


def colour(clips: torch.Tensor, seeds: list) -> torch.Tensor:
    """The colour part of σ ~ S, constant over a clip, drawn for each clip on its own; then the network's input.

    clips: uint8 (N, T, 3, H, W) on any device, which is not waited for; seeds: N ints -> float32 (N, 3, T, H, W).
    Equals torchvision's v2.ColorJitter and RandomGrayscale on floats.
    """
    few = max(1, 2 ** 20 // clips[0].numel()) if clips.device.type == "cpu" else len(clips)     # what fits its cache
    return torch.cat([normalise(jitter(part, seeds[few * k:])) for k, part in enumerate(clips.split(few))])


def augmented(clips, seeds):
    """The network's input, with the colour part of σ: uint8 (B, n, T, 3, H, W) -> float32 (B, n, 3, T, H, W).

    seeds: (B, n), one of the colours of each clip, on the CPU.
    """
    return colour(clips.flatten(0, 1), seeds.flatten().tolist()).unflatten(0, clips.shape[:2])


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """uint8 or float (N, T, 3, H, W) of 0 ... 255 -> float32 (N, 3, T, H, W), channels last in memory."""
    planes = [(x - 255 * mean) / (255 * std) for x, mean, std in zip(clips.unbind(2), MEAN, STD)]   # (N, T, H, W)
    return torch.stack(planes, dim=-1).movedim(-1, 1)
