"""torchvision's ColorJitter and RandomGrayscale, drawn per clip and applied per batch."""
import itertools
from contextlib import contextmanager

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

# paper silent: colour strengths; these are MoCo v2's (after SimCLR [10]), without blur
JITTER = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
P_JITTER, P_GREY = 0.8, 0.2
STEPS = 5                                                       # most adjustments of one clip


@contextmanager
def seeded(seed):
    """Seed torch's CPU generator inside the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def brightness(x, factor):
    return x * factor


def contrast(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x).mean((-3, -2, -1), keepdim=True), x, factor)


def saturation(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x), x, factor)


def hue(x, shift):
    """Rotate the hue of HSV by `shift` turns; each pixel keeps its maximum and minimum.

    h is in sixths of a turn: red 0, green 2, blue 4.
    """
    red, green, blue = x.split(1, dim=-3)
    high = torch.maximum(torch.maximum(red, green), blue)       # amax is slow over 3 channels
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    h = torch.where(high == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    h = torch.where(high == red, green - blue, h).div_(chroma.clamp(min=1e-6)).add_(6 * shift)
    away = torch.cat([h, h - 2, h - 4], dim=-3)                 # from red, green, blue
    return away.abs_().sub_(3).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)


ADJUST = brightness, contrast, saturation, hue                  # in ColorJitter's order


def draw_colour(seed):
    """Draw the colour part of σ for one clip, as torchvision's ColorJitter and RandomGrayscale do.

    -> (STEPS, 2), in the order of application: index in ADJUST (-1: none), factor or shift
    """
    steps = []
    with seeded(seed):
        if torch.rand(()) < P_JITTER:
            drawn = JITTER.make_params([])
            for k in drawn["fn_idx"].tolist():
                steps.append((k, drawn[f"{ADJUST[k].__name__}_factor"]))
        if torch.rand(()) < P_GREY:
            steps.append((ADJUST.index(saturation), 0.0))
    return torch.tensor(steps + [(-1, 0.0)] * (STEPS - len(steps)))


def jitter(clips, colours):
    """Apply the n-th adjustment of every clip in round n.

    clips: (N, T, 3, H, W) of 0 ... 255, on any device
    colours: (N, STEPS, 2) on the CPU, so that nothing waits for a GPU
    -> float32 (N, T, 3, H, W)
    """
    x = clips.contiguous().float()                              # separate planes are faster
    for n, (k, adjust) in itertools.product(range(STEPS), enumerate(ADJUST)):
        rows = (colours[:, n, 0] == k).nonzero()[:, 0]
        if len(rows):
            factor = colours[rows, n, 1].view(-1, 1, 1, 1, 1)
            rows, factor = (y.to(x.device, non_blocking=True) for y in (rows, factor))
            x[rows] = adjust(x[rows], factor).clamp_(0, 255)
    return x
