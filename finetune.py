"""Fine-tune all layers for action recognition (Tables 1, 2 and 4, "Finetune"), and test with multiple crops.

    python finetune.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    torchrun --nproc_per_node=4 finetune.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist \\
        --checkpoint BACKBONE                                                   # or: --checkpoint random
    python finetune.py --dataset diving48 --data Diving48 --step 1 --checkpoint BACKBONE    # Table 4, V2, 1x
    python finetune.py --predict MY_VIDEOS --checkpoint OUT/finetune-ucf101-4x-1/checkpoint.pt

A new linear layer on F(x); the last epoch is tested, never the best on the test set. Writes
OUT/finetune-DATASET-STEPx.json, OUT/finetune-DATASET-STEPx-predictions.jsonl (a line a test video) and, for each split,
OUT/finetune-DATASET-STEPx-SPLIT/checkpoint.pt, from which the same command goes on. A test video that cannot be read
counts as wrong and is named. --predict classifies all videos below a folder, with the classes and clips of the
training, and writes OUT/predictions.jsonl.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from common.checkpoints import resume, save, warmup_cosine
from common.files import check_writable, write_json_lines
from common.flags import judging_parser, known_flags, optimisation_flags, parse_and_check
from common.judging import (average_crops, count_videos, counts_sentence, load_for_judging, most_frequent, per_class,
                            predictions, result_folder, scan_parts, write_accuracy)
from common.precision import autocast, on_device, step_scaled
from common.processes import data_parallel, init_distributed, locked, on_first, run, share_buffers
from common.progress import Progress
from common.splits import check_parts, scan_folder, unreadable, usable
from data import Clips, Windows, colour, step_loader
from models import classifier, fill, new_backbone, plain_key, read_weights


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
    group.add_argument("--predict", metavar="FOLDER", help="only classify the videos below a folder, with a "
                       "checkpoint.pt of this script, whose --frames, --size and --step hold")
    parser.set_defaults(**finetune_defaults(known_flags(parser, argv).dataset))
    return parse_and_check(parser, argv)


def check_batch_size(args, world):
    """Each process gets as many videos as the others, and the two that BatchNorm needs."""
    if args.batch_size % world:
        raise ValueError(f"--batch-size {args.batch_size} does not split over {world} processes")
    if args.batch_size < 2 * world:
        raise ValueError(f"--batch-size {args.batch_size} gives {world} process(es) fewer than two videos each, which "
                         "BatchNorm needs")


def training_clips(args, split, index, rank):
    """The training videos of a split that can be used -> Clips."""
    paths, report = usable(split, index, T=1)                                   # short videos repeat their last frame
    if args.batch_size > len(paths):
        raise ValueError(f"--batch-size {args.batch_size} is larger than the {len(paths)} usable videos ({report})")
    if rank == 0:
        print(report, file=sys.stderr)
    return Clips(split, paths, index, args.frames, args.size, args.step, args.seed)


def train(network, clips, args, rank, world, device):
    """Fine-tune on the training clips of a split, or go on doing so, to the weights of the last epoch."""
    out, steps_an_epoch = Path(args.out), len(clips) // args.batch_size
    steps = args.epochs * steps_an_epoch
    optimizer = AdamW(network.parameters(), args.lr, weight_decay=args.weight_decay, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = dict(model=network, optimizer=optimizer, scaler=scaler)
    step = resume(out, args, world, **state)
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_an_epoch), steps, step)
    if args.test and step < steps:
        raise ValueError(f"--test: {out} holds {f'step {step} of {steps}' if step else 'no checkpoint'}: train first")
    if step == steps:
        return

    model = data_parallel(network, device)
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
        values = dict(loss=loss, train_acc=(logits.argmax(1) == label).float().mean())
        progress.done(step, schedule.get_last_lr()[0], **values, **step_scaled(scaler, optimizer, loss))
        schedule.step()
        if progress.saves(step):
            save(out, args, world, step, **state)
    if step < steps:                                                            # asked to stop
        if rank == 0:
            save(out, args, world, step, **state)
        progress.leave(step)


def probabilities(network, split, index, args, device):
    """Sec. 3.4: averaged over windows and crops -> float32 (V, classes), NaN where a video failed, {path: problem}."""
    share_buffers(network)
    windows = Windows(split, index, args.frames, args.size, args.step, args.windows)
    scores, failed = average_crops(network.eval(), windows, args.size, args.crops, device, args.amp, args.workers,
                                   softmax=True, title=split.title)
    return scores.numpy(), {split.paths[v]: problem for v, problem in failed.items()}


def test(network, split, index, args, device):
    """The class of highest probability; a failed video is wrong -> dict for the result, rows of predictions."""
    scores, failed = probabilities(network, split, index, args, device)
    right = scores.argmax(axis=1) == np.array(split.labels)                     # (V,)
    right[[path in failed for path in split.paths]] = False
    result = dict(test=count_videos(split, failed), top1=float(right.mean()), chance=most_frequent(split),
                  per_class=per_class(split, right))
    return result, predictions(split, scores, failed, split.classes, "probabilities", split=args.split)


def run_split(args, number, training, testing, rank, world, device):
    """Fine-tune and test on one official split -> F, dict for the result, rows of predictions."""
    backbone, classes = load_for_judging(args), training[0].classes
    out = result_folder(args, args.checkpoint, args.arch) / f"finetune-{args.dataset}-{args.step}x-{number}"
    this = argparse.Namespace(**vars(args) | dict(split=number, checkpoint=backbone.sha256, out=str(out),
                                                  classes=classes))             # what --predict needs to know
    network = on_device(classifier(backbone, len(classes)), device)
    with locked(out):
        train(network, training_clips(this, *training, rank), this, rank, world, device)
        result, rows = test(network, *testing, this, device)
    result |= dict(split=number, train=count_videos(training[0], unreadable(*training)))
    return backbone, result, rows


def random_result(args, name):
    """{"random": top-1} of the same command with --checkpoint random, if that was run with its own --out."""
    free = {"data", "annotations", "index", "workers", "amp", "log_every", "save_every", "test", "out", "checkpoint"}
    file = result_folder(argparse.Namespace(out=None), "random", args.arch) / f"{name}.json"
    if args.checkpoint == "random" or not file.is_file():
        return {}
    result = json.loads(file.read_text())
    same = all(result["protocol"].get(key) == value for key, value in vars(args).items() if key not in free)
    return {"random": result["top1"]["random"]} if same else {}


def load_classifier(file):
    """What a checkpoint.pt of this script holds -> F and its linear layer, in eval mode; the arguments of training."""
    state, trained, arch = read_weights(file)
    if "classes" not in trained:
        raise ValueError(f"{file} names no classes: --predict takes a checkpoint.pt that finetune.py wrote")
    network = classifier(new_backbone(arch), len(trained["classes"]))
    fill(network, {plain_key(key): value for key, value in state.items()}, file, f"a classifier on {arch}")
    return network.eval(), argparse.Namespace(**trained)


def predict(args, rank, device):
    """Classify all videos below a folder with what was trained; writes OUT/predictions.jsonl."""
    network, trained = load_classifier(args.checkpoint)
    network.to(device, memory_format=torch.channels_last_3d)
    args.frames, args.size, args.step = trained.frames, trained.size, trained.step
    print(f"{args.checkpoint}: {len(trained.classes)} classes; as in training, clips of {args.frames} frames, "
          f"{args.step} source frames a step, {args.size} pixels")
    file = result_folder(args, args.checkpoint, trained.arch) / "predictions.jsonl"
    if rank == 0:
        check_writable(out=file)

    split, index = on_first(scan_folder, args.predict, args)
    scores, failed = probabilities(network, split, index, args, device)
    if rank:
        return
    rows = predictions(split, scores, failed, trained.classes, "probabilities")
    write_json_lines(file, rows)
    print(counts_sentence(count_videos(split, failed), "have no prediction"))
    found = Counter(row["predicted"] for row in rows if row["predicted"])
    print(f"most frequent: {', '.join(f'{name} ({count})' for name, count in found.most_common(5))} ({file})")


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = init_distributed()
    if args.predict:
        predict(args, rank, device)
        return
    if not args.test:
        check_batch_size(args, world)
    scanned = scan_parts(args, ("train", "test"))
    for (training, _), (testing, _) in scanned:
        check_parts(training, testing)

    # Train and test, split after split
    name, results, rows = f"finetune-{args.dataset}-{args.step}x", [], []
    for number, (training, testing) in zip(args.split, scanned):
        backbone, result, predicted = run_split(args, number, training, testing, rank, world, device)
        results.append(result)
        rows += predicted
    if rank:
        return

    row = "random" if args.checkpoint == "random" else "checkpoint"
    top1 = {row: float(np.mean([result["top1"] for result in results]))} | random_result(args, name)
    write_accuracy(args, "fine-tuned", name, backbone, None, top1, results, rows)


if __name__ == "__main__":
    run(main)
