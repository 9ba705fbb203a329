"""Fine-tune all layers for action recognition (Tables 1, 2 and 4, "Finetune"), and test with multiple crops.

    python finetune.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    torchrun --nproc_per_node=4 finetune.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist \\
        --checkpoint BACKBONE                                                   # or: --checkpoint random
    python finetune.py --dataset diving48 --data Diving48 --step 1 --checkpoint BACKBONE    # Table 4, V2, 1x

A new linear layer on F(x); the last epoch is tested, never the best on the test set. Writes
OUT/finetune-DATASET-STEPx.json and, for each split, OUT/finetune-DATASET-STEPx-SPLIT/checkpoint.pt, from which the
same command goes on. A test video that cannot be read counts as wrong and is named.
"""
import argparse
import json
import sys

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common.checkpoints import resume, save, warmup_cosine
from common.files import check_writable
from common.flags import judging_parser, known_flags, optimisation_flags, parse_and_check
from common.judging import (average_crops, default_out, in_words, judged, load_for_judging, most_frequent, told,
                            write_result)
from common.precision import autocast, mend_bf16_on_cpus, step_scaled
from common.processes import init_distributed, on_first, run, share_buffers
from common.progress import Progress
from common.splits import check_parts, list_and_scan, unreadable, usable
from data import Clips, Windows, colour, step_loader
from models import classifier


def finetune_defaults(dataset):
    """Sec. 3.4 and 4.2; for toy, what suits two CPU cores."""
    if dataset == "toy":
        return dict(epochs=15, batch_size=16, lr=1e-3, warmup_epochs=1)
    # paper silent: 100 epochs on all but UCF101 and HMDB51, warm-up
    return dict(epochs=200 if dataset == "hmdb51" else 100, batch_size=32, lr=1e-4, warmup_epochs=5)


def parse_args(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = judging_parser(__doc__, argv, crops="ten")
    group = optimisation_flags(parser)
    group.add_argument("--test", action="store_true", help="only test what OUT holds, on any number of processes")
    parser.set_defaults(**finetune_defaults(known_flags(parser, argv).dataset))
    return parse_and_check(parser, argv)


def train(network, split, index, args, out, rank, world, device):
    """Fine-tune on the training videos of a split, or go on doing so, to the weights of the last epoch."""
    paths, report = usable(split, index, T=1)                                   # short videos repeat their last frame
    clips = Clips(split, paths, index, args.frames, args.size, args.step, args.seed)
    steps_an_epoch = len(clips) // args.batch_size
    if steps_an_epoch == 0:
        raise ValueError(f"--batch-size {args.batch_size} is larger than the {len(clips)} usable videos")
    steps = args.epochs * steps_an_epoch
    optimizer = torch.optim.AdamW(network.parameters(), args.lr, weight_decay=args.weight_decay,
                                  fused=device.type == "cuda")
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_an_epoch), steps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    if rank == 0:
        check_writable(out=out / "checkpoint.pt")
    parts = dict(model=network, optimizer=optimizer, schedule=schedule, scaler=scaler)
    step = resume(out, args, world, **parts)
    if args.test and step < steps:
        raise ValueError(f"--test: {out} holds {f'step {step} of {steps}' if step else 'no checkpoint'}: train first")
    if rank == 0:
        print(report, file=sys.stderr)
    if step == steps:
        return
    model = network
    if device.type == "cpu":
        mend_bf16_on_cpus(network)
    if dist.is_initialized():
        model = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None,
                                        broadcast_buffers=False)                # statistics: see share_buffers
    model.train()
    loaded = step_loader(clips, args.batch_size, step, steps, args.workers, rank, world)
    progress = Progress(out, clips.files, step, steps, steps_an_epoch, args.batch_size, args, device)
    for step, batch in progress.batches(loaded):
        label = batch["label"].to(device, non_blocking=True)                    # (B,)
        x = colour(batch["clips"].to(device, non_blocking=True), batch["seed"].tolist())    # (B, 3, T, H, W)
        with autocast(args.amp, device):
            logits = model(x).float()                                           # (B, classes)
        loss = F.cross_entropy(logits, label)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaled = step_scaled(scaler, optimizer, loss)
        accuracy = (logits.argmax(1) == label).float().mean()
        progress.done(step, schedule.get_last_lr()[0], loss=loss, train_acc=accuracy, **scaled)
        schedule.step()
        if progress.saves(step):
            save(out, args, world, step, **parts)
    if step < steps:
        if rank == 0:
            save(out, args, world, step, **parts)
        progress.leave(step)


def test(network, split, index, args, device):
    """Sec. 3.4: the class of highest probability, averaged over windows and crops; a failed video is wrong -> dict."""
    share_buffers(network)
    windows = Windows(split, index, args.frames, args.size, args.step, args.windows)
    network.eval()
    scores, failed = average_crops(network, windows, args.size, args.crops, device, args.amp, args.workers,
                                   softmax=True, title=split.title)
    labels = np.array(split.labels)
    right = scores.argmax(1).numpy() == labels                                  # (V,)
    right[list(failed)] = False
    return dict(test=judged(split, None, {split.paths[v]: problem for v, problem in failed.items()}),
                top1=float(right.mean()), chance=most_frequent(split),
                per_class={split.classes[k]: float(right[labels == k].mean()) for k in np.unique(labels)})


def random_result(args, name):
    """{"random": top-1} of the same command with --checkpoint random, if that was run with its own --out."""
    free = {"data", "annotations", "index", "workers", "amp", "log_every", "save_every", "test", "out", "checkpoint"}
    file = default_out(argparse.Namespace(out=None), "random", args.arch) / f"{name}.json"
    if args.checkpoint == "random" or not file.is_file():
        return {}
    result = json.loads(file.read_text())
    same = all(result["protocol"].get(key) == value for key, value in vars(args).items() if key not in free)
    return {"random": result["top1"]["random"]} if same else {}


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()
    if args.batch_size % world and not args.test:
        raise ValueError(f"--batch-size {args.batch_size} does not split over {world} processes")
    if args.batch_size < 2 * world and not args.test:
        raise ValueError(f"--batch-size {args.batch_size} gives {world} process(es) fewer than two videos each, which "
                         "BatchNorm needs")
    splits = [[on_first(list_and_scan, args, number, part) for part in ("train", "test")] for number in args.split]
    for (train_split, _), (test_split, _) in splits:
        check_parts(train_split, test_split)
    name, results = f"finetune-{args.dataset}-{args.step}x", []
    for number, (training, testing) in zip(args.split, splits):
        backbone = load_for_judging(args)
        out = default_out(args, args.checkpoint, args.arch) / f"{name}-{number}"
        network = classifier(backbone, len(training[0].classes)).to(device, memory_format=torch.channels_last_3d)
        this = argparse.Namespace(**vars(args) | dict(split=number, checkpoint=backbone.sha256, out=str(out)))
        train(network, *training, this, out, rank, world, device)
        results.append(dict(split=number, train=judged(training[0], None, unreadable(*training)),
                            **test(network, *testing, args, device)))
    if rank == 0:
        row = "random" if args.checkpoint == "random" else "checkpoint"
        top1 = {row: float(np.mean([result["top1"] for result in results]))} | random_result(args, name)
        chance = float(np.mean([result["chance"] for result in results]))
        file = write_result(args, name, backbone, None, top1=top1, chance=chance, splits=results)
        for result in results:
            print(told(result["train"], "left out"), told(result["test"], "count as wrong"), sep="\n")
        print(f"fine-tuned on {args.dataset}, split {' '.join(map(str, args.split))}: "
              f"{in_words(top1, chance)} ({file})")


if __name__ == "__main__":
    run(main)
