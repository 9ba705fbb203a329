"""Machines that people have: little shared memory, stalled disks, macOS; and what processes leave open."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import pretrain
from common import flags, loading, processes, progress
from conftest import ROOT, fails, free_port, stored, together, train, wait_until, words


def in_a_small_machine():
    """Words that start a command where /dev/shm holds 64 kB, in a mount namespace of its own."""
    mount = "mount -t tmpfs -o size=64k tmpfs /dev/shm && exec \"$@\""
    return ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, ROOT / "pretrain.py"]


def can_unshare():
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],
                          capture_output=True).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs a mount namespace of its own")
def test_a_small_dev_shm_ends_in_a_sentence_and_without_workers_the_run_works(world, tmp_path):
    more = ("--size", 48, "--frames", 8, "--epochs", 1)                         # 0.9 MB a batch
    run = [*in_a_small_machine(), *words(world, tmp_path / "out", *more)]
    run[run.index("--workers") + 1] = "2"
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "/dev/shm" in last and "MB)" in last and "--shm-size" in last and "--workers 0" in last
    run[run.index("--workers") + 1] = "0"
    done = subprocess.run(run, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def stall(folder):
    """Turn every video into a pipe that nobody writes to: to open it takes for ever, as on a network disk that is gone.
    """
    for file in folder.rglob("*.avi"):
        pipe = file.with_suffix(".pipe")
        os.mkfifo(pipe)
        pipe.replace(file)


def test_a_wish_to_stop_is_answered_while_a_batch_is_waited_for(copy_of_world, tmp_path):
    out = tmp_path / "out"
    argv = [sys.executable, ROOT / "pretrain.py", *words(copy_of_world, out, "--workers", 1, "--epochs", 10000)]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = out / "log.jsonl"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, process)
    stall(copy_of_world)
    size = -1
    while size != log.stat().st_size:                                           # what was read before is used up
        size = log.stat().st_size
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    last = [json.loads(line) for line in log.read_text().splitlines()][-1]["step"]
    assert process.returncode == 1 and "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"SIGTERM: saved step {last} of")   # below the bar
    assert stored(out)["step"] == last


class Stalled(torch.utils.data.Dataset):
    """What never gives anything."""

    def __len__(self):
        return 1

    def __getitem__(self, k):
        time.sleep(60)


def test_a_loader_that_gives_nothing_in_time_ends_in_one_sentence(monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE", 0.1)
    batches = loading.load(Stalled(), 1)
    with pytest.raises(ValueError, match="no batch came from the loader processes.*--workers 0"):
        next(batches)
    processes.end_loader_processes()


@pytest.mark.parametrize("words, part", (
    ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
     "shared memory. Please try to raise your shared memory limit.", "--shm-size"),
    ("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)", "--workers 0"),
    ("DataLoader timed out after 600 seconds", "no batch came"),
    ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
    ("DataLoader worker (pid(s) 12) exited unexpectedly", "memory full?")))
def test_what_stops_loader_processes_is_said_in_one_sentence_with_a_way_out(words, part):
    said = loading.loader_problem(words)
    assert part in said and "\n" not in said


def test_any_other_error_of_a_loader_stays_what_it_is():
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, k):
            raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake in the code"):
        next(loading.load(Broken(), 1))


def test_nothing_that_macos_lacks_is_needed(world, tmp_path, monkeypatch):
    for name in ("sched_getaffinity", "sched_setaffinity", "preadv", "pread", "posix_fadvise"):
        monkeypatch.delattr(os, name, raising=False)
    assert flags.default_workers() >= 1
    train(world, tmp_path, "--epochs", 1)
    assert stored(tmp_path)["step"] == 3


def test_peak_memory_is_in_gigabytes_on_macos_too(monkeypatch):
    here = progress.peak_memory(torch.device("cpu"))
    monkeypatch.setattr(sys, "platform", "darwin")                              # counts bytes
    assert 1000 < here / progress.peak_memory(torch.device("cpu")) < 1100


def left_open():
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(os.listdir("/proc/self/task"))


def leaves_nothing(rank):
    torch.distributed.init_process_group("gloo")
    processes.on_first(int, 3)
    before = left_open()
    for _ in range(5):
        assert processes.on_first(int, 7) == 7
    after = left_open()
    assert after[0] <= before[0] + 1 and after[2] <= before[2] + 1, (before, after)


def test_what_the_first_process_does_for_all_leaves_neither_files_nor_threads():
    assert together(2, leaves_nothing) == [0, 0]


def test_ddp_leaves_batchnorms_statistics_to_each_process(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        args = pretrain.parse_args(["--arch", "r3d18_narrow"])
        network = pretrain.wrapped(pretrain.new_model(args, torch.device("cpu")), args, torch.device("cpu"))
        assert network.broadcast_buffers is False
    finally:
        torch.distributed.destroy_process_group()


def test_with_accumulate_the_running_statistics_move_once_a_part(world, tmp_path):
    train(world, tmp_path, "--epochs", 1, "--accumulate", 2)
    tracked = stored(tmp_path)["model"]["backbone.stem.1.num_batches_tracked"]
    assert tracked == 3 * 2                                                     # three steps of two parts


def test_a_run_starts_from_the_weights_that_init_names(world, whole, tmp_path):
    begun = torch.load(whole / "backbone.pt", weights_only=True)["backbone"]
    train(world, tmp_path, "--epochs", 1, "--lr", 1e-12, "--weight-decay", 0, "--init", whole / "backbone.pt")
    ended = torch.load(tmp_path / "backbone.pt", weights_only=True)["backbone"]
    for name, value in begun.items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(ended[name], value)
    assert stored(tmp_path)["args"]["init"] == str(whole / "backbone.pt")
    assert "init" in fails(pretrain.main, words(world, tmp_path, "--epochs", 1, "--lr", 1e-12, "--weight-decay", 0))


def test_init_takes_all_of_f_or_says_which_keys_are_not_there(world, whole, tmp_path):
    stored_weights = torch.load(whole / "backbone.pt", weights_only=True)
    del stored_weights["backbone"]["layer3.1.conv1.0.weight"]
    torch.save(stored_weights, tmp_path / "part.pt")
    said = fails(pretrain.main, words(world, tmp_path / "out", "--init", tmp_path / "part.pt"))
    assert "1 missing (layer3.1.conv1.0.weight)" in said


def test_init_without_its_file_ends_before_the_videos_are_scanned(world, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "list_and_scan", lambda *_: pytest.fail("scanned"))
    said = fails(pretrain.main, words(world, tmp_path / "out", "--init", tmp_path / "none.pt"))
    assert "there is no file" in said and not (tmp_path / "out").exists()
