"""What a training loop tells, what stops it, and which videos it had to replace."""
import os
import platform
import re
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.files import log_json
from common.processes import any_process, gather_objects, mean_over_processes, rank_and_world
from common.splits import MAX_BAD

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)                  # of schedulers, of a user's Ctrl-C


class Interrupted(BaseException):
    """A wish to stop that came while the loop waited for a batch."""


class StopRequest:
    """A wish to stop, by a signal: answered before the next step, or at once while a batch is waited for."""

    def __init__(self):
        self.name, self.waiting = "", False
        for number in STOP_SIGNALS:
            signal.signal(number, self.note)

    def note(self, number, _):
        """A second Ctrl-C ends the process at once, but for torchrun, which passes the first on."""
        self.name = signal.Signals(number).name
        if not dist.is_initialized():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.waiting:
            raise Interrupted

    def next_batch(self, batches):
        """-> the next batch; None, on all processes at the same step, where one of them was asked to stop."""
        batch = None
        try:
            self.waiting = True
            if not self.name:
                batch = next(batches)
        except Interrupted:
            batch = None
        finally:
            self.waiting = False
        return None if any_process(bool(self.name)) else batch

    def forget(self):
        """Give the signals back their usual meaning: nothing is left to be saved."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Step(NamedTuple):
    """What is kept of a step until it is logged; the values stay on the device, which is not waited for."""
    step: int
    videos: torch.Tensor
    values: dict


class Progress:
    """A training loop's progress bar, OUT/log.jsonl, replaced videos and wish to stop.

    files: the videos by number; step: the first; clips: of a step, over all processes.
    """

    def __init__(self, out, files, step, steps, steps_an_epoch, clips, args, device):
        self.out, self.file, self.files = out, out / "log.jsonl", files
        self.first, self.steps, self.steps_an_epoch = step, steps, steps_an_epoch
        self.clips, self.device = clips, device
        self.log_every, self.save_every = args.log_every, args.save_every
        self.rank, world = rank_and_world()
        if self.rank == 0:
            print(f"{out}: {'goes on' if step else 'starts'} at step {step} of {steps} ({args.epochs} epochs of "
                  f"{steps_an_epoch} steps) on {world} {device.type} process(es); {vars(args)}", file=sys.stderr)
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=self.rank > 0)
        self.board = summary_writer(out) if vars(args).get("tensorboard") and self.rank == 0 else None
        self.stop = StopRequest()
        self.begun = self.saved = time.perf_counter()
        self.work = None                                                        # of a GPU: what it was last asked for
        self.replaced, self.new = set(), {}                                     # names; {name: problem} to be told
        self.restart()

    def restart(self):
        """Begin the steps of another line of the log."""
        self.kept, self.waited, self.since = [], 0.0, time.perf_counter()

    def log(self, step, **values):
        """One line of OUT/log.jsonl, and TensorBoard's curves, by process 0."""
        if self.rank:
            return
        log_json(self.file, step=step, epoch=step / self.steps_an_epoch, **values)
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def batches(self, loaded):
        """The steps still to be done, each with its batch -> (step, batch) after (step, batch); ends early, on all
        processes after the same step, where one was asked to stop."""
        for step in range(self.first + 1, self.steps + 1):
            asked = time.perf_counter()
            batch = self.stop.next_batch(loaded)
            if batch is None:
                self.report(step - 1)
                return
            if self.work is None or self.work.query():                          # a GPU has nothing left to do: it waits
                self.waited += time.perf_counter() - asked
            self.new.update(batch.pop("failed"))
            self.videos = batch["video"]                                        # on the CPU
            yield step, batch

    def done(self, step, lr, **values):
        """A step is done: every log_every steps the means since the last line are logged.

        values: 0-dim tensors, loss and others, and 1-dim *_shares, of which the log has the largest, as *_chance.
        ValueError, on all processes, before a log line or a checkpoint: a loss was not finite; more than MAX_BAD of
        the videos were replaced.
        """
        self.lr = lr
        self.work = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        self.bar.update()
        self.kept.append(Step(step, self.videos, {name: value.detach() for name, value in values.items()}))
        if step % self.log_every == 0 or step == self.steps:
            self.report(step)
        elif step % self.steps_an_epoch == 0:
            self.values_so_far()
        if step == self.steps:
            self.bar.close()
            self.stop.forget()

    def report(self, step):
        """One line of the log: the means of the steps since the last one, over all processes."""
        if not self.kept:
            return
        means = mean_over_processes({name: value.mean(0) for name, value in self.values_so_far().items()})
        now = time.perf_counter()
        seconds, steps_so_far = now - self.since, step - self.first
        line = {}
        for name, value in means.items():
            if name.endswith("_shares"):                                        # chance: always the most frequent class
                line[name.replace("_shares", "_chance")] = max(value)
            else:
                line[name] = value
        line |= dict(lr=self.lr, clips_per_s=self.clips * len(self.kept) / seconds,
                     waiting_for_data=self.waited / seconds, peak_memory_gb=peak_memory(self.device),
                     left_s=(now - self.begun) / steps_so_far * (self.steps - step))
        new = self.newly_replaced()
        self.log(step, replaced=len(self.replaced), **line)
        self.show(line)
        if self.rank == 0:
            for name, problem in new.items():
                self.bar.write(f"replaced an unreadable video: {problem}", sys.stderr)
                log_json(self.file, step=step, unreadable=name, problem=problem)
        if len(self.replaced) > MAX_BAD * len(self.files):
            raise ValueError(f"{len(self.replaced)} of {len(self.files)} videos turned out to be unreadable, more than "
                             f"{MAX_BAD:.0%}: {self.file} names them")
        self.restart()

    def show(self, line):
        """The loss and its terms, clips/s and the share of time waiting for data, beside the bar."""
        shown = [name for name in self.kept[0].values if "_" not in name] + ["clips_per_s", "waiting_for_data"]
        self.bar.set_postfix({name: f"{line[name]:.3g}" for name in shown})

    def newly_replaced(self):
        """{name: problem} of the videos that any process has replaced since the last line, each video once."""
        found = {}
        for new in gather_objects(self.new):
            found |= new
        found = {name: problem for name, problem in found.items() if name not in self.replaced}
        self.replaced |= found.keys()
        self.new = {}
        return found

    def values_so_far(self):
        """Wait for the device -> {name: (steps since the last line, ...) on the CPU}.

        ValueError, on all processes: the loss of one of these steps was not finite.
        """
        problems = sorted(problem for problem in gather_objects(self.first_problem()) if problem)
        if problems:
            raise ValueError(problems[0][1])
        return self.stacked()

    def stacked(self):
        """{name: (steps since the last line, ...) on the CPU}"""
        names = self.kept[0].values if self.kept else ()
        return {name: torch.stack([step.values[name] for step in self.kept]).float().cpu() for name in names}

    def first_problem(self):
        """(step, words) of the first step since the last line whose loss was not finite, or None."""
        values = self.stacked()
        for k, step in enumerate(self.kept):
            if not values["loss"][k].isfinite():
                terms = ", ".join(f"{name} {value[k]:.4g}" for name, value in values.items() if "_" not in name)
                return step.step, self.in_a_step(step.step, f"the loss is not finite: {terms}", step.videos)
        return None

    def in_a_step(self, step, problem, videos):
        """A problem of a step, as the user is told of it."""
        names = ", ".join(os.fsdecode(self.files[v]) for v in videos.tolist())
        return f"step {step}: {problem} ({self.out / 'checkpoint.pt'}, if there, is from before; the videos: {names})"

    @contextmanager
    def naming_videos(self, step):
        """Inside, a ValueError is told with the step and its videos, or as what it follows from: a loss before it that
        was not finite."""
        try:
            yield
        except ValueError as error:
            before = self.first_problem()
            raise ValueError(before[1] if before else self.in_a_step(step, error, self.videos)) from None

    def saves(self, step):
        """Whether this process writes a checkpoint now: process 0 alone, and the others wait; so not after each of
        UCF101's epochs of 49 steps."""
        now = time.perf_counter()
        due = step == self.steps or step % self.steps_an_epoch == 0 and now - self.saved >= self.save_every
        if due:
            self.saved = now
        return due and self.rank == 0

    def leave(self, step):
        """End by a signal, once process 0 has saved: torchrun soon kills the others when the first has left."""
        names = [name for name in gather_objects(self.stop.name) if name]
        sys.exit(f"{names[0]}: saved step {step} of {self.steps}; the same command goes on from there")


def summary_writer(folder):
    """TensorBoard's writer; the package is optional, so it is imported only here."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def peak_memory(device):
    """Peak memory of this process so far in GB: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024                              # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def processor():
    """The CPU's name: Linux's, else what Python says."""
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
