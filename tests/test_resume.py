"""A run that is killed, stopped or out of disk resumes bit for bit: equal weights on a CPU."""
import contextlib
import fcntl
import io
import itertools
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    STEPS,
    after_step,
    drifting,
    evaluation_words,
    fails,
    load_checkpoint,
    log_lines,
    official,
    start,
    train,
    words,
    write_video,
)

import data
import finetune
import linear_probe
import pretrain
from common import UserError, evaluation, splits, toy, training
from common.distributed import STOP, run
from common.training import Progress, locked, resume, save_file
from common.video import decode
from models import LOSSES


def same(one, other):
    """Whether two checkpoints have the same step, weights and moments, bit for bit."""
    moments = []
    for checkpoint in (one, other):
        states = checkpoint["optimizer"]["state"].values()
        moments.append(torch.cat([x.flatten() for state in states for x in state.values()]))
    return (one["step"] == other["step"] == STEPS and torch.equal(*moments)
            and all(torch.equal(x, other["model"][name]) for name, x in one["model"].items()))


# ---- Killed and stopped ----

def train_until_killed(argv, step):
    after_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    pretrain.main(argv)


@pytest.mark.parametrize("step, save_every", [(2, 1000), (6, 0)])           # resumes at 0, 5
def test_a_killed_run_resumes_bit_for_bit_with_other_workers(
        world, whole, tmp_path, step, save_every):
    argv = words(world, tmp_path, "--save-every", save_every)
    process = start(tmp_path / "printed", train_until_killed, argv, step)
    process.join(120)
    process.kill()                                      # if it hangs
    assert process.exitcode == -signal.SIGKILL
    if save_every == 0:
        assert load_checkpoint(tmp_path)["step"] == step - 1
    else:
        assert not (tmp_path / "checkpoint.pt").exists()
    with open(tmp_path / "log.jsonl", "a") as log:      # a step that is taken again, half a line
        log.write(f'{{"step": {step}}}\n{{"st')
    assert same(train(world, tmp_path, "--workers", 2), load_checkpoint(whole))
    losses = [[line["loss"] for line in log_lines(out)] for out in (tmp_path, whole)]
    assert losses[0] == losses[1]


def test_a_run_with_init_resumes_with_what_it_has_learned(world, whole, tmp_path, at_step):
    init = "--init", whole / "backbone.pt"
    expected = train(world, tmp_path / "whole", *init)
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="SIGTERM: saved step 4 of 9"):
        train(world, tmp_path / "stopped", *init)
    assert same(train(world, tmp_path / "stopped", *init), expected)


def train_until_signalled(argv, number):
    """The signal comes while the run waits for its fifth batch; the loader process gets it, too."""
    def slow_decode(*args):
        time.sleep(0.2 * (next(calls) >= 4 * 8))        # of eight videos a batch
        return decode(*args)
    calls = itertools.count()
    data.decode = slow_decode
    os.setpgrp()                                        # as terminals do
    sys.stderr.isatty = lambda: True                    # so that there is a bar
    after_step(4, threading.Timer(0.15, os.killpg, [0, number]).start)
    run(lambda: pretrain.main(argv))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_signal_saves_the_step_in_hand_and_ends_in_a_sentence_below_the_bar(
        world, whole, tmp_path, name):
    argv = words(world, tmp_path, "--save-every", 1000, "--log-every", 1000, "--workers", 1)
    process = start(tmp_path / "printed", train_until_signalled, argv, signal.Signals[name])
    process.join(120)
    process.kill()                                      # if it hangs
    assert process.exitcode == 1
    # a bar that is not closed ends in no "\n", one that is drawn again follows
    *_, bar, last, end = (tmp_path / "printed").read_text().split("\n")
    assert "| 5/9 [" in bar and end == ""
    assert last == f"{name}: saved step 5 of 9; the same command resumes"
    assert load_checkpoint(tmp_path)["step"] == 5
    assert same(train(world, tmp_path), load_checkpoint(whole))


def test_after_training_signals_act_as_before(world, tmp_path):
    before = [signal.getsignal(number) for number in STOP]
    train(world, tmp_path, "--epochs", 1)
    assert [signal.getsignal(number) for number in STOP] == before


def test_under_nohup_a_closed_terminal_stops_nothing(world, tmp_path, at_step):
    at_step(2, lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)               # as nohup does
    try:
        assert train(world, tmp_path, "--epochs", 1)["step"] == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_during_the_scan_ends_it_in_one_sentence(world, tmp_path, monkeypatch):
    def interrupted_probe(path):
        probed.append(path)
        if len(probed) == 3:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        return probe(path)
    probed, probe = [], splits.probe
    monkeypatch.setattr(splits, "probe", interrupted_probe)
    message = fails(pretrain.main, words(world, tmp_path / "out", "--index", tmp_path / "index"))
    assert message == "SCRIPT: interrupted" and len(probed) < 24


def test_ctrl_c_during_an_evaluation_ends_it_in_a_sentence_below_the_bar(
        world, checkpoint, tmp_path, monkeypatch, capsys):
    def exit(sentence):
        before.append(capsys.readouterr().err)
        raise SystemExit(sentence)
    before = []
    monkeypatch.setattr(evaluation, "views_of", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(sys, "exit", exit)
    argv = evaluation_words(world, checkpoint, tmp_path)
    assert fails(linear_probe.main, argv) == "SCRIPT: interrupted"
    assert before[0].endswith("\n")                     # a bar that is not closed ends in no "\n"
    assert capsys.readouterr().err == ""                # nor is it drawn again


def test_a_toy_set_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def write_video_and_interrupt(*args, **kwargs):
        write_video(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
    write_video = toy.write_video
    monkeypatch.setattr(toy, "write_video", write_video_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy.make_toy(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, folder", [(pretrain, "."), (finetune, "finetune-ucf101-2x-1")])
def test_a_second_run_into_an_out_is_refused_until_the_first_ends(
        world, checkpoint, tmp_path, script, folder):
    more = "--epochs", 1, "--batch-size", 8, "--workers", 1         # a worker outlives a killed run
    argv, out = words(world, tmp_path, *more), tmp_path / folder
    if script is finetune:
        argv = evaluation_words(world, checkpoint, tmp_path, *more)
    command = [sys.executable, script.__file__, *argv, "--epochs", "10000", "--log-every", "1"]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not (out / "log.jsonl").exists() or not log_lines(out):
            assert first.poll() is None                     # it runs until it is killed
            time.sleep(0.05)
        message = fails(script.main, argv)
    finally:
        first.kill()
        first.wait()
    assert message.startswith(f"SCRIPT: error: cannot lock {out / 'lock'}, another run may be")
    with locked(out):
        pass


# ---- Checkpoints ----

def test_a_full_disk_keeps_the_checkpoint_before(world, whole, tmp_path, at_step):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(5, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard)))
    try:
        with pytest.raises((OSError, RuntimeError)):    # the kernel cuts files at 200 kB
            train(world, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path)["step"] == 4
    assert same(train(world, tmp_path), load_checkpoint(whole))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["writing", "flushing", "renaming"])
def test_killed_at_any_moment_of_saving_the_checkpoint_before_is_whole(
        tmp_path, monkeypatch, moment):
    def write_half(content, file):
        file.write(path.read_bytes()[:100])
        raise Killed

    def die(*_):
        raise Killed
    path = tmp_path / "checkpoint.pt"
    save_file(path, step=1)
    faults = dict(writing=(torch, "save", write_half), flushing=(os, "fsync", die),
                  renaming=(Path, "replace", die))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*faults[moment])
        save_file(path, step=2)
    assert torch.load(path, weights_only=True) == dict(step=1)
    save_file(path, step=2)
    assert torch.load(path, weights_only=True) == dict(step=2)


def test_checkpoints_are_save_every_seconds_apart_at_any_step_and_at_the_end(
        world, tmp_path, monkeypatch, at_step):
    clock, saved = [0.0], []
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: sum(clock)))
    monkeypatch.setattr(pretrain, "save", lambda out, args, step, **_: saved.append(step))
    for n in range(STEPS):
        at_step(n + 1, lambda: clock.append(10))        # a step takes 10 seconds
    pretrain.main(words(world, tmp_path, "--save-every", 35))
    assert saved == [4, 8, 9]


def test_keep_every_keeps_backbones_of_those_steps(world, tmp_path):
    train(world, tmp_path, "--epochs", 1, "--keep-every", 2, "--save-every", 1000)
    last, kept = (torch.load(tmp_path / f"{name}.pt", weights_only=True)["backbone"]
                  for name in ("backbone", "backbone-2"))
    assert len(list(tmp_path.glob("backbone*"))) == 2
    assert not torch.equal(kept["layer4.1.conv2.0.weight"], last["layer4.1.conv2.0.weight"])


# ---- What belongs to a run ----

MAY_CHANGE = {                                          # none of them changes a number of training
    "data", "annotations", "index", "workers", "compile", "out", "log_every", "save_every",
    "keep_every", "tensorboard", "windows", "crops"}


def test_a_run_resumes_only_with_arguments_and_processes_of_the_same_training(
        whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "out")
    args = {name: getattr(finetune.parse_args([]), name) for name in ("windows", "crops")}
    args |= load_checkpoint(out)["args"]
    del args["processes"]
    for name in args:
        changed = args | {name: "another"}
        if name in MAY_CHANGE:
            assert resume(out, changed) == STEPS
        else:
            with pytest.raises(UserError, match=rf"of another run \({name} .* -> another\)"):
                resume(out, changed)
    monkeypatch.setattr(training, "rank_and_world", lambda: (0, 2))
    with pytest.raises(UserError, match=r"is of another run \(processes 1 -> 2\)"):
        resume(out, args)


@pytest.mark.parametrize("script", [pretrain, finetune])
def test_a_run_resumes_only_with_the_videos_it_began_with(
        world_copy, checkpoint, tmp_path, script):
    videos, path = world_copy / "UCF-101", official(1, "train")[5]
    argv = words(world_copy, tmp_path / "out")
    if script is finetune:
        argv = evaluation_words(world_copy, checkpoint, tmp_path / "out", "--batch-size", 8)
    script.main([*argv, "--epochs", "1"])
    videos.rename(world_copy / "moved")
    moved = "--epochs", "1", "--data", str(world_copy / "moved")
    script.main([*argv, *moved])                        # the same videos
    (world_copy / "moved" / path).unlink()
    assert "(videos 24 -> 23, names_and_frames " in fails(script.main, [*argv, *moved])
    write_video(world_copy / "moved" / path, drifting(30))
    assert "of another run (names_and_frames " in fails(script.main, [*argv, *moved])


def test_without_a_rank_a_world_size_is_not_torchruns(world, whole, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    assert same(train(world, tmp_path / "out"), load_checkpoint(whole))
    assert "--batch-size 7" in fails(pretrain.main, words(world, tmp_path, "--batch-size", 7))


def print_progress(out, monkeypatch, stderr):
    """What a run of two days prints."""
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", "a b", "--lr", "1e-3"])
    args = Namespace(log_every=1, save_every=60, lr=1e-3, epochs=400)
    with Progress(out, 0, 199600, 50, 10 ** 4, args, torch.device("cpu")) as progress:
        progress.begun -= 2 * 86400
        progress.bar.start_t = time.time() - 2 * 86400
        for n in range(2):
            progress.since -= 1
            terms = {name: torch.tensor(3.14159 - n) for name in ("loss", *LOSSES)}
            progress.log(19999 + n, 1e-3, **terms)
        progress.bar.update(20000)


def test_the_bar_fits_80_columns_with_loss_speed_and_waiting(tmp_path, monkeypatch):
    here, there = os.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(there, "w") as terminal:
        print_progress(tmp_path, monkeypatch, terminal)
    printed = b""
    with contextlib.suppress(OSError):                  # read to the end: the terminal is closed
        while part := os.read(here, 10 ** 5):
            printed += part
    first, bars = printed.decode().replace("\r\n", "\n").split("\n", 1)
    assert first.endswith("1 cpu process(es); arguments: --out 'a b' --lr 1e-3")
    last = bars.rstrip("\n").split("\r")[-1]
    assert re.search(r"loss=2.14, clips/s=\d+, wait=0%\]$", last) and "| 20000/199600 [48:" in last
    assert max(map(len, bars.split("\r"))) <= 80


def test_a_file_gets_a_line_for_each_line_of_the_log_and_no_bar(tmp_path, monkeypatch):
    stderr = io.StringIO()
    print_progress(tmp_path, monkeypatch, stderr)
    printed = stderr.getvalue()
    _, *lines = printed.splitlines()
    assert [line.split(", clips/s=")[0] for line in lines] == [
        "step 19999 of 199600: loss=3.14", "step 20000 of 199600: loss=2.14"]
    assert all(re.search(r", wait=0%, left=4\d\d:", line) for line in lines) and "\r" not in printed


def test_the_time_left_is_that_of_steps_since_the_start(tmp_path, monkeypatch):
    clock = Mock(return_value=0)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=clock))
    with Progress(tmp_path, 4, 9, 3, 16, Namespace(log_every=1), torch.device("cpu")) as progress:
        clock.return_value = 10
        progress.log(5, 1e-3, loss=torch.ones(()))
    assert log_lines(tmp_path)[0]["left_s"] == 40


@pytest.mark.parametrize("gpu_has_work", [None, False, True])                   # None: no GPU
def test_time_counts_as_waiting_for_data_unless_the_gpu_has_work(tmp_path, gpu_has_work):
    def slow_loader():
        for _ in range(2):
            time.sleep(0.05)
            yield {}
    args = Namespace(log_every=10, save_every=60)
    with Progress(tmp_path, 0, 2, 2, 4, args, torch.device("cpu")) as progress:
        if gpu_has_work is not None:
            progress.work = SimpleNamespace(query=lambda: not gpu_has_work)     # a torch.cuda.Event
        assert [step for step, _ in progress.batches(slow_loader())] == [1, 2]
    assert progress.waited == 0 if gpu_has_work else progress.waited > 0.08
