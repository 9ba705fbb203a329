"""The small experiment (tests/experiment.py): frames from memory, its table, and that it goes on where it stopped."""
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import experiment
import pretrain
from conftest import ROOT, SHARED

TINY = dict(network="--arch r3d18_narrow --frames 2 --size 16", judge="--windows 1",
            pretrain="--batch-size 8 --epochs 2 --warmup-epochs 0 --log-every 1",
            finetune="--batch-size 4 --epochs 1 --windows 1 --crops centre")    # 2 steps of pre-training
LONG = TINY | dict(pretrain="--batch-size 4 --epochs 10 --log-every 1 --save-every 0", finetune="")    # 30 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set in UCF101's layout, 12 + 4 toy videos of two classes."""
    root = tmp_path_factory.mktemp("ucf")
    lists = dict(classInd=["1 Spin", "2 Zoom"], trainlist01=[], testlist01=[])
    for n in range(16):
        cls, group = ("Spin", "Zoom")[n % 2], n // 2 + 1
        path = f"{cls}/v_{cls}_g{group:02d}_c01.avi"
        data.write_video(root / "UCF-101" / path, data.toy_video(cls, np.random.default_rng(n))[:40])
        lists["testlist01" if group < 3 else "trainlist01"].append(path)
    (root / "ucfTrainTestlist").mkdir()
    for name, lines in lists.items():
        (root / "ucfTrainTestlist" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def start(folder, out, settings, rows="random k"):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return subprocess.Popen([sys.executable, ROOT / "tests/experiment.py", "--small", "--data", folder, "--out", out,
                             "--rows", *rows.split(), "--seeds", "0", *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    """-> exit status, stdout, stderr"""
    said = process.communicate(timeout=120)
    return process.returncode, *said


def stamps(out):
    """When each file of the runs was written."""
    return {path: path.stat().st_mtime_ns for pattern in ("*-0/*", "*-0.txt") for path in out.glob(pattern)}


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A whole experiment of two rows -> its folder, what it printed."""
    out = tmp_path_factory.mktemp("whole")
    status, said, problem = finish(start(folder, out, TINY))
    assert status == 0, problem
    return out, said


def test_frames_from_memory_decode_to_the_same_pixels_as_from_the_file(folder, monkeypatch):
    real = sorted((SHARED / "videos/ucf8_128/UCF-101").glob("*/*_g01_c01.avi"))[::3]    # if they are here
    files, rng, read = [str(path) for path in [*folder.rglob("*_g01_*.avi"), *real]], random.Random(0), data.read_frames
    for path in files:
        kept = experiment.remember(path)
        monkeypatch.setitem(experiment.MEMORY, path, kept)
        frames = [rng.randrange(len(kept[1])) for _ in range(6)]
        box, _ = data.draw_view(kept[0].height, kept[0].width, rng.getrandbits(60))
        for size, boxes in ((None, None), (24, None), (73, None), (24, [box] * 6), (112, [box] * 6)):
            expected = data.decode(path, frames, size, boxes)
            monkeypatch.setattr(data, "read_frames", experiment.recall_frames)
            assert torch.equal(data.decode(path, frames, size, boxes), expected), (path, size)
            monkeypatch.setattr(data, "read_frames", read)


def test_a_file_that_ends_in_an_error_does_so_from_memory(folder, tmp_path, monkeypatch):
    path = tmp_path / "cut.avi"
    whole = next(folder.rglob("*.avi")).read_bytes()
    for content in (whole[:len(whole) // 2], b"no video"):
        path.write_bytes(content)
        counted = data.count_frames(path)
        monkeypatch.setitem(experiment.MEMORY, str(path), experiment.remember(str(path)))
        with monkeypatch.context() as patch:
            patch.setattr(data, "read_frames", experiment.recall_frames)
            assert data.count_frames(path) == counted
            with pytest.raises(data.VideoError, match="cut.avi"):
                data.decode(path, [39])


@pytest.mark.parametrize("row", sorted(experiment.ROWS.keys() - {"random"}))
def test_each_row_has_the_flags_that_readme_gives_it(row):
    name = "dist192" if row == "distinct" else row
    readme = (ROOT / "README.md").read_text()
    flags = re.search(rf"`\$P \$U --out runs/{name}( [^`]*)?`", readme)[1]
    ours, readme = (vars(pretrain.parse_args(shlex.split(words or ""))) for words in (experiment.ROWS[row], flags))
    assert ours == readme


def test_two_rows_run_to_a_table(whole):
    out, said = whole
    table = (out / "table.md").read_text()
    assert said.endswith(table + "\n")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.split("\n\n")[1].splitlines()}
    assert [*rows] == ["row", "---", "random", "k", "chance"] and rows["chance"][5] == "50.0%"
    assert rows["k"][1:4] == ["inst equi speed direction order", "1", "2"] and rows["random"][1:4] == ["-", "1", "0"]
    assert all(re.fullmatch(r"\d+\.\d%", cell) for row in ("random", "k") for cell in rows[row][5:])  # fine-tuned, too
    assert re.search(r"^\| k \| \d+\.\d% \(\d+\.\d%\)", table, re.M)           # speed, and by chance


def test_what_is_done_is_not_run_again(folder, whole):
    before = stamps(whole[0])
    status, said, problem = finish(start(folder, whole[0], TINY))
    assert status == 0 and stamps(whole[0]) == before and said == (whole[0] / "table.md").read_text() + "\n", problem


def test_other_settings_are_refused_in_the_same_folder(folder, whole):
    status, _, problem = finish(start(folder, whole[0], TINY | dict(judge="--windows 2")))
    assert status == 1 and "'--windows 1' -> '--windows 2'" in problem.splitlines()[-1]


def test_killed_in_the_middle_it_goes_on(folder, tmp_path):
    process = start(folder, tmp_path, LONG)
    while not (tmp_path / "k-0/checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert not (tmp_path / "k-0/linear_probe-ucf101.json").exists()
    status, said, problem = finish(start(folder, tmp_path, LONG))
    assert status == 0, problem
    begun = re.findall(r"(?:starts|goes on) at step (\d+) of 30", (tmp_path / "k-0.txt").read_text())
    assert len(begun) == 2 and 0 < int(begun[1]) < 30
    assert "| k | inst equi speed direction order | 1 | 30 |" in said


def test_a_run_that_fails_is_told_and_the_others_go_on(folder, tmp_path):
    (tmp_path / "e-0").mkdir()
    (tmp_path / "e-0/checkpoint.pt").mkdir()                                    # cannot be read, and not written over
    (tmp_path / "e-0/checkpoint.previous.pt").mkdir()
    (tmp_path / "e-0/checkpoint.previous.pt/file").touch()
    status, said, problem = finish(start(folder, tmp_path, TINY | dict(finetune=""), "e g"))
    assert status == 1 and problem.splitlines()[-1].endswith("1 of 2 runs failed")
    assert re.search(r"^e-0 failed: .*directory", said, re.M | re.I) and re.search(r"^\| g \| speed", said, re.M)
