"""tools/shrink.py: what a copy keeps, what is listed, what a stop or a full disk leaves."""
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    INVALID,
    ROOT,
    fails,
    garble_frame,
    numbered_frames,
    numbers,
    read_rows,
    write_video,
)

from common import UserError
from common.splits import SUFFIXES, is_video
from common.video import decode, probe, read_frames
from tools import shrink


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data set with a bit of everything; read-only."""
    root = tmp_path_factory.mktemp("world")
    original = write_video(root / "Spin/a.avi", numbered_frames(70), b="4000000")
    odd = [os.fsdecode(b"caf\xe9.avi"), "new\nline.avi", "concat:x.avi", "-i.MP4", "deep/%03d.mkv"]
    for name in [f"b{suffix}" for suffix in SUFFIXES] + odd:
        (root / "Zoom" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, root / "Zoom" / name)
    (root / "Zoom/linked.avi").symlink_to(original)
    (root / "Linked").symlink_to(root / "Spin")
    (root / "empty").mkdir()
    (root / "Spin/._a.avi").write_bytes(b"not a video")
    (root / "classInd.txt").write_text("1 Spin\n2 Zoom\n")
    return root


@pytest.fixture(scope="module")
def copied(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("copied"))


def words(source, target, *more):
    return [str(word) for word in (source, target, "--size", 24, "--workers", 2, *more)]


def run(source, target, *more):
    """Copy in this process -> target"""
    shrink.main(words(source, target, *more))
    return target


def start(source, target, **options):
    """Copy in another process -> the process"""
    command = [sys.executable, ROOT / "tools/shrink.py", *words(source, target)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def tree(root):
    """{path: bytes, None for a folder} below a folder, links followed, without shrink.jsonl"""
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        found[os.path.relpath(folder, root)] = None
        for name in names:
            file = Path(folder, name)
            found[os.path.relpath(file, root)] = file.read_bytes()
    found.pop("shrink.jsonl", None)
    return found


def shown(path):
    """The numbers that the frames of a video show."""
    return numbers(decode(path, range(probe(path)[0])))


def test_tree_files_and_frames_are_those_of_the_source_which_is_not_changed(world, tmp_path):
    def state():
        return tree(world), {path: (world / path).lstat().st_mtime_ns for path in tree(world)}
    before = state()
    copied = run(world, tmp_path / "out")
    assert state() == before
    was, now = before[0], tree(copied)
    assert now.keys() == was.keys()
    for path in was:
        if is_video(path):
            assert probe(copied / path) == (70, 24, 32, ""), path
            assert shown(copied / path) == list(range(70)), path
        else:
            assert now[path] == was[path]


def test_frame_times_from_0_on_and_colours_are_kept(tmp_path):
    def times(path):
        return [float(frame.pts * frame.time_base) for frame in read_frames(path)]
    stamps = [n * n // 3 + n + 9 for n in range(60)]
    colours = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210]])
    pictures = [np.tile(colours[n % 5], (48, 64, 1)) for n in range(60)]
    source = write_video(
        tmp_path / "in/uneven.mp4", pictures, "libx264", stamps, bf="2", colorspace="bt709")
    copy = run(tmp_path / "in", tmp_path / "out", "--quality", 1) / "uneven.mp4"
    was, now = times(source), times(copy)
    assert np.diff(was) == pytest.approx(np.diff(stamps) / 25)
    assert now == pytest.approx([t - was[0] for t in was], abs=1e-6)
    was, now = (decode(path, range(60)).float().mean((2, 3)) for path in (source, copy))
    assert (was - now).abs().max() < 2.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_no_half_file_and_resumes(world, copied, tmp_path, number):
    target = tmp_path / "out"
    process = start(world, target, start_new_session=True)
    while len([*target.glob("Spin/*.*"), *target.glob("Zoom/*.*")]) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, number)                              # as terminals and schedulers do
    error = process.communicate(timeout=60)[1]
    done = {path: content for path, content in tree(target).items() if shrink.TMP not in path}
    assert done.items() <= tree(copied).items()
    if number != signal.SIGKILL:
        assert process.returncode == 1 and not [*target.glob(f"{shrink.TMP}*")]
        assert error.splitlines()[-1] == "shrink.py: interrupted" and "Traceback" not in error
    kept = {path: (target / path).stat().st_ctime_ns for path in done if is_video(path)}
    assert tree(run(world, target, "--workers", 1)) == tree(copied)
    assert {path: (target / path).stat().st_ctime_ns for path in kept} == kept


def test_a_full_disk_leaves_no_half_files(world, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    process = start(world, tmp_path / "out", preexec_fn=limit)
    assert "File too large" in process.communicate()[1] and process.returncode == 1
    left = tree(tmp_path / "out")
    assert not [path for path in left if is_video(path) or shrink.TMP in path]


def test_what_is_not_whole_is_listed_by_each_run_and_too_much_is_an_error(tmp_path, monkeypatch):
    source, target = tmp_path / "in", tmp_path / "out"
    write_video(source / "whole.avi", numbered_frames(3))
    damaged = write_video(source / "damaged.avi", numbered_frames(30), "mjpeg")
    garble_frame(damaged, 20)
    (source / "text.avi").write_text("no video")
    (source / "dangling.txt").symlink_to(source / "none")
    with pytest.raises(UserError, match="1 of 3 videos unreadable, more than 5%"):
        run(source, target)
    expected = [
        dict(file="damaged.avi", frames=20, reason=INVALID),
        dict(file="dangling.txt", frames=0, reason="not a readable file"),
        dict(file="text.avi", frames=0, reason=INVALID)]
    assert read_rows(target / "shrink.jsonl")[1:] == expected
    assert shown(target / "damaged.avi") == list(range(20))   # up to the fault
    monkeypatch.setattr(shrink, "MAX_BAD", 1 / 3)
    run(source, target)
    assert read_rows(target / "shrink.jsonl")[1:] == expected


def test_a_target_around_or_inside_the_source_or_of_other_settings_is_refused(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write_video(source / "a.avi", numbered_frames(2))
    run(source, target)
    before = tree(tmp_path)
    for wrong in (source / "out", tmp_path):
        assert "must not lie in one another" in fails(shrink.main, words(source, wrong))
    assert "is not a copy with" in fails(shrink.main, words(source, target, "--quality", 5))
    assert tree(tmp_path) == before
