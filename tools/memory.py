"""How much memory of a GPU a training step keeps, computed without one.

    python tools/memory.py                          # all backbones, clips as in Tables 1 and 2
    python tools/memory.py --arch r3d18 --batch-size 64 --amp off

Batch sizes are videos a process (and a part of --accumulate), two clips each. "Saved" is what the forward pass keeps
for the backward pass, each piece of memory once; "weights" are the weights, their gradients and AdamW's two moments.
Not counted: the workspace of cuDNN, gradients on their way back through the network, the batch itself.
"""
import argparse
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.flags import LEAST, MOST, Formatter, paper_defaults
from common.precision import AMP
from common.processes import run
from models import BACKBONES, TimeEquivariant, check_clips

BOUNDS = dict(batch_size=(2, 2 ** 16), frames=(LEAST["frames"], MOST["frames"]), size=(LEAST["size"], MOST["size"]))


def saved_bytes(model, clips):
    """What model(clips) keeps for the backward pass, in bytes; weights, which are there anyway, are left out."""
    weights = {address(weight) for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[address(tensor)] = tensor.untyped_storage()                        # held, so that no address comes twice
        return tensor.detach()

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(clips)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def address(tensor):
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


@contextmanager
def autocast_without_a_gpu(amp):
    """torch.autocast("cuda", ...), which turns itself off where there is no GPU."""
    torch.set_autocast_dtype("cuda", AMP[amp])
    torch.set_autocast_enabled("cuda", amp != "off")
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def memory(arch, videos, frames, size, amp):
    """-> bytes saved for the backward pass, bytes of weights, gradients and moments, of a step of pretrain.py.

    Fake tensors have a device, a shape and a type alone: nothing is computed, and no GPU is asked for.
    """
    with FakeTensorMode(), torch.device("cuda"), autocast_without_a_gpu(amp):
        model = TimeEquivariant(arch)
        saved = saved_bytes(model, torch.empty(videos, 2, 3, frames, size, size))
        weights = sum(weight.nbytes for weight in model.parameters())
    return saved, 4 * weights


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("--arch", choices=BACKBONES, nargs="+", default=list(BACKBONES), help="backbones F")
    parser.add_argument("--batch-size", type=int, default=24, help="videos a process; 24: the paper's 192 on 8 GPUs")
    parser.add_argument("--frames", type=int, metavar="T", help="frames a clip; None: as in the paper's tables")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="height and width of a clip; None: likewise")
    parser.add_argument("--amp", choices=AMP, default="bf16", help="mixed precision; off: float32")
    args = parser.parse_args(argv)
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} must lie between {least} and {most}, but is {value}")
    return args


def main(argv=None):
    args = parse_args(argv)
    print(f"{args.batch_size} videos, {args.amp}; GB")
    print(f"{'network':12}  {'clip':>14}  {'saved':>6}  {'weights':>7}  {'sum':>6}")
    for arch in args.arch:
        clip = paper_defaults("ucf101", arch)
        frames, size = args.frames or clip["frames"], args.size or clip["size"]
        check_clips(argparse.Namespace(arch=arch, frames=frames, size=size))
        saved, weights = memory(arch, args.batch_size, frames, size, args.amp)
        figures = f"{saved / 1e9:6.2f}  {weights / 1e9:7.2f}  {(saved + weights) / 1e9:6.2f}"
        print(f"{arch:12}  {f'{frames} x {size} x {size}':>14}  {figures}")


if __name__ == "__main__":
    run(main)
