"""A run that is killed, asked to stop, or out of disk goes on as if nothing had happened.

"Bit for bit" means equal weights on a CPU. A run that dies is a process of its own where the kernel kills it, else this
one.
"""
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import STEPS, after_step, fails, judging, lines, start, stored, train, wait_until, words

import finetune
import pretrain
from common import processes, splits, toy
from common.checkpoints import keep_log_until, load_checkpoint, save_checkpoint
from common.progress import Progress


def same(one, other):
    """Bit for bit: the weights, the optimiser's moments, the step."""
    moments = []
    for run in (one, other):
        values = [x.flatten() for state in run["optimizer"]["state"].values() for x in state.values()]
        moments.append(torch.cat(values))
    return (one["step"] == other["step"] == STEPS and torch.equal(*moments)
            and all(torch.equal(value, other["model"][name]) for name, value in one["model"].items()))


def kill(name):
    os.kill(os.getpid(), getattr(signal, name))


def train_and_be_killed(argv, step):
    torch.set_num_threads(1)
    after_step(step, lambda: kill("SIGKILL"))
    pretrain.main(argv)


# ---- Killed, and asked to stop ----

@pytest.mark.parametrize("step", [2, 5])                                        # before any checkpoint, and mid-epoch
def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one_with_other_workers(world, whole, tmp_path, step):
    process = start(train_and_be_killed, words(world, tmp_path), step)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "checkpoint.pt").exists() == (step > 3)
    assert same(train(world, tmp_path, "--workers", 2), stored(whole))
    assert [line["loss"] for line in lines(tmp_path)] == [line["loss"] for line in lines(whole)]


@pytest.mark.parametrize("name, workers", [("SIGTERM", 0), ("SIGUSR1", 1), ("SIGINT", 0)])
def test_a_signal_makes_a_checkpoint_at_once_and_the_resumed_run_is_bit_for_bit(world, whole, tmp_path, at_step, name,
                                                                               workers):
    at_step(4, lambda: kill(name))                                              # mid-epoch, and no line would be due
    with pytest.raises(SystemExit, match=f"^{name}: saved step 4 of 9; the same command goes on from there$"):
        train(world, tmp_path, "--log-every", 1000, "--workers", workers)       # a message is exit status 1
    assert stored(tmp_path)["step"] == 4
    assert same(train(world, tmp_path, "--workers", 1), stored(whole))


def test_ctrl_c_outside_training_ends_in_one_sentence_and_leaves_no_scan_behind(world, tmp_path, monkeypatch):
    def examine(path):
        seen.append(path)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        return real(path)
    seen, real = [], splits.examine
    monkeypatch.setattr(splits, "examine", examine)
    said = fails(pretrain.main, words(world, tmp_path / "out", "--index", tmp_path / "index.json"))
    assert said == "SCRIPT: interrupted" and len(seen) < 24


def test_a_toy_set_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def write_video_and_interrupt(*args, **kwargs):
        write_video(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
    write_video = toy.write_video
    monkeypatch.setattr(toy, "write_video", write_video_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy.make_toy(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, folder", [(pretrain, "."), (finetune, "finetune-ucf101-4x-1")])
def test_a_second_run_into_an_out_is_refused_until_the_first_is_gone(
        world, whole, tmp_path, script, folder):
    more = "--epochs", 1, "--batch-size", 8, "--workers", 1         # a worker outlives a killed run
    argv, out = words(world, tmp_path, *more), tmp_path / folder
    if script is finetune:
        argv = judging("finetune", world, whole, tmp_path, *more)
    command = [sys.executable, script.__file__, *argv, "--epochs", "10000"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (out / "log.jsonl").exists() and lines(out), first)
        said = fails(script.main, argv)
    finally:
        first.kill()
        first.wait()
    assert said.startswith(f"SCRIPT: error: another run is writing to {out}: ")
    with processes.locked(out):
        pass


# ---- Checkpoints ----

def test_a_full_disk_ends_the_run_in_one_sentence_and_the_old_checkpoint_stays_whole(world, whole, tmp_path, at_step):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1])))    # the kernel cuts files there
    try:
        with pytest.raises(OSError, match=r"^cannot write .*point.pt \(disk full\?\): .*the one before it.* is whole"):
            train(world, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stored(tmp_path)["step"] == 3 and not list(tmp_path.glob("*.tmp"))
    assert same(train(world, tmp_path), stored(whole))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_disk_that_is_full_half_way_leaves_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, step=1)

    def half(state, file):
        file.write_bytes(path.read_bytes()[:100])
        raise error
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, step=2)
    assert load_checkpoint(path) == dict(step=1) and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("survived", [0, 1, 2])                                 # renames
def test_killed_at_any_moment_of_saving_there_is_a_whole_checkpoint(tmp_path, monkeypatch, survived, damaged):
    path, replace, renames = tmp_path / "checkpoint.pt", Path.replace, []
    for step in (1, 2):
        save_checkpoint(path, step=step)
    if damaged:                                                                 # the newest, so the run went on from 1
        os.truncate(path, 100)

    def rename_or_die(*args):
        if len(renames) == survived:
            raise KeyboardInterrupt
        renames.append(args)
        return replace(*args)
    monkeypatch.setattr(Path, "replace", rename_or_die)
    try:
        save_checkpoint(path, step=3)
    except KeyboardInterrupt:
        pass
    steps = {0: 1 if damaged else 2, 1: 3 if damaged else 2, 2: 3}
    assert load_checkpoint(path) == dict(step=steps[survived])


@pytest.mark.parametrize("keep", [0, 0.5, 0.999])
def test_a_truncated_newest_checkpoint_is_named_and_the_one_before_it_is_taken(world, whole, tmp_path, capsys, keep):
    out = shutil.copytree(whole, tmp_path / "out")
    os.truncate(out / "checkpoint.pt", int((out / "checkpoint.pt").stat().st_size * keep))
    if keep == 0.5:                                                             # all the way once
        assert same(train(world, out), stored(whole))
        said = capsys.readouterr().err
        assert f"{out}: goes on at step 6 of 9" in said
    else:
        assert load_checkpoint(out / "checkpoint.pt")["step"] == 6
        said = capsys.readouterr().err
    assert re.search(r"checkpoint.pt is damaged \(\w+\) and passed over", said)


def test_a_checkpoint_is_written_at_the_end_of_an_epoch_but_not_more_often_than_asked(world, tmp_path, at_step):
    at_step(8, lambda: (tmp_path / "seen").write_text(str((tmp_path / "checkpoint.pt").exists())))
    assert train(world, tmp_path, "--save-every", 600)["step"] == STEPS         # after 3 and 6 steps none was due
    assert (tmp_path / "seen").read_text() == "False" and not (tmp_path / "checkpoint.previous.pt").exists()


# ---- What belongs to a run ----

def test_a_checkpoint_of_other_arguments_is_not_continued(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    with pytest.raises(ValueError, match="holds another run's checkpoint .*lam 0.1 -> 0.2"):
        train(world, out, "--lam", 0.2)


def test_another_number_of_processes_is_refused_with_the_reason(world, whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "out")
    torch.save(stored(out) | dict(world=2), out / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"processes 2 -> 1.* BatchNorm makes the number of processes matter\)"):
        train(world, out)


def test_a_log_with_a_cut_or_foreign_line_does_not_stop_a_run_from_going_on(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "name": "a}\n[3]\n{"loss": 1}\n\xff\n{"step": 2}\n{"step": 3}\n{"st')
    keep_log_until(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("gpu_has_work", [None, False, True])                   # None: there is no GPU
def test_time_counts_as_waiting_for_data_unless_the_gpu_has_work(tmp_path, gpu_has_work):
    def slow():
        for _ in range(2):
            time.sleep(0.05)
            yield dict(video=torch.arange(2), failed=[])
    args = Namespace(log_every=10, save_every=60, epochs=1)
    progress = Progress(tmp_path, ["a", "b"], 0, 2, 2, 4, args, torch.device("cpu"))
    if gpu_has_work is not None:
        progress.work = SimpleNamespace(query=lambda: not gpu_has_work)         # as a torch.cuda.Event
    assert [step for step, _ in progress.batches(slow())] == [1, 2]
    assert (progress.waited > 0.08) == (not gpu_has_work) and (progress.waited == 0) == (gpu_has_work is True)
