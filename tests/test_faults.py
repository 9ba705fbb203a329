"""Run: python -m pytest tests/test_faults.py        The slow part: python tests/soak.py

What happens when a run is killed, a disk full, a file broken, a process dead, a command wrong. "Bit for bit" means
equal weights on a CPU. A run that dies is a process of its own where the kernel kills it, else this one.
"""
import ast
import contextlib
import errno
import itertools
import json
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, fails, forkserver, free_port, lines, write_lists

import common
import data
import finetune
import linear_probe
import pretrain
import retrieval
import soak
from data import toy_video, write_video
from models import load_backbone

SCRIPTS = dict(pretrain=pretrain, finetune=finetune, linear_probe=linear_probe, retrieval=retrieval)
MODULES = sorted(ROOT.glob("*.py"))
CLASSES = ("Spin", "Zoom")
STEPS = 9                                                                       # 3 epochs of 24 videos in batches of 8


def listed(n):
    """The n-th video's line in the lists of `world`."""
    cls = CLASSES[n % 2]
    return f"{cls}/v_{cls}_g{n // 2 + 1:02d}_c01.avi"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """24 training and 6 test videos of two classes, in UCF101's layout; to be read only."""
    root, paths = tmp_path_factory.mktemp("world"), [listed(n) for n in range(30)]
    for n, path in enumerate(paths):
        write_video(root / "videos" / path, toy_video(path.split("/")[0], np.random.default_rng(n))[:60])
    return write_lists(root, CLASSES, trainlist01=paths[:24], testlist01=paths[24:])


@pytest.fixture
def copy(world, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(world, tmp_path / "copy")


def words(world, out, *more):
    """The command line of a small pre-training."""
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "videos", "--annotations", world, "--out", out, "--arch",
        "r3d18_narrow", "--frames", 4, "--size", 16, "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 1, "--lr",
        1e-3, "--log-every", 1, "--save-every", 0, "--workers", 0, *more)]


def train(world, out, *more):
    pretrain.main(words(world, out, *more))
    return stored(out)


def stored(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(one, other):
    """Bit for bit: the weights, the optimiser's moments, the step."""
    moments = [torch.cat([x.flatten() for state in run["optimizer"]["state"].values() for x in state.values()])
               for run in (one, other)]
    return (one["step"] == other["step"] == STEPS and torch.equal(*moments)
            and all(torch.equal(value, other["model"][name]) for name, value in one["model"].items()))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of a run that nothing interrupts; to be read only."""
    out = tmp_path_factory.mktemp("whole")
    train(world, out)
    return out


def on_step(setattr, n, action):
    """When step n is done in this process, action() happens; setattr: how to see to that."""
    done = common.Progress.done

    def done_and_more(self, step, *args, **values):
        if step == n:
            action()
        return done(self, step, *args, **values)
    setattr(common.Progress, "done", done_and_more)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, action): the same, for one test."""
    return lambda *args: on_step(monkeypatch.setattr, *args)


@pytest.fixture(autouse=True)
def signals():
    """What a run in this process does to the signals' handlers is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(target, *args):
    """A process of its own."""
    with forkserver() as context:
        process = context.Process(target=target, args=args)
        process.start()
    return process


# ---------------------------------------------------------------------- interruption


def train_and_be_killed(argv, step):
    torch.set_num_threads(1)
    on_step(setattr, step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    pretrain.main(argv)


@pytest.mark.parametrize("step", [2, 5])                                        # before any checkpoint, and mid-epoch
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one_with_other_workers(world, whole, tmp_path, step):
    process = start(train_and_be_killed, words(world, tmp_path), step)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "checkpoint.pt").exists() == (step > 3)
    assert same(train(world, tmp_path, "--workers", 2), stored(whole))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(whole)]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_makes_a_checkpoint_at_once_and_the_resumed_run_is_bit_for_bit(world, whole, tmp_path, at_step, name,
                                                                               monkeypatch):
    at_step(4, lambda: os.kill(os.getpid(), getattr(signal, name)))             # mid-epoch, and no line would be due
    with pytest.raises(SystemExit, match=f"^{name}: saved step 4 of 9; the same command goes on from there$"):
        train(world, tmp_path, "--log-every", 1000)                             # a message is exit status 1
    assert stored(tmp_path)["step"] == 4
    monkeypatch.undo()
    assert same(train(world, tmp_path, "--workers", 1), stored(whole))


def test_a_full_disk_ends_the_run_in_one_sentence_and_the_old_checkpoint_stays_whole(world, whole, tmp_path, at_step,
                                                                                     monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1])))    # the kernel cuts files there
    try:
        with pytest.raises(OSError, match=r"^cannot write .*point.pt \(disk full\?\): .*the one before it.* is whole"):
            train(world, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored(tmp_path)["step"] == 3 and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    assert same(train(world, tmp_path), stored(whole))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_disk_that_is_full_half_way_leaves_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, step=1)

    def half(state, file):
        file.write_bytes(path.read_bytes()[:100])
        raise error
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        common.save_checkpoint(path, step=2)
    assert common.load_checkpoint(path) == dict(step=1) and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("survived", [0, 1, 2])                                 # renames
def test_killed_at_any_moment_of_saving_there_is_a_whole_checkpoint(tmp_path, monkeypatch, survived, damaged):
    path, replace, renames = tmp_path / "checkpoint.pt", Path.replace, []
    for step in (1, 2):
        common.save_checkpoint(path, step=step)
    if damaged:                                                                 # the newest, so the run went on from 1
        os.truncate(path, 100)

    def rename_or_die(*args):
        if len(renames) == survived:
            raise KeyboardInterrupt
        renames.append(args)
        return replace(*args)
    monkeypatch.setattr(Path, "replace", rename_or_die)
    try:
        common.save_checkpoint(path, step=3)
    except KeyboardInterrupt:
        pass
    steps = {0: 1 if damaged else 2, 1: 3 if damaged else 2, 2: 3}
    assert common.load_checkpoint(path) == dict(step=steps[survived])


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_truncated_newest_checkpoint_is_named_and_the_one_before_it_is_taken(world, whole, tmp_path, capsys, keep):
    out = shutil.copytree(whole, tmp_path / "out")
    os.truncate(out / "checkpoint.pt", int((out / "checkpoint.pt").stat().st_size * keep))
    if keep == 0.5:                                                             # all the way once
        assert same(train(world, out), stored(whole))
        assert f"{out}: goes on at step 6 of 9" in (said := capsys.readouterr().err)
    else:
        assert common.load_checkpoint(out / "checkpoint.pt")["step"] == 6
        said = capsys.readouterr().err
    assert re.search(r"checkpoint.pt is damaged \(\w+\) and passed over", said)


def test_a_checkpoint_is_written_at_the_end_of_an_epoch_but_not_more_often_than_asked(world, tmp_path, at_step):
    at_step(8, lambda: (tmp_path / "seen").write_text(str((tmp_path / "checkpoint.pt").exists())))
    assert train(world, tmp_path, "--save-every", 600)["step"] == STEPS         # after 3 and 6 steps none was due
    assert (tmp_path / "seen").read_text() == "False" and not (tmp_path / "checkpoint.previous.pt").exists()


def test_time_does_not_count_as_waiting_while_the_gpu_has_work():
    def work(done):
        return SimpleNamespace(query=lambda: done)                              # as a torch.cuda.Event
    slow = (time.sleep(0.05) or n for n in itertools.count())
    told = [common.next_batch(slow, what) for what in (None, work(True), work(False))]
    assert [batch for batch, _ in told] == [0, 1, 2] and all(seconds > 0.04 for _, seconds in told[:2])
    assert told[2][1] == 0


def test_ctrl_c_outside_training_ends_in_one_sentence_and_leaves_no_scan_behind(world, tmp_path, monkeypatch):
    def examine(path):
        seen.append(path)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        return real(path)
    seen, real = [], data.examine
    monkeypatch.setattr(data, "examine", examine)
    said = fails(pretrain.main, words(world, tmp_path / "out", "--index", tmp_path / "index.json"))
    assert said == "SCRIPT: interrupted" and len(seen) < 24


def test_a_toy_set_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def write_video_and_interrupt(file, frames):
        write_video(file, frames)
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(data, "write_video", write_video_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.make_toy(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_a_log_with_a_cut_or_foreign_line_does_not_stop_a_run_from_going_on(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "name": "a}\n[3]\n{"loss": 1}\n\xff\n{"step": 2}\n{"step": 3}\n{"st')
    common.keep_log_until(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_another_number_of_processes_is_refused_with_the_reason(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    torch.save(stored(out) | dict(world=2), out / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"processes 2 -> 1; BatchNorm makes the number of processes matter\)"):
        train(world, out)


# ---------------------------------------------------------------------- several processes

WRAPPER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common, pretrain
done = common.Progress.done
def done_or_die(self, step, *args, **values):
    if step == 5 and self.rank == 1 and not os.path.exists({flag!r}):
        open({flag!r}, "w").close()
        {fate}
    return done(self, step, *args, **values)
common.Progress.done = done_or_die
common.run(lambda: pretrain.main(sys.argv[1:]))
"""


def torchrun(world, folder, fate, *flags):
    """Two processes, of which the second meets its fate at step 5, once -> what torchrun gave."""
    wrapper = folder / "wrapper.py"
    wrapper.write_text(WRAPPER.format(root=str(ROOT), flag=str(folder / "flag"), fate=fate))
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", *flags, str(wrapper),
               *words(world, folder / "out", "--workers", 1)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)    # gloo waits for half an hour
    assert (folder / "flag").exists(), done.stderr[-3000:]
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


def as_rank(rank, processes, port, target, *args):
    """target(rank, *args), as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    target(rank, *args)


def together(processes, target, *args):
    """target(rank, *args) in each of several processes -> their exit statuses."""
    port = free_port()
    running = [start(as_rank, rank, processes, port, target, *args) for rank in range(processes)]
    for process in running:
        process.join(240)
    return [process.exitcode for process in running]


def train_on(rank, argv):
    pretrain.main(argv)


def train_and_get_a_signal(rank, argv, number):
    on_step(setattr, 4, lambda: rank == 1 and [os.kill(os.getpid(), number) for _ in "twice"])   # torchrun passes it on
    pretrain.main(argv)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_with_a_checkpoint(world, tmp_path, number):
    argv = words(world, tmp_path, "--log-every", 1000)
    assert together(2, train_and_get_a_signal, argv, number) == [1, 1]
    assert stored(tmp_path)["step"] == 5                                        # known to both at the next step
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


def test_the_knn_check_of_two_processes_is_that_of_one_with_the_weights_and_statistics_saved(world, tmp_path):
    """Every Zoom falls to the second process: BatchNorm statistics of its own would tell the two classes apart."""
    argv = words(world, tmp_path, "--epochs", 1, "--knn-every", 1)
    assert together(2, train_on, argv) == [0, 0]
    args = pretrain.parse_args(argv)
    backbone, device = load_backbone(tmp_path / "backbone.pt"), torch.device("cpu")
    accuracy, chance = pretrain.knn_accuracy(backbone, *pretrain.prepare(args), args, device)
    line, = lines(tmp_path, "knn")
    assert (line["knn"], line["knn_chance"]) == pytest.approx((accuracy, chance), abs=1e-6) and chance == 0.5


def train_and_tell_what_was_drawn(rank, argv, folder):
    """BatchNorm in eval mode: its statistics are each process's own, so they would differ."""
    network, wait_for, seen = pretrain.TimeEquivariant, common.Progress.wait_for, []
    pretrain.TimeEquivariant = lambda *args: network(*args).eval()

    def wait_and_tell(self, batches):
        batch = wait_for(self, batches)
        seen.append({name: batch[name] for name in ("video", "pq", "seed", "start")})
        return batch
    common.Progress.wait_for = wait_and_tell
    pretrain.main(argv)
    torch.save(seen, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def curves(world, tmp_path_factory):
    """{processes: (what each drew at each step, the lines of the log)}"""
    found = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        argv = words(world, folder)
        assert together(processes, train_and_tell_what_was_drawn, argv, folder) == [0] * processes
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


def test_more_processes_than_gpus_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="process 1 of this machine has no GPU: .*--nproc_per_node is at most 1 here"):
        common.init_distributed()


# ---------------------------------------------------------------------- broken videos


def test_mutated_files_give_frames_or_a_video_error_and_neither_hang_nor_crash(tmp_path):
    jobs = soak.mutations(soak.originals(tmp_path / "files")[:3], 60)           # the slow part: soak.py
    assert {what for _, what, _ in jobs} == {"cut", "flip 1", "flip 16", "flip 256", "head 16"}
    with forkserver():
        told = soak.verdicts(jobs)
    kinds = {verdict for verdict, _ in told}
    assert len(told) == 60 and kinds == {"all frames", "some frames, then VideoError", "VideoError"}, told


def test_a_video_stream_without_a_decoder_is_a_video_error(tmp_path):
    file, path = soak.originals(tmp_path / "files")[1], tmp_path / "unknown.mp4"
    assert b"avc1" in file.read_bytes()
    path.write_bytes(file.read_bytes().replace(b"avc1", b"none"))               # a codec that nobody knows
    with pytest.raises(data.VideoError, match="unknown.mp4: no decoder"):
        data.decode(path, [0])


def breaks_after_the_scan(monkeypatch, *damage):
    """When the videos have been counted, each damage(file) happens to one of them."""
    loader = pretrain.step_loader

    def damage_and_load(pairs, *args):
        for k, happens in enumerate(damage):
            happens(Path(os.fsdecode(pairs.files[5 * k])))
        return loader(pairs, *args)
    monkeypatch.setattr(pretrain, "step_loader", damage_and_load)


def shorten(file):
    write_video(file, toy_video("Spin", np.random.default_rng(0))[:3])


def garble(file):
    file.write_bytes(b"garbage" * 100)


def test_videos_that_vanish_turn_unreadable_or_end_early_are_replaced_alike_and_named_once(world, tmp_path,
                                                                                           monkeypatch):
    monkeypatch.setattr(common, "MAX_BAD", 0.2)
    breaks_after_the_scan(monkeypatch, Path.unlink, garble, shorten, lambda file: (file.unlink(), file.mkdir()))
    runs = []
    for n, workers in enumerate((0, 2)):
        out = tmp_path / f"out{n}"
        runs.append(train(shutil.copytree(world, tmp_path / f"world{n}"), out, "--workers", workers))
        named = lines(out, "unreadable")
        assert len(named) == len({line["unreadable"] for line in named}) == lines(out)[-1]["replaced"] == 4
        problems = " | ".join(line["problem"] for line in named)
        for reason in ("No such file", "Invalid data", "only 3 frames decode", "Is a directory"):
            assert reason in problems
    assert same(*runs)


def test_more_than_the_stated_share_of_bad_videos_stops_the_run_and_says_so(copy, tmp_path, monkeypatch):
    breaks_after_the_scan(monkeypatch, Path.unlink, garble)                     # 2 of 24 are more than 5 %
    with pytest.raises(ValueError, match="^2 of 24 videos turned out to be unreadable, more than 5%: .*log.jsonl"):
        train(copy, tmp_path / "out")


def test_an_error_of_a_loaders_process_is_one_sentence(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MAX_BAD", 1)
    breaks_after_the_scan(monkeypatch, *[Path.unlink] * 5)
    monkeypatch.setattr(data.Pairs, "read", lambda self, v, *_: data.decode(self.files[0].decode(), [0]))
    sentence = fails(pretrain.main, words(copy, tmp_path / "out", "--workers", 1))
    assert re.fullmatch(r"\S+: error: 10 videos in a row are unreadable, the last: .*: No such file or directory",
                        sentence)


# ---------------------------------------------------------------------- numbers


@pytest.fixture
def network(monkeypatch):
    """network[0]: the model that pretrain.main or finetune.main trains."""
    made, build, head = [], pretrain.TimeEquivariant, finetune.classifier
    monkeypatch.setattr(pretrain, "TimeEquivariant", lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(finetune, "classifier", lambda *args: made.append(head(*args)) or made[-1])
    return made


@pytest.mark.parametrize("name, said", [
    ("speed", r"the loss is not finite: loss nan, inst [\d.]+, equi [\d.]+, speed nan, di"),
    ("psi", "similarities are not finite: a feature is NaN")])
def test_a_loss_that_is_not_finite_stops_with_step_terms_and_videos_and_keeps_the_checkpoint(
        world, tmp_path, network, at_step, name, said):
    at_step(4, lambda: torch.nn.init.constant_(network[0].heads[name][-1].weight, float("nan")))
    with pytest.raises(ValueError, match=f"^step 5: {said}") as caught:
        train(world, tmp_path)
    assert len(set(re.findall(r"v_\w+\.avi", str(caught.value)))) == 8 and "is from before" in str(caught.value)
    assert stored(tmp_path)["step"] == 3


def test_fine_tuning_stops_at_a_loss_that_is_not_finite_too(world, whole, tmp_path, network, at_step):
    at_step(2, lambda: torch.nn.init.constant_(network[0][-1].weight, float("inf")))
    with pytest.raises(ValueError, match=r"^step 3: the loss is not finite: loss nan \(.*the videos: ") as caught:
        finetune.main(judging("finetune", world, whole, tmp_path, "--batch-size", 8, "--epochs", 2))
    assert len(set(re.findall(r"v_\w+\.avi", str(caught.value)))) == 8


def test_weights_and_statistics_that_are_not_finite_are_never_saved(world, tmp_path, network, at_step):
    at_step(3, lambda: network[0].backbone.stem[1].running_var.fill_(float("inf")))   # training does not use it
    with pytest.raises(ValueError, match="^step 3: 1 weights are not finite, the first backbone.stem.1.running_var"):
        train(world, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "backbone.pt").exists()


def test_an_fp16_step_that_overflows_is_left_out_and_logged(world, tmp_path, monkeypatch):
    monkeypatch.setitem(common.AMP, "fp16", torch.bfloat16)                     # fp16 is very slow on CPUs
    train(world, tmp_path, "--amp", "fp16", "--epochs", 1)
    assert [(line["overflow"], line["loss_scale"]) for line in lines(tmp_path)] == [(0, 65536)] * 3
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, expected in ((float("inf"), dict(overflow=1, loss_scale=1)), (1, dict(overflow=0, loss_scale=1))):
        before = weight.item()
        scaler.scale((weight * factor).sum()).backward()
        assert common.step_scaled(scaler, optimizer, weight.sum()) == expected
        assert (weight.item() == before) == (expected["overflow"] == 1)
        optimizer.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert common.step_scaled(off, optimizer, weight.sum()) == {}


@pytest.mark.parametrize("terms", [("inst", "speed"), ("speed",)])              # step 6 raises an error, or is done
def test_the_first_step_that_was_not_finite_is_named_when_others_followed_it(world, tmp_path, network, at_step, terms):
    at_step(4, lambda: torch.nn.init.constant_(network[0].heads["speed"][-1].weight, float("nan")))
    said = r"^step 5: the loss is not finite: loss nan, (inst [\d.]+, )?speed nan "
    with pytest.raises(ValueError, match=said) as caught:
        train(world, tmp_path, "--log-every", 1000, "--losses", *terms)
    paths = [listed(v) for v in data.epoch_order(0, 1, 24)[8:16]]               # epoch 1, second batch
    assert sorted(re.findall(r"\w+/v_\w+\.avi", str(caught.value))) == sorted(paths)
    assert stored(tmp_path)["step"] == 3


# ---------------------------------------------------------------------- waiting for the device


class NoBlockingCopies(torch.overrides.TorchFunctionMode):
    """Refuses copies to the device that are waited for: not non_blocking, or made there of Python's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result, kwargs = function(*args, **(kwargs or {})), kwargs or {}
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.to, torch.Tensor.new_tensor) and result.is_meta:
            there = function is torch.Tensor.to and (args[0].is_meta or kwargs.get("non_blocking"))
            assert there, f"{function} copies and waits"
        return result


@pytest.mark.parametrize("script, flags", [
    ("pretrain", ()), ("pretrain", ("--accumulate", 2)), ("pretrain", ("--losses", "inst", "distinct", "speed")),
    ("finetune", ())])
def test_steps_between_log_lines_do_not_wait_for_the_device(world, whole, tmp_path, monkeypatch, script, flags):
    """A tensor on torch's device "meta" has no value: what needs one, and so would wait, raises NotImplementedError."""
    for module in (pretrain, finetune):
        monkeypatch.setattr(module, "init_distributed", lambda: (0, 1, torch.device("meta")))
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())    # there is none for meta
    done, wait_for, steps, modes = common.Progress.done, common.Progress.wait_for, [], contextlib.ExitStack()

    def wait_and_watch(*args):
        if not steps:
            modes.enter_context(NoBlockingCopies())
        return wait_for(*args)

    def done_and_count(self, step, *args, **values):
        steps.append(step)
        return done(self, step, *args, **values)
    monkeypatch.setattr(common.Progress, "wait_for", wait_and_watch)
    monkeypatch.setattr(common.Progress, "done", done_and_count)
    with modes, pytest.raises(NotImplementedError, match="meta") as caught:
        if script == "pretrain":
            train(world, tmp_path, "--log-every", 2, *flags)
        else:
            finetune.main(judging(script, world, whole, tmp_path, "--batch-size", 8, "--log-every", 2))
    assert steps == [1, 2] and [entry.name for entry in caught.traceback].count("look") == 1


class NoValues(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what makes a number of Python's of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits"
        return function(*args, **(kwargs or {}))


def test_what_the_log_tells_of_fp16_is_not_waited_for():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu")    # fused: as on a GPU
    scaler.scale(weight.sum()).backward()
    with NoValues():
        told = common.step_scaled(scaler, optimizer, weight.sum())
    assert told == dict(overflow=0, loss_scale=65536) and weight.item() < 1


# ---------------------------------------------------------------------- security


def calls(file):
    """(name of a called function as written, {keyword: value}) of every call in a module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_files_are_loaded_without_running_what_is_in_them_and_nothing_goes_through_a_shell():
    loads = 0
    for file in MODULES:
        for name, keywords in calls(file):
            assert name != "torch.load" or keywords["weights_only"] == "True", file
            assert name not in ("np.load", "numpy.load") or keywords.get("allow_pickle", "False") == "False", file
            assert not re.match(r"os\.(system|popen|exec|spawn)|subprocess|pickle|joblib|eval$|exec$|yaml", name), file
            assert "shell" not in keywords, file
            loads += name == "torch.load"
        imported = {alias.name.split(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                    if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        assert not imported & {"pickle", "subprocess", "marshal", "shelve", "joblib"}
    assert loads == 2


class Payload:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_not_run(world, tmp_path, capsys, legacy):
    evil, out = tmp_path / "evil.pt", tmp_path / "out"
    torch.save(dict(step=1, model=Payload(tmp_path / "ran")), evil)
    if legacy:
        evil.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    out.mkdir()
    shutil.copy(evil, out / "checkpoint.pt")
    assert common.load_checkpoint(out / "checkpoint.pt") is None
    assert re.search(r"checkpoint.pt is damaged \(\w+Error\) and passed over", capsys.readouterr().err)
    argv = judging("retrieval", world, tmp_path, out, "--checkpoint", evil)
    assert "is not a file of tensors" in fails(retrieval.main, argv)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):
        torch.load(evil, weights_only=False)                                    # it is a payload
    assert (tmp_path / "ran").exists()


def test_file_names_of_any_bytes_are_trained_on_and_retrieved(world, whole, tmp_path):
    root = tmp_path / "names"
    names = [b"caf\xe9", b"[a] (b) {c}; $(touch x) & '\"`", b"-i", b"concat:x", b"%03d*?", b"new\nline", b"\xff\xfe",
             b" blank "]
    for n, name in enumerate(names):
        folder = root / os.fsdecode((b"-class \xe9", b"[other]")[n % 2])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(sorted((world / "videos" / "Spin").iterdir())[n], folder / os.fsdecode(name + b".avi"))
    train(world, tmp_path / "out", "--dataset", "folder", "--data", root, "--epochs", 1)
    retrieval.main(judging("retrieval", world, whole, tmp_path, "--gallery", root, "--query", root, "--k", 1,
                           "--features", tmp_path / "x.npz", "--picture", tmp_path / "x.png"))
    found = json.loads((tmp_path / "retrieval-folder.json").read_text())["splits"][0]["neighbours"]
    assert {os.path.basename(os.fsencode(path)) for path in found} == {name + b".avi" for name in names}
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert {os.fsencode(str(path)) for path in arrays["query_paths"]} == {os.fsencode(path) for path in found}


# ---------------------------------------------------------------------- wrong invocations


def judging(script, world, whole, out, *more):
    """The command line of a judging script."""
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "videos", "--annotations", world, "--out", out, "--checkpoint",
        whole / "backbone.pt", "--windows", 1, "--workers", 0,
        *(("--crops", "centre") if script == "finetune" else ()), *more)]


def write(file, content):
    """A file with that content, in a folder that may have to be made -> its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    return file


def tensors(file, value):
    torch.save(value, file)
    return file


def lists(here, **changed):
    """Lists of `world` that name its first video alone, for training and test, or have other lines -> their folder."""
    return write_lists(here / "lists", CLASSES, **dict(trainlist01=[listed(0)], testlist01=[listed(0)]) | changed)


def diving(here, content):
    write(here / "Diving48_V2_train.json", content)
    return "--dataset", "diving48", "--annotations", here


def hmdb(here, line):
    write(here / "wave_test_split1.txt", line)
    return "--dataset", "hmdb51", "--annotations", here


def unlabelled(here, frames=60):
    """Two videos without class folders."""
    for name in "ab":
        write_video(here / "plain" / f"{name}.avi", toy_video("Spin", np.random.default_rng(0))[:frames])
    return "--dataset", "folder", "--data", here / "plain"


def empty(here):
    (here / "empty").mkdir()
    return here / "empty"


WRONG = [                                                                       # script, flags (of a folder), sentence
    # flags
    ("pretrain", lambda here: ["--epoch", 3], "unrecognized arguments: --epoch 3"),
    ("pretrain", lambda here: ["--epochs", 0], "--epochs must be at least 1, but is 0"),
    ("pretrain", lambda here: ["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    ("pretrain", lambda here: ["--lr", 0], "--lr must be above 0, but is 0"),
    ("pretrain", lambda here: ["--lr", "nan"], "--lr must be above 0, but is nan"),
    ("pretrain", lambda here: ["--lam", -0.1], "--lam must be above 0, but is -0.1"),
    ("pretrain", lambda here: ["--lam", 1e-9], "step 1: similarities are not finite: .* lam=1e-09 is too small"),
    ("pretrain", lambda here: ["--weight-decay", -1], "--weight-decay must be at least 0, but is -1"),
    ("pretrain", lambda here: ["--weight-decay", "inf"], "--weight-decay must be at most .*, but is inf"),
    ("pretrain", lambda here: ["--warmup-epochs", "inf"], "--warmup-epochs must be at most .*, but is inf"),
    ("pretrain", lambda here: ["--warmup-epochs", "nan"], "--warmup-epochs must be at least 0, but is nan"),
    ("pretrain", lambda here: ["--losses", "inst", "revers"], "argument --losses: invalid choice: 'revers'"),
    ("pretrain", lambda here: ["--losses"], "argument --losses: expected at least one argument"),
    ("pretrain", lambda here: ["--speeds", 0, 1], "--speeds must lie between 1 and 1023"),
    ("pretrain", lambda here: ["--speeds", 30], "shorter than 91 frames.*too few to train on"),
    ("pretrain", lambda here: ["--equivariance", "spatial"], "--equivariance spatial .*--losses inst equi only"),
    ("pretrain", lambda here: ["--accumulate", 3], "--batch-size 8 does not split .* in 3 part.*a multiple of 6"),
    ("pretrain", lambda here: ["--knn-every", 1, *unlabelled(here)], "--knn-every needs labels"),
    ("pretrain", lambda here: ["--log-every", 0], "--log-every must be at least 1, but is 0"),
    ("pretrain", lambda here: ["--seed", -1], "--seed must be at least 0, but is -1"),
    ("pretrain", lambda here: ["--seed", 2 ** 64], f"--seed must be at most {2 ** 63 - 1}, but is {2 ** 64}"),
    ("linear_probe", lambda here: ["--C", "big"], "--C must be a number above 0, or auto"),
    ("linear_probe", lambda here: ["--C", "nan"], "--C must be a number above 0, or auto"),
    ("retrieval", lambda here: ["--k", 0], "--k must be at least 1, but is 0"),
    ("retrieval", lambda here: ["--k", 25], "--k 25 is larger than the gallery, ucf101 train split 1: 24 videos"),
    ("retrieval", lambda here: ["--picture", "sheet.doc"], "--picture must end in .png or .jpg, but is sheet.doc"),
    ("retrieval", lambda here: ["--psi", "psi.pdf"], "--psi must end in .png or .jpg, but is psi.pdf"),
    ("retrieval", lambda here: ["--features", "found.csv"], "--features must end in .npz, but is found.csv"),
    ("retrieval", lambda here: ["--windows", 0], "--windows must be at least 1, but is 0"),
    ("finetune", lambda here: ["--step", 0], "--step must be at least 1, but is 0"),
    ("finetune", lambda here: ["--test", "--batch-size", 8], "--test: .* holds no checkpoint: train f"),
    ("finetune", lambda here: ["--crops", "five"], "argument --crops: invalid choice: 'five'"),
    ("preview", lambda here: ["--group", 15], "--group must lie between 0 and 14, but is 15"),
    # sizes
    ("pretrain", lambda here: ["--frames", 1], "--frames must be at least 2, but is 1"),
    ("pretrain", lambda here: ["--frames", 61], "24 shorter than 61 frames.*too few to train on"),
    ("pretrain", lambda here: ["--size", 7], "--size must be at least 8, but is 7"),
    ("retrieval", lambda here: ["--size", 10 ** 9], "--size must be at most 1024, but is 1000000000"),
    ("pretrain", lambda here: ["--batch-size", 7], "--batch-size 7 does not split .*a multiple of 2"),
    ("pretrain", lambda here: ["--batch-size", 26], "--batch-size 26 is larger than the 24 usable videos"),
    ("pretrain", lambda here: ["--arch", "s3dg"], "--arch s3dg needs --frames above 4 and --size above 16, but they"),
    ("retrieval", lambda here: ["--checkpoint", "random", "--arch", "s3dg", "--frames", 4], "--arch s3dg needs --f"),
    ("finetune", lambda here: ["--batch-size", 1], "--batch-size 1 gives 1 process.* fewer than two videos each"),
    ("finetune", lambda here: ["--batch-size", 25], "--batch-size 25 is larger than the 24 usable videos"),
    ("pretrain", lambda here: unlabelled(here, 3), "2 shorter than 4 frames: a.avi, b.avi; too few to train on"),
    # paths
    ("pretrain", lambda here: ["--data", here / "none"], "the video folder .*none does not exist"),
    ("pretrain", lambda here: ["--data", write(here / "a.avi", "")], "the video folder .*a.avi is a file"),
    ("pretrain", lambda here: ["--dataset", "toy", "--data", empty(here)], "empty is there, but is not the toy set"),
    ("pretrain", lambda here: ["--index", write(here / "list.txt", "a 1")], "list.txt is no index of a scan"),
    ("pretrain", lambda here: ["--index", write(here / "V2.json", '[{"vid_name": "a"}]')], "V2.json is no index of"),
    ("pretrain", lambda here: ["--dataset", "folder", "--data", empty(here)], "looked for videos in .*empty, found 0"),
    ("pretrain", lambda here: ["--out", write(here / "taken", "")], r"cannot write .*taken/.* \(--out\): File exists"),
    ("linear_probe", lambda here: ["--out", write(here / "taken", "")], r"cannot write .*taken.* \(--out\): File ex"),
    ("finetune", lambda here: ["--batch-size", 8, "--out", write(here / "taken", "")], r"taken.* \(--out\): Not a dir"),
    ("retrieval", lambda here: ["--features", write(here / "a", "").parent / "a/b.npz"], r"b.npz \(--features\): F"),
    ("pretrain", lambda here: ["--index", here], r"cannot write .*: Is a directory; give another --index"),
    ("retrieval", lambda here: ["--gallery", here / "none"], "there is no folder .*none; a gallery or query is"),
    ("retrieval", lambda here: ["--query", here], "looked for videos in .*, found 0"),
    ("retrieval", lambda here: ["--query", here, "--dataset", "toy"], "one is a folder, the other part of the toy set"),
    ("preview", lambda here: ["--out", here / "figure"], "--out must end in .png or .jpg, but is"),
    ("preview", lambda here: ["--out", write(here / "a", "") / "b.png"], "File exists|Not a directory"),
    # lists
    ("pretrain", lambda here: ["--annotations", here / "none"],
     "no list trainlist01.txt in .*none.* \\(--annotations\\)"),
    ("pretrain", lambda here: ["--annotations", lists(here, classInd=["Spin"])],
     "classInd.txt, line 1: 'Spin' is not understood; expected is a number and"),
    ("pretrain", lambda here: ["--annotations", lists(here, trainlist01=[])], "the list .*trainlist01.txt is empty"),
    ("pretrain", lambda here: ["--annotations", lists(here, trainlist01=["Fly/a.avi"])], "is of class 'Fly', which"),
    ("pretrain", lambda here: ["--annotations", lists(here, trainlist01=["Spin/none.avi"])],
     "looked for 1 listed videos in .*, found 0; the first missing: Spin/none.avi"),
    ("finetune", lambda here: ["--annotations", lists(here, trainlist01=["../a.avi"])],
     "names '../a.avi', which lies outside"),
    ("pretrain", lambda here: ["--annotations", lists(here)], "1 videos.*, 1 usable; too few to train on"),
    ("linear_probe", lambda here: ["--annotations", lists(here)], "1 of 1 test videos are training videos too"),
    ("pretrain", lambda here: hmdb(here, "one.avi\n"), "wave_test_split1.txt, line 1: 'one.avi' is not understood"),
    ("pretrain", lambda here: diving(here, "[{"), "V2_train.json is not a list of objects with vid_name and label"),
    ("pretrain", lambda here: diving(here, '[{"vid_name": "a"}]'), "V2_train.json, entry 1: {'vid_name': 'a'}"),
    ("pretrain", lambda here: diving(here, "7"), "V2_train.json is not a list of .*, but 7"),
    ("pretrain", lambda here: diving(here, '[{"vid_name": "a", "label": 48}]'), "is of class '48', which the list of"),
    # splits
    ("pretrain", lambda here: ["--split", 4], "argument --split: invalid choice: 4"),
    ("pretrain", lambda here: ["--split", 2], "no list trainlist02.txt"),
    ("pretrain", lambda here: ["--dataset", "diving48", "--split", 2], "diving48 has one split, 1, but --split is 2"),
    ("finetune", lambda here: ["--split", 1, 3], "no list trainlist03.txt"),
    ("linear_probe", lambda here: unlabelled(here), "has no labels to learn"),
    # checkpoints
    ("finetune", lambda here: ["--checkpoint", here / "none.pt"], "there is no file .*none.pt"),
    ("retrieval", lambda here: ["--checkpoint", here], "is a folder: give a file in it, such as backbone.pt"),
    ("retrieval", lambda here: ["--checkpoint", write(here / "a.pt", "text")], "a.pt is not a file of tensors"),
    ("retrieval", lambda here: ["--arch", "s3dg"], "backbone.pt holds r3d18_narrow, but arch is s3dg"),
    ("retrieval", lambda here: ["--checkpoint", tensors(here / "a.pt", {3: torch.ones(1)})], "a.pt holds no state"),
    ("retrieval", lambda here: ["--checkpoint", tensors(here / "a.pt", dict(args=[1], backbone={"a": torch.ones(1)}))],
     "a.pt holds no state dict"),
    ("linear_probe", lambda here: ["--checkpoint", tensors(here / "a.pt", {"a": torch.ones(1)})],
     "does not say which network it holds: give arch, one of"),
    ("pretrain", lambda here: ["--out", tensors(here / "checkpoint.pt", {"a": torch.ones(1)}).parent],
     "checkpoint.pt is not a checkpoint of this script: give another --out"),
    # devices
    ("pretrain", lambda here: ["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    ("pretrain", lambda here: ["--workers", -1], "--workers must be at least 0, but is -1"),
    pytest.param("pretrain", lambda here: ["--sync-bn"], "--sync-bn needs GPUs", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
]


@pytest.mark.parametrize("script, flags, said", WRONG)
def test_a_wrong_invocation_ends_in_one_sentence(world, whole, tmp_path, monkeypatch, capsys, script, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    more = flags(tmp_path / "here")
    if script == "preview":
        main, argv = data.preview, ["--dataset", "folder", "--data", world / "videos", "--frames", 4, *more]
    elif script == "pretrain":
        main, argv = pretrain.main, words(world, tmp_path / "out", *more)
    else:
        main, argv = SCRIPTS[script].main, judging(script, world, whole, tmp_path / "out", *more)
    code = fails(main, argv)
    error = capsys.readouterr().err.splitlines()[-1] if code == "2" else code   # 2: argparse has said it
    assert ": error: " in error and re.search(said, error), error


def test_the_table_has_at_least_forty_wrong_invocations_of_all_five_scripts():
    rows = [getattr(row, "values", row) for row in WRONG]
    assert len(rows) >= 40 and {row[0] for row in rows} == {*SCRIPTS, "preview"}


def test_data_py_as_a_script_ends_in_one_sentence_too(copy, tmp_path, monkeypatch):
    argv = ["data.py", "preview", "--dataset", "folder", "--data", str(copy / "videos"), "--frames", "4", "--size",
            "16", "--workers", "0", "--index", str(tmp_path / "index.json"), "--out",
            str(tmp_path / "new" / "figure.png")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    assert (tmp_path / "new" / "figure.png").stat().st_size > 1000
    for file in copy.rglob("*.avi"):                                            # broken, but of the same size and time
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SystemExit, match="^data.py: error: 10 videos in a row are unreadable, the last: .*Invalid"):
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")


def test_each_row_of_what_happens_when_in_readme_is_backed_by_a_test():
    table = (ROOT / "README.md").read_text().split("## What happens when")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][1:]
    tests = {node.name for file in (ROOT / "tests").glob("test_*.py") for node in ast.parse(file.read_text()).body
             if isinstance(node, ast.FunctionDef)}
    named = [re.findall(r"`(test_\w+)`", row.split(" | ")[2]) for row in rows]
    assert len(rows) > 9 and all(named) and len(sum(named, [])) > 20 and set(sum(named, [])) <= tests


@pytest.mark.parametrize("argv", [[], ["--help"], ["count"]])
def test_data_py_without_a_command_says_which_there_are(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["data.py", *argv])
    with pytest.raises(SystemExit, match="^usage: python data.py {preview"):
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
