"""Fine-tune all layers for action recognition, test on averaged crops (Tables 1, 2 and 4).

    python finetune.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    torchrun --nproc_per_node=4 finetune.py --dataset ucf101 --data UCF-101 \\
        --annotations ucfTrainTestlist --checkpoint BACKBONE            # or: --checkpoint random
    python finetune.py --dataset diving48 --data Diving48 --checkpoint BACKBONE     # Table 4, 1x
    python finetune.py --predict MY_VIDEOS --checkpoint OUT/finetune-ucf101-4x-1/checkpoint.pt

A new linear layer on F(x); the last epoch is tested, never the best on the test set. Writes
OUT/finetune-DATASET-STEPx.json, OUT/finetune-DATASET-STEPx-predictions.jsonl (a line per video)
and, for each split, OUT/finetune-DATASET-STEPx-SPLIT/checkpoint.pt, from which the same command
resumes. Unreadable test videos count as errors and are named. --predict classifies all videos below
a folder, with the classes and clips of the training, and writes OUT/predictions.jsonl.
"""
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import AdamW

from common import UserError, evaluation, flags, write_json
from common.distributed import (
    data_parallel,
    init_distributed,
    on_rank0,
    rank_and_world,
    run,
    share_buffers,
)
from common.splits import check_test, labelled_folder, scan, usable
from common.training import (
    Progress,
    autocast,
    check_finite,
    locked,
    resume,
    save,
    step_scaled,
    warmup_cosine,
)
from data import Clips, colour, step_loader
from models import classifier, fill, new_backbone, read_weights


def parse_args(argv=None):
    parser = flags.evaluation_parser(__doc__, crops="ten")
    parser.epilog = flags.table_of_defaults(flags.finetune_defaults)
    flags.optimisation_flags(parser).add_argument(
        "--predict", metavar="FOLDER", help="classify the videos below a folder with a "
        "checkpoint.pt of this script; --frames, --size and --step are taken from it")
    args = parser.parse_args(argv)
    if args.predict and not args.checkpoint:
        parser.error("--predict needs --checkpoint, a checkpoint.pt of this script")
    return flags.fill_defaults(parser, args, flags.finetune_defaults(args.dataset))


def training_clips(args, split):
    """The usable training videos of a split -> Clips"""
    _, world = rank_and_world()
    paths, report = usable(split, T=1)                      # short videos repeat their last frame
    print(report, file=sys.stderr)
    why = f"{world} process(es), two videos each for BatchNorm"
    flags.check_batch_size(args.batch_size, world, 2 * world, why, len(paths))
    return Clips(split, paths, args.frames, args.size, args.step, args.seed)


def train(network, clips, args, trained_with, folder, device):
    """Fine-tune to the last epoch, resuming if possible; trained_with: the stored arguments."""
    rank, world = rank_and_world()
    steps_per_epoch = len(clips) // args.batch_size
    steps = args.epochs * steps_per_epoch
    optimizer = AdamW(network.parameters(), args.lr, weight_decay=args.weight_decay,
                      fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = dict(model=network, optimizer=optimizer, scaler=scaler)
    trained_with = trained_with | clips.identity
    step = resume(folder, trained_with, **state)
    schedule = warmup_cosine(optimizer, round(args.warmup_epochs * steps_per_epoch), steps, step)
    if step == steps:
        return

    model = data_parallel(network, device)
    model.train()
    loader = step_loader(clips, args.batch_size, step, steps, args.workers, rank, world)
    with Progress(folder, step, steps, steps_per_epoch, args.batch_size, args, device) as progress:
        for step, batch in progress.batches(loader):
            label = batch["label"].to(device, non_blocking=True)            # (B,)
            x = batch["clips"].to(device, non_blocking=True)                # (B, T, H, W, 3)
            x = colour(x, batch["colour"])                                  # (B, 3, T, H, W)
            with autocast(args.amp, device):
                logits = model(x).float()                                   # (B, classes)
            loss = F.cross_entropy(logits, label)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaled = step_scaled(scaler, optimizer, loss)
            accuracy = (logits.argmax(1) == label).float().mean()
            progress.log(step, schedule.get_last_lr()[0], loss=loss, train_acc=accuracy, **scaled)
            schedule.step()
            if progress.save_due(step):
                check_finite(network, step)
                save(folder, trained_with, step, **state)


def probabilities(network, split, args, device):
    """Sec. 3.4: mean over windows and crops -> (V, classes) float32, NaN: failed; {path: reason}"""
    share_buffers(network)
    scores, failed = evaluation.average_crops(network.eval(), split, args, device, softmax=True)
    return scores.numpy(), failed


def test(network, split, args, number, device):
    """Top-1 predictions; unreadable videos count as errors -> dict for the result, predictions."""
    scores, failed = probabilities(network, split, args, device)
    right = scores.argmax(axis=1) == np.array(split.labels)                 # (V,)
    right[[path in failed for path in split.paths]] = False
    result = dict(top1=float(right.mean()), per_class=evaluation.per_class(split, right))
    rows = evaluation.predictions(
        split, scores, failed, split.classes, "probabilities", split=number)
    return result, evaluation.counts(split, failed), rows


def run_split(args, number, train_split, test_split, device):
    """Fine-tune and test on one official split -> F, dict for the result, predictions."""
    backbone, classes = evaluation.load_network(args), train_split.classes
    name = f"finetune-{args.dataset}-{args.step}x-{number}"
    folder = evaluation.result_folder(args, backbone.arch) / name
    # --predict needs the classes; the hash tells whether a resumed run started from the same F
    trained_with = vars(args) | dict(split=number, checkpoint=backbone.sha256, classes=classes)
    network = classifier(backbone, len(classes)).to(device, memory_format=torch.channels_last_3d)
    with locked(folder):
        clips = on_rank0(training_clips, args, train_split)
        train(network, clips, args, trained_with, folder, device)
        figures, tested, rows = test(network, test_split, args, number, device)
    row = "random" if args.checkpoint == "random" else "checkpoint"
    trained = evaluation.counts(train_split, train_split.failed)
    chance = evaluation.most_frequent(test_split)
    result = dict(split=number, train=trained, test=tested, chance=chance) | {row: figures}
    return backbone, result, rows


def predict(args, rank, device):
    """Classify all videos below a folder with a fine-tuned network -> OUT/predictions.jsonl"""
    stored, state, _ = read_weights(args.checkpoint)
    trained = stored.get("args", {})
    if "classes" not in trained:
        raise UserError(f"{args.checkpoint} names no classes: --predict takes a checkpoint.pt that "
                        "finetune.py wrote")
    network = classifier(new_backbone(trained["arch"]), len(trained["classes"]))
    fill(network, state, args.checkpoint)
    network.to(device, memory_format=torch.channels_last_3d)
    args.frames, args.size, args.step = trained["frames"], trained["size"], trained["step"]
    print(f"{args.checkpoint}: {len(trained['classes'])} classes; as in training, clips of "
          f"{args.frames} frames, {args.step} source frames per step, {args.size} pixels")

    split = on_rank0(lambda: scan(labelled_folder(args.predict, Path(args.predict)), args.index,
                                  args.workers))
    scores, failed = probabilities(network, split, args, device)
    if rank:
        return
    file = evaluation.result_folder(args, trained["arch"]) / "predictions.jsonl"
    rows = evaluation.predictions(split, scores, failed, trained["classes"], "probabilities")
    write_json(file, *rows)
    evaluation.print_counts(evaluation.counts(split, failed), "have no prediction")
    top = Counter(row["predicted"] for row in rows if row["predicted"]).most_common(5)
    print(f"most frequent: {', '.join(f'{name} ({n})' for name, n in top)} ({file})")


def main(argv=None):
    args = parse_args(argv)
    rank, device = init_distributed()
    if args.predict:
        predict(args, rank, device)
        return
    evaluation.load_network(args)                           # fail before the scan
    parts = evaluation.load_parts(args, ("train", "test"))
    for pair in parts:
        check_test(*pair)

    # Train and test, split after split
    results, rows = [], []
    for number, pair in zip(args.split, parts):
        backbone, result, predicted = run_split(args, number, *pair, device)
        results.append(result)
        rows += predicted
    if rank == 0:
        name = f"finetune-{args.dataset}-{args.step}x"
        evaluation.write_accuracy(args, "fine-tuned", name, backbone, results, rows)


if __name__ == "__main__":
    run(main)
