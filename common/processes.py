"""torchrun's processes: joining them, gathering from them, and how a script ends."""
import fcntl
import functools
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.video import VideoError


def init_distributed():
    """Join torchrun's process group if there is one -> rank, world size, device.

    NCCL between GPUs, and gloo for what is on the CPU, for which no GPU is waited for.
    """
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)                                                # docs/running.md says why
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
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store_of_this_start(world), rank=rank, world_size=world)
        patient_group.cache_clear()             # of a process group that has ended
    return rank, world, device


def rank_and_world():
    """This process's number and how many there are; 0 and 1 without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def store_of_this_start(world):
    """torchrun's store outlives a restart: without a name for each start, the addresses of dead processes are found
    there (pytorch issue 135712). None on several machines, whose counts of restarts need not agree."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ["LOCAL_WORLD_SIZE"] != str(world):
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def all_gather(*tensors):
    """Each tensor's rows from all processes, in the order of the processes, without gradient.

    Eq. 2 stops the gradient at the keys, so nothing is lost: the gradient equals the one-process gradient.
    """
    if not dist.is_initialized():
        return tensors
    gathered = []
    for x in tensors:
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.detach().contiguous())
        gathered.append(torch.cat(rows))
    return tuple(gathered)


def gather_objects(value):
    """Any picklable value of each process -> the list of all, in the order of the processes."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def any_process(flag):
    """Whether the flag is True on any process; on CPUs, so that no GPU is waited for."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes)
    return votes.item() > 0


def mean_over_processes(values):
    """{name: tensor on the CPU} -> the same names, averaged over all processes, as floats or lists of floats."""
    flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    pieces = flat.split([value.numel() for value in values.values()])
    return {name: piece.view(value.shape).tolist() for (name, value), piece in zip(values.items(), pieces)}


def data_parallel(model, device):
    """The model under DDP where torchrun started it, else itself. BatchNorm's statistics are shared where they are
    needed (share_buffers), not at every step."""
    if not dist.is_initialized():
        return model
    network = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    network.broadcast_buffers = False           # as an argument, newer torch warns of it
    return network


def share_buffers(network):
    """Give every process the first one's BatchNorm statistics, which a checkpoint has."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


@functools.cache
def patient_group():
    """A gloo group with a timeout of a day: the first scan of Kinetics takes hours.

    Created once and kept: destroying a group right after its last use can hang in torch 2.6.
    """
    return dist.new_group(timeout=timedelta(days=1), backend="gloo")


def on_first(function, *args, **kwargs):
    """Run on process 0 alone -> its result, on every process.

    Where it raises, process 0 raises and the others exit with status 1.
    """
    result, error = None, None
    if rank_and_world()[0] == 0:
        try:
            result = function(*args, **kwargs)
        except Exception as problem:
            error = problem
    box = [(result, error is not None)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=patient_group())
    if error is not None:
        raise error
    result, failed = box[0]
    if failed:
        sys.exit(1)                             # process 0 says why
    return result


@contextmanager
def locked(out):
    """Keep other runs out of the folder `out`: process 0 holds a lock on OUT/lock.

    The system drops it when the process ends, even if killed. ValueError: another run holds it, or
    OUT cannot be written.
    """
    rank, _ = rank_and_world()
    file = on_first(lock, out)
    try:
        yield
    finally:
        if rank == 0:
            os.close(file)


def lock(out):
    """Lock OUT/lock -> its file descriptor; closing it drops the lock.

    lockf, not flock: loader processes inherit flock's lock and outlive a killed run by seconds.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ValueError(f"cannot write {out / 'lock'} (--out): {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another run is writing to {out}: wait for it, or give another --out") from None
    except OSError as error:                    # some network file systems have no locks
        print(f"cannot lock {out} ({error.strerror}): do not start a second run there", file=sys.stderr)
    return file


def run(main):
    """Call main(); what the user can put right ends in one sentence and exit status 1, not in a traceback."""
    sys.stdout.reconfigure(errors="surrogateescape")                            # names of files are any bytes
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: error: the GPU's memory is full (a smaller --batch-size or --size, or more of "
                 f"--accumulate): {error}")
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted")
    except (ValueError, OSError, VideoError) as error:
        sys.exit(f"{script}: error: {error}")
    finally:
        end_loader_processes()
        for bar in list(tqdm._instances):       # an open bar is drawn again below the sentence
            with suppress(OSError):             # stderr may be closed
                bar.close()


def end_loader_processes():
    """Kill the loader processes, which ignore the SIGTERM that Python sends them at exit.

    scikit-learn's are of another class and end by themselves.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if isinstance(child, multiprocessing.Process):
            child.kill()
