"""Pre-train a time-equivariant video representation (Jenni & Jin, ICCV 2021) on unlabelled videos.

    python pretrain.py                                                          # the toy set, on a CPU
    torchrun --nproc_per_node=8 pretrain.py --arch r3d18 --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist

Writes OUT/log.jsonl, OUT/checkpoint.pt (started again with the same OUT, it goes on from there) and OUT/backbone.pt.
"""
import contextlib
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW

from common.checkpoints import resume, save, save_checkpoint, warmup_cosine
from common.flags import optimisation_flags, parse_and_check, pretraining_parser
from common.precision import autocast, on_device, step_scaled
from common.processes import all_gather, data_parallel, init_distributed, locked, on_first, run
from common.progress import Progress
from common.splits import list_and_scan, usable
from data import Pairs, augmented, step_loader
from losses import loss_distinct, loss_equi, loss_inst
from models import LOSSES, TERMS, TimeEquivariant, check_clips, load_backbone, read_weights
from retrieval import knn_accuracy


def parse_args(argv=None):
    parser = pretraining_parser(__doc__, sys.argv[1:] if argv is None else argv)
    group = parser.add_argument_group("objective")
    group.add_argument("--losses", nargs="+", choices=TERMS, default=LOSSES, metavar="TERM",
                       help=f"terms of the sum, of {' '.join(TERMS)} (Table 1 e-o; distinct: Fig. 5)")
    group.add_argument("--equivariance", choices=("temporal", "spatial", "both"), default="temporal",
                       help="what the two videos of a group share, and so what psi has to tell: shift, speeds and "
                       "directions; crop and flip; both (Table 1 b-d)")
    group.add_argument("--speeds", type=int, nargs="+", default=[1, 2, 4, 8], metavar="S",
                       help="playback speeds: source frames from one frame of a clip to the next (Sec. 3.2)")
    group.add_argument("--lam", type=float, default=0.1, help="temperature λ (Eq. 2)")
    group = optimisation_flags(parser)
    group.add_argument("--init", metavar="FILE", help="start from the weights of F in a backbone.pt or of torchvision; "
                       "the heads are fresh (the paper: from scratch)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N",
                       help="cut the batch into N parts, with the gradient of the whole (Eq. 2: keys get none)")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm over all processes (paper silent)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--tensorboard", action="store_true", help="curves in OUT as well (pip install tensorboard)")
    group.add_argument("--knn-every", type=int, default=0, metavar="EPOCHS",
                       help="1-NN accuracy among training videos every so many epochs, by their labels; 0: never")
    group.add_argument("--keep-every", type=int, default=0, metavar="STEPS",
                       help="keep F every so many steps besides, as OUT/backbone-STEP.pt; 0: never")
    args = parse_and_check(parser, argv)

    args.losses, args.speeds = sorted(set(args.losses), key=TERMS.index), sorted(set(args.speeds))
    args.out = args.out or f"runs/{args.dataset}-{args.arch}"
    if args.speeds[0] < 1 or args.speeds[-1] > 1023:
        parser.error("--speeds must lie between 1 and 1023 source frames a step")
    if args.equivariance == "spatial" and set(args.losses) & {"speed", "direction", "order", "distinct"}:
        parser.error("--equivariance spatial gives both clips one temporal transformation, so it goes with "
                     "--losses inst equi only (Table 1 b)")
    check_clips(args)
    return args


def check_batch_size(args, world):
    """Each process, and each of its --accumulate parts, gets whole groups of two videos."""
    unit = 2 * world * args.accumulate
    if args.batch_size % unit:
        raise ValueError(f"--batch-size {args.batch_size} does not split into groups of two videos on {world} "
                         f"process(es) in {args.accumulate} part(s): give a multiple of {unit}")


def prepare(args):
    """The training videos: list, frame counts, and which of them can be used -> Split, paths, index."""
    split, index = list_and_scan(args, args.split, "train")
    if args.knn_every and not split.classes:
        raise ValueError(f"--knn-every needs labels, which {split.title} lacks")
    paths, report = usable(split, index, args.speeds[0] * (args.frames - 1) + 1)    # what the slowest clip takes
    if args.batch_size > len(paths):
        raise ValueError(f"--batch-size {args.batch_size} is larger than the {len(paths)} usable videos ({report})")
    print(report, file=sys.stderr)
    return split, paths, index


def training_pairs(args, split, paths, index):
    """Groups of two videos under one relative transformation (Fig. 3); for Fig. 5's baseline each clip twice."""
    clips = 4 if "distinct" in args.losses else 2
    return Pairs(split, paths, index, args.frames, args.size, args.speeds, args.seed, args.equivariance, clips)


def clips_as_rows(x, i):
    """x (B, n, D) of n clips of videos i, one row a clip -> (nB, D), i of each 0 0 1 1 ..., its clip 0 1 0 1 ..."""
    n = x.shape[1]
    return x.flatten(0, 1), i.repeat_interleave(n), torch.arange(n, device=i.device).repeat(len(i))


def anchors(out, batch):
    """What Eq. 1, Eq. 3 and Fig. 5 compare, a row each -> {term: (features, ids ...)}, the losses' arguments."""
    i = batch["video"]                                                          # (B,)
    rows = {}
    if "phi" in out:
        rows["inst"] = clips_as_rows(out["phi"], i)                             # φ_i^p (2B, D), i, p (2B,)
    if "psi" in out:
        rows["equi"] = out["psi"], i, batch["pq"]                               # ψ_i^pq (B, D), i, pq (B,)
    if "chi" in out:
        chi, i, clip = clips_as_rows(out["chi"], i)                             # χ_i^ps (4B, D): clips p q p q,
        rows["distinct"] = chi, i, clip % 2, clip // 2                          # σ of each 0 0 1 1
    return rows


def gather_keys(out, batch):
    """The keys of Eq. 1, Eq. 3 and Fig. 5: the anchors of all processes."""
    return {term: all_gather(*rows) for term, rows in anchors(out, batch).items()}


def objective(out, batch, keys, lam):
    """L = L_inst + L_equi + L_speed + L_direction + L_order, term by term (Table 1; a row passes fewer terms).

    -> terms {name: scalar}, scores {name: scalar, or the labels' shares}: what the heads get right, and by chance.
    """
    terms, scores = {}, {}
    rows = anchors(out, batch)
    if "inst" in rows:
        phi, i, p = rows["inst"]
        terms["inst"] = loss_inst(phi, i, p, keys["inst"], lam)                 # Eq. 3
        phi_j, j, r = keys["inst"]
        same_i, same_p = i[:, None] == j, p[:, None] == r                       # (2B, M)
        scores["phi_nearest"], scores["phi_chance"] = nearest(phi, phi_j, ~(same_i & same_p), same_i)
    if "equi" in rows:
        psi, i, pq = rows["equi"]
        terms["equi"] = loss_equi(psi, i, pq, keys["equi"], lam)                # Eq. 1
        psi_k, k, rs = keys["equi"]
        scores["psi_nearest"], scores["psi_chance"] = nearest(psi, psi_k, i[:, None] != k, pq[:, None] == rs)
    if "distinct" in rows:
        chi, i, p, s = rows["distinct"]
        terms["distinct"] = loss_distinct(chi, i, p, s, keys["distinct"], lam)  # Fig. 5
    for task in ("speed", "direction", "order"):                                # Sec. 3.2
        if task in out:
            logits, label = out[task].float().flatten(0, -2), batch[task].flatten()
            terms[task] = F.cross_entropy(logits, label)
            scores[f"{task}_acc"] = (logits.argmax(1) == label).float().mean()
            scores[f"{task}_shares"] = F.one_hot(label, logits.shape[1]).float().mean(0)
    return terms, scores


@torch.no_grad()
def nearest(x, y, candidate, match):
    """How often an anchor's most similar candidate matches, and how often a random one would.

    x: (N, D), y: (M, D), candidate, match: bool (N, M) -> two scalars.
    """
    cosine = F.normalize(x.float(), dim=1) @ F.normalize(y.float(), dim=1).T    # (N, M)
    hit = match.gather(1, cosine.masked_fill(~candidate, -2).argmax(1, keepdim=True))
    return hit.float().mean(), ((match & candidate).sum(1) / candidate.sum(1)).mean()


def split_batch(batch, n):
    """n equal parts of a batch, along the videos -> list of dicts."""
    pieces = {name: value.chunk(n) for name, value in batch.items()}
    return [{name: piece[k] for name, piece in pieces.items()} for k in range(n)]


@contextlib.contextmanager
def frozen_statistics(network):
    """Inside, BatchNorm's running statistics stay as they are: clips that are seen twice count once."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def keys_of_parts(network, parts, batch, precision):
    """The keys of a whole batch, of all processes, from a first pass over its parts without gradient."""
    with torch.no_grad(), precision, frozen_statistics(network):
        outs = [network(part["clips"]) for part in parts]
    whole = {name: torch.cat([out[name] for out in outs]) for name in outs[0]}
    return gather_keys(whole, batch)


def forward_backward(network, batch, n, lam, precision=contextlib.nullcontext(), scaler=None):
    """The gradient of one batch, cut into n parts: first the keys of all parts, then each part against all keys.

    That is the whole batch's gradient, since Eq. 2 stops it at the keys (BatchNorm aside, which sees the parts).
    -> {name: mean over the parts}: loss, terms, scores. ValueError: what the losses refuse, on a CPU.
    """
    parts = split_batch(batch, n)
    keys = keys_of_parts(network, parts, batch, precision) if n > 1 else None
    values = defaultdict(float)
    for k, part in enumerate(parts):
        more = k < n - 1 and dist.is_initialized()                              # DDP averages the gradients once
        with network.no_sync() if more else contextlib.nullcontext():
            with precision:
                out = network(part["clips"])                                    # (B, 2, 3, T, H, W) -> dict
            terms, scores = objective(out, part, keys or gather_keys(out, part), lam)
            loss = sum(terms.values())                                          # Table 1: plain sums
            (scaler.scale(loss / n) if scaler else loss / n).backward()
        for name, value in dict(loss=loss, **terms, **scores).items():
            values[name] += value.detach() / n
    return dict(values)


def to_device(batch, device):
    """A batch on the network's device, its clips with the colour part of σ (Sec. 3.4): (B, n, 3, T, H, W) float32."""
    seeds = batch.pop("seed")                                                   # (B, n), used on the CPU
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return batch | dict(clips=augmented(batch["clips"], seeds))


def new_model(args, device):
    """F and the heads of the chosen losses, on the device -> TimeEquivariant."""
    if args.sync_bn and device.type == "cpu":
        raise ValueError("--sync-bn needs GPUs: torch has no SyncBatchNorm for CPUs")
    model = on_device(TimeEquivariant(args.arch, args.losses, len(args.speeds)), device)
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if args.sync_bn else model


def wrapped(model, args, device):
    """The model under DDP, where torchrun started it, and torch.compile."""
    network = data_parallel(model, device)
    return torch.compile(network) if args.compile else network


def save_all(out, args, world, step, state):
    """OUT/checkpoint.pt, from which a run goes on, and OUT/backbone.pt, F alone for the judges."""
    save(out, args, world, step, **state)
    save_backbone(out / "backbone.pt", state["model"], args)


def save_backbone(file, model, args):
    """F alone, with the run's arguments, for the judges."""
    save_checkpoint(file, arch=args.arch, backbone=model.backbone.state_dict(), args=vars(args))


def train(args, videos, pairs, rank, world, device):
    """Pre-train, or go on doing so; writes what OUT holds. videos: of prepare; pairs: of training_pairs."""
    out, steps_an_epoch = Path(args.out), len(pairs) // (args.batch_size // 2)
    steps = args.epochs * steps_an_epoch

    # Model and optimiser
    model = new_model(args, device)
    optimizer = AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    step = resume(out, args, world, **state)
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_an_epoch), steps, step)
    if args.init and step == 0:
        model.backbone.load_state_dict(load_backbone(args.init, args.arch).state_dict())
    network = wrapped(model, args, device)

    # Steps
    loaded = step_loader(pairs, args.batch_size // 2, step, steps, args.workers, rank, world)
    progress = Progress(out, pairs.files, step, steps, steps_an_epoch, pairs.clips * args.batch_size, args, device)
    for step, batch in progress.batches(loaded):
        batch = to_device(batch, device)
        optimizer.zero_grad()
        with progress.naming_videos(step):
            values = forward_backward(network, batch, args.accumulate, args.lam, autocast(args.amp, device), scaler)
        values |= step_scaled(scaler, optimizer, values["loss"])
        progress.done(step, schedule.get_last_lr()[0], **values)
        schedule.step()

        if progress.saves(step):
            save_all(out, args, world, step, state)
        if args.keep_every and step % args.keep_every == 0 and rank == 0:
            save_backbone(out / f"backbone-{step}.pt", model, args)
        if args.knn_every and step % (args.knn_every * steps_an_epoch) == 0:
            progress.log(step, **knn_accuracy(model.backbone, *videos, args, device))
    if step < steps:                                                            # asked to stop
        if rank == 0:
            save_all(out, args, world, step, state)
        progress.leave(step)


def next_command(args, backbone):
    """What to type to see what F has learned: the linear probe, or neighbours where there are no official lists."""
    checkpoint = ["--checkpoint", str(backbone)]
    if args.dataset in ("kinetics400", "folder"):
        words = ["retrieval.py", "--gallery", args.data, "--query", args.data, "--features", "features.npz"]
    elif args.dataset == "toy" and args.data == "toy-videos":
        words = ["linear_probe.py"]
    else:
        words = ["linear_probe.py", "--dataset", args.dataset, "--data", args.data]
        words += ["--annotations", args.annotations] if args.annotations else []
    return f"python {shlex.join(words + checkpoint)}"


def main(argv=None):
    args = parse_args(argv)
    backbone = Path(args.out) / "backbone.pt"

    # Distributed
    rank, world, device = init_distributed()
    check_batch_size(args, world)
    if args.init and not backbone.exists():                                     # of a new run: rather than fail after
        read_weights(args.init)                                                 # the scan of the videos
    torch.manual_seed(args.seed)

    with locked(backbone.parent):
        videos = on_first(prepare, args)                                        # Split, paths, index
        pairs = training_pairs(args, *videos)
        train(args, videos, pairs, rank, world, device)
    print(f"next: {next_command(args, backbone)}")


if __name__ == "__main__":
    run(main)
