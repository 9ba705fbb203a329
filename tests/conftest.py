"""Tests run from any folder, on the modules above this one, with a cache of their own and a thread a process.

What tests of two files or more need is here too, to be imported: `from conftest import ROOT`.
"""
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                                                 # real videos and lists; may be missing
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import pretrain
from common import processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SHARP = dict(flags="+qscale", global_quality="236")                             # mpeg4's options for few artefacts
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"                                             # for the processes that tests start
os.environ["CUDA_VISIBLE_DEVICES"] = ""                                         # tests compare bit for bit, on CPUs


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Indexes of data sets go to a folder of this run, not to the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real videos and annotation files; tests that need it are skipped, visibly, where it is not."""
    if not (SHARED / "videos").is_dir():
        pytest.skip(f"{SHARED} is not here")
    return SHARED


# ---- Files ----

def write_video(path, pictures, codec="mpeg4", stamps=None, **options):
    """Encode uint8 (H, W, 3) pictures; stamps: the time stamp of each, in frames; options: the encoder's -> path."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts = stamps[n] if stamps else n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(frames):
    """Pictures that show their number: eight bits, eight black or white columns, (48, 64, 3) each."""
    rows = [np.unpackbits(np.uint8([n])).repeat(8) * np.uint8(255) for n in range(frames)]
    return [np.broadcast_to(row[None, :, None], (48, 64, 3)) for row in rows]


def drifting(frames, seed=0, axis=0, side=32):
    """A random texture that drifts, a pixel a frame, down (axis 0) or across (axis 1) -> uint8 (N, side, side, 3)."""
    texture = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(texture, n, axis) for n in range(frames)])


def write_lists(folder, classes, **lists):
    """Lists in UCF101's layout: classInd.txt of the classes, and NAME.txt of each NAME=[line, ...] -> their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (dict(classInd=[f"{k} {cls}" for k, cls in enumerate(classes, 1)]) | lists).items():
        (folder / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder


LENGTHS = {f"{'walk' if k % 2 else 'run'}/{k:02d}.avi": 20 + 3 * k for k in range(13)}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Thirteen tiny videos of LENGTHS in two class folders, and a file that is none; to be read only."""
    root = tmp_path_factory.mktemp("data") / "videos"
    for path, length in LENGTHS.items():
        write_video(root / path, [picture[::2, ::2] + np.uint8(16) for picture in numbered(length)])
    for folder in ("run", "walk"):
        (root / folder / "readme.txt").write_text("")
    return root


# ---- A small world, and runs of pretrain.py in it ----

CLASSES = ("Down", "Across")
STEPS = 9                                                                       # 3 epochs of 24 videos in batches of 8


def listed(n):
    """The n-th video's line in the lists of `world`."""
    cls = CLASSES[n % 2]
    return f"{cls}/v_{cls}_g{n // 2 + 1:02d}_c01.avi"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """24 training and 6 test videos of two classes, in UCF101's layout; to be read only."""
    root = tmp_path_factory.mktemp("world")
    paths = [listed(n) for n in range(30)]
    for n, path in enumerate(paths):
        write_video(root / "videos" / path, drifting(60, seed=n, axis=n % 2), **SHARP)
    return write_lists(root, CLASSES, trainlist01=paths[:24], testlist01=paths[24:])


@pytest.fixture
def copy_of_world(world, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(world, tmp_path / "copy")


def words(world, out, *more):
    """The command line of a small pre-training."""
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "videos", "--annotations", world, "--out", out, "--arch",
        "r3d18_narrow", "--frames", 4, "--size", 16, "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 1, "--lr",
        1e-3, "--log-every", 1, "--save-every", 0, "--workers", 0, "--amp", "off", *more)]


def judging(script, world, whole, out, *more):
    """The command line of a judging script."""
    crops = ("--crops", "centre") if script == "finetune" else ()
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "videos", "--annotations", world, "--out", out, "--checkpoint",
        whole / "backbone.pt", "--windows", 1, "--workers", 0, "--amp", "off", *crops, *more)]


def train(world, out, *more):
    """A small pre-training in this process -> its checkpoint."""
    pretrain.main(words(world, out, *more))
    return stored(out)


def stored(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def lines(out, key="loss"):
    """The lines of a run's log that have that key; those of steps have a loss."""
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line]


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """The folder of a run that nothing interrupts; to be read only."""
    out = tmp_path_factory.mktemp("whole")
    train(world, out)
    return out


def after_step(n, action):
    """When the optimiser has taken this process's n-th step from now on, action() happens -> handle, to remove it."""
    taken = []

    def count(*_):
        taken.append(None)
        if len(taken) == n:
            action()
    return register_optimizer_step_post_hook(count)


@pytest.fixture
def at_step():
    """at_step(n, action): the same, for one test."""
    handles = []
    yield lambda n, action: handles.append(after_step(n, action))
    for handle in handles:
        handle.remove()


@pytest.fixture(autouse=True)
def signals():
    """What a run in this process does to the signals' handlers is undone."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fails(main, argv):
    """The sentence with which main ends where processes.run calls it; "2" where argparse has said it."""
    with pytest.raises(SystemExit) as left, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["SCRIPT", *map(str, argv)])
        processes.run(lambda: main([str(word) for word in argv]))
    said = str(left.value.code)
    assert said not in ("0", "None") and "Traceback" not in said and "\n" not in said
    return said


# ---- Processes ----

def free_port():
    """A port of this machine that nobody listens to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def forkserver():
    """Where processes of their own are started: the modules are imported once for all of them -> their context."""
    multiprocessing.set_forkserver_preload(["pretrain"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)                                                       # the server imports from there
        yield multiprocessing.get_context("forkserver")


def start(target, *args):
    """A process of its own that calls target(*args)."""
    with forkserver() as context:
        process = context.Process(target=target, args=args)
        process.start()
    return process


def as_rank(rank, count, port, target, *args):
    """target(rank, *args), as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    target(rank, *args)


def together(count, target, *args):
    """target(rank, *args) in each of several processes -> their exit statuses."""
    port = free_port()
    running = [start(as_rank, rank, count, port, target, *args) for rank in range(count)]
    for process in running:
        process.join(240)
    return [process.exitcode for process in running]
