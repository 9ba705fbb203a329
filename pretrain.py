"""Pre-train a time-equivariant video representation (Jenni & Jin, ICCV 2021) on unlabelled videos.

    python pretrain.py                                                      # the toy set, on a CPU
    torchrun --nproc_per_node=8 pretrain.py --arch r3d18 \\
        --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist

Writes OUT/log.jsonl, OUT/checkpoint.pt (the same command resumes from it) and OUT/backbone.pt.
"""
import contextlib
import importlib
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim import AdamW

from common import UserError, flags
from common.distributed import (
    all_gather,
    data_parallel,
    init_distributed,
    on_rank0,
    rank_and_world,
    run,
)
from common.splits import load_and_scan, own_parts, subfolders, usable
from common.training import (
    Progress,
    autocast,
    check_finite,
    locked,
    resume,
    save,
    save_file,
    step_scaled,
    warmup_cosine,
)
from data import Pairs, augment, step_loader
from losses import loss_distinct, loss_equi, loss_inst
from models import LOSSES, TERMS, TimeEquivariant, load_backbone


def parse_args(argv=None):
    parser = flags.pretraining_parser(__doc__)
    parser.epilog = flags.table_of_defaults(
        lambda name: flags.paper_defaults(name, flags.default_arch(name)))
    add = parser.add_argument_group("objective").add_argument
    add("--losses", nargs="+", choices=TERMS, default=LOSSES, metavar="TERM",
        help=f"terms of the sum, of {' '.join(TERMS)} (Table 1 e-o). Fig. 5's baseline: distinct, "
        "alone or with inst, at half the --batch-size and --epochs, since it takes four clips of a "
        "video, not two")
    add("--equivariance", choices=("temporal", "spatial", "both"), default="temporal",
        help="what the videos of a group share and psi encodes: temporal (shift, speeds, "
        "directions), spatial (crop, flip) or both (Table 1 b-d)")
    add("--speeds", type=flags.positive_int, nargs="+", default=[1, 2, 4, 8], metavar="S",
        help="playback speeds: source frames from one frame of a clip to the next (Sec. 3.2)")
    add("--lam", type=flags.positive_float, default=0.1,
        help="temperature λ (Eq. 2); float32 overflows below 0.012")
    add = flags.optimisation_flags(parser).add_argument
    add("--init", metavar="FILE", help="start from the weights of F in a backbone.pt or of "
        "torchvision; heads are newly initialised (the paper: from scratch)")
    add("--accumulate", type=flags.positive_int, default=1, metavar="N",
        help="split the batch into N parts; same gradient as the whole (Eq. 2: keys get none)")
    add("--sync-bn", action="store_true", help="BatchNorm over all processes (paper silent)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--tensorboard", action="store_true",
        help="also write curves to OUT (pip install tensorboard)")
    add("--keep-every", type=flags.non_negative_int, default=0, metavar="STEPS",
        help="also save F every STEPS steps, as OUT/backbone-STEP.pt; 0: never")
    args = parser.parse_args(argv)

    args.arch = args.arch or flags.default_arch(args.dataset)
    flags.fill_defaults(parser, args, flags.paper_defaults(args.dataset, args.arch))
    args.losses = sorted(set(args.losses), key=TERMS.index)
    args.speeds = sorted(set(args.speeds))
    args.out = args.out or f"runs/{args.dataset}-{args.arch}"
    if args.equivariance == "spatial" and not set(args.losses) <= {"inst", "equi"}:
        parser.error("--equivariance spatial gives both clips one temporal transformation, so it "
                     "goes with --losses inst equi only (Table 1 b)")
    return args


def try_flags(args, device):
    """UserError, before a scan that may take hours: a flag lacks what it needs."""
    if args.init and not Path(args.out, "checkpoint.pt").exists():
        load_backbone(args.init, args.arch)
    if args.sync_bn and device.type == "cpu":
        raise UserError("--sync-bn needs a GPU")
    if args.tensorboard:
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    if args.compile:
        try:
            torch.compile(lambda x: x.sin())(torch.ones(1, device=device))
        except RuntimeError as error:
            cause = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
            raise UserError(f"--compile fails here: {cause}") from None


# ---- Data ----

def prepare(args):
    """The training videos, scanned -> Pairs: groups of two under one transformation (Fig. 3)."""
    _, world = rank_and_world()
    split = load_and_scan(args, args.split, "train")
    paths, report = usable(split, args.speeds[0] * (args.frames - 1) + 1)   # of the slowest clip
    print(report, file=sys.stderr)
    unit = 2 * world * args.accumulate
    why = f"groups of 2 videos, {world} process(es), {args.accumulate} part(s)"
    flags.check_batch_size(args.batch_size, unit, unit, why, len(paths))
    clips = 4 if "distinct" in args.losses else 2
    return Pairs(split, paths, args.frames, args.size, args.speeds, args.seed, args.equivariance,
                 clips)


def to_device(batch, device):
    """Move a batch to the device and apply the colour part of σ (Sec. 3.4) to its clips.

    clips: uint8 (B, n, T, H, W, 3) -> float32 (B, n, 3, T, H, W)
    """
    colours = batch.pop("colour")                               # stays on the CPU
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return batch | dict(clips=augment(batch["clips"], colours))


# ---- Objective ----

def objective(out, batch, keys, lam):
    """Table 1: the terms of L = L_inst + L_equi + L_speed + L_direction + L_order -> {name: scalar}

    out: the network's output, with the heads of the chosen terms; keys: from `gather_keys`.
    """
    terms = {}
    i, k = batch["video"], keys["video"]                                    # (B,), (M,)
    if "phi" in out:                                                        # Eq. 3
        terms["inst"] = loss_inst(*clip_rows(out["phi"], i), clip_rows(keys["phi"], k), lam)
    if "psi" in out:                                                        # Eq. 1
        terms["equi"] = loss_equi(out["psi"], i, batch["pq"], (keys["psi"], k, keys["pq"]), lam)
    if "chi" in out:                                                        # Fig. 5
        terms["distinct"] = loss_distinct(*view_rows(out["chi"], i), view_rows(keys["chi"], k), lam)
    for task in ("speed", "direction", "order"):                            # Sec. 3.2
        if task in out:
            logits = out[task].float().flatten(0, -2)                       # (2B or B, classes)
            terms[task] = F.cross_entropy(logits, batch[task].flatten())
    return terms


def clip_rows(x, i):
    """x (B, n, D), n clips of each video -> (nB, D), video ids 0 0 1 1 ..., clip ids 0 1 0 1 ..."""
    n = x.shape[1]
    return x.flatten(0, 1), i.repeat_interleave(n), torch.arange(n, device=i.device).repeat(len(i))


def view_rows(x, i):
    """The same for clips p q p q under σ_s, s = 0 0 1 1 -> (4B, D), i, p, s"""
    x, i, clip = clip_rows(x, i)
    return x, i, clip % 2, clip // 2


def gather_keys(out, batch):
    """The keys of Eq. 1, Eq. 3 and Fig. 5: features and ids of all processes, without gradient."""
    features = {name: out[name] for name in ("phi", "psi", "chi") if name in out}
    ids = {name: batch[name] for name in ("video", "pq")}
    return {name: all_gather(x) for name, x in (features | ids).items()}


@torch.no_grad()
def scores(out, batch, keys):
    """Accuracies of the heads, and as *_chance their chance levels, or the class frequencies."""
    found = {}
    i, k = batch["video"], keys["video"]                                    # (B,), (M,)
    if "phi" in out:                                            # nearest is of the same video
        phi, i_row, p = clip_rows(out["phi"], i)
        phi_j, j, r = clip_rows(keys["phi"], k)
        same_i, same_p = i_row[:, None] == j, p[:, None] == r               # (2B, M)
        found["phi_nearest"], found["phi_chance"] = nearest(phi, phi_j, ~(same_i & same_p), same_i)
    if "psi" in out:                                            # nearest has the same pq
        same_pq = batch["pq"][:, None] == keys["pq"]                        # (B, M)
        found["psi_nearest"], found["psi_chance"] = nearest(
            out["psi"], keys["psi"], i[:, None] != k, same_pq)
    for task in ("speed", "direction", "order"):
        if task in out:
            logits, label = out[task].flatten(0, -2), batch[task].flatten()
            found[f"{task}_acc"] = (logits.argmax(1) == label).float().mean()
            found[f"{task}_chance"] = F.one_hot(label, logits.shape[1]).float().mean(0)
    return found


def nearest(x, y, candidate, match):
    """How often an anchor's most similar candidate matches, and how often a random one would.

    x: (N, D), y: (M, D), candidate, match: bool (N, M) -> two scalars
    """
    cosine = F.normalize(x.float(), dim=1) @ F.normalize(y.float(), dim=1).T        # (N, M)
    hit = match.gather(1, cosine.masked_fill(~candidate, -2).argmax(1, keepdim=True))
    return hit.float().mean(), ((match & candidate).sum(1) / candidate.sum(1)).mean()


def accumulate(network, batch, args, scaler):
    """Compute a batch's gradient in N parts: all keys first, then each part against them.

    Exact, since Eq. 2 stops the gradient at the keys; only BatchNorm sees the parts. Its running
    statistics skip the first pass. -> terms, scores: means over the parts
    """
    n, device = args.accumulate, batch["clips"].device
    parts = [dict(zip(batch, values)) for values in zip(*(x.chunk(n) for x in batch.values()))]
    norms = [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    with torch.no_grad(), autocast(args.amp, device):
        outs = [network(part["clips"]) for part in parts]
    for norm in norms:
        norm.track_running_stats = True
    keys = gather_keys({name: torch.cat([out[name] for out in outs]) for name in outs[0]}, batch)

    values = []
    for part in parts:
        more = part is not parts[-1] and dist.is_initialized()              # DDP averages once
        with network.no_sync() if more else contextlib.nullcontext():
            with autocast(args.amp, device):
                out = network(part["clips"])
            terms = objective(out, part, keys, args.lam)
            scaler.scale(sum(terms.values()) / n).backward()
        values.append((terms, scores(out, part, keys)))
    return [{name: sum(value[name].detach() for value in column) / n for name in column[0]}
            for column in zip(*values)]


# ---- Training ----

def train(args, pairs, device):
    rank, world = rank_and_world()
    folder, steps_per_epoch = Path(args.out), len(pairs) // (args.batch_size // 2)
    steps = args.epochs * steps_per_epoch

    # Model and optimiser
    model = TimeEquivariant(args.arch, args.losses, len(args.speeds))
    model.to(device, memory_format=torch.channels_last_3d)
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay,
                      fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    # Resume
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    trained_with = vars(args) | pairs.identity
    step = resume(folder, trained_with, **state)
    if args.init and step == 0:
        model.backbone.load_state_dict(load_backbone(args.init, args.arch).state_dict())
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_per_epoch), steps, step)
    network = data_parallel(model, device)
    if args.compile:
        network = torch.compile(network)

    # Steps
    loader = step_loader(pairs, args.batch_size // 2, step, steps, args.workers, rank, world)
    clips = pairs.clips * args.batch_size
    with Progress(folder, step, steps, steps_per_epoch, clips, args, device) as progress:
        for step, batch in progress.batches(loader):
            batch = to_device(batch, device)
            optimizer.zero_grad()
            if args.accumulate > 1:
                terms, accuracies = accumulate(network, batch, args, scaler)
                loss = sum(terms.values())
            else:
                with autocast(args.amp, device):
                    out = network(batch["clips"])                           # (B, n, 3, T, H, W)
                keys = gather_keys(out, batch)
                terms = objective(out, batch, keys, args.lam)
                loss = sum(terms.values())                                  # Table 1: plain sums
                scaler.scale(loss).backward()
                accuracies = scores(out, batch, keys)
            scaled = step_scaled(scaler, optimizer, loss)
            lr = schedule.get_last_lr()[0]
            progress.log(step, lr, loss=loss, **terms, **accuracies, **scaled)
            schedule.step()

            if progress.save_due(step):
                check_finite(model, step)
                save_backbone(folder / "backbone.pt", model, args)
                save(folder, trained_with, step, **state)
            if args.keep_every and step % args.keep_every == 0 and rank == 0:
                save_backbone(folder / f"backbone-{step}.pt", model, args)


def save_backbone(file, model, args):
    """F alone, with the run's arguments, for the evaluations."""
    save_file(file, arch=args.arch, backbone=model.backbone.state_dict(), args=vars(args))


def next_command(args):
    """What to type next: the linear probe, or neighbours if own videos have no classes to test."""
    words, own = ["linear_probe.py"], args.dataset in ("kinetics400", "folder")
    train, test = own_parts(Path(args.data)) if own else ("", "")
    if own and not (test and len(subfolders(Path(args.data, train))) > 1):
        folder = os.path.join(".", args.data)                   # "train" would be a part
        words = ["retrieval.py", "--gallery", folder, "--query", folder]
    elif (args.dataset, args.data) != ("toy", "toy-videos"):
        words += ["--dataset", args.dataset, "--data", args.data]
    if args.split != 1:
        words += ["--split", str(args.split)]
    for name in ("annotations", "index"):
        if getattr(args, name):
            words += [f"--{name}", getattr(args, name)]
    return f"python {shlex.join(words)} --checkpoint {shlex.quote(args.out)}/backbone.pt"


def main(argv=None):
    args = parse_args(argv)
    _, device = init_distributed()
    try_flags(args, device)
    torch.manual_seed(args.seed)
    with locked(Path(args.out)):
        train(args, on_rank0(prepare, args), device)
    print(f"next: {next_command(args)}")


if __name__ == "__main__":
    run(main)
