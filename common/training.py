"""Shared by pre-training and fine-tuning: precision, schedule, checkpoints, progress bar, log."""
import contextlib
import fcntl
import json
import math
import os
import resource
import shlex
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from common import UserError, write_text
from common.distributed import STOP, gather_objects, on_rank0, rank_and_world, sum_over_processes

BAR = "{percentage:3.0f}%|{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


# ---- Mixed precision ----

def default_amp():
    """bf16 where a GPU has it, else fp16; a CPU trains in float32."""
    if not torch.cuda.is_available():
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast(amp, device):
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


def step_scaled(scaler, optimizer, loss):
    """One step of the optimiser -> with fp16, for the log: skipped for overflow or not, the scale.

    loss: any tensor on the device; the scale is read through it, since get_scale() waits for a GPU.
    """
    before = scaler.scale(torch.ones_like(loss))
    scaler.step(optimizer)
    scaler.update()
    scale = scaler.scale(torch.ones_like(loss))
    return dict(overflow=scale < before, loss_scale=scale) if scaler.is_enabled() else {}


# ---- Schedule ----

def warmup_cosine(optimizer, warmup, steps, step=0):
    """Sec. 3.4: linear warm-up, then cosine annealing. # paper silent: per step, to 0.

    step: steps already taken; if above 0, the optimiser's state must already be loaded.
    """
    def factor(n):
        if n < warmup:
            return (n + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (n - warmup) / max(1, steps - warmup))) / 2

    return LambdaLR(optimizer, factor, last_epoch=step - 1)


# ---- Checkpoints ----

MAY_CHANGE = {                                                  # flags, when a run resumes
    "data", "annotations", "index", "workers", "compile", "out", "log_every", "save_every",
    "keep_every", "tensorboard", "windows", "crops"}


def save_file(path, **content):
    """torch.save to a temporary file, then rename: the file on disk is always complete."""
    tmp = path.with_suffix(".tmp")
    with tmp.open("wb") as file:
        torch.save(content, file)
        os.fsync(file.fileno())
    tmp.replace(path)


def check_finite(model, step):
    """UserError, before anything is saved: a weight is not finite."""
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"step {step}: {name} is not finite; the files in --out, if there, are "
                            "from before")


def save(out, args, step, **stateful):
    """OUT/checkpoint.pt: all that `resume` needs to continue bit for bit; args: {flag: value}"""
    states = {name: part.state_dict() for name, part in stateful.items()}
    _, world = rank_and_world()
    save_file(out / "checkpoint.pt", step=step, args=args | dict(processes=world), **states)


def resume(out, args, **stateful):
    """Load OUT/checkpoint.pt, if there is one, into model, optimizer, ... -> its step, or 0.

    Rank 0 reads it for all. UserError: the arguments or the number of processes differ (BatchNorm
    depends on the latter).
    """
    file = out / "checkpoint.pt"
    state = on_rank0(lambda: torch.load(file, "cpu", weights_only=True) if file.exists() else None)
    if state is None:
        on_rank0(trim_log, out / "log.jsonl", 0)
        return 0
    _, world = rank_and_world()
    now = args | dict(processes=world)
    changed = [f"{name} {state['args'].get(name)} -> {value}" for name, value in now.items()
               if name not in MAY_CHANGE and state["args"].get(name) != value]
    if changed:
        raise UserError(f"{file} is of another run ({', '.join(changed)}): give another --out, or "
                        "the same arguments, videos and processes")
    for name, part in stateful.items():
        part.load_state_dict(state[name])
    on_rank0(trim_log, out / "log.jsonl", state["step"])
    return state["step"]


def trim_log(file, step):
    """Drop log lines after `step`, which are taken again, and truncated lines."""
    kept = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    write_text(file, "".join(kept))


@contextlib.contextmanager
def locked(out):
    """Keep other runs out of the folder `out`: rank 0 locks OUT/lock until it ends, even if killed.

    lockf, not flock: loader processes inherit flock's lock and outlive a killed run by seconds.
    """
    rank, _ = rank_and_world()
    file = on_rank0(lock, out)
    try:
        yield
    finally:
        if rank == 0:
            os.close(file)


def lock(out):
    """Make and lock OUT/lock -> its file descriptor"""
    out.mkdir(parents=True, exist_ok=True)
    file = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"cannot lock {out / 'lock'}, another run may be writing there: {error}; "
                        "wait for it, or give another --out") from None
    return file


# ---- Progress bar, log and stop requests ----

class Progress:
    """The steps of a training loop, with a progress bar and OUT/log.jsonl; used in a `with`.

    The signals in STOP end it after the step in hand. If stderr is no terminal, each log entry is a
    line instead. step, steps: the first and the last; clips: clips of a step, over all processes.
    """

    def __init__(self, out, step, steps, steps_per_epoch, clips, args, device):
        self.out, self.first, self.steps = out, step, steps
        self.steps_per_epoch = steps_per_epoch
        self.clips, self.args, self.device = clips, args, device
        self.rank, world = rank_and_world()
        if self.rank == 0:
            print(f"{out}: {'resumes' if step else 'starts'} at step {step} of {steps} "
                  f"({steps_per_epoch} per epoch) on {world} {device.type} process(es); arguments: "
                  f"{shlex.join(sys.argv[1:]) or 'the defaults'}", file=sys.stderr)
        self.board = None
        if vars(args).get("tensorboard") and self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out), purge_step=step + 1)

    def __enter__(self):
        self.bar = tqdm(total=self.steps, initial=self.first, bar_format=BAR,
                        disable=self.rank > 0 or not sys.stderr.isatty())
        self.signal, self.stopping, self.handlers = "", False, {}
        for number in STOP:
            if signal.getsignal(number) != signal.SIG_IGN:      # as under nohup
                self.handlers[number] = signal.signal(number, self.request_stop)
        self.begun = self.saved = self.since = time.perf_counter()
        self.values, self.waited, self.work = [], 0.0, None
        return self

    def __exit__(self, *_):
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def request_stop(self, number, _):
        """Note a signal. A second Ctrl-C ends at once, except under torchrun, which repeats it."""
        self.signal = signal.Signals(number).name
        if not dist.is_initialized():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def batches(self, loader):
        """Yield (step, batch) for the steps still to be taken; exits when a stop was requested."""
        for step in range(self.first + 1, self.steps + 1):
            asked = time.perf_counter()
            batch = next(loader)
            if self.work is None or self.work.query():      # count only if the GPU is idle
                self.waited += time.perf_counter() - asked
            yield step, batch
            self.bar.update()
            if self.stopping:
                names = gather_objects(self.signal)         # all wait until rank 0 has saved
                self.bar.close()
                sentence = f"saved step {step} of {self.steps}; the same command resumes"
                sys.exit(1 if self.rank else f"{max(names)}: {sentence}")

    def log(self, step, lr, **values):
        """Log the means since the last line, every --log-every steps.

        values: 0-dim tensors, loss and others, and 1-dim *_chance, the frequencies of classes: the
        largest is logged. UserError: the loss of a step was not finite.
        """
        self.values.append({name: value.detach() for name, value in values.items()})
        if self.device.type == "cuda":
            self.work = torch.cuda.current_stream().record_event()
        if step % self.args.log_every and step < self.steps:
            return
        means = mean_over_processes(self.values)
        if not math.isfinite(means["loss"]):
            terms = ", ".join(f"{name} {means[name]:.4g}" for name in means if "_" not in name)
            raise UserError(f"the loss is not finite in the {len(self.values)} steps up to {step}: "
                            f"{terms}; {self.out / 'checkpoint.pt'}, if there, is from before")
        now = time.perf_counter()
        line = means | dict(
            lr=lr,
            clips_per_s=self.clips * len(self.values) / (now - self.since),
            waiting_for_data=self.waited / (now - self.since),
            peak_memory_gb=peak_memory(self.device),
            left_s=(now - self.begun) / (step - self.first) * (self.steps - step))
        shown = (f"loss={line['loss']:.3g}, clips/s={line['clips_per_s']:.0f}, "
                 f"wait={line['waiting_for_data']:.0%}")
        self.bar.set_postfix_str(shown)
        if self.rank == 0:
            self.write(step, line)
            if self.bar.disable:
                left = tqdm.format_interval(line["left_s"])
                print(f"step {step} of {self.steps}: {shown}, left={left}", file=sys.stderr)
        self.values, self.waited, self.since = [], 0.0, now

    def write(self, step, line):
        line = {name: float(f"{value:.6g}") for name, value in line.items()}
        with open(self.out / "log.jsonl", "a") as file:
            print(json.dumps(dict(step=step, epoch=step / self.steps_per_epoch) | line), file=file)
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, step)

    def save_due(self, step):
        """Whether rank 0 saves now: --save-every has passed, the last step, or a stop request."""
        self.stopping = sum_over_processes(torch.tensor(int(bool(self.signal)))).item() > 0
        now = time.perf_counter()
        due = self.stopping or step == self.steps or now - self.saved >= self.args.save_every
        if due:
            self.saved = now
        return due and self.rank == 0


def mean_over_processes(values):
    """[{name: tensor} a step] -> {name: mean over steps and processes}, the largest if 1-dim"""
    _, world = rank_and_world()
    means = {}
    for name in values[0]:
        mean = torch.stack([step[name] for step in values]).float().mean(0).cpu()
        means[name] = (sum_over_processes(mean) / world).max().item()
    return means


def peak_memory(device):
    """Peak memory of this process in GB: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
