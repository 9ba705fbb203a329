"""Tests run from any folder, on the modules above this one, with a cache of their own and a thread a process.

What tests of two files or more need is here too, to be imported: `from conftest import ROOT`.
"""
import contextlib
import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                                                 # real videos and lists; may be missing
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import finetune
import linear_probe
import pretrain
import retrieval
from common import processes
from common.judging import average_crops
from models import new_backbone

CPU = torch.device("cpu")
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


def touch(root, *names, text=""):
    """Files of that text, byte for byte, in folders that may have to be made -> root."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, newline="")
    return root


def ucf(root, lines, classes=("Run", "HandstandPushups"), end="\n"):
    """A UCF101 of one's own: lists in root/ucfTrainTestlist, videos (if any) in root/UCF-101 -> the latter."""
    for name, rows in (("classInd", [f"{k} {name}" for k, name in enumerate(classes, 1)]), ("trainlist01", lines)):
        touch(root, "UCF-101/readme.txt", f"ucfTrainTestlist/{name}.txt", text="")
        (root / f"ucfTrainTestlist/{name}.txt").write_bytes("".join(row + end for row in rows).encode())
    return root / "UCF-101"


def forbid(monkeypatch, name, *folders):
    """os.NAME of these folders is not permitted (to root, who runs tests, all is)."""
    real = getattr(os, name)

    def forbidden(folder):
        if os.path.realpath(folder) in map(os.path.realpath, folders):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        return real(folder)
    monkeypatch.setattr(os, name, forbidden)


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


# ---- A tiny set of 27 videos with two official splits, and the judges on it ----

TINY_CLASSES = ("Bend", "Climb", "Dive")
TINY_LISTS = {1: {"train": ("08", "09", "10"), "test": ("01",)}, 2: {"train": ("01", "09", "10"), "test": ("08",)}}
TINY_CLIPS = {"01": 3, "08": 2, "09": 2, "10": 2}                               # 9 videos a class, of 4 groups


def noisy(seed, hue):
    """24 frames of a noisy texture that drifts; hue: which colour is somewhat brighter than it would be."""
    rng = np.random.default_rng(seed)
    texture, shift = rng.integers(0, 140, (32, 48, 3)) + rng.integers(0, 90, 3), rng.integers(1, 4)
    texture[..., hue] += 25                                                     # some are told right, some wrong
    return np.stack([np.roll(texture, shift * n, axis=1) for n in range(24)]).astype(np.uint8)


def official(number, part):
    """The names that the lists of `tiny` give."""
    return [f"{name}/v_{name}_g{group}_c{clip + 1:02d}.avi" for name in TINY_CLASSES
            for group in TINY_LISTS[number][part] for clip in range(TINY_CLIPS[group])]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """27 videos and two splits in UCF101's layout; to be read only."""
    root = tmp_path_factory.mktemp("tiny")
    write_lists(root / "ucfTrainTestlist", TINY_CLASSES, **{
        f"{part}list{number:02d}": official(number, part) for number in TINY_LISTS for part in ("train", "test")})
    for seed, path in enumerate(official(1, "train") + official(1, "test")):
        write_video(root / "UCF-101" / path, noisy(seed, TINY_CLASSES.index(path.split("/")[0])), **SHARP)
    return root


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """The tiny set, to be changed."""
    return shutil.copytree(tiny, tmp_path / "copy")


def save_backbone(path, seed):
    """What pretrain.py writes, with weights and BatchNorm statistics drawn at random."""
    torch.manual_seed(seed)
    net = new_backbone("r3d18_narrow")
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.mul_(1 + 0.2 * torch.rand_like(value))
    torch.save(dict(arch=net.arch, backbone=net.state_dict(), args=dict(frames=4, size=16, lr=1e-3)), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("checkpoint") / "backbone.pt", 5)


def judge_words(root, checkpoint, out, *more):
    """A command line."""
    return [str(word) for word in ("--dataset", "ucf101", "--data", root / "UCF-101", "--checkpoint", checkpoint,
                                   "--windows", 2, "--step", 2, "--workers", 0, "--amp", "off", "--out", out, *more)]


def strict(file):
    """A result file; NaN and Infinity are no JSON."""
    return json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {file}"))


def probe(root, checkpoint, out, *more):
    linear_probe.main(judge_words(root, checkpoint, out, *more))
    return strict(out / "linear_probe-ucf101.json")


def retrieve(root, checkpoint, out, *more):
    """-> result, the arrays of --features."""
    retrieval.main(judge_words(root, checkpoint, out, "--features", out / "found.npz", "--k", 1, 5, 10, *more))
    return strict(next(out.glob("retrieval-*.json"))), dict(np.load(out / "found.npz"))


def tune(root, checkpoint, out, *more):
    finetune.main(judge_words(root, checkpoint, out, "--epochs", 2, "--warmup-epochs", 0, "--batch-size", 6, "--lr",
                              1e-3, "--crops", "centre", *more))
    return strict(out / "finetune-ucf101-2x.json")


@pytest.fixture(scope="session")
def found(tiny, checkpoint, tmp_path_factory):
    """Features and results of retrieval on split 1."""
    return retrieve(tiny, checkpoint, tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="session")
def probed(tiny, checkpoint, tmp_path_factory):
    return probe(tiny, checkpoint, tmp_path_factory.mktemp("probed"))


def by_path(arrays):
    """{path: feature} of gallery and query."""
    return {path: x for side in ("gallery", "query") for path, x in zip(arrays[f"{side}_paths"].tolist(),
                                                                        arrays[f"{side}_features"])}


def by_hand(arrays, C=1e-3):
    """{test path: is the prediction right} of scikit-learn's linear SVM, called step by step on retrieval's arrays."""
    scaler = StandardScaler().fit(arrays["gallery_features"])
    svm = LinearSVC(C=C, random_state=0, max_iter=10000).fit(scaler.transform(arrays["gallery_features"]),
                                                             arrays["gallery_classes"])
    right = svm.predict(scaler.transform(arrays["query_features"])) == arrays["query_classes"]
    return dict(zip(arrays["query_paths"].tolist(), right.tolist()))


@pytest.fixture
def own(tiny, tmp_path):
    """A folder of six videos without classes."""
    for n, path in enumerate(official(1, "train")[::3]):
        (tmp_path / "own").mkdir(exist_ok=True)
        shutil.copy(tiny / "UCF-101" / path, tmp_path / "own" / f"video {n}.avi")
    return tmp_path / "own"


def spied(monkeypatch):
    """The predictions of the fine-tuning tests to come: a list that grows."""
    scores = []

    def spy(*args, **kwargs):
        result = average_crops(*args, **kwargs)
        scores.append(result[0])
        return result

    monkeypatch.setattr(finetune, "average_crops", spy)
    return scores


# ---- Processes ----

def run_python(*argv, cwd):
    """Run a Python that finds the project's modules -> its stdout; fail where it fails."""
    done = subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_until(condition, process):
    """Wait until condition() holds; fail if the process, a subprocess.Popen, ends first."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


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
