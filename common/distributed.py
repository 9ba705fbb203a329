"""torchrun's processes: joining them, gathering from them, and how a script ends."""
import functools
import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import UserError

STOP = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT     # they end a training run


def torchrun(name, default=0):
    """An int that torchrun sets; without RANK, as in templates of Slurm, it does not count."""
    return int(os.environ.get(name, default)) if "RANK" in os.environ else default


def init_distributed():
    """Join torchrun's process group if there is one -> rank, device

    NCCL for GPU tensors, gloo for CPU tensors, so that those never wait for a GPU.
    """
    cuda = torch.cuda.is_available()
    rank, device = torchrun("RANK"), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", torchrun("LOCAL_RANK"))
        torch.cuda.set_device(device)
        # Clip shapes are fixed, so let cuDNN benchmark its algorithms. TF32 is torch's default for
        # convolutions; matrix products stay float32, since Eq. 2 turns an error of 1e-3 into 1e-2.
        torch.backends.cudnn.benchmark = True
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)                            # docs/running.md says why
    if rank:
        sys.stdout = open(os.devnull, "w")                  # only rank 0 prints
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        patient_group.cache_clear()                         # of a process group that has ended
    return rank, device


def rank_and_world():
    """This process's number and how many there are; 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(x):
    """The rows of all processes, in the order of the ranks, without gradient.

    Eq. 2 stops the gradient at the keys, so the gradient equals that of one process.
    """
    if not dist.is_initialized():
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    return torch.cat(rows)


def gather_objects(value):
    """Gather a picklable value from every process -> list in rank order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(x):
    """The sum of a tensor on the CPU over all processes, which waits for no GPU."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def data_parallel(model, device):
    """The model under DDP where torchrun runs; each process keeps its own BatchNorm statistics."""
    if not dist.is_initialized():
        return model
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    network.broadcast_buffers = False                       # newer torch warns of the argument
    return network


def share_buffers(network):
    """Give every process the BatchNorm statistics of rank 0, those of the checkpoint."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


@functools.cache
def patient_group():
    """A gloo group with a timeout of a day: the first scan of Kinetics takes hours.

    Created once and kept: destroying a group right after its last use can hang in torch 2.6.
    """
    return dist.new_group(timeout=timedelta(days=1), backend="gloo")


def on_rank0(function, *args):
    """Call on rank 0 alone -> its result, on every process; if it raises, the others exit."""
    result, error = None, None
    if rank_and_world()[0] == 0:
        try:
            result = function(*args)
        except Exception as problem:
            error = problem
    box = [(result, error is not None)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=patient_group())
    if error is not None:
        raise error
    result, failed = box[0]
    if failed:
        sys.exit(1)
    return result


def run(main):
    """Call main(). UserError and Ctrl-C end in one sentence, other exceptions in a traceback."""
    sys.stdout.reconfigure(errors="surrogateescape")        # names of files are any bytes
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()                    # after an error it could wait for ever
    except UserError as error:
        sys.exit(1 if torchrun("LOCAL_RANK") else f"{script}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted")
    finally:
        end_loader_processes()


def ignore_signals(worker):
    """In loader processes, ignore signals that are sent to the whole group."""
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)


def end_loader_processes():
    """Kill the loader processes, which ignore the SIGTERM that Python sends them at exit.

    scikit-learn's are of another class and end by themselves.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if isinstance(child, multiprocessing.Process):
            child.kill()
