"""The flags that the stages share, with the paper's defaults."""
import argparse
import os

import torch

from common import UserError
from common.distributed import torchrun
from common.training import AMP, default_amp
from models import BACKBONES

DATASETS = ("toy", "ucf101", "hmdb51", "diving48", "diving48v1", "kinetics400", "folder")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the docstring's lines and shows each default but None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors: one sentence, which rank 0 alone prints."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message} (--help lists the flags)")


def paper_defaults(dataset, arch):
    """Pre-training (Sec. 3.4, 4.1, 4.2) by data set and backbone; toy: what suits two CPU cores."""
    if dataset == "toy":
        return dict(epochs=200, batch_size=32, frames=8, size=24, lr=2e-3, warmup_epochs=10)
    defaults = dict(
        epochs=400, batch_size=192,                                         # Sec. 4.1
        frames=16, size=128,                                                # Sec. 3.4
        lr=3e-4, warmup_epochs=10)                                          # Sec. 3.4; paper silent
    if dataset == "kinetics400":                                            # Sec. 4.2
        batch_size = {"s3dg": 256, "r2plus1d18": 192}.get(arch, 512)        # what fits the memory
        defaults |= dict(epochs=200, batch_size=batch_size)
    if arch == "r2plus1d18":
        defaults |= dict(size=112)                                          # Table 2
    if arch == "s3dg":
        defaults |= dict(frames=32)                                         # Table 2
    return defaults


def evaluation_defaults(dataset):
    """Evaluation by data set: Sec. 3.4 skips three frames, Sec. 4.2 none on Diving48 (1x)."""
    return dict(step=1 if dataset.startswith("diving48") else 4)


def finetune_defaults(dataset):
    """Fine-tuning (Sec. 3.4, 4.2) by data set; toy: what suits two CPU cores."""
    defaults = evaluation_defaults(dataset)
    if dataset == "toy":
        return defaults | dict(epochs=30, batch_size=16, lr=1e-3, warmup_epochs=1)
    # paper silent: 100 epochs on all but UCF101 and HMDB51, warm-up
    epochs = 200 if dataset == "hmdb51" else 100
    return defaults | dict(epochs=epochs, batch_size=32, lr=1e-4, warmup_epochs=5)


def default_arch(dataset):
    """Sec. 4.1: a 3D-ResNet-18; Sec. 4.2: R(2+1)D on Diving48; toy: a quarter of the width."""
    if dataset.startswith("diving48"):
        return "r2plus1d18"
    return "r3d18_narrow" if dataset == "toy" else "r3d18"


def usable_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def default_workers():
    """Loader processes per process, at most 16; without a GPU, leave one core to train."""
    cores = usable_cores() // torchrun("LOCAL_WORLD_SIZE", 1)
    return min(16, max(1, cores if torch.cuda.is_available() else cores - 1))


# ---- Types ----

def number(kind, least, name):
    """A type for argparse, whose message is: invalid positive_int value: '0'"""
    def parse(text):
        if not least <= kind(text) < float("inf"):
            raise ValueError
        return kind(text)
    parse.__name__ = name
    return parse


positive_int = number(int, 1, "positive_int")
non_negative_int = number(int, 0, "non_negative_int")
positive_float = number(float, 1e-9, "positive_float")
non_negative_float = number(float, 0, "non_negative_float")


# ---- Parsers ----

def shared_parser(doc):
    """The flags of all four stages; those whose default is None take it from `paper_defaults`."""
    parser = Parser(doc)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="toy", help="toy is generated on first use")
    add("--data", help="folder of the videos")
    add("--annotations", help="folder of the official lists (default: beside the videos)")
    add("--index", help="file that caches the scan of the videos (default: in ~/.cache)")
    add("--workers", type=non_negative_int, default=default_workers(),
        help="loader processes for each process of torchrun")
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=BACKBONES, help="backbone F (Sec. 3.4; default: r3d18, on Diving48 "
        "r2plus1d18, on the toy set r3d18_narrow)")
    add("--frames", type=positive_int, metavar="T", help="frames per clip (Sec. 3.4: 16; Table 2)")
    add("--size", type=positive_int, metavar="PIXELS",
        help="height and width of a clip (Sec. 3.4: 128; Table 2)")
    add("--amp", choices=AMP if torch.cuda.is_available() else ["off"], default=default_amp(),
        help="mixed precision, on GPUs; off: float32 (paper silent)")
    parser.add_argument_group("run").add_argument(
        "--seed", type=non_negative_int, default=0, help="random seed")
    return parser


def pretraining_parser(doc, out="folder of what this run writes (default: below runs/)"):
    parser = shared_parser(doc)
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1,
                        help="official split (Sec. 4: 1)")
    parser.add_argument("--out", help=out)
    return parser


def evaluation_parser(doc, crops="centre"):
    """The flags of the three evaluations; the checkpoint gives --arch, --frames and --size."""
    parser = shared_parser(doc)
    parser.add_argument("--split", type=int, choices=(1, 2, 3), nargs="+", default=[1],
                        help="official splits; results are averaged (Sec. 4; paper silent)")
    parser.add_argument("--out", help="folder of the results (default: that of --checkpoint)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--checkpoint", help="backbone.pt or checkpoint.pt of pretrain.py, a torchvision state "
        "dict of --arch, or the word random (default: backbone.pt of the default run)")
    add("--windows", type=positive_int, default=10,
        help="clips per video, evenly spaced (Sec. 3.4; number: paper silent)")
    add("--crops", choices=("centre", "ten"), default=crops,
        help="centre and its mirror image, or five crops and theirs (paper silent)")
    add("--step", type=positive_int, help="source frames from one frame of a clip to the next "
        "(default: 4, that is, skip three, Sec. 3.4; on Diving48 1; Table 4: 1 and 2)")
    return parser


def optimisation_flags(parser):
    """The flags that pre-training and fine-tuning share -> their group."""
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=positive_int, help="passes over the videos (Sec. 4.1, 4.2)")
    add("--batch-size", type=positive_int, help="videos over all processes (Sec. 4.1, 4.2)")
    add("--lr", type=positive_float, help="peak learning rate (Sec. 3.4)")
    add("--weight-decay", type=non_negative_float, default=1e-4, help="AdamW's (Sec. 3.4)")
    add("--warmup-epochs", type=non_negative_float, help="epochs of linear warm-up, by default "
        "at most a tenth of --epochs (paper silent)")
    add("--log-every", type=positive_int, default=10, metavar="STEPS",
        help="steps between lines of the log")
    add("--save-every", type=non_negative_float, default=60, metavar="SECONDS",
        help="seconds between checkpoints")
    return group


def table_of_defaults(defaults):
    """Epilog of --help: the defaults of each data set; defaults: data set -> {flag: value}"""
    rows = []
    for dataset in DATASETS:
        flags = (f"--{name.replace('_', '-')} {value}" for name, value in defaults(dataset).items())
        rows.append(f"  {dataset:12}{' '.join(flags)}")
    return "\n".join(["defaults by --dataset (with its default --arch):", *rows])


def fill_defaults(parser, args, defaults):
    """Give the flags that were not given the data set's values; check what needs several flags."""
    if "warmup_epochs" in defaults:                             # paper silent: of short runs
        tenth = (args.epochs or defaults["epochs"]) / 10
        defaults = defaults | dict(warmup_epochs=min(defaults["warmup_epochs"], tenth))
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if "warmup_epochs" in defaults and args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs {args.warmup_epochs} is longer than --epochs {args.epochs}")
    if args.data is None and args.dataset == "toy":
        args.data = "toy-videos"
    if args.data is None:
        parser.error(f"--dataset {args.dataset} needs --data, the folder of its videos")
    if args.dataset not in ("toy", "ucf101", "hmdb51") and args.split not in (1, [1]):
        parser.error(f"--dataset {args.dataset} has one split, 1, but --split is {args.split}")
    return args


def check_batch_size(size, unit, least, why, videos):
    """UserError, with a size that works: no multiple of `unit`, below `least`, above `videos`."""
    right = max(least, min(size, videos) // unit * unit)
    if size != right or right > videos:
        fault = f"is not a multiple of {unit} ({why})"
        if size < least:
            fault = f"is less than {least} ({why})"
        if size > videos:
            fault = f"is larger than the {videos} usable videos"
        advice = f": give {right}" if right <= videos else ""
        raise UserError(f"--batch-size {size} {fault}{advice}")
