"""What the four scripts share and that is neither loss, sampling nor architecture."""
import json
import os
import resource
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from data import VideoError


def init_distributed():
    """Join torchrun's process group if there is one (NCCL on GPUs, gloo on CPUs) -> rank, world size, device."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
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


def on_first(function, *args, **kwargs):
    """Run on the first process alone and give every process the result, or the error."""
    box = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            box = [(function(*args, **kwargs), None)]
        except Exception as error:
            box = [(None, error)]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
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


def save_checkpoint(path, **state):
    """Write beside, then rename, keeping the checkpoint before: at any moment a whole one is on disk."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    if path.exists():
        path.replace(path.with_suffix(".previous.pt"))
    beside.replace(path)


def load_checkpoint(path):
    """The newest whole checkpoint at `path`, on the CPU, or None; a damaged one is named and the one before is taken."""
    for candidate in (path, path.with_suffix(".previous.pt")):
        if candidate.exists():
            try:
                return torch.load(candidate, map_location="cpu", weights_only=True)
            except Exception as error:
                print(f"{candidate} is damaged ({type(error).__name__}) and passed over", file=sys.stderr)
    return None


def log_json(path, **values):
    """Append one JSON object as a line."""
    with Path(path).open("a") as file:
        print(json.dumps(values), file=file)


def mean_over_processes(values):
    """{name: tensor of any shape} -> the same names, averaged over all processes, as floats or lists of floats."""
    flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    parts = flat.cpu().split([value.numel() for value in values.values()])
    return {name: part.tolist() if value.ndim else part.item() for (name, value), part in zip(values.items(), parts)}


def peak_memory(device):
    """Peak memory of this process so far in GB: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def run(main):
    """Call main(); what the user can put right ends in one sentence and exit status 1, not in a traceback."""
    try:
        main()
    except (ValueError, OSError, VideoError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
