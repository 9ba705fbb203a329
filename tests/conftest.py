"""Set up the tests: modules of the folder above, a cache of their own, one thread per process.

Helpers that several test files use are here too: `from conftest import ROOT`.
"""
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                             # real videos and lists; may be missing
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import finetune
import linear_probe
import pretrain
import retrieval
from common import distributed

CPU = torch.device("cpu")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
INVALID = "Invalid data found when processing input"       # FFmpeg's message
SHARP = dict(flags="+qscale", global_quality="236")         # mpeg4's options for few artefacts
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored in background jobs
signal.signal(signal.SIGHUP, signal.SIG_DFL)                # ignored under nohup
os.environ["OMP_NUM_THREADS"] = "1"                         # for the processes that tests start
if not any("test_cuda" in word for word in sys.argv):       # `pytest tests/test_cuda.py` uses a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""                 # others compare bit for bit, on CPUs


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Write the scans of data sets to a folder of this run, not to the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real videos and annotation files; skips the test where it is missing."""
    if not ((SHARED / "videos").is_dir() and (SHARED / "annotations").is_dir()):
        pytest.skip(f"{SHARED} is not here")
    return SHARED


# ---- Files ----

def write_video(path, pictures, codec="mpeg4", stamps=None, muxer=None, **options):
    """Encode uint8 (H, W, 3) pictures -> path

    stamps: the time stamp of each, in frames; muxer: its options; options: the encoder's.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pixels = options.pop("pixel_format", "yuvj420p" if codec == "mjpeg" else "yuv420p")
    with av.open(os.fspath(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = pixels
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts = stamps[n] if stamps else n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered_frames(frames):
    """Frames that show their number in eight columns, black or white: its bits -> [(48, 64, 3)]"""
    rows = [np.unpackbits(np.uint8([n])).repeat(8) * np.uint8(255) for n in range(frames)]
    return [np.broadcast_to(row[None, :, None], (48, 64, 3)) for row in rows]


def numbers(clip):
    """The numbers that such frames show, at any size: uint8 (N, 3, H, W) -> N ints"""
    bits = clip.float().unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127
    return np.packbits(bits.numpy(), axis=1)[:, 0].tolist()


def garble_frame(path, n):
    """Overwrite frame n of a Motion JPEG in AVI, so that decoding ends there."""
    start = b"\xff\xd8\xff"                                 # of a JPEG
    images = path.read_bytes().split(start)
    images[n + 1] = bytes(len(images[n + 1]))               # the first part is AVI's header
    path.write_bytes(start.join(images))


def drifting(frames, seed=0, axis=0, side=32):
    """A random texture that moves a pixel a frame, down (axis 0) or across (axis 1)

    -> uint8 (frames, side, side, 3)
    """
    texture = np.random.default_rng(seed).integers(0, 256, (side // 4, side // 4, 3), np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(texture, n, axis) for n in range(frames)])


def write_lists(folder, classes, **lists):
    """Write classInd.txt of the classes and NAME.txt of each NAME=[line, ...] -> folder"""
    folder.mkdir(parents=True, exist_ok=True)
    index = [f"{k} {name}" for k, name in enumerate(classes, 1)]
    for name, rows in (dict(classInd=index) | lists).items():
        (folder / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder


LENGTHS = {f"{'walk' if k % 2 else 'run'}/{k:02d}.avi": 20 + 3 * k for k in range(13)}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Thirteen tiny videos of LENGTHS, in two class folders; read-only."""
    root = tmp_path_factory.mktemp("data") / "videos"
    for path, length in LENGTHS.items():
        frames = [frame[::2, ::2] // 2 + 16 for frame in numbered_frames(length)]
        write_video(root / path, frames)
    return root


@pytest.fixture
def copy(videos, tmp_path):
    """The small videos, to be changed by the test."""
    return shutil.copytree(videos, tmp_path / "videos")


# ---- A small world: 33 videos of three classes, with two splits in UCF101's layout ----

CLASSES = ("Bend", "Climb", "Dive")
GROUPS = {"01": 3, "08": 4, "09": 2, "10": 2}               # videos of each, in every class
TEST_GROUP = {1: "01", 2: "08"}                             # 24 and 21 videos are for training
STEPS = 9                                                   # 3 epochs of 24 videos in batches of 8


def official(number, part):
    """The paths in a list of `world`."""
    return [f"{name}/v_{name}_g{group}_c{clip:02d}.avi"
            for name in CLASSES for group, clips in GROUPS.items()
            if (group == TEST_GROUP[number]) == (part == "test") for clip in range(1, clips + 1)]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The folder of UCF-101/ and ucfTrainTestlist/; read-only."""
    root = tmp_path_factory.mktemp("world")
    write_lists(root / "ucfTrainTestlist", CLASSES, **{
        f"{part}list{number:02d}": official(number, part)
        for number in TEST_GROUP for part in ("train", "test")})
    for seed, path in enumerate(official(1, "train") + official(1, "test")):
        pictures = drifting(31, seed, axis=seed % 2, side=48)[:, :32] // 2
        pictures += np.random.default_rng(seed).integers(0, 90, 3, np.uint8)
        pictures[..., CLASSES.index(path.split("/")[0])] += 25      # some are classified right
        write_video(root / "UCF-101" / path, pictures, **SHARP)
    return root


@pytest.fixture
def world_copy(world, tmp_path):
    """The small world, to be changed by the test."""
    return shutil.copytree(world, tmp_path / "copy")


@pytest.fixture
def own(world, tmp_path):
    """A folder of six videos without classes."""
    (tmp_path / "own").mkdir()
    for n, path in enumerate(official(1, "train")[::4]):
        shutil.copy(world / "UCF-101" / path, tmp_path / "own" / f"video {n}.avi")
    return tmp_path / "own"


# ---- Runs of the scripts ----

def words(world, out, *more):
    """The arguments of a small pre-training."""
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "UCF-101", "--out", out, "--arch", "r3d18_narrow",
        "--frames", 4, "--size", 16, "--batch-size", 8, "--epochs", 3, "--warmup-epochs", 1,
        "--lr", 1e-3, "--log-every", 1, "--save-every", 0, "--workers", 0, "--amp", "off", *more)]


def train(world, out, *more):
    """A small pre-training in this process -> its checkpoint"""
    pretrain.main(words(world, out, *more))
    return load_checkpoint(out)


def load_checkpoint(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def read_rows(file):
    """Read a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def log_lines(out):
    return read_rows(out / "log.jsonl")


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """The folder of an uninterrupted pre-training; read-only."""
    out = tmp_path_factory.mktemp("whole")
    train(world, out)
    return out


@pytest.fixture(scope="session")
def checkpoint(whole):
    """The backbone.pt of that run."""
    return whole / "backbone.pt"


def evaluation_words(world, checkpoint, out, *more):
    """The arguments of a small evaluation."""
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "UCF-101", "--checkpoint", checkpoint, "--windows",
        2, "--step", 2, "--crops", "centre", "--workers", 0, "--amp", "off", "--out", out, *more)]


def read_json(file):
    """Read a result file; NaN and Infinity are no JSON."""
    def refuse(word):
        pytest.fail(f"{word} in {file}")
    return json.loads(file.read_text(), parse_constant=refuse)


def probe(world, checkpoint, out, *more):
    linear_probe.main(evaluation_words(world, checkpoint, out, *more))
    return read_json(out / "linear_probe-ucf101.json")


def retrieve(world, checkpoint, out, *more):
    """-> result, the arrays of --features"""
    features = out / "features.npz"
    retrieval.main(evaluation_words(
        world, checkpoint, out, "--features", features, "--k", 1, 5, 10, *more))
    return read_json(out / "retrieval-ucf101.json"), dict(np.load(features))


def tune(world, checkpoint, out, *more):
    finetune.main(evaluation_words(
        world, checkpoint, out, "--epochs", 2, "--warmup-epochs", 0, "--batch-size", 8,
        "--lr", 1e-3, *more))
    return read_json(out / "finetune-ucf101-2x.json")


@pytest.fixture(scope="session")
def retrieved(world, checkpoint, tmp_path_factory):
    """Retrieval on split 1 -> result, the arrays of --features"""
    return retrieve(world, checkpoint, tmp_path_factory.mktemp("retrieved"))


@pytest.fixture(scope="session")
def probed(world, checkpoint, tmp_path_factory):
    return probe(world, checkpoint, tmp_path_factory.mktemp("probed"))


def by_hand(arrays):
    """scikit-learn's linear SVM, step by step, on retrieval's arrays -> {test path: is it right}"""
    scaler = StandardScaler().fit(arrays["gallery_features"])
    x, test_x = (scaler.transform(arrays[f"{side}_features"]) for side in ("gallery", "query"))
    svm = LinearSVC(C=1e-3, dual="auto", random_state=0, max_iter=10000)
    right = svm.fit(x, arrays["gallery_classes"]).predict(test_x) == arrays["query_classes"]
    return dict(zip(arrays["query_paths"].tolist(), right.tolist()))


def after_step(n, action):
    """Call action() after the optimiser's n-th step from now on -> handle, to remove it"""
    taken = []

    def count(*_):
        taken.append(None)
        if len(taken) == n:
            action()
    return register_optimizer_step_post_hook(count)


@pytest.fixture
def at_step():
    """at_step(n, action): `after_step` for one test."""
    handles = []
    yield lambda n, action: handles.append(after_step(n, action))
    for handle in handles:
        handle.remove()


def fails(main, argv):
    """The sentence in which main ends under `distributed.run`."""
    with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["SCRIPT", *map(str, argv)])
        distributed.run(lambda: main([str(word) for word in argv]))
    message = str(exit.value.code)
    assert message.startswith("SCRIPT: ") and "\n" not in message
    return message


# ---- A plain training loop ----

def warmup_and_cosine(lr, warmup, steps):
    """The learning rate of each step: linear warm-up, then a cosine to 0 (Sec. 3.4)."""
    up = [lr * (n + 1) / (warmup + 1) for n in range(warmup)]
    rest = steps - warmup
    return up + [lr * (1 + math.cos(math.pi * n / rest)) / 2 for n in range(rest)]


def plain_training(network, loss_of, rates, weight_decay):
    """Train with AdamW; loss_of(step) computes the loss of a batch -> the loss of each step"""
    optimizer = torch.optim.AdamW(network.train().parameters(), weight_decay=weight_decay)
    values = []
    for step, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.fixture
def used_rates():
    """A list of the learning rate at each step of an optimiser in this test."""
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.extend(group["lr"] for group in optimizer.param_groups))
    yield rates
    hook.remove()


def assert_same_training(log, used, weights, expected_rates, expected_losses, network):
    """A run's log, rates and weights are those of `plain_training`, but for rounding errors."""
    assert [line["lr"] for line in log] == pytest.approx(expected_rates, rel=1e-5)
    # in the optimiser itself; the plain loop's steps follow
    assert used[:len(log)] == pytest.approx(expected_rates)
    assert [line["loss"] for line in log] == pytest.approx(expected_losses, rel=1e-4)
    for name, value in network.named_parameters():
        assert weights[name].norm().item() == pytest.approx(value.norm().item(), 0.01, 1e-4), name


# ---- Processes ----

def start(printed, target, *args):
    """Call target(*args) in a new process, with its output in that file -> the process

    All processes share one import of this module.
    """
    multiprocessing.set_forkserver_preload(["conftest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT / "tests"))     # the server imports from there
        process = multiprocessing.get_context("forkserver").Process(
            target=call, args=(printed, target, *args))
        process.start()
    return process


def call(printed, target, *args):
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)    # a run's own processes see its spies
    torch.set_num_threads(1)
    target(*args)


def as_rank(rank, count, port, target, *args):
    """Call target(*args) as torchrun would start it on machines of two processes each."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank % 2),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.run(lambda: target(*args))


def together(count, target, *args):
    """Call target(*args) in each of several processes, then print their output

    -> their exit statuses
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]                      # nobody listens there
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, str(rank)) for rank in range(count)]
        running = [start(file, as_rank, rank, count, port, target, *args)
                   for rank, file in enumerate(printed)]
        for process, file in zip(running, printed):
            process.join(240)
            process.kill()                                  # one that hangs
            print(file.read_text())
    return [process.exitcode for process in running]
