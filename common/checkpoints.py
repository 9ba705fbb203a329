"""Going on where a run was stopped: the schedule, checkpoints and what makes two runs the same."""
import contextlib
import json
import math
import os
import sys

import torch
from torch.optim.lr_scheduler import LambdaLR

from common.files import replace_text
from common.processes import gather_objects, on_first


def warmup_cosine(optimizer, warmup, steps, step=0):
    """Sec. 3.4: linear warm-up, then cosine annealing to 0 (# paper silent: both by the step, the final value).

    step: how many steps the optimiser has taken; past 0 it holds the state that was saved then.
    """
    def factor(n):
        if n < warmup:
            return (n + 1) / (warmup + 1)
        return (1 + math.cos(math.pi * (n - warmup) / max(1, steps - warmup))) / 2

    return LambdaLR(optimizer, factor, last_epoch=step - 1)


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


def resume(out, args, world, **stateful):
    """Put the state of OUT/checkpoint.pt, if there is one, into model, optimizer, ... -> its step, or 0.

    ValueError: the file is not of this script, of other arguments, or not the same for all processes.
    """
    state = load_checkpoint(out / "checkpoint.pt")
    if state is not None and not is_checkpoint(state, stateful):
        raise ValueError(f"{out / 'checkpoint.pt'} is not a checkpoint of this script: give another --out")
    step = state["step"] if state else 0
    steps = set(gather_objects(step))
    if len(steps) > 1:
        raise ValueError(f"the processes find checkpoints of different steps, {sorted(steps)}: --out {out} must be on "
                         "storage that all machines share")
    if state:
        check_same_run(state, args, world)
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
    on_first(keep_log_until, out / "log.jsonl", step)
    return step


def is_checkpoint(state, stateful):
    """Whether a file's content is what `save` writes, with a state for each of model, optimizer, ..."""
    return isinstance(state, dict) and {"step", "args", "world", "rng", *stateful} <= state.keys()


def save(out, args, world, step, **stateful):
    """OUT/checkpoint.pt: everything that `resume` needs to go on as if nothing had happened.

    ValueError, and the last good checkpoint stays: a weight is not finite.
    """
    bad = [name for name, value in stateful["model"].state_dict().items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"step {step}: {len(bad)} weights are not finite, the first {bad[0]}; "
                         f"{out / 'checkpoint.pt'}, if there, is from before")
    save_checkpoint(out / "checkpoint.pt", step=step, args=vars(args), world=world, rng=torch.get_rng_state(),
                    **{name: part.state_dict() for name, part in stateful.items()})


FREE = {"data", "annotations", "index", "workers", "compile", "out", "log_every", "save_every", "keep_every", "windows",
        "crops", "test"}                                                        # may change when a run goes on


def check_same_run(state, args, world):
    """Refuse to go on where the rest would not be what an uninterrupted run does. ValueError names the difference."""
    if vars(args).get("test"):                                                  # finetune.py --test: nothing goes on
        world = state["world"]
    was = state["args"] | {"processes": state["world"]}
    now = vars(args) | {"processes": world}
    changed = [f"{name} {was.get(name)} -> {now[name]}" for name in now
               if name not in FREE and was.get(name) != now[name]]
    if not changed:
        return
    if was["processes"] != now["processes"]:
        changed.append("and BatchNorm makes the number of processes matter")
    raise ValueError(f"--out {args.out} holds another run's checkpoint ({', '.join(changed)}): give another --out, or "
                     "the same arguments and processes")


def keep_log_until(file, step):
    """Drop the log's lines after `step`: the steps that an interrupted run did not save are done again."""
    kept = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):              # a line that a full disk cut
            if json.loads(line)["step"] <= step:
                kept.append(line)
    replace_text(file, "".join(f"{line}\n" for line in kept))
