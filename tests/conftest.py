"""Tests run from any folder, on the modules above this one, with a cache of their own and a thread a process.

What tests of two files or more need is here too, to be imported: `from conftest import ROOT`.
"""
import contextlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"                                                 # real videos and lists; may be missing
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
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


def write_lists(folder, classes, **lists):
    """Lists in UCF101's layout: classInd.txt of the classes, and NAME.txt of each NAME=[line, ...] -> their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (dict(classInd=[f"{k} {cls}" for k, cls in enumerate(classes, 1)]) | lists).items():
        (folder / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    return folder


def lines(out, key="loss"):
    """The lines of a run's log that have that key; those of steps have a loss."""
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if key in line]


def fails(main, argv):
    """The sentence with which main ends where common.run calls it; "2" where argparse has said it."""
    with pytest.raises(SystemExit) as left, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["SCRIPT", *map(str, argv)])
        common.run(lambda: main([str(word) for word in argv]))
    said = str(left.value.code)
    assert said not in ("0", "None") and "Traceback" not in said and "\n" not in said
    return said


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
