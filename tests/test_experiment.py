"""tools/experiment.py: frames from memory, its table, and that it goes on where it stopped."""
import functools
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data
from common import splits, video
from common.toy import toy_video
from conftest import ROOT, SHARP, write_lists, write_video
from tools import experiment, results

TINY = dict(network="--arch r3d18_narrow --frames 2 --size 16", judge="--windows 1",
            pretrain="--batch-size 8 --epochs 2 --warmup-epochs 0 --log-every 1 --keep-every 3",
            finetune="--batch-size 4 --epochs 1 --windows 1 --crops centre")    # 6 steps of pre-training
LONG = TINY | dict(pretrain="--batch-size 4 --epochs 10 --log-every 1 --save-every 0", finetune="")    # 60 steps


def begin(world, out, settings, rows="random k"):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.Popen([sys.executable, ROOT / "tools/experiment.py", "--small", "--data", world / "videos",
                             "--out", out, "--rows", *rows.split(), "--seeds", "0", *flags], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    """-> exit status, stdout, stderr"""
    said = process.communicate(timeout=120)
    return process.returncode, *said


def stamps(out):
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for pattern in ("*-0/**/*", "*-0.txt") for path in out.glob(pattern)}


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A whole experiment of two rows -> its folder, what it printed."""
    out = tmp_path_factory.mktemp("experiment")
    status, said, problem = finish(begin(world, out, TINY))
    assert status == 0, problem
    return out, said


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """Four videos of the toy set in the layout of UCF101: grey and smooth, so that how one scales hardly matters."""
    root = tmp_path_factory.mktemp("smooth")
    paths = [f"{cls}/v_{cls}_g{group:02d}_c01.avi" for cls in ("ChecksDrift", "RingsZoom") for group in (1, 2)]
    for n, path in enumerate(paths):
        write_video(root / "videos" / path, toy_video(path.split("/")[0], np.random.default_rng(n)), **SHARP)
    write_lists(root, ("ChecksDrift", "RingsZoom"), trainlist01=paths, testlist01=paths)
    return dict(dataset="ucf101", data=str(root / "videos"), side=32)


@pytest.mark.parametrize("size, box", ((24, None), (48, None), (24, (0.1, 0.2, 0.5, 0.6)), (40, (0, 0.25, 1, 0.75))))
def test_frames_from_memory_are_those_of_the_file_but_for_rounding(smooth, tmp_path, size, box):
    memory = experiment.remember(smooth, tmp_path / "index.json")
    frames, boxes = [5, 7, 9, 9, 30, 2], box and [box] * 6
    for file in memory:
        expected = video.decode(file, frames, size, boxes)
        found = experiment.recall(memory, file, frames, size, boxes)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert (found.float() - expected.float()).abs().mean() < 4              # of 255


def test_a_batch_from_memory_is_drawn_as_one_from_files(smooth, tmp_path, monkeypatch):
    split = splits.load_split("ucf101", smooth["data"])
    pairs = data.Pairs(split, split.paths, splits.scan(split, tmp_path / "index.json"), 4, 24)
    from_files = data.collate([pairs[0, 0], pairs[1, 1]])
    memory = experiment.remember(smooth, tmp_path / "index.json")
    monkeypatch.setattr(data, "decode", functools.partial(experiment.recall, memory))
    from_memory = data.collate([pairs[0, 0], pairs[1, 1]])
    for name in ("seed", "video", "pq", "start", "speed"):
        assert (from_memory[name] == from_files[name]).all()
    assert (from_memory["clips"].float() - from_files["clips"].float()).abs().mean() < 4


@pytest.mark.parametrize("row", sorted(results.ROWS.keys() - {"random"}))
def test_each_row_has_the_flags_that_the_docs_give_it(row):
    name = "d192" if row == "distinct" else row
    listed = (ROOT / "docs/results.md").read_text()
    flags = re.search(rf"`\$P \$U --out runs/{name}( [^`]*)?`", listed)[1]
    ours, theirs = (experiment.pretrain.parse_args((words or "").split()) for words in (results.ROWS[row], flags))
    assert vars(ours) == vars(theirs)


def test_what_tells_most_is_run_first():
    small = "k-0 e-0 g-0 random-0 k-1 e-1 g-1 random-1 i-0 j-0 f-0 h-0 i-1 j-1 f-1 h-1 b-0 c-0 distinct-0 l-0 m-0 n-0"
    assert experiment.parse_args(["--small"]).names == small.split()
    toy = experiment.parse_args(["--toy"]).names
    assert toy[:3] == ["k-0", "e-0", "g-0"] and toy[11:14] == ["k-1", "e-1", "g-1"] and len(toy) == 33
    some = experiment.parse_args("--small --rows n e --seeds 3 0".split()).names
    assert some == ["n-3", "e-3", "n-0", "e-0"]
    other = experiment.parse_args("--small --seeds 7".split()).names
    assert len(other) == 14 and all(name.endswith("-7") for name in other)


def test_two_rows_run_to_a_table_with_every_figure(whole):
    out, said = whole
    table = (out / "table.md").read_text()
    assert said.endswith(table)
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.split("\n\n")[1].splitlines()}
    assert [*rows] == ["row", "---", "random", "k", "chance"] and rows["chance"][4] == "50.0"
    assert rows["k"][1:3] == ["1", "6"] and rows["random"][1:3] == ["1", "0"]
    for row in ("random", "k"):
        assert all(re.fullmatch(r"\d+\.\d", cell) for cell in rows[row][4:-1])  # fine-tuned, too
        assert rows[row][-1] == "{hardware}, {commit}".format(**experiment.made()).strip(", ")
    assert re.search(r"^\| k \| \d+\.\d \(\d+\.\d\)", table, re.M)              # speed, and by chance


def test_what_was_kept_on_the_way_is_judged(whole):
    assert sorted(path.parent.name for path in (whole[0] / "k-0").glob("backbone-*/linear_probe-ucf101.json")) == [
        "backbone-3", "backbone-6"]


@pytest.mark.parametrize("draw", (results.draw_curves, results.draw_table))
def test_the_pictures_are_drawn(whole, tmp_path, draw):
    pytest.importorskip("matplotlib")
    draw(tmp_path / "picture.png", experiment.SMALL | dict(seeds=[0]), whole[0])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_run_again(world, whole):
    before = stamps(whole[0])
    status, said, problem = finish(begin(world, whole[0], TINY))
    assert status == 0 and stamps(whole[0]) == before and said == (whole[0] / "table.md").read_text(), problem


def test_other_settings_are_refused_in_the_same_folder(world, whole):
    status, _, problem = finish(begin(world, whole[0], TINY | dict(judge="--windows 2")))
    assert status == 1 and "'--windows 1' -> '--windows 2'" in problem.splitlines()[-1]


def test_killed_in_the_middle_it_goes_on(world, tmp_path):
    process = begin(world, tmp_path, LONG)
    while not (tmp_path / "k-0/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not (tmp_path / "k-0/linear_probe-ucf101.json").exists()
    status, said, problem = finish(begin(world, tmp_path, LONG))
    assert status == 0, problem
    begun = re.findall(r"(?:starts|goes on) at step (\d+) of 60", (tmp_path / "k-0.txt").read_text())
    assert len(begun) == 2 and 0 < int(begun[1]) < 60
    assert "| k | 1 | 60 |" in said


def test_a_run_that_fails_is_named_and_the_others_go_on(world, tmp_path):
    (tmp_path / "e-0").mkdir()
    (tmp_path / "e-0/checkpoint.pt").mkdir()                                    # cannot be read, and not written over
    (tmp_path / "e-0/checkpoint.previous.pt").mkdir()
    (tmp_path / "e-0/checkpoint.previous.pt/file").touch()
    status, said, problem = finish(begin(world, tmp_path, TINY | dict(finetune=""), "e g"))
    assert status == 1 and problem.splitlines()[-1].endswith("1 of 2 runs failed")
    assert re.search(r"^e-0 failed: .*directory", said, re.M | re.I) and re.search(r"^\| g \| 1", said, re.M)
