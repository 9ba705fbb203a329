"""Several processes do what one does: keys and gradients, what is drawn, how they stop, and torchrun around them."""
import os
import re
import signal
import subprocess

import pytest
import torch
from conftest import (ROOT, STEPS, TORCHRUN, after_step, drifting, free_port, lines, stored, together, train, words,
                      write_lists, write_video)
from torch.nn.parallel import DistributedDataParallel

import pretrain
from common.flags import paper_defaults
from common.processes import init_distributed, locked, mean_over_processes
from common.toy import TOY_CLASSES
from models import LOSSES, TimeEquivariant, load_backbone
from pretrain import gather_keys, objective
from retrieval import knn_accuracy

# ---- The gradient of one process ----

GROUPED = 0, 0, 1, 1, 2, 2, 1, 1                # each group on one process; two of the four 1s on another, by chance
SPLIT = 0, 1, 2, 1, 0, 1, 2, 1                  # with two and with four processes, every positive of 0 and 2 elsewhere
CASES = {"all": (LOSSES, SPLIT), "equi-grouped": (("equi",), GROUPED)} | {name: ((name,), SPLIT) for name in LOSSES}


def train_step(case, rank=0, world=1):
    """This process's share of eight videos, forward and backward -> terms, averaged over processes; gradients.

    BatchNorm sees its share only, so its statistics would differ: eval mode.
    """
    names, pq = CASES[case]
    torch.manual_seed(0)                                                        # the same model and batch everywhere
    model = TimeEquivariant("r3d18_narrow", names).double().eval()
    batch = dict(clips=torch.randn(8, 2, 3, 2, 8, 8).double(), video=torch.arange(8), pq=torch.tensor(pq),
                 speed=torch.randint(4, (8, 2)), direction=torch.randint(2, (8, 2)), order=torch.randint(3, (8,)))
    batch = {name: value.chunk(world)[rank] for name, value in batch.items()}
    network = DistributedDataParallel(model) if world > 1 else model
    out = network(batch["clips"])
    terms, _ = objective(out, batch, gather_keys(out, batch), lam=0.1)
    sum(terms.values()).backward()
    return mean_over_processes(terms), {name: p.grad for name, p in model.named_parameters()}


def train_steps(rank, world, folder):
    """One of several processes: its share of each case, written to the folder."""
    init_distributed()
    torch.save({case: train_step(case, rank, world) for case in CASES}, folder / f"{rank}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def distributed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    assert together(request.param, train_steps, request.param, folder) == [0] * request.param
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_processes_together_give_the_value_and_the_gradient_of_one(distributed, case):
    terms, gradients = train_step(case)
    assert set(terms) == set(CASES[case][0]) and all(gradient.abs().max() > 1e-5 for gradient in gradients.values())
    for results in distributed:
        assert results[case][0] == pytest.approx(terms, rel=1e-6)
        torch.testing.assert_close(results[case][1], gradients, rtol=1e-8, atol=1e-8)


# ---- The run of one process ----

def train_and_keep_what_was_drawn(rank, argv, folder):
    """BatchNorm in eval mode: its statistics are each process's own, so they would differ."""
    network, step_loader, seen = pretrain.TimeEquivariant, pretrain.step_loader, []

    def load_and_keep(*args):
        for batch in step_loader(*args):
            seen.append({name: batch[name] for name in ("video", "pq", "seed", "start")})
            yield batch
    pretrain.TimeEquivariant = lambda *args: network(*args).eval()
    pretrain.step_loader = load_and_keep
    pretrain.main(argv)
    torch.save(seen, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def curves(world, tmp_path_factory):
    """{processes: (what each drew at each step, the lines of the log)}"""
    found = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        argv = words(world, folder)
        assert together(processes, train_and_keep_what_was_drawn, argv, folder) == [0] * processes
        drawn = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
        found[processes] = drawn, lines(folder)
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_takes_the_same_number_of_steps_and_together_they_draw_what_one_draws(curves, processes):
    (alone,), _ = curves[1]
    drawn, _ = curves[processes]
    assert [len(steps) for steps in drawn] == [STEPS] * processes
    for step in range(STEPS):
        for name, value in alone[step].items():
            assert torch.equal(torch.cat([steps[step][name] for steps in drawn]), value)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_give_the_loss_curve_of_one_up_to_rounding_batchnorm_aside(curves, processes):
    for one, several in zip(curves[1][1], curves[processes][1], strict=True):
        for name in ("loss", "inst", "equi", "speed", "direction", "order"):
            assert several[name] == pytest.approx(one[name], rel=2e-4), (one["step"], name)
    assert len({line["loss"] for line in curves[1][1]}) == STEPS


def train_on(rank, argv):
    pretrain.main(argv)


def test_the_knn_check_of_two_processes_is_that_of_one_with_the_weights_and_statistics_saved(world, tmp_path):
    """All videos of one class fall to the second process: BatchNorm statistics of its own would tell the two apart."""
    argv = words(world, tmp_path, "--epochs", 1, "--knn-every", 1)
    assert together(2, train_on, argv) == [0, 0]
    args = pretrain.parse_args(argv)
    backbone = load_backbone(tmp_path / "backbone.pt")
    accuracy, chance = knn_accuracy(backbone, *pretrain.prepare(args), args, torch.device("cpu")).values()
    line, = lines(tmp_path, "knn")
    assert (line["knn"], line["knn_chance"]) == pytest.approx((accuracy, chance), abs=1e-6) and chance == 0.5


# ---- How they stop ----

def train_and_get_a_signal(rank, argv, number):
    if rank == 1:
        after_step(4, lambda: [os.kill(os.getpid(), number) for _ in "twice"])  # torchrun passes it on
    pretrain.main(argv)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_with_a_checkpoint(world, tmp_path, number):
    argv = words(world, tmp_path, "--log-every", 1000)
    assert together(2, train_and_get_a_signal, argv, number) == [1, 1]
    assert stored(tmp_path)["step"] == 4
    assert together(2, train_on, argv) == [0, 0] and stored(tmp_path)["step"] == STEPS


def train_in_folders(rank, argv, folder):
    """Machines without storage of their own for all: each process finds its own --out."""
    try:
        pretrain.main([*argv, "--out", str(folder / str(rank))])
    except ValueError as error:
        (folder / f"{rank}.txt").write_text(str(error))


def test_machines_that_find_different_checkpoints_are_told_so(world, tmp_path):
    train(world, tmp_path / "0", "--epochs", 1)
    assert together(2, train_in_folders, words(world, tmp_path), tmp_path) == [0, 0]
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert re.search(r"find checkpoints of different steps, \[0, 3\]: --out .*/\d must be on storage", said)


def test_more_processes_than_gpus_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: .*--nproc_per_node is at most 1 here"):
        init_distributed()


# ---- torchrun ----

WRAPPER = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import after_step
import pretrain
from common.processes import run
def die():
    if os.environ["RANK"] == "1" and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        {fate}
after_step(5, die)
run(lambda: pretrain.main(sys.argv[1:]))
"""


def torchrun(world, folder, fate, *flags):
    """Two processes, of which the second meets its fate at step 5, once -> what torchrun gave."""
    wrapper = folder / "wrapper.py"
    flag = folder / "flag"
    wrapper.write_text(WRAPPER.format(root=str(ROOT), tests=str(ROOT / "tests"), flag=str(flag), fate=fate))
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *flags, str(wrapper),
               *words(world, folder / "out", "--workers", 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)    # gloo waits for half an hour
    assert flag.exists(), done.stderr[-3000:]
    return done


def test_torchruns_own_restart_recovers_a_killed_worker(world, tmp_path):
    done = torchrun(world, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starts at step 0 of 9" in done.stderr and "goes on at step 3 of 9" in done.stderr
    assert stored(tmp_path / "out")["step"] == STEPS
    assert [line["step"] for line in lines(tmp_path / "out")] == [*range(1, STEPS + 1)]


def test_a_process_that_fails_ends_all_of_them_with_the_cause(world, tmp_path):
    done = torchrun(world, tmp_path, "raise OSError('the lamp fell into the disk')")
    assert done.returncode != 0 and "error: the lamp fell into the disk" in done.stderr
    assert stored(tmp_path / "out")["step"] == 3


def test_a_refusal_is_told_by_process_0_alone(world, tmp_path):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(ROOT / "pretrain.py")]
    with locked(tmp_path):
        done = subprocess.run([*command, *words(world, tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stderr.count("error: another run is writing to") == 1


def test_two_machines_of_two_processes_train_together(world, tmp_path):
    """Two torchrun agents on this machine stand for two machines."""
    flags = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=localhost", f"--master_port={free_port()}"]
    command = [str(ROOT / "pretrain.py"), *words(world, tmp_path, "--epochs", 1)]
    agents = [subprocess.Popen([*TORCHRUN, *flags, f"--node_rank={node}", *command], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True) for node in (0, 1)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    line = lines(tmp_path)[-1]
    assert line["step"] == 3 and "on 4 cpu process(es)" in said[0]
    assert line["phi_chance"] == pytest.approx(1 / 15, rel=1e-3)                # keys of all 2 * 8 clips


def test_the_command_of_the_project_runs_as_it_stands_on_eight_processes_without_a_warning(tmp_path):
    """torchrun --nproc_per_node=8 pretrain.py --arch r3d18, on a toy set of two batches, for an epoch."""
    batch = paper_defaults("toy", "r3d18")["batch_size"]
    paths = [f"{TOY_CLASSES[n % len(TOY_CLASSES)]}/v_g{n:03d}_c01.avi" for n in range(2 * batch)]
    for n, path in enumerate(paths):
        write_video(tmp_path / "toy-videos" / path, drifting(30, seed=n))
    write_lists(tmp_path / "toy-videos" / "ucfTrainTestlist", TOY_CLASSES, trainlist01=paths)
    command = [*TORCHRUN, "--nproc_per_node=8", str(ROOT / "pretrain.py"), "--arch", "r3d18", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 8 cpu process(es)" in done.stderr and stored(tmp_path / "runs" / "toy-r3d18")["step"] == 2
    assert re.findall(r"\w+Warning.*", done.stderr) == []


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_toy_batch_splits_over_the_processes_of_one_machine(processes):
    pretrain.check_batch_size(pretrain.parse_args([]), processes)
