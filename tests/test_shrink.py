"""tools/shrink.py: what a copy keeps, what is listed, what a stop leaves."""
import contextlib
import os
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import (
    INVALID,
    fails,
    garble_frame,
    numbered_frames,
    numbers,
    read_rows,
    start,
    write_video,
)

from common import UserError
from common.splits import is_video
from common.video import decode, probe
from tools import shrink


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A small data set with odd names, links and an empty folder; read-only."""
    root = tmp_path_factory.mktemp("originals")
    original = write_video(root / "Spin/a.avi", numbered_frames(70), b="4000000")
    odd = [os.fsdecode(b"caf\xe9.avi"), "new\nline.avi", "concat:x.avi", "-i.MP4", "deep/%03d.mkv"]
    for name in odd + [f"{k}.webm" for k in range(20)]:
        (root / "Zoom" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(original, root / "Zoom" / name)
    (root / "Zoom/linked.avi").symlink_to(original)
    (root / "Linked").symlink_to(root / "Spin")
    (root / "empty").mkdir()
    (root / "Spin/._a.avi").write_bytes(b"not a video")
    (root / "classInd.txt").write_text("1 Spin\n2 Zoom\n")
    return root


def arguments(source, target, *more):
    return [str(word) for word in (source, target, "--size", 24, "--workers", 2, *more)]


def copy(source, target, *more):
    """Copy in this process -> target"""
    shrink.main(arguments(source, target, *more))
    return target


def tree(root):
    """{path: bytes, None for a folder} below a folder, links followed"""
    paths = [Path(folder, name) for folder, folders, names in os.walk(root, followlinks=True)
             for name in folders + names]
    return {os.path.relpath(path, root): None if path.is_dir() else path.read_bytes()
            for path in paths}


def shown(path):
    """The numbers that the frames of a video show."""
    return numbers(decode(path, range(probe(path)[0])))


def assert_whole(source, target):
    """A copy has the tree of its source, all frames of each video, and the other files."""
    was, now = tree(source), tree(target)
    was = {path: content for path, content in was.items() if "._" not in path}
    assert now.keys() == was.keys() | {"shrink.jsonl"}
    for path in was:
        if is_video(path):
            assert probe(target / path) == (70, 24, 32, ""), path
            assert shown(target / path) == list(range(70)), path
        else:
            assert now[path] == was[path]


def test_tree_files_and_frames_are_those_of_the_source_which_is_not_changed(originals, tmp_path):
    before = tree(originals)
    assert_whole(originals, copy(originals, tmp_path / "out"))
    assert tree(originals) == before


def run_script(source, target):
    """Copy as the command does, in a session of its own."""
    os.setsid()
    sys.argv[1:] = arguments(source, target)
    runpy.run_path(shrink.__file__, run_name="__main__")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_no_half_file_and_resumes(originals, tmp_path, number):
    def videos():
        """{path: when it was written}"""
        paths = [*target.glob("Spin/*.avi"), *target.glob("Zoom/*.*")]
        return {path: path.stat().st_ctime_ns for path in paths}
    target, printed = tmp_path / "out", tmp_path / "printed"
    process = start(printed, run_script, originals, target)
    while not videos():
        assert process.is_alive(), printed.read_text()
        time.sleep(0.01)
    os.killpg(process.pid, number)                              # as terminals and schedulers do
    process.join(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)                  # what has not stopped
    if number != signal.SIGKILL:
        assert process.exitcode == 1 and not [*target.glob(f"{shrink.TMP}*")]
        error = printed.read_text()
        assert error.splitlines()[-1] == "shrink.py: interrupted" and "Traceback" not in error
    done = videos()
    assert_whole(originals, copy(originals, target, "--workers", 1))
    assert videos().items() >= done.items()


def test_what_is_not_whole_is_listed_by_each_run_and_too_much_is_an_error(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write_video(source / "whole.avi", numbered_frames(3))
    damaged = write_video(source / "damaged.avi", numbered_frames(30), "mjpeg")
    garble_frame(damaged, 20)
    (source / "text.avi").write_text("no video")
    (source / "dangling.txt").symlink_to(source / "none")
    for _ in range(2):
        with pytest.raises(UserError, match="1 of 3 videos unreadable, more than 5%"):
            copy(source, target)
        assert read_rows(target / "shrink.jsonl")[1:] == [
            dict(file="damaged.avi", frames=20, reason=INVALID),
            dict(file="dangling.txt", frames=0, reason="not a readable file"),
            dict(file="text.avi", frames=0, reason=INVALID)]
        assert shown(target / "damaged.avi") == list(range(20))     # up to the fault


def test_a_target_around_or_inside_the_source_or_of_other_settings_is_refused(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    write_video(source / "a.avi", numbered_frames(2))
    copy(source, target)
    before = tree(tmp_path)
    for wrong in (source / "out", tmp_path):
        assert "must not lie in one another" in fails(shrink.main, arguments(source, wrong))
    assert "is not a copy with" in fails(shrink.main, arguments(source, target, "--quality", 5))
    assert tree(tmp_path) == before
