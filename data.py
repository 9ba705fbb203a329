"""Temporal transformations, augmentation, data sets and loader (Sec. 3).

Shapes: B videos, n = 2 clips p and q, T frames, H x W pixels; frames are uint8 RGB.
"""
import functools
import hashlib
import os
import random
import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
from torchvision.transforms import v2

from common.colour import draw_colour, jitter, seeded
from common.distributed import ignore_signals
from common.video import VideoError, decode

MAX_FRAMES = 2 ** 24                                            # upper limit of a video's frames


@dataclass(frozen=True)
class Tau:
    """A temporal transformation τ (Fig. 2): first source frame, frames per step, direction."""
    start: int
    speed: int
    reverse: bool

    def frames(self, T: int = 16) -> list:
        """T source frames in playback order."""
        frames = [self.start + self.speed * t for t in range(T)]
        return frames[::-1] if self.reverse else frames

    def end(self, T: int = 16) -> int:
        """Last source frame on the timeline, in either direction."""
        return self.start + self.speed * (T - 1)


def sample_tau(length: int, T: int = 16, speeds=(1, 2, 4, 8), rng=random) -> Tau:
    """Draw τ ~ 𝒯 (Sec. 3.2): a speed that fits the video, a start and a direction.

    # paper silent: each is uniform. ValueError: no speed fits.
    """
    feasible = [s for s in speeds if s * (T - 1) < length]
    if not feasible:
        raise ValueError(f"{length} frames are too few for a clip of {T} at any speed of {speeds}")
    speed = rng.choice(feasible)
    return Tau(rng.randint(0, length - 1 - speed * (T - 1)), speed, rng.random() < 0.5)


def sample_pair(lengths, T=16, speeds=(1, 2, 4, 8), rng=random):
    """Draw (τ_p, τ_q) for each video of a group, with ONE relative transformation pq (Fig. 3).

    Speeds, directions and the shift from p to q are drawn once per group, the position of the pair
    once per video.
    lengths: frames of each video
    -> [(τ_p, τ_q), ...], and the group's labels (Sec. 3.1, 3.2): speed and direction [p, q] as
       class indices; order 0 before | 1 after | 2 overlap; pq, an int, equal between two groups
       iff their relative transformations are.
    ValueError: a video is too short for T frames.
    """
    p = sample_tau(min(lengths), T, speeds, rng)
    q = sample_tau(min(lengths), T, speeds, rng)
    first, last = min(p.start, q.start), max(p.end(T), q.end(T))
    # shift both clips of a video together
    slides = [rng.randint(-first, n - 1 - last) for n in lengths]
    pairs = [(replace(p, start=p.start + s), replace(q, start=q.start + s)) for s in slides]
    labels = dict(
        speed=[speeds.index(p.speed), speeds.index(q.speed)],
        direction=[int(p.reverse), int(q.reverse)],
        order=order_of(p, q, T),
        pq=id_of(p, q))
    return pairs, labels


def order_of(p, q, T):
    """Sec. 3.2: 0 τ_p(x) lies entirely before τ_q(x) | 1 entirely after | 2 they overlap.

    # paper silent: on the source timeline; intervals that intersect overlap, even if the clips have
    no frame in common.
    """
    if p.end(T) < q.start:
        return 0
    if q.end(T) < p.start:
        return 1
    return 2


def id_of(p, q):
    """Encode pq as one int: the shift from p to q in source frames, both speeds and directions."""
    shift = q.start - p.start
    values = shift + MAX_FRAMES, p.speed, q.speed, p.reverse, q.reverse
    return int(np.ravel_multi_index(values, (2 * MAX_FRAMES, 1024, 1024, 2, 2)))


def fitting_step(length: int, T: int = 16, step: int = 4) -> int:
    """Source frames per step in transfer: `step` (Sec. 3.4: 4) or what fits (# paper silent)."""
    return max(1, min(step, (length - 1) // (T - 1)))


def eval_windows(length: int, T: int = 16, step: int = 4, windows: int = 10) -> list:
    """Sec. 3.4: `windows` evenly spaced clips of T frames, `step` source frames apart.

    # paper silent: a video of fewer than T frames repeats its last frame.
    -> `windows` lists of T frame numbers
    """
    step = fitting_step(length, T, step)
    last = max(0, length - 1 - step * (T - 1))
    spaced = np.linspace(0, last, windows).round().astype(int).tolist()
    starts = spaced if windows > 1 else [last // 2]
    return [clip_frames(length, start, T, step) for start in starts]


def clip_frames(length, start, T, step):
    """T source frames, `step` apart; past the end, the last frame repeats."""
    return [min(start + step * t, length - 1) for t in range(T)]


# ---- Augmentation S (Sec. 3.4) ----

# paper silent: mean and standard deviation; these are those of torchvision's video networks
MEAN, STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)
# paper silent: area and aspect ratio; the area is that of the authors' earlier code
CROP = v2.RandomResizedCrop(1, scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3))


def draw_view(height, width, seed):
    """Draw the spatial part of σ ~ S: a random resized crop and a horizontal flip.

    -> (top, left, height, width) as fractions of the frame, whether to flip
    """
    with seeded(seed):
        crop = CROP.make_params([torch.empty(1, height, width, device="meta")])
        flip = torch.rand(()).item() < 0.5
    box = crop["top"] / height, crop["left"] / width, crop["height"] / height, crop["width"] / width
    return box, flip


def colour(clips: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Apply the colour part of σ ~ S, constant over a clip, and normalise.

    Equals torchvision's v2.ColorJitter and RandomGrayscale on floats.
    clips: uint8 (N, T, H, W, 3); colours: (N, STEPS, 2) of `draw_colour`, on the CPU
    -> float32 (N, 3, T, H, W)
    """
    chunk = len(clips)
    if clips.device.type == "cpu":
        chunk = max(1, 2 ** 20 // clips[0].numel())             # fits in the cache
    chunks = zip(clips.movedim(-1, 2).split(chunk), colours.split(chunk))
    return torch.cat([normalise(jitter(*pair)) for pair in chunks])


def augment(clips, colours):
    """Apply `colour` to a batch: uint8 (B, n, T, H, W, 3) -> float32 (B, n, 3, T, H, W)."""
    return colour(clips.flatten(0, 1), colours.flatten(0, 1)).unflatten(0, clips.shape[:2])


def normalise(clips: torch.Tensor) -> torch.Tensor:
    """(N, T, 3, H, W) of 0 ... 255, uint8 or float -> float32 (N, 3, T, H, W), channels last.

    Channels are last in memory, not in shape.
    """
    planes = [(x - 255 * mean) / (255 * std) for x, mean, std in zip(clips.unbind(2), MEAN, STD)]
    return torch.stack(planes, dim=-1).movedim(-1, 1)


# ---- Batches for pre-training (Fig. 3) ----

@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, videos):
    """Order of the videos in an epoch: a permutation (# paper silent)."""
    return np.random.default_rng([seed, epoch]).permutation(videos)


class Videos(torch.utils.data.Dataset):
    """Videos of a scanned split, in flat arrays that loader processes share without copying.

    files: (V,) bytes; shapes: (V, 3) frames, height, width, all zero for a failed video; identity:
    what a run that resumes must have in common with its checkpoint.
    """

    def __init__(self, split, paths):
        self.files = np.array([os.fsencode(split.files.get(path, "")) for path in paths])
        self.shapes = np.array([split.shapes.get(path, (0, 0, 0)) for path in paths])
        names = map(os.fsencode, paths)                         # equal in every locale
        sha256 = hashlib.sha256(repr([*zip(names, self.shapes[:, 0].tolist())]).encode())
        self.identity = dict(videos=len(paths), names_and_frames=sha256.hexdigest()[:8])

    def __len__(self):
        return len(self.files)

    def decode(self, v, frames, size, boxes=None):
        """Decode frames of video v -> uint8 (N, 3, H, W)"""
        return decode(os.fsdecode(self.files[v]), frames, size, boxes)

    def first_readable(self, key, read):
        """Read item `key`, (epoch, number), or the next whose videos decode, up to the tenth.

        -> the dict read(key, rng, number), plus failed: the errors. RuntimeError: none decodes.
        """
        epoch, number = key
        rng, failed = random.Random(repr((self.seed, epoch, number))), []
        for n in range(number, number + 10):
            try:
                return read(key, rng, n % len(self)) | dict(failed=failed)
            except VideoError as error:
                failed.append(str(error))
        raise RuntimeError(f"{len(failed)} items in a row cannot be read: {'; '.join(failed)}")


class Pairs(Videos):
    """Groups of two videos under one relative transformation (Fig. 3), indexed by (epoch, group).

    An item depends on (seed, epoch, group) alone, not on workers or processes.
    equivariance: what the two videos of a group have in common (Table 1 b-d). "temporal": pq;
                  "spatial": the views (crop box and flip) of p and of q, with one τ for both clips
                  of a video and no labels of τ; "both".
                  # paper silent: each clip has its own colour.
    clips: 2, p and q; or 4, p, q, and p, q under another σ (Fig. 5).
    """

    def __init__(self, split, paths, T=16, size=128, speeds=(1, 2, 4, 8), seed=0,
                 equivariance="temporal", clips=2):
        super().__init__(split, paths)
        self.T, self.size, self.speeds, self.seed = T, size, speeds, seed
        self.equivariance, self.clips = equivariance, clips

    def __len__(self):
        return len(self.files) // 2

    def __getitem__(self, key):
        """-> dict: clips, a list of 2n uint8 (T, H, W, 3), and tensors with one row per video:

        colour (2, n, STEPS, 2); video, pq, order (2,); speed, direction, start of p and q (2, 2).
        """
        return self.first_readable(key, self.read_group)

    def read_group(self, key, rng, group):
        epoch, requested = key
        videos = epoch_order(self.seed, epoch, len(self.files))[2 * group:2 * group + 2].tolist()
        pairs, labels = self.draw_taus(videos, rng)
        if self.equivariance != "temporal":
            labels["pq"] = epoch * len(self) + requested        # no two keys have equal views
        views, colours = self.draw_sigmas(videos, rng)
        both = {name: torch.tensor([label, label]) for name, label in labels.items()}
        clips = [self.read(*row) for row in zip(videos, pairs, views)]
        return both | dict(
            clips=clips[0] + clips[1],
            colour=torch.stack(colours).unflatten(0, (2, self.clips)),
            video=torch.tensor(videos),
            start=torch.tensor([[p.start, q.start] for p, q in pairs]))

    def draw_taus(self, videos, rng):
        """Draw (τ_p, τ_q) of each video, and their labels (see `sample_pair`)."""
        lengths = self.shapes[videos, 0].tolist()
        if self.equivariance == "spatial":                      # Sec. 4.1
            taus = [sample_tau(n, self.T, self.speeds, rng) for n in lengths]
            return [(tau, tau) for tau in taus], {}
        return sample_pair(lengths, self.T, self.speeds, rng)

    def draw_sigmas(self, videos, rng):
        """Draw σ ~ S of each clip (Sec. 3.1) -> n views per video, colours of all 2n clips."""
        shared = draw_seeds(rng, self.clips)
        views, colours = [], []
        for v in videos:
            seeds, shape = draw_seeds(rng, self.clips), self.shapes[v, 1:]
            if self.equivariance != "temporal":
                seeds, shape = shared, self.shapes[videos[0], 1:]
            views.append([draw_view(*shape.tolist(), seed) for seed in seeds])
            colours += map(draw_colour, draw_seeds(rng, self.clips))
        return views, colours

    def read(self, v, pair, views):
        """Decode video v once -> its n clips p, q (and p, q again), each (T, size, size, 3)."""
        p, q = pair
        frames = (p.frames(self.T) + q.frames(self.T)) * (self.clips // 2)
        boxes = [box for box, _ in views for _ in range(self.T)]
        clips = self.decode(v, frames, self.size, boxes).movedim(1, 3).split(self.T)
        return [clip.flip(2) if flip else clip for clip, (_, flip) in zip(clips, views)]


def draw_seeds(rng, n):
    """Draw n seeds for torch (see `seeded`)."""
    return [rng.getrandbits(63) for _ in range(n)]


def collate(items):
    """Join the rows of all items -> one batch.

    Its clips are uint8: (B, n, T, H, W, 3) for Pairs, (B, T, H, W, 3) for Clips.
    """
    rows = {name: [row for item in items for row in item[name]] for name in items[0]}
    failed = rows.pop("failed")
    collate = torch.utils.data.default_collate                  # one copy, into shared memory
    batch = {name: collate(values) for name, values in rows.items()}
    shape = batch["colour"].shape[:-2]
    return batch | dict(clips=batch["clips"].unflatten(0, shape), failed=failed)


def step_loader(dataset, items, first, last, workers=0, rank=0, world=1):
    """Yield the batches of steps first ... last - 1, counted over all epochs, for process `rank`.

    items: groups (Pairs) or clips (Clips) in a global batch, whatever the number of processes.
    # paper silent: the last, incomplete batch of an epoch is dropped.
    A video that does not decode is replaced; a warning names it (Python shows each text once).
    """
    keys = step_keys(len(dataset) // items, items, first, last, rank, items // world)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers,
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available())
    for batch in loader:
        for reason in batch.pop("failed"):
            warnings.warn(f"replaced a video that does not decode: {reason}")
        yield batch


def step_keys(steps_per_epoch, items, first, last, rank, count):
    """Yield the `count` keys (epoch, number) of this process for each step."""
    for step in range(first, last):
        epoch, place = divmod(step, steps_per_epoch)
        start = place * items + rank * count
        yield [(epoch, number) for number in range(start, start + count)]


# ---- Clips for transfer (Sec. 3.4, 4) ----

class Clips(Videos):
    """Labelled clips for fine-tuning, indexed by (epoch, place): one per video and epoch.

    A clip starts anywhere and plays forwards, its frames `step` apart or as far apart as fits.
    An item depends on (seed, epoch, place) alone, not on workers or processes.
    """

    def __init__(self, split, paths, T=16, size=128, step=4, seed=0):
        super().__init__(split, paths)
        label = dict(zip(split.paths, split.labels))
        self.labels = np.array([label[path] for path in paths])
        self.T, self.size, self.step, self.seed = T, size, step, seed

    def __getitem__(self, key):
        """-> dict: clips, a list of one uint8 (T, H, W, 3), and tensors with one row:

        colour (1, STEPS, 2); label, video (1,).
        """
        return self.first_readable(key, self.read_clip)

    def read_clip(self, key, rng, place):
        epoch, _ = key
        v = int(epoch_order(self.seed, epoch, len(self))[place])
        length, height, width = self.shapes[v].tolist()
        step = fitting_step(length, self.T, self.step)
        start = rng.randint(0, max(0, length - 1 - step * (self.T - 1)))
        box, flip = draw_view(height, width, rng.getrandbits(63))
        frames = clip_frames(length, start, self.T, step)
        clip = self.decode(v, frames, self.size, [box] * self.T).movedim(1, 3)
        return dict(
            clips=[clip.flip(2) if flip else clip],
            label=torch.tensor([self.labels[v]]),
            colour=draw_colour(rng.getrandbits(63))[None],
            video=torch.tensor([v]))


class Windows(Videos):
    """Evenly spaced test windows of each video, from one decode, with short side size * 8 / 7.

    # paper silent: 8/7 (as 128 for 112), so that the crops differ.
    """

    def __init__(self, split, T=16, size=128, step=4, windows=10):
        super().__init__(split, split.paths)
        self.failed = {v: split.failed[path] for v, path in enumerate(split.paths)
                       if path in split.failed}
        self.T, self.side, self.step, self.windows = T, round(size * 8 / 7), step, windows

    def __getitem__(self, v):
        """-> v, clips uint8 (windows, T, 3, h, w), reason "". If it failed: v, None, the reason."""
        if v in self.failed:
            return v, None, self.failed[v]
        windows = eval_windows(int(self.shapes[v, 0]), self.T, self.step, self.windows)
        frames = [n for window in windows for n in window]
        try:
            return v, self.decode(v, frames, self.side).unflatten(0, (-1, self.T)), ""
        except VideoError as error:
            return v, None, error.reason
