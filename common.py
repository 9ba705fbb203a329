"""What the four scripts share and that is neither loss, sampling nor architecture."""
import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import av
import numpy as np
import sklearn
import torch
import torch.distributed as dist
import torchvision
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from data import (MAX_BAD, PATIENCE, VideoError, Windows, ignore_signals, load_split, make_toy, normalise, scan,
                  write_json)
from models import BACKBONES, load_backbone

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.bfloat16}
DATASETS = ("toy", "ucf101", "hmdb51", "diving48", "diving48v1", "kinetics400", "folder")


def paper_defaults(dataset, arch):
    """Sec. 3.4, 4.1, 4.2: what the paper trains with, by data set and backbone; for toy, what suits two CPU cores."""
    if dataset == "toy":
        return dict(epochs=40, batch_size=24, frames=8, size=24, lr=2e-3, warmup_epochs=4)
    kinetics = {"s3dg": 256, "r2plus1d18": 192}                                 # Sec. 4.2: what fits the memory
    return dict(
        epochs=200 if dataset == "kinetics400" else 400,                        # Sec. 4.2 | 4.1
        batch_size=kinetics.get(arch, 512) if dataset == "kinetics400" else 192,    # Sec. 4.2 | 4.1
        frames=32 if arch == "s3dg" else 16,                                    # Table 2 | Sec. 3.4
        size=112 if arch == "r2plus1d18" or dataset.startswith("diving48") else 128,   # Table 2; Diving48: paper silent
        lr=3e-4, warmup_epochs=10)                                              # Sec. 3.4; warm-up: paper silent


def shared_parser(doc, argv, judging=False):
    """The flags that the scripts share -> parser, and the other defaults for the --dataset and --arch in argv.

    So `python SCRIPT --dataset ucf101 --help` shows what holds for ucf101. judging: there is a --checkpoint, which
    says what --arch, --frames and --size are, and there may be several splits; its value is the default of --crops.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="toy", help="toy is generated on first use")
    group.add_argument("--data", help="folder of the videos")
    group.add_argument("--annotations", help="folder of the official lists; None: looked for beside the videos")
    several = dict(nargs="+", default=[1], help="official splits, of several the mean (Sec. 4; which: ours)")
    group.add_argument("--split", type=int, choices=(1, 2, 3), **several if judging else dict(
        default=1, help="official split (Sec. 4: 1)"))
    group.add_argument("--index", help="file that remembers what the scan of the videos found; None: one in ~/.cache")
    group.add_argument("--workers", type=int, help="loader processes for each process of torchrun", default=min(
        16, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))))
    group = parser.add_argument_group("model")
    stored = "; None: as --checkpoint has it" if judging else ""
    group.add_argument("--arch", choices=BACKBONES, help=f"backbone F (Sec. 3.4){stored}")
    group.add_argument("--frames", type=int, metavar="T", help=f"frames a clip (Sec. 3.4, Table 2){stored}")
    group.add_argument("--size", type=int, metavar="PIXELS", help=f"height and width of a clip (Table 2){stored}")
    group.add_argument("--amp", choices=("bf16", "fp16", "off"), default=(
        "off" if not torch.cuda.is_available() else
        "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"),
        help="mixed precision; off: float32 (paper silent)")
    if judging:
        group = parser.add_argument_group("judging")
        group.add_argument("--checkpoint", help="backbone.pt or checkpoint.pt of pretrain.py, a torchvision state dict "
                           "of --arch, or the word random")
        group.add_argument("--windows", type=int, default=10,
                           help="clips a video, evenly spaced (Sec. 3.4; number: ours)")
        group.add_argument("--crops", choices=("centre", "ten"), default=judging,
                           help="centre and its mirror image, or five crops and theirs (Sec. 3.4; which: ours)")
        group.add_argument("--step", type=int, default=4, help="source frames from one frame of a "
                           "clip to the next (Sec. 3.4: 4, that is, skip three; Table 4: 1 and 2)")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    group.add_argument("--out", help="folder of what this run writes; None: "
                       + ("that of --checkpoint" if judging else "one below runs/"))
    known, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    arch = known.arch or ("r3d18_narrow" if known.dataset == "toy" else "r3d18")
    defaults = paper_defaults(known.dataset, arch)
    parser.set_defaults(data="toy-videos" if known.dataset == "toy" else None)
    if judging:
        parser.set_defaults(checkpoint=f"runs/{known.dataset}-{arch}/backbone.pt")
    else:
        parser.set_defaults(arch=arch, **{name: defaults[name] for name in ("frames", "size")})
    return parser, defaults


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


def checked(parser, argv):
    """Parse, and refuse values that cannot be meant."""
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error(f"--dataset {args.dataset} needs --data, the folder of its videos")
    least = dict(frames=2, size=8, workers=0, windows=1, step=1, epochs=1, batch_size=1, warmup_epochs=0, log_every=1,
                 save_every=0, accumulate=1, knn_every=0, seed=0, weight_decay=0)
    for name, value in vars(args).items():
        most = dict(frames=1024, size=1024, seed=2 ** 63 - 1).get(name, sys.float_info.max)
        if name in least and value is not None and not least[name] <= value <= most:
            bound = f"at least {least[name]}" if not value >= least[name] else f"at most {most}"
            parser.error(f"--{name.replace('_', '-')} must be {bound}, but is {value}")
        if name == "split" and args.dataset not in ("toy", "ucf101", "hmdb51") and set(np.ravel(value)) != {1}:
            parser.error(f"--dataset {args.dataset} has one split, 1, but --split is {value}")
        if name in ("lr", "lam") and not 0 < value < float("inf"):
            parser.error(f"--{name} must be above 0, but is {value}")
    return args


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that keeps the docstring's lines and shows each default."""


def init_distributed():
    """Join torchrun's process group if there is one -> rank, world size, device.

    NCCL between GPUs, and gloo for what is on the CPU, for which no GPU is waited for.
    """
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        raise ValueError(f"process {device.index} of this machine has no GPU: torchrun's --nproc_per_node is at most "
                         f"{torch.cuda.device_count()} here")
    if cuda:
        torch.cuda.set_device(device)
        # All clips have one shape, so that to try cuDNN's algorithms pays. TF32: convolutions may use it, which is
        # torch's default; products of matrices may not, since Eq. 2 makes of an error of 1e-3 in a cosine one of 1e-2.
        torch.backends.cudnn.benchmark = True
    if rank:
        sys.stdout = open(os.devnull, "w")                                      # one process tells
    if "RANK" in os.environ:
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["LOCAL_WORLD_SIZE"] == str(world):
            # torchrun's store outlives a restart: without a name for each start, the addresses of dead processes are
            # found there (pytorch issue 135712). On several machines the count of restarts need not agree.
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


def all_gather(*tensors):
    """Each tensor's rows from all processes, in the order of the processes, without gradient.

    Eq. 2 stops the gradient at the keys, so nothing is lost: the gradient equals the one-process gradient.
    """
    if not dist.is_initialized():
        return tensors
    gathered = []
    for x in tensors:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.detach().contiguous())
        gathered.append(torch.cat(parts))
    return tuple(gathered)


def gather_objects(value):
    """Any picklable value of each process -> the list of all, in the order of the processes."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def share_buffers(network):
    """Give every process the first one's BatchNorm statistics, which a checkpoint has (DDP does so a step late)."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def on_first(function, *args, **kwargs):
    """Run on the first process alone and give every process the result, or the error."""
    box = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box = [(function(*args, **kwargs), None)]
        except Exception as error:
            box = [(None, error)]
    if dist.is_initialized():
        patient = dist.new_group(timeout=timedelta(days=1), backend="gloo")     # the first scan of Kinetics takes hours
        dist.broadcast_object_list(box, group=patient)
    result, error = box[0]
    if error is not None:
        raise error
    return result


def warmup_cosine(optimizer, warmup, steps):
    """Sec. 3.4: linear warm-up, then cosine annealing to 0 (# paper silent: both by the step, the final value)."""
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    if warmup == 0:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup), cosine], [warmup])


def step_scaled(scaler, optimizer, loss):
    """One step of the optimiser -> what the log tells of fp16: the share of steps left out for overflow, the scale."""
    before = scaler.scale(torch.ones_like(loss))                                # get_scale() would wait for the device
    scaler.step(optimizer)                                                      # leaves out a step that overflows ...
    scaler.update()                                                             # ... and lowers the scale
    scale = scaler.scale(torch.ones_like(loss))
    return dict(overflow=scale < before, loss_scale=scale) if scaler.is_enabled() else {}


def save_checkpoint(path, **state):
    """Write beside, then rename, keeping the checkpoint before: at any moment a whole one is on disk."""
    beside = path.with_suffix(".tmp")
    try:
        torch.save(state, beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())                                             # on disk before the one before it moves
    except (OSError, RuntimeError) as error:                                    # a full disk is a RuntimeError to torch
        beside.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} (disk full?): {error}; the one before it, if any, is whole") from None
    if path.exists():
        path.replace(path.with_suffix(".previous.pt"))
    beside.replace(path)


def load_checkpoint(path):
    """The newest whole checkpoint at `path`, or None; a damaged one is named and the one before it is taken."""
    for suffix in (path.suffix, ".previous.pt", ".tmp"):                        # .tmp: killed between the two renames
        candidate = path.with_suffix(suffix)
        if candidate.exists():
            try:
                return torch.load(candidate, map_location="cpu", weights_only=True)
            except Exception as error:
                print(f"{candidate} is damaged ({type(error).__name__}) and passed over", file=sys.stderr)
    return None


def resume(out, args, world, **parts):
    """Put the state of OUT/checkpoint.pt, if there is one, into the parts (model, optimizer, ...) -> its step, or 0."""
    state = load_checkpoint(out / "checkpoint.pt")
    if state is not None and not (isinstance(state, dict) and {"step", "args", "world", "rng", *parts} <= state.keys()):
        raise ValueError(f"{out / 'checkpoint.pt'} is not a checkpoint of this script: give another --out")
    step = state["step"] if state else 0
    if len(steps := set(gather_objects(step))) > 1:
        raise ValueError(f"the processes find checkpoints of different steps, {sorted(steps)}: --out {out} must be on "
                         "storage that all machines share")
    if state:
        check_same_run(state, args, world)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
    on_first(keep_log_until, out / "log.jsonl", step)
    return step


def save(out, args, world, step, **parts):
    """OUT/checkpoint.pt: everything that `resume` needs to go on as if nothing had happened.

    ValueError, and the last good checkpoint stays: a weight is not finite.
    """
    bad = [name for name, value in parts["model"].state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"step {step}: {len(bad)} weights are not finite, the first {bad[0]}; "
                         f"{out / 'checkpoint.pt'}, if there, is from before")
    save_checkpoint(out / "checkpoint.pt", step=step, args=vars(args), world=world, rng=torch.get_rng_state(),
                    **{name: part.state_dict() for name, part in parts.items()})


def check_same_run(state, args, world):
    """Refuse to go on where the rest would not be what an uninterrupted run does. ValueError names the difference."""
    free = {"data", "annotations", "index", "workers", "compile", "out", "log_every", "save_every", "windows", "crops",
            "test"}
    world = state["world"] if vars(args).get("test") else world                 # finetune.py --test: nothing goes on
    was, now = ({name: value for name, value in run.items() if name not in free}
                for run in (state["args"] | {"processes": state["world"]}, vars(args) | {"processes": world}))
    changed = [f"{name} {was.get(name)} -> {now[name]}" for name in now if was.get(name) != now[name]]
    if changed:
        why = "; BatchNorm makes the number of processes matter" * (was.get("processes") != now["processes"])
        raise ValueError(f"--out {args.out} holds another run's checkpoint ({', '.join(changed)}{why}): give another "
                         "--out, or the same arguments and processes")


def keep_log_until(file, step):
    """Drop the log's lines after `step`: the steps that an interrupted run did not save are done again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):              # a line that a full disk cut
            kept += [line] if json.loads(line)["step"] <= step else []
    beside = file.with_suffix(".tmp")
    beside.write_text("".join(f"{line}\n" for line in kept))
    beside.replace(file)


def log_json(path, **values):
    """Append one JSON object as a line."""
    with Path(path).open("a") as file:
        print(json.dumps({name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in values.items()}),
              file=file)


def mean_over_processes(values):
    """{name: tensor on the CPU} -> the same names, averaged over all processes, as floats or lists of floats."""
    flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    parts = flat.split([value.numel() for value in values.values()])
    return {name: part.tolist() if value.ndim else part.item() for (name, value), part in zip(values.items(), parts)}


def work_of(device):
    """-> what tells later whether a GPU has done all that it has been asked for so far; None on a CPU"""
    return torch.cuda.current_stream().record_event() if device.type == "cuda" else None


def next_batch(batches, work):
    """-> the next batch, and for how many seconds the network waited for it: none if the GPU, which is asked for steps
    in advance, still has `work` when it comes."""
    asked = time.perf_counter()
    batch = next(batches)
    busy = work is not None and not work.query()
    return batch, 0.0 if busy else time.perf_counter() - asked


class Progress:
    """What a training loop tells: a progress bar, OUT/log.jsonl, videos replaced, a wish to stop (SIGTERM, Ctrl-C ...).

    Values stay on the device, which is not waited for until they are logged or a checkpoint follows.
    """

    def __init__(self, out, files, step, steps, steps_an_epoch, clips, args, device):
        self.out, self.file, self.files = out, out / "log.jsonl", files         # files: the videos, by number
        self.first, self.steps, self.steps_an_epoch = step, steps, steps_an_epoch
        self.clips, self.device = clips, device                                 # clips: of a step, over all processes
        self.log_every, self.save_every = args.log_every, args.save_every
        self.work, self.saved = None, time.perf_counter()
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=self.rank > 0)
        self.begun, self.replaced, self.new, self.signals = time.perf_counter(), set(), {}, []
        self.board = None
        if vars(args).get("tensorboard") and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter               # only here: the package is optional
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(str(out))
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            signal.signal(getattr(signal, name), self.note)
        self.restart()

    def note(self, number, _):
        """A wish to stop. A second Ctrl-C ends the process at once, but for torchrun, which passes the first on."""
        self.signals.append(signal.Signals(number).name)
        if not dist.is_initialized():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def restart(self):
        self.kept, self.waited, self.since = [], 0.0, time.perf_counter()       # kept: (step, videos, values)

    def log(self, step, **values):
        """One line of OUT/log.jsonl, and TensorBoard's curves."""
        log_json(self.file, step=step, epoch=step / self.steps_an_epoch, **values)
        for name, value in values.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def wait_for(self, batches):
        """The next batch; how long the network waited for it is added up."""
        batch, seconds = next_batch(batches, self.work)
        self.waited += seconds
        self.new.update(batch.pop("failed"))
        self.video, self.asked = batch["video"], torch.tensor(len(self.signals))    # on the CPU
        self.answer = dist.all_reduce(self.asked, async_op=True) if dist.is_initialized() else None
        return batch

    def in_a_step(self, step, problem, video):
        """A problem, as the user is told of it."""
        names = ", ".join(os.fsdecode(self.files[v]) for v in video.tolist())
        return f"step {step}: {problem} ({self.out / 'checkpoint.pt'}, if there, is from before; the videos: {names})"

    def look(self):
        """Wait for the device -> values {name: (steps since the last log, ...) on the CPU}, the problem [(step, words)]
        of the first of these steps whose loss is not finite, or []."""
        names = self.kept[0][2] if self.kept else ()
        values = {name: torch.stack([told[name] for *_, told in self.kept]).float().cpu() for name in names}
        for k, (step, video, _) in enumerate(self.kept):
            if not values["loss"][k].isfinite():
                terms = ", ".join(f"{name} {value[k]:.4g}" for name, value in values.items() if "_" not in name)
                return values, [(step, self.in_a_step(step, f"the loss is not finite: {terms}", video))]
        return values, []

    def failed(self, step, error):
        """The ValueError that a step raised, or of a loss that was not finite before it, from which it follows."""
        _, problem = self.look()
        return ValueError(problem[0][1] if problem else self.in_a_step(step, error, self.video))

    def done(self, step, lr, **values):
        """A step is done. Every log_every steps, and before a stop, the means since the last log are logged.

        values: 0-dim tensors, loss and others, and 1-dim *_shares, of which the log has the largest, as *_chance.
        -> the name of a signal that asks to stop, or None; under torchrun one that came before the step, so that all
        processes stop at one step. ValueError, on all processes: a loss was not finite, which is looked at before a
        log line and before a checkpoint; more than MAX_BAD of the videos were replaced.
        """
        self.work = work_of(self.device)
        self.bar.update()
        if step == self.steps:
            self.bar.close()
            for name in (signal.SIGTERM, signal.SIGUSR1):                       # nothing is left to be saved
                signal.signal(name, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.kept.append((step, self.video, {name: value.detach() for name, value in values.items()}))
        if self.answer:
            self.answer.wait()                                                  # asked before the step: it is there
        stop = self.asked.item() if self.answer else self.signals
        logs = stop or step % self.log_every == 0 or step == self.steps
        if not logs and step % self.steps_an_epoch:
            return None
        steps, problem = self.look()
        news = gather_objects((self.new, self.signals, problem))                # of each process
        problems = sorted(sum((part for *_, part in news), []))
        if problems:
            raise ValueError(problems[0][1])
        if not logs:
            return None
        means = mean_over_processes({name: value.mean(0) for name, value in steps.items()})
        means = {name.replace("_shares", "_chance"): max(value) if isinstance(value, list) else value
                 for name, value in means.items()}                              # chance: always the most frequent class
        now = time.perf_counter()
        means |= dict(lr=lr, clips_per_s=self.clips * len(self.kept) / (now - self.since),
                      waiting_for_data=self.waited / (now - self.since), peak_memory_gb=peak_memory(self.device),
                      left_s=(now - self.begun) / (step - self.first) * (self.steps - step))
        new = {name: reason for part, *_ in news for name, reason in part.items() if name not in self.replaced}
        self.replaced |= new.keys()
        if self.rank == 0:
            self.log(step, replaced=len(self.replaced), **means)
            self.bar.set_postfix({name: f"{means[name]:.3g}" for name in means if name in values and "_" not in name
                                  or name in ("clips_per_s", "waiting_for_data")})
            for name, reason in new.items():
                self.bar.write(f"replaced an unreadable video: {reason}", sys.stderr)
                log_json(self.file, step=step, unreadable=name, problem=reason)
        if len(self.replaced) > MAX_BAD * len(self.files):
            raise ValueError(f"{len(self.replaced)} of {len(self.files)} videos turned out to be unreadable, more than "
                             f"{MAX_BAD:.0%}: {self.file} names them")
        self.new = {}
        self.restart()
        signals = [name for _, part, _ in news for name in part]
        return signals[0] if signals and step < self.steps else None

    def saves(self, step, leave):
        """Whether this process writes a checkpoint now: process 0 alone, and the others wait; so not after each of
        UCF101's epochs of 49 steps."""
        now = time.perf_counter()
        due = leave or step == self.steps or step % self.steps_an_epoch == 0 and now - self.saved >= self.save_every
        self.saved = now if due else self.saved
        return bool(due) and self.rank == 0

    def leave(self, step, name):
        """End by a signal, once process 0 has saved: torchrun soon kills the others when the first has left."""
        gather_objects(None)
        sys.exit(f"{name}: saved step {step} of {self.steps}; the same command goes on from there")


def views_of(windows, size, crops):
    """Test crops (Sec. 3.4): "centre" is the centre crop and its mirror image, "ten" five crops and theirs.

    # paper silent: how many, and which.
    windows: uint8 (W, T, 3, h, w) -> uint8 (C * W, T, 3, size, size), C = 2 or 10.
    """
    if crops == "ten":
        return torch.cat(TF.ten_crop(windows, size))
    centre = TF.center_crop(windows, size)
    return torch.cat([centre, TF.horizontal_flip(centre)])


@torch.no_grad()
def average_crops(network, windows, size, crops, device, amp="off", workers=0, softmax=False, title="test"):
    """Sec. 3.4: "averaging predictions of multiple temporal and spatial crops", and features in the same way.

    network: (N, 3, T, H, W) -> (N, K), in eval mode; windows: data.Windows. Videos are shared out over the processes
    and each is run on its own: its result depends on nothing else. softmax: average probabilities, not the outputs.
    -> float32 (V, K) in the order of the videos, NaN where a video failed, and {v: problem}; on every process.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader = torch.utils.data.DataLoader(
        windows, batch_size=None, sampler=range(rank, len(windows), world), num_workers=workers,
        pin_memory=device.type == "cuda", timeout=10 * PATIENCE if workers else 0, worker_init_fn=ignore_signals)
    outputs, failed = {}, {}
    for v, clips, problem in tqdm(loader, title, unit="video", disable=rank > 0):
        if problem:
            failed[v] = problem
            continue
        clips = normalise(views_of(clips.to(device, non_blocking=True), size, crops))   # (C * W, 3, T, H, W)
        with torch.autocast(device.type, AMP[amp], enabled=amp != "off"):
            output = network(clips).float()                                     # (C * W, K)
        outputs[v] = (output.softmax(1) if softmax else output).mean(0).cpu()   # (K,)
    parts = gather_objects((outputs, failed))
    outputs, failed = ({v: value for part in parts for v, value in part[k].items()} for k in (0, 1))
    if not outputs:
        raise ValueError(f"{title}: not one of {len(windows)} videos could be read, the first: {failed[0]}")
    strange = sum(not output.isfinite().all() for output in outputs.values())
    if strange:
        raise ValueError(f"{title}: what the network makes of {strange} of {len(windows)} videos is not finite")
    nothing = torch.full_like(next(iter(outputs.values())), float("nan"))
    return torch.stack([outputs.get(v, nothing) for v in range(len(windows))]), dict(sorted(failed.items()))


def load_for_judging(args):
    """F from --checkpoint; fills in what it decides: args.arch, args.frames, args.size -> module.

    The clips are those of pre-training, where the file says what they were, else the paper's for --dataset and --arch.
    """
    if args.checkpoint == "random":
        args.arch = args.arch or ("r3d18_narrow" if args.dataset == "toy" else "r3d18")
    torch.manual_seed(args.seed)                                                # of the random initialisation
    file = Path(args.checkpoint)
    content = file.read_bytes() if args.checkpoint != "random" and file.is_file() else None     # it may change later
    if args.checkpoint != "random" and not file.exists():
        raise ValueError(f"there is no file {file}: run pretrain.py first, or give --checkpoint")
    network = load_backbone(args.checkpoint, args.arch)
    network.sha256 = content and hashlib.sha256(content).hexdigest()
    clips = paper_defaults(args.dataset, network.arch) | network.args
    args.arch, args.frames, args.size = network.arch, args.frames or clips["frames"], args.size or clips["size"]
    check_clips(args)
    return network


def check_clips(args):
    """models.s3dg halves T twice and a picture's sides five times. ValueError: nothing would be left."""
    if args.arch == "s3dg" and (args.frames <= 4 or args.size <= 16):
        raise ValueError(f"--arch s3dg needs --frames above 4 and --size above 16, but they are {args.frames} and "
                         f"{args.size}")


def check_writable(**files):
    """Rather than fail after hours: can these files, {flag: path}, be written? ValueError says which cannot."""
    for flag, file in files.items():
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(file).parent).close()
        except OSError as error:
            raise ValueError(f"cannot write {file} (--{flag}): {error.strerror}") from None


def list_and_scan(args, number, part):
    """One part of an official split, or the folder `part` of one's own videos -> Split, what `scan` finds."""
    if part not in ("train", "test"):
        if not Path(part).is_dir():
            raise ValueError(f"there is no folder {part}; a gallery or query is train, test or a folder of videos")
        split = replace(load_split("folder", part), title=part)
    else:
        if args.dataset == "toy":
            make_toy(args.data)
        split = load_split(args.dataset, args.data, args.annotations, number, part)
    return split, scan(split, args.index, max(1, args.workers))


def check_parts(train, test):
    """Refuse what gives no test result: videos without labels, and test videos that were trained on."""
    if not train.classes:
        raise ValueError(f"{train.title} has no labels to learn (one's own videos can be listed as UCF101's are)")
    both = set(train.found.values()) & set(test.found.values())
    if both:
        raise ValueError(f"{train.title}: {len(both)} of {len(test.paths)} test videos are training videos too (one's "
                         f"own videos can be listed as UCF101's are)")


def extract(networks, args, split, index, device):
    """Features of every video: mean over windows and crops (Sec. 3.4).

    networks: {name: F} -> Split, {name: float32 array (V, D), NaN rows where a video failed}, {path: problem}.
    """
    windows = Windows(split, index, args.frames, args.size, args.step, args.windows)
    x, failed = average_crops(lambda clips: torch.cat([network(clips) for network in networks.values()], dim=1),
                              windows, args.size, args.crops, device, args.amp, args.workers, title=split.title)
    features = zip(networks, x.split([network.dim for network in networks.values()], dim=1))    # one decode for all
    return split, {name: f.numpy() for name, f in features}, {split.paths[v]: problem for v, problem in failed.items()}


def random_beside(network, args, device):
    """{"checkpoint": F} and, where F has learned anything, {"random": the same network, initialised with --seed}."""
    networks = {"random": network}
    if args.checkpoint != "random":
        beside = argparse.Namespace(**vars(args) | dict(checkpoint="random"))
        networks = {"checkpoint": network, "random": load_for_judging(beside)}
    return {name: net.to(device, memory_format=torch.channels_last_3d) for name, net in networks.items()}


def most_frequent(split):
    """Accuracy by chance: the share of the most frequent class, which one gets who always answers with it."""
    return max(Counter(split.labels).values()) / len(split.labels)


def judged(split, _, failed):
    """What was asked for and what came of it, for a result file; takes what `extract` gives."""
    return dict(title=split.title, expected=len(split.paths), scored=len(split.paths) - len(failed), failed=failed)


def told(part, fate):
    """What `judged` gave, in words; fate: what became of the videos that could not be read."""
    names = [f"{path} ({problem})" for path, problem in part["failed"].items()]
    return (f"{part['title']}: {part['scored']} of {part['expected']} videos scored"
            + (f"; {len(names)} could not be read and {fate}: " if names else "")
            + ", ".join(names[:10]) + (", ..." if len(names) > 10 else ""))


def in_words(figures, chance):
    """{"checkpoint": share, "random": share}, chance -> "71.2% (randomly initialised: 15.3%, chance: 1.2%)"."""
    if "checkpoint" not in figures:
        return f"{figures['random']:.1%} randomly initialised (chance: {chance:.1%})"
    random = f"{figures['random']:.1%}" if "random" in figures else "not run"
    return f"{figures['checkpoint']:.1%} (randomly initialised: {random}, chance: {chance:.1%})"


def default_out(args, checkpoint, arch):
    """Where a judging script writes: --out, or beside the checkpoint -> Path."""
    return Path(args.out or (f"runs/random-{arch}" if checkpoint == "random" else Path(checkpoint).parent))


def write_result(args, name, network, standardised, **result):
    """OUT/name.json: the result and all that says what it is. Returns the file."""
    protocol = {key: value for key, value in vars(args).items() if key not in ("out", "checkpoint")}
    file = default_out(args, args.checkpoint, network.arch) / f"{name}.json"
    write_json(file, indent=1, value=result | dict(
        protocol=protocol | dict(standardised=standardised),
        checkpoint=dict(path=args.checkpoint, sha256=network.sha256, arch=network.arch, trained_with=network.args),
        command=sys.argv, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        versions=dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                      av=av.__version__, numpy=np.__version__, sklearn=sklearn.__version__)))
    return file


def peak_memory(device):
    """Peak memory of this process so far in GB: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(main):
    """Call main(); what the user can put right ends in one sentence and exit status 1, not in a traceback."""
    sys.stdout.reconfigure(errors="surrogateescape")                            # names of files are any bytes
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: the GPU's memory is full (a smaller --batch-size or --size, or "
                 f"more of --accumulate): {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(sys.argv[0]).name}: interrupted")
    except (ValueError, OSError, VideoError) as error:                          # of a loader's process: its last line
        sentence = re.sub(r"\ACaught .* in DataLoader worker .*^[\w.]+: ", "", str(error), flags=re.S | re.M).strip()
        sys.exit(f"{Path(sys.argv[0]).name}: error: {sentence}")
    finally:                                                                    # loaders' processes ignore SIGTERM, by
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                           # which Python would end them at exit
        for child in multiprocessing.active_children():
            child.kill()
