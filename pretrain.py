"""Pre-train a time-equivariant video representation (Jenni & Jin, ICCV 2021) on unlabelled videos.

    python pretrain.py                                                          # the toy set, on a CPU
    torchrun --nproc_per_node=8 pretrain.py --arch r3d18 --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist

Writes OUT/log.jsonl, OUT/checkpoint.pt (started again with the same OUT, it goes on from there) and OUT/backbone.pt.
"""
import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common.checkpoints import resume, save, save_checkpoint, step_scaled, warmup_cosine
from common.files import check_writable
from common.flags import AMP, optimisation_flags, parse_and_check, pretraining_parser
from common.judging import average_crops
from common.processes import all_gather, init_distributed, on_first, run, share_buffers
from common.progress import Progress
from common.splits import list_and_scan, sources, usable
from data import Pairs, Windows, augmented, step_loader
from losses import loss_distinct, loss_equi, loss_inst
from models import LOSSES, TERMS, TimeEquivariant, check_clips
from retrieval import search, standardise


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
    group.add_argument("--accumulate", type=int, default=1, metavar="N",
                       help="cut the batch into N parts, with the gradient of the whole (Eq. 2: keys get none)")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm over all processes (paper silent)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--tensorboard", action="store_true", help="curves in OUT as well (pip install tensorboard)")
    group.add_argument("--knn-every", type=int, default=0, metavar="EPOCHS",
                       help="1-NN accuracy among training videos every so many epochs, by their labels; 0: never")
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


def prepare(args):
    """The training videos: list, frame counts, and which of them can be used -> Split, paths, index."""
    split, index = list_and_scan(args, args.split, "train")
    if args.knn_every and not split.classes:
        raise ValueError(f"--knn-every needs labels, which {split.title} lacks")
    paths, report = usable(split, index, args.speeds[0] * (args.frames - 1) + 1)    # what the slowest clip takes
    print(report, file=sys.stderr)
    return split, paths, index


def gather_keys(out, batch):
    """The keys of Eq. 1 and Eq. 3 over all processes: for each contrastive term (features, video ids, pq or p)."""
    keys = {}
    if "phi" in out:
        keys["inst"] = all_gather(*clips_as_rows(out["phi"], batch["video"]))
    if "psi" in out:
        keys["equi"] = all_gather(out["psi"], batch["video"], batch["pq"])
    if "chi" in out:
        chi, i, clip = clips_as_rows(out["chi"], batch["video"])
        keys["distinct"] = all_gather(chi, i, clip % 2, clip // 2)              # τ: p q p q ..., σ: 0 0 1 1 ...
    return keys


def clips_as_rows(x, i):
    """x (B, n, D) of n clips of videos i, one row a clip -> (nB, D), i of each 0 0 1 1 ..., its clip 0 1 0 1 ..."""
    n = x.shape[1]
    return x.flatten(0, 1), i.repeat_interleave(n), torch.arange(n, device=i.device).repeat(len(i))


def objective(out, batch, keys, lam):
    """L = L_inst + L_equi + L_speed + L_direction + L_order, term by term (Table 1; a row passes fewer terms).

    -> terms {name: scalar}, scores {name: scalar, or the labels' shares}: what the heads get right, and by chance.
    """
    terms, scores = {}, {}
    if "phi" in out:
        phi, i, p = clips_as_rows(out["phi"], batch["video"])                   # (2B, D), (2B,), (2B,)
        terms["inst"] = loss_inst(phi, i, p, keys["inst"], lam)                 # Eq. 3
        phi_j, j, r = keys["inst"]
        same_i, same_p = i[:, None] == j, p[:, None] == r                       # (2B, M)
        scores["phi_nearest"], scores["phi_chance"] = nearest(phi, phi_j, ~(same_i & same_p), same_i)
    if "psi" in out:
        psi, i, pq = out["psi"], batch["video"], batch["pq"]                    # (B, D), (B,), (B,)
        terms["equi"] = loss_equi(psi, i, pq, keys["equi"], lam)                # Eq. 1
        psi_k, k, rs = keys["equi"]
        scores["psi_nearest"], scores["psi_chance"] = nearest(psi, psi_k, i[:, None] != k, pq[:, None] == rs)
    if "chi" in out:
        chi, i, clip = clips_as_rows(out["chi"], batch["video"])                # (4B, D), (4B,), (4B,)
        terms["distinct"] = loss_distinct(chi, i, clip % 2, clip // 2, keys["distinct"], lam)   # Fig. 5
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


def knn_accuracy(backbone, split, paths, index, args, device, most=2000):
    """1-NN accuracy (Table 1) among up to `most` training videos, so that a bad run is seen early; a video's own source
    (UCF101's group) does not count as a neighbour. -> accuracy, accuracy of always naming the most frequent class."""
    paths = paths[::-(-len(paths) // most)]
    label = dict(zip(split.paths, split.labels))
    windows = Windows(replace(split, paths=paths), index, args.frames, args.size, windows=1)
    share_buffers(backbone.eval())
    x, failed = average_crops(backbone, windows, args.size, "centre", device, args.amp, args.workers, title="k-NN")
    backbone.train()
    read = [n for n in range(len(paths)) if n not in failed]
    source = sources(args.dataset, paths)
    ids = torch.tensor([[label[paths[n]] for n in read], [source.index(source[n]) for n in read]])  # class, source
    x, _ = standardise(x[read], x[read])
    ranks, *_ = search(x, x, ids, ids, k=1)
    return (ranks == 0).double().mean().item(), (ids[0].bincount().max() / len(read)).item()


def split_batch(batch, n):
    """n equal parts of a batch, along the videos -> list of dicts."""
    parts = {name: value.chunk(n) for name, value in batch.items()}
    return [{name: part[k] for name, part in parts.items()} for k in range(n)]


def forward_backward(network, batch, n, lam, autocast=contextlib.nullcontext(), scaler=None):
    """The gradient of one batch, cut into n parts: first the keys of all parts, then each part against all keys.

    That is the whole batch's gradient, since Eq. 2 stops it at the keys (BatchNorm aside, which sees the parts).
    -> {name: mean over the parts}: loss, terms, scores. ValueError: what the losses refuse, on a CPU.
    """
    parts, keys, values = split_batch(batch, n), None, {}
    if n > 1:
        with torch.no_grad(), autocast:
            outs = [network(augmented(part)) for part in parts]
        keys = gather_keys({name: torch.cat([out[name] for out in outs]) for name in outs[0]}, batch)
    for k, part in enumerate(parts):
        wait = k < n - 1 and dist.is_initialized()                              # DDP averages the gradients once
        with network.no_sync() if wait else contextlib.nullcontext():
            with autocast:
                out = network(augmented(part))                                  # clips (B, 2, 3, T, H, W) -> dict
            terms, scores = objective(out, part, keys or gather_keys(out, part), lam)
            loss = sum(terms.values())                                          # Table 1: plain sums
            (scaler.scale(loss / n) if scaler else loss / n).backward()
        for name, value in dict(loss=loss, **terms, **scores).items():
            values[name] = values.get(name, 0) + value.detach() / n
    return values


def main(argv=None):
    args = parse_args(argv)

    # Distributed
    rank, world, device = init_distributed()
    unit = 2 * world * args.accumulate
    if args.batch_size % unit:
        raise ValueError(f"--batch-size {args.batch_size} does not split into groups of two videos on {world} "
                         f"process(es) in {args.accumulate} part(s): give a multiple of {unit}")
    out = Path(args.out)
    if rank == 0:
        check_writable(out=out / "checkpoint.pt")
    torch.manual_seed(args.seed)

    # Data
    split, paths, index = on_first(prepare, args)
    if args.batch_size > len(paths):
        raise ValueError(f"--batch-size {args.batch_size} is larger than the {len(paths)} usable videos")
    pairs = Pairs(split, paths, index, args.frames, args.size, args.speeds, args.seed, args.equivariance,
                  clips=4 if "distinct" in args.losses else 2)
    steps_an_epoch = len(pairs) // (args.batch_size // 2)
    steps = args.epochs * steps_an_epoch

    # Model and optimiser
    model = TimeEquivariant(args.arch, args.losses, len(args.speeds)).to(device, memory_format=torch.channels_last_3d)
    if args.sync_bn and device.type == "cpu":
        raise ValueError("--sync-bn needs GPUs: torch has no SyncBatchNorm for CPUs")
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_an_epoch), steps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off")

    # Go on from a checkpoint
    step = resume(out, args, world, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler)
    if rank == 0:
        print(f"{out}: {'goes on' if step else 'starts'} at step {step} of {steps} ({args.epochs} epochs of "
              f"{steps_an_epoch} steps) on {world} {device.type} process(es); {vars(args)}", file=sys.stderr)
    network = model
    if dist.is_initialized():
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    if args.compile:
        network = torch.compile(network)

    # Train
    batches = iter(step_loader(pairs, args.batch_size // 2, step, steps, args.workers, rank, world))
    progress = Progress(out, pairs.files, step, steps, steps_an_epoch, pairs.clips * args.batch_size, args, device)
    while step < steps:
        batch = progress.wait_for(batches)
        seeds = batch.pop("seed")                                               # (B, n), used on the CPU
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()} | dict(seed=seeds)
        optimizer.zero_grad()
        try:
            values = forward_backward(network, batch, args.accumulate, args.lam, autocast, scaler)
        except ValueError as error:
            raise progress.failed(step + 1, error) from None
        values |= step_scaled(scaler, optimizer, values["loss"])
        lr = schedule.get_last_lr()[0]
        schedule.step()
        step += 1
        leave = progress.done(step, lr, **values)

        if progress.saves(step, leave):
            save(out, args, world, step, model=model, optimizer=optimizer, schedule=schedule, scaler=scaler)
            save_checkpoint(out / "backbone.pt", arch=args.arch, backbone=model.backbone.state_dict(), args=vars(args))
        if args.knn_every and step % (args.knn_every * steps_an_epoch) == 0:
            accuracy, chance = knn_accuracy(model.backbone, split, paths, index, args, device)
            if rank == 0:
                progress.log(step, knn=accuracy, knn_chance=chance)
        if leave:
            progress.leave(step, leave)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
