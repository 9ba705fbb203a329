"""Loader processes, and waiting for what they make."""
import signal

import torch

from common.video import PATIENCE


def loader(dataset, workers, **keys):
    """torch's DataLoader as every stage uses it; keys: what to load, in which batches (sampler, batch_sampler ...)."""
    return torch.utils.data.DataLoader(
        dataset, num_workers=workers, pin_memory=torch.cuda.is_available(), timeout=10 * PATIENCE if workers else 0,
        worker_init_fn=ignore_signals, **keys)


def ignore_signals(worker):
    """Schedulers send SIGTERM and SIGUSR1 to every process, terminals SIGINT; the main process alone decides what
    follows, and ends its loaders' processes itself (processes.run)."""
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
