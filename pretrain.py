"""Pre-train a time-equivariant video representation (Jenni & Jin, ICCV 2021) on unlabelled videos.

    python pretrain.py                                                          # the toy set, on a CPU
    torchrun --nproc_per_node=8 pretrain.py --arch r3d18 --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist

Writes OUT/log.jsonl, OUT/checkpoint.pt (started again with the same OUT, it goes on from there) and OUT/backbone.pt.
"""
import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import (all_gather, gather_objects, init_distributed, load_checkpoint, log_json, mean_over_processes, on_first,
                    peak_memory, run, save_checkpoint, warmup_cosine)
from data import MAX_BAD, Pairs, colour, load_split, make_toy, pair_loader, scan, usable
from losses import loss_equi, loss_inst
from models import BACKBONES, TimeEquivariant

LOSSES = ("inst", "equi", "speed", "direction", "order")
DATASETS = ("toy", "ucf101", "hmdb51", "diving48", "diving48v1", "kinetics400", "folder")


def paper_defaults(dataset, arch):
    """Sec. 3.4, 4.1 and 4.2: what the paper trains with, by data set and backbone; for toy, what suits two CPU cores."""
    if dataset == "toy":
        return dict(epochs=60, batch_size=24, frames=8, size=32, lr=2e-3, warmup_epochs=4)
    kinetics = {"r3d18": 512, "r3d18_tv": 512, "s3dg": 256, "r2plus1d18": 192}  # Sec. 4.2: batch sizes fit the memory
    return dict(
        epochs=200 if dataset == "kinetics400" else 400,                        # Sec. 4.2 | 4.1
        batch_size=kinetics.get(arch, 512) if dataset == "kinetics400" else 192,
        frames=32 if arch == "s3dg" else 16,                                    # Table 2 | Sec. 3.4
        size=112 if arch == "r2plus1d18" or dataset.startswith("diving48") else 128,    # Table 2; Diving48: paper silent
        lr=3e-4, warmup_epochs=10)                                              # Sec. 3.4; warm-up: paper silent


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="toy", help="default toy: generated on first use")
    group.add_argument("--data", help="folder of the videos (default for toy: toy-videos)")
    group.add_argument("--annotations", help="folder of the official lists (default: beside the videos)")
    group.add_argument("--split", type=int, default=1, choices=(1, 2, 3), help="official split; default 1 (Sec. 4)")
    group.add_argument("--index", help="file that remembers frame counts (default: in ~/.cache)")
    group.add_argument("--workers", type=int, help="loader processes (default: this process's share of the cores)")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=BACKBONES, help="default r3d18, for toy r3d18_narrow (Sec. 3.4)")
    group.add_argument("--frames", type=int, help="frames a clip T; default 16, s3dg 32, toy 8 (Sec. 3.4, Table 2)")
    group.add_argument("--size", type=int, help="pixels a side; default 128, r2plus1d18 112, toy 32 (Sec. 3.4, Table 2)")
    group = parser.add_argument_group("objective")
    group.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES, metavar="TERM",
                       help=f"terms of the sum, of {' '.join(LOSSES)}; default all (Table 1 e-o)")
    group.add_argument("--equivariance", choices=("temporal", "spatial", "both"), default="temporal",
                       help="what the two videos of a group share; default temporal (Table 1 b-d)")
    group.add_argument("--speeds", type=int, nargs="+", default=(1, 2, 4, 8), metavar="S",
                       help="playback speeds; default 1 2 4 8 (Sec. 3.2)")
    group.add_argument("--lam", type=float, default=0.1, help="temperature λ; default 0.1 (Eq. 2)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="default 400, kinetics400 200 (Sec. 4.1, 4.2)")
    group.add_argument("--batch-size", type=int,
                       help="videos over all processes; default 192, kinetics400 512/256/192 by backbone (Sec. 4)")
    group.add_argument("--lr", type=float, help="peak learning rate; default 3e-4 (Sec. 3.4)")
    group.add_argument("--weight-decay", type=float, default=1e-4, help="default 1e-4 (Sec. 3.4)")
    group.add_argument("--warmup-epochs", type=float, help="default 10 (paper silent)")
    group.add_argument("--amp", choices=("bf16", "fp16", "off"), help="default bf16 on a GPU, else off (paper silent)")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm over all processes (paper silent)")
    group.add_argument("--compile", action="store_true", help="torch.compile the model")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="default 0")
    group.add_argument("--out", help="default runs/DATASET-ARCH")
    group.add_argument("--log-every", type=int, default=10, help="steps between lines of the log; default 10")
    args = parser.parse_args(argv)

    args.arch = args.arch or ("r3d18_narrow" if args.dataset == "toy" else "r3d18")
    for name, value in paper_defaults(args.dataset, args.arch).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data is None:
        if args.dataset != "toy":
            parser.error(f"--dataset {args.dataset} needs --data, the folder of its videos")
        args.data = "toy-videos"
    args.losses, args.speeds = sorted(set(args.losses), key=LOSSES.index), sorted(set(args.speeds))
    if args.workers is None:
        args.workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    args.amp = args.amp or ("bf16" if torch.cuda.is_available() else "off")
    args.out = args.out or f"runs/{args.dataset}-{args.arch}"
    for name, least in dict(epochs=1, frames=2, size=8, batch_size=4, workers=0, warmup_epochs=0, log_every=1).items():
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, but is {getattr(args, name)}")
    if args.speeds[0] < 1 or args.speeds[-1] > 1023:
        parser.error("--speeds must lie between 1 and 1023 source frames a step")
    if not args.lam > 0 or not args.lr > 0:
        parser.error("--lam and --lr must be above 0")
    if args.equivariance == "spatial" and set(args.losses) - {"inst", "equi"}:
        parser.error("--equivariance spatial gives both clips one temporal transformation, so it goes with "
                     "--losses inst equi only (Table 1 b)")
    return args


def prepare(args):
    """The training videos: list, frame counts, and which of them can be used -> Split, paths, index."""
    if args.dataset == "toy":
        make_toy(args.data)
    split = load_split(args.dataset, args.data, args.annotations, args.split)
    index = scan(split, args.index, max(1, args.workers))
    paths, report = usable(split, index, args.frames)
    print(report, file=sys.stderr)
    return split, paths, index


def gather_keys(out, batch):
    """The keys of Eq. 1 and Eq. 3 over all processes: for each contrastive term (features, video ids, pq or p)."""
    keys = {}
    if "phi" in out:
        keys["inst"] = all_gather(*clips_as_rows(out, batch))
    if "psi" in out:
        keys["equi"] = all_gather(out["psi"], batch["video"], batch["pq"])
    return keys


def clips_as_rows(out, batch):
    """φ_i^p with its i and p, one row a clip: (2B, D), (2B,) 0 0 1 1 ..., (2B,) 0 1 0 1 ..."""
    i = batch["video"]
    return out["phi"].flatten(0, 1), i.repeat_interleave(2), torch.arange(2, device=i.device).repeat(len(i))


def objective(out, batch, keys, lam):
    """L = L_inst + L_equi + L_speed + L_direction + L_order, term by term (Table 1; a row passes fewer terms).

    -> terms {name: scalar}, scores {name: scalar or the labels' shares}: what the heads get right, and chance beside it.
    """
    terms, scores = {}, {}
    if "phi" in out:
        phi, i, p = clips_as_rows(out, batch)                                   # (2B, D), (2B,), (2B,)
        terms["inst"] = loss_inst(phi, i, p, keys["inst"], lam)                 # Eq. 3
        phi_j, j, r = keys["inst"]
        same_i, same_p = i[:, None] == j, p[:, None] == r                       # (2B, M)
        scores["phi_nearest"], scores["phi_chance"] = nearest(phi, phi_j, ~(same_i & same_p), same_i)
    if "psi" in out:
        psi, i, pq = out["psi"], batch["video"], batch["pq"]                    # (B, D), (B,), (B,)
        terms["equi"] = loss_equi(psi, i, pq, keys["equi"], lam)                # Eq. 1
        psi_k, k, rs = keys["equi"]
        scores["psi_nearest"], scores["psi_chance"] = nearest(psi, psi_k, i[:, None] != k, pq[:, None] == rs)
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


def check_same_run(state, args, world):
    """Refuse to go on where the rest would not be what an uninterrupted run does. ValueError names the difference."""
    free = {"data", "annotations", "index", "workers", "compile", "out", "log_every"}
    was, now = ({name: value for name, value in run.items() if name not in free}
                for run in (state["args"] | {"processes": state["world"]}, vars(args) | {"processes": world}))
    changed = [f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name]]
    if changed:
        raise ValueError(f"{args.out} holds another run's checkpoint ({', '.join(changed)}; BatchNorm makes the number "
                         f"of processes matter): give another --out, or the same arguments and processes")


def keep_log_until(file, step):
    """Drop the log's lines after `step`: the steps that an interrupted run did not save are done again."""
    lines = file.read_text().splitlines() if file.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    file.write_text("".join(f"{line}\n" for line in kept))


def main(argv=None):
    args = parse_args(argv)

    # Distributed
    rank, world, device = init_distributed()
    if args.batch_size % (2 * world):
        raise ValueError(f"--batch-size {args.batch_size} does not split into groups of two videos on {world} "
                         f"process(es): give a multiple of {2 * world}")
    torch.manual_seed(args.seed)

    # Data
    split, paths, index = on_first(prepare, args)
    if args.batch_size > len(paths):
        raise ValueError(f"--batch-size {args.batch_size} is larger than the {len(paths)} usable videos")
    pairs = Pairs(split, paths, index, args.frames, args.size, args.speeds, args.seed, args.equivariance)
    steps_an_epoch = len(pairs) // (args.batch_size // 2)
    steps = args.epochs * steps_an_epoch

    # Model and optimiser
    model = TimeEquivariant(args.arch, args.losses, len(args.speeds)).to(device, memory_format=torch.channels_last_3d)
    if args.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_an_epoch), steps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = torch.autocast(device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16,
                              enabled=args.amp != "off")

    # Go on from a checkpoint
    out, step = Path(args.out), 0
    state = load_checkpoint(out / "checkpoint.pt")
    if state:
        check_same_run(state, args, world)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        step = state["step"]
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        keep_log_until(out / "log.jsonl", step)
        print(f"{out}: {'goes on at' if state else 'starts at'} step {step} of {steps} ({args.epochs} epochs of "
              f"{steps_an_epoch} steps) on {world} {device.type} process(es); {vars(args)}", file=sys.stderr)
    network = model
    if dist.is_initialized():
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    if args.compile:
        network = torch.compile(network)

    # Train
    batches = iter(pair_loader(pairs, args.batch_size, step, steps, args.workers, rank, world))
    bar = tqdm(total=steps, initial=step, unit="step", disable=rank > 0)
    sums, count, waited, since, begun, first = defaultdict(float), 0, 0.0, time.perf_counter(), time.perf_counter(), step
    unread, failed = {}, set()
    while step < steps:
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        unread.update(batch.pop("failed"))
        seeds = batch.pop("seed").flatten().tolist()                            # (2B,) one a clip, kept off the GPU
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        clips = colour(batch.pop("clips").flatten(0, 1), seeds)                 # (2B, 3, T, H, W)
        with autocast:
            features = network(clips.unflatten(0, (-1, 2)))                     # (B, 2, 3, T, H, W) -> dict
        terms, scores = objective(features, batch, gather_keys(features, batch), args.lam)
        loss = sum(terms.values())                                              # Table 1: plain sums

        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        step, count = step + 1, count + 1
        for name, value in dict(loss=loss, **terms, **scores).items():
            sums[name] = sums[name] + value.detach()                            # no synchronisation until the log

        bar.update()
        if step % args.log_every == 0 or step == steps:
            values = mean_over_processes({name: total / count for name, total in sums.items()})
            for task in {"speed", "direction", "order"} & set(terms):
                values[f"{task}_chance"] = max(values.pop(f"{task}_shares"))    # always the most frequent class
            now = time.perf_counter()
            values |= dict(lr=lr, clips_per_s=2 * args.batch_size * count / (now - since),
                           waiting_for_data=waited / (now - since), left_s=(now - begun) / (step - first) * (steps - step),
                           peak_memory_gb=peak_memory(device))
            unread = {name: problem for part in gather_objects(unread) for name, problem in part.items()}
            if rank == 0:
                log_json(out / "log.jsonl", step=step, epoch=step / steps_an_epoch, **values)
                bar.set_postfix({name: f"{values[name]:.3g}" for name in ("loss", *terms, "clips_per_s",
                                                                          "waiting_for_data")})
                for name in unread.keys() - failed:
                    bar.write(f"replaced an unreadable video: {unread[name]}", sys.stderr)
                    log_json(out / "log.jsonl", step=step, unreadable=name, problem=unread[name])
            failed |= unread.keys()
            if len(failed) > MAX_BAD * len(paths):
                raise ValueError(f"{len(failed)} of {len(paths)} videos turned out to be unreadable, more than "
                                 f"{MAX_BAD:.0%}: see {out / 'log.jsonl'}")
            sums, count, waited, since, unread = defaultdict(float), 0, 0.0, now, {}

        if step % steps_an_epoch == 0 and rank == 0:
            save_checkpoint(out / "checkpoint.pt", model=model.state_dict(), optimizer=optimizer.state_dict(),
                            schedule=schedule.state_dict(), scaler=scaler.state_dict(), rng=torch.get_rng_state(),
                            step=step, args=vars(args), world=world)
            save_checkpoint(out / "backbone.pt", arch=args.arch, backbone=model.backbone.state_dict(), args=vars(args))
    bar.close()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
