"""What a training loop tells: a bar, a log, replaced videos; and a wish to stop."""
import os
import resource
import signal
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.files import log_json
from common.processes import gather_objects, mean_over_processes
from common.splits import MAX_BAD


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


def peak_memory(device):
    """Peak memory of this process so far in GB: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


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
