"""Loader processes, and waiting for what they make."""
import re
import shutil
import signal

import torch

from common.video import PATIENCE, VideoError

SHARED_MEMORY = "/dev/shm"
CAUGHT = re.compile(r"\ACaught .* in DataLoader worker .*^[\w.]+: ", re.DOTALL | re.MULTILINE)


def load(dataset, workers, **keys):
    """What torch's DataLoader makes, batch by batch; keys: what to load, in which batches (sampler, collate_fn ...).

    An error in a loader's process is raised here as its own last line. ValueError: what stops loader processes.
    """
    batches = iter(torch.utils.data.DataLoader(
        dataset, num_workers=workers, pin_memory=torch.cuda.is_available(), timeout=10 * PATIENCE if workers else 0,
        worker_init_fn=ignore_signals, **keys))
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (ValueError, OSError, VideoError) as error:
            raise type(error)(CAUGHT.sub("", str(error)).strip()) from None
        except RuntimeError as error:
            sentence = loader_problem(str(error))
            if not sentence:
                raise
            raise ValueError(sentence) from None
        yield batch


def ignore_signals(worker):
    """Schedulers send SIGTERM and SIGUSR1 to every process, terminals SIGINT; the main process alone decides what
    follows, and ends its loaders' processes itself (processes.run)."""
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)


def loader_problem(words):
    """What a RuntimeError of torch's DataLoader means for the user, or "" where it is none of these."""
    if "shared memory" in words or "Bus error" in words:
        return (f"{SHARED_MEMORY}, through which loader processes hand over batches, is full ({shared_memory_size()}): "
                "make it larger (docker run --shm-size=8g), or load in the training process (--workers 0)")
    if "timed out" in words:
        return (f"no batch came from the loader processes within {10 * PATIENCE} seconds: the disk may be gone, or too "
                "few open files allowed (ulimit -n); --workers 0 needs neither other processes nor many files")
    if "Too many open files" in words or "received 0 items of ancdata" in words:
        return ("too few open files are allowed for the loader processes: raise the limit (ulimit -n 4096), or load in "
                "the training process (--workers 0)")
    if "exited unexpectedly" in words or "killed by signal" in words:
        return f"a loader process was killed (memory full? fewer --workers take less): {words.splitlines()[0]}"
    return ""


def shared_memory_size():
    """The size of /dev/shm, in words."""
    try:
        return f"{shutil.disk_usage(SHARED_MEMORY).total / 1e6:.0f} MB"
    except OSError:
        return "of unknown size"
