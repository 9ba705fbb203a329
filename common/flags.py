"""The flags that the stages share, with the paper's defaults."""
import argparse
import os
import sys

import numpy as np
import torch

from common.precision import AMP, default_amp
from models import BACKBONES

DATASETS = ("toy", "ucf101", "hmdb51", "diving48", "diving48v1", "kinetics400", "folder")
LEAST = dict(frames=2, size=8, workers=0, windows=1, step=1, epochs=1, batch_size=1, warmup_epochs=0, log_every=1,
             save_every=0, accumulate=1, knn_every=0, keep_every=0, seed=0, weight_decay=0)
MOST = dict(frames=1024, size=1024, seed=2 ** 63 - 1)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the docstring's lines and shows each default."""


def paper_defaults(dataset, arch):
    """Sec. 3.4, 4.1, 4.2: what the paper trains with, by data set and backbone; for toy, what suits two CPU cores."""
    if dataset == "toy":
        return dict(epochs=200, batch_size=32, frames=8, size=24, lr=2e-3, warmup_epochs=10)
    defaults = dict(
        epochs=400, batch_size=192,                                             # Sec. 4.1
        frames=16, size=128,                                                    # Sec. 3.4
        lr=3e-4, warmup_epochs=10)                                              # Sec. 3.4; warm-up: paper silent
    if dataset == "kinetics400":
        defaults |= dict(epochs=200, batch_size=512)                            # Sec. 4.2
        defaults |= dict(batch_size={"s3dg": 256, "r2plus1d18": 192}.get(arch, 512))    # what fits the memory
    if dataset.startswith("diving48"):
        defaults |= dict(size=112)                                              # paper silent
    if arch == "r2plus1d18":
        defaults |= dict(size=112)                                              # Table 2
    if arch == "s3dg":
        defaults |= dict(frames=32)                                             # Table 2
    return defaults


def default_arch(dataset):
    """The paper's ablations use a 3D-ResNet-18 (Sec. 4.1); the toy set takes a quarter of its width."""
    return "r3d18_narrow" if dataset == "toy" else "r3d18"


def usable_cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):                                        # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers():
    """Loader processes for each process of torchrun: the cores shared out, at most 16; without a GPU one core of them
    trains."""
    cores = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(1, cores if torch.cuda.is_available() else cores - 1))


def known_flags(parser, argv):
    """What argv says so far, with --help left for later, so that help can show the defaults that hold."""
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    return known


def shared_parser(doc, stored=""):
    """The flags of all four stages; stored: words on where a default comes from -> parser."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="toy", help="toy is generated on first use")
    group.add_argument("--data", help="folder of the videos")
    group.add_argument("--annotations", help="folder of the official lists; None: looked for beside the videos")
    group.add_argument("--index", help="file that remembers what the scan of the videos found; None: one in ~/.cache")
    group.add_argument("--workers", type=int, default=default_workers(),
                       help="loader processes for each process of torchrun")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=BACKBONES, help=f"backbone F (Sec. 3.4){stored}")
    group.add_argument("--frames", type=int, metavar="T", help=f"frames a clip (Sec. 3.4, Table 2){stored}")
    group.add_argument("--size", type=int, metavar="PIXELS", help=f"height and width of a clip (Table 2){stored}")
    group.add_argument("--amp", choices=AMP, default=default_amp(),
                       help="mixed precision; off: float32 (paper silent)")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    return parser


def pretraining_parser(doc, argv, out="folder of what this run writes; None: one below runs/"):
    """The flags of pre-training, with the defaults for the --dataset and --arch in argv, which --help shows -> parser.

    So `python pretrain.py --dataset ucf101 --help` shows what holds for ucf101.
    """
    parser = shared_parser(doc)
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="official split (Sec. 4: 1)")
    parser.add_argument("--out", help=out)
    known = known_flags(parser, argv)
    arch = known.arch or default_arch(known.dataset)
    parser.set_defaults(arch=arch, data="toy-videos" if known.dataset == "toy" else None,
                        **paper_defaults(known.dataset, arch))
    return parser


def judging_parser(doc, argv, crops="centre", out="folder of what this run writes; None: that of --checkpoint"):
    """The flags of the three judges, with the defaults for the --dataset and --arch in argv -> parser.

    --checkpoint says what --arch, --frames and --size are, and there may be several splits; crops: --crops' default.
    """
    parser = shared_parser(doc, stored="; None: as --checkpoint has it")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), nargs="+", default=[1],
                        help="official splits, of several the mean (Sec. 4; which: ours)")
    parser.add_argument("--out", help=out)
    group = parser.add_argument_group("judging")
    group.add_argument("--checkpoint", help="backbone.pt or checkpoint.pt of pretrain.py, a torchvision state dict "
                       "of --arch, or the word random")
    group.add_argument("--windows", type=int, default=10, help="clips a video, evenly spaced (Sec. 3.4; number: ours)")
    group.add_argument("--crops", choices=("centre", "ten"), default=crops,
                       help="centre and its mirror image, or five crops and theirs (Sec. 3.4; which: ours)")
    group.add_argument("--step", type=int, default=4, help="source frames from one frame of a "
                       "clip to the next (Sec. 3.4: 4, that is, skip three; Table 4: 1 and 2)")
    known = known_flags(parser, argv)
    arch = known.arch or default_arch(known.dataset)
    parser.set_defaults(data="toy-videos" if known.dataset == "toy" else None,
                        checkpoint=f"runs/{known.dataset}-{arch}/backbone.pt")
    return parser


def optimisation_flags(parser):
    """The flags that pre-training and fine-tuning share -> their group."""
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="passes over the videos (Sec. 4.1, 4.2; Diving48: ours)")
    group.add_argument("--batch-size", type=int, help="videos over all processes (Sec. 4.1, 4.2; Diving48: ours)")
    group.add_argument("--lr", type=float, help="peak learning rate (Sec. 3.4)")
    group.add_argument("--weight-decay", type=float, default=1e-4, help="AdamW's (Sec. 3.4)")
    group.add_argument("--warmup-epochs", type=float, help="epochs of linear warm-up (paper silent)")
    group.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="steps between lines of the log")
    group.add_argument("--save-every", type=float, default=60, metavar="SECONDS", help="a checkpoint at the end of an "
                       "epoch, so long after the one before; always at the last step and when stopped")
    return group


def parse_and_check(parser, argv):
    """Parse, and refuse values that cannot be meant -> Namespace."""
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error(f"--dataset {args.dataset} needs --data, the folder of its videos")
    if args.dataset not in ("toy", "ucf101", "hmdb51") and set(np.ravel(args.split)) != {1}:
        parser.error(f"--dataset {args.dataset} has one split, 1, but --split is {args.split}")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in LEAST and value is not None:
            most = MOST.get(name, sys.float_info.max)
            if not value >= LEAST[name]:
                parser.error(f"{flag} must be at least {LEAST[name]}, but is {value}")
            if not value <= most:
                parser.error(f"{flag} must be at most {most}, but is {value}")
        if name in ("lr", "lam") and not 0 < value < float("inf"):
            parser.error(f"{flag} must be above 0, but is {value}")
    return args
