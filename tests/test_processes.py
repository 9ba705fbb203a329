"""Several processes do what one does: gradients, samples, stopping; torchrun and its restart."""
import multiprocessing
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from conftest import (
    ROOT,
    STEPS,
    TORCHRUN,
    after_step,
    load_checkpoint,
    log_lines,
    together,
    words,
)
from torch.nn.parallel import DistributedDataParallel

import pretrain
from common.distributed import ignore_signals, init_distributed, run
from common.training import mean_over_processes
from models import LOSSES, TimeEquivariant
from pretrain import gather_keys, objective

# ---- The gradient of one process ----

# pq of eight videos: groups stay on one process; two of the four 1s are on another
GROUPED = 0, 0, 1, 1, 2, 2, 1, 1
SPLIT = 0, 1, 2, 1, 0, 1, 2, 1          # every positive of 0 and 2 is on another process
CASES = {"all": (LOSSES, SPLIT), "equi-grouped": (("equi",), GROUPED)}
CASES |= {name: ((name,), SPLIT) for name in LOSSES}


def gradients_of(case, rank=0, world=1):
    """Forward and backward of this process's videos -> terms, mean over processes; gradients

    In eval mode, since BatchNorm sees the videos of its process only.
    """
    names, pq = CASES[case]
    torch.manual_seed(0)                # the same model and batch in every process
    model = TimeEquivariant("r3d18_narrow", names).double().eval()
    batch = dict(
        clips=torch.randn(8, 2, 3, 2, 8, 8).double(), video=torch.arange(8), pq=torch.tensor(pq),
        speed=torch.randint(4, (8, 2)), direction=torch.randint(2, (8, 2)),
        order=torch.randint(3, (8,)))
    batch = {name: value.chunk(world)[rank] for name, value in batch.items()}
    network = DistributedDataParallel(model) if world > 1 else model
    out = network(batch["clips"])
    terms = objective(out, batch, gather_keys(out, batch), lam=0.1)
    sum(terms.values()).backward()
    means = mean_over_processes([{name: term.detach() for name, term in terms.items()}])
    return means, {name: p.grad for name, p in model.named_parameters()}


def save_gradients(world, folder):
    rank, _ = init_distributed()
    torch.save({case: gradients_of(case, rank, world) for case in CASES}, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def distributed_gradients(request, tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("gradients"), request.param
    assert together(world, save_gradients, world, folder) == [0] * world
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("case", CASES)
def test_several_processes_have_the_terms_and_the_gradient_of_one(distributed_gradients, case):
    terms, gradients = gradients_of(case)
    assert set(terms) == set(CASES[case][0])
    assert all(gradient.abs().max() > 1e-5 for gradient in gradients.values())
    for results in distributed_gradients:
        assert results[case][0] == pytest.approx(terms, rel=1e-6)
        torch.testing.assert_close(results[case][1], gradients, rtol=1e-8, atol=1e-8)


# ---- The run of one process ----

def train_and_save_samples(argv, folder):
    """Pre-train with BatchNorm in eval mode; its statistics are each process's own."""
    network, step_loader, seen = pretrain.TimeEquivariant, pretrain.step_loader, []

    def spying_loader(*args):
        for batch in step_loader(*args):
            seen.append({name: batch[name] for name in ("video", "pq", "colour", "start")})
            yield batch
    pretrain.TimeEquivariant = lambda *args: network(*args).eval()
    pretrain.step_loader = spying_loader
    pretrain.main(argv)
    torch.save(seen, folder / f"{os.environ['RANK']}.pt")


def run_and_samples(world, folder, processes, *more):
    """-> samples of each process and step, lines of the log"""
    argv = words(world, folder, *more)
    assert together(processes, train_and_save_samples, argv, folder) == [0] * processes
    files = [folder / f"{rank}.pt" for rank in range(processes)]
    return [torch.load(file, weights_only=True) for file in files], log_lines(folder)


@pytest.fixture(scope="module")
def run_of_one(world, tmp_path_factory):
    return run_and_samples(world, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("processes, parts", [(4, 1), (2, 2)])
def test_several_processes_or_parts_have_the_samples_and_the_loss_curve_of_one(
        world, run_of_one, tmp_path, capsys, processes, parts):
    (alone,), log = run_of_one
    samples, lines = run_and_samples(world, tmp_path, processes, "--accumulate", parts)
    assert [len(steps) for steps in samples] == [STEPS] * processes
    for step in range(STEPS):
        for name, value in alone[step].items():
            assert torch.equal(torch.cat([steps[step][name] for steps in samples]), value)
    for one, several in zip(log, lines, strict=True):
        for name in ("loss", *LOSSES):
            assert several[name] == pytest.approx(one[name], rel=2e-4), (one["step"], name)
    assert len({line["loss"] for line in log}) == STEPS
    printed = capsys.readouterr().out
    assert printed.count("next: ") == 1                     # only rank 0 prints
    assert re.findall(r"\w+Warning.*", printed) == []


# ---- Stopping ----

def train_and_get_a_signal(argv, number):
    if os.environ["RANK"] == "1":       # twice, since torchrun repeats Ctrl-C
        after_step(4, lambda: [os.kill(os.getpid(), number) for _ in range(2)])
    pretrain.main(argv)


@pytest.mark.parametrize("flag, sentence", [
    ("--batch-size", "error: --batch-size 6 is not"),
    ("--epoch", "error: unrecognized arguments: --epoch 6")])
def test_a_refusal_ends_every_process_and_only_rank_0_says_why(
        world, tmp_path, capsys, flag, sentence):
    assert together(2, pretrain.main, words(world, tmp_path, flag, 6)) == [1, 1]
    printed = capsys.readouterr().out
    assert printed.count(sentence) == 1 and "Traceback" not in printed


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(world, tmp_path):
    argv = words(world, tmp_path, "--log-every", 1000, "--save-every", 1000)
    assert together(2, train_and_get_a_signal, argv, signal.SIGINT) == [1, 1]
    assert load_checkpoint(tmp_path)["step"] == 4
    assert together(2, pretrain.main, argv) == [0, 0] and load_checkpoint(tmp_path)["step"] == STEPS


def wait_as_a_loader_process(ready):
    ignore_signals(0)
    ready.set()
    time.sleep(100)


def test_no_loader_process_outlives_a_run():
    ready = multiprocessing.Event()
    process = multiprocessing.Process(target=wait_as_a_loader_process, args=[ready])
    process.start()
    assert ready.wait(60)
    run(lambda: None)
    process.join(10)
    assert process.exitcode == -signal.SIGKILL


# ---- torchrun ----

# pretrain.py, but rank 1 is killed once, after five steps
KILLED_ONCE = """
import os, pathlib, signal, sys
sys.path[:0] = {folders}
from conftest import after_step
import pretrain
from common.distributed import run

def kill_once():
    flag = pathlib.Path({flag!r})
    if os.environ["RANK"] == "1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)

after_step(5, kill_once)
run(lambda: pretrain.main(sys.argv[1:]))
"""


def test_torchruns_restart_recovers_a_killed_worker(world, tmp_path):
    script, flag, out = tmp_path / "script.py", tmp_path / "flag", tmp_path / "out"
    script.write_text(KILLED_ONCE.format(folders=[str(ROOT), str(ROOT / "tests")], flag=str(flag)))
    flags = "--standalone", "--nproc_per_node=2", "--max-restarts=1"
    done = subprocess.run(
        [*TORCHRUN, *flags, script, *words(world, out, "--workers", 1)], capture_output=True,
        text=True, timeout=300, env=os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    assert done.returncode == 0 and flag.exists(), done.stderr[-3000:]
    assert "starts at step 0 of 9" in done.stderr and "resumes at step 4 of 9" in done.stderr
    assert load_checkpoint(out)["step"] == STEPS
    assert [line["step"] for line in log_lines(out)] == [*range(1, STEPS + 1)]
