"""tools/shrink.py: what a copy keeps, what is listed, what a stop or a full disk leaves."""
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT, drifting, fails, numbered_frames, read_rows, write_video

from common import UserError
from common.splits import SUFFIXES, find_videos, is_video
from common.video import decode, probe, read_frames
from tools import shrink

INVALID = "Invalid data found when processing input"


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


def report(target):
    """{path: the row} of the files that are not whole"""
    return {row["file"]: row for row in read_rows(target / "shrink.jsonl")[1:]}


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


def numbers(path):
    """The numbers that the frames of a video show, whose width is a multiple of 8."""
    clip = decode(path, range(probe(path)[0])).float()
    bits = clip.unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127
    return np.packbits(bits.numpy(), axis=1)[:, 0].tolist()


# ---- What is kept ----

def test_the_tree_and_files_that_are_no_videos_are_those_of_the_original(world, copied):
    was, now = tree(world), tree(copied)
    assert now.keys() == was.keys()
    assert not any(path.is_symlink() for path in copied.rglob("*"))
    for path in was:
        assert is_video(path) or now[path] == was[path]


def test_every_copy_shows_the_frames_of_its_original_in_order(world, copied):
    for path in find_videos(world):
        assert probe(copied / path) == (70, 24, 32, ""), path
        assert numbers(copied / path) == list(range(70)), path


def test_frame_times_are_kept_from_0_on(tmp_path):
    def times(path):
        return [float(frame.pts * frame.time_base) for frame in read_frames(path)]
    stamps = [n * n // 3 + n + 9 for n in range(60)]
    source = write_video(tmp_path / "in/uneven.mp4", numbered_frames(60), "libx264", stamps, bf="2")
    content = bytearray(source.read_bytes())
    at = content.index(b"mdhd") + 16
    content[at:at + 4] = (13001).to_bytes(4, "big")             # units a second, 12800 before
    source.write_bytes(content)
    was, now = times(source), times(run(tmp_path / "in", tmp_path / "out") / "uneven.mp4")
    assert np.diff(was) == pytest.approx(np.diff(stamps) * 512 / 13001, abs=1e-4)
    assert now == pytest.approx([t - was[0] for t in was], abs=1e-6)


@pytest.mark.parametrize("stamps, expected", [
    ([3, 5, 4, 6, 9], [0, 1, 2, 3, 6]), ([0, 1, 1, 2, 4], [0, 1, 2, 3, 4]),
    ([2, None, None, 10, None], [0, 2, 4, 6, 8]), ([None] * 3, [0, 1, 2]), ([5], [0])])
def test_time_stamps_are_sorted_or_evenly_spaced_where_some_are_missing(stamps, expected):
    assert list(shrink.times_of(stamps)) == expected


@pytest.mark.parametrize("codec, options", [
    ("ffv1", {}), ("mjpeg", {}), ("libx264", dict(colorspace="bt709")),
    ("libx264", dict(colorspace="bt709", color_range="pc", pixel_format="yuv444p10le"))])
def test_colours_are_kept(tmp_path, codec, options):
    colours = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210]])
    painted = [np.tile(colour, (48, 64, 1)) for colour in colours]
    path = write_video(tmp_path / "a.mkv", painted, codec, **options)
    assert shrink.encode(path, tmp_path / "copy", 32, 1, False) == (5, "")
    was, now = (decode(file, range(5)).float().mean((2, 3)) for file in (path, tmp_path / "copy"))
    assert (was - now).abs().max() < 2.5


@pytest.mark.parametrize("sides, size, expected", [
    ((48, 64), 24, [24, 32]), ((64, 48), 24, [32, 24]), ((48, 64), 200, [48, 64]),
    ((240, 426), 128, [128, 226]), ((49, 65), 49, [48, 64]), ((1, 30), 8, [2, 30])])
def test_size_is_the_short_side_even_and_never_enlarged(sides, size, expected):
    assert shrink.small_shape(*sides, size) == expected


def test_quality_and_intra_reach_the_encoder(tmp_path):
    def encoded(quality, intra):
        assert shrink.encode(path, tmp_path / "copy", 24, quality, intra) == (70, "")
        with av.open(str(tmp_path / "copy")) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        keys = [n for n, packet in enumerate(packets) if packet.is_keyframe]
        return keys, sum(packet.size for packet in packets)

    path = write_video(tmp_path / "a.avi", drifting(70, side=64))
    keys, size = encoded(4, False)
    assert keys == [0, 33, 66]
    assert encoded(1, False)[1] > size > encoded(31, False)[1]
    assert encoded(4, True)[0] == list(range(70))


def test_nothing_in_the_source_is_changed(world, tmp_path):
    def state():
        return tree(world), {path: (world / path).lstat().st_mtime_ns for path in tree(world)}
    before = state()
    run(world, tmp_path / "out")
    assert state() == before


# ---- Resuming ----

def test_what_is_done_is_not_done_again_and_what_changed_is(tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("same", "second", "older", "newer"):
        write_video(source / f"{name}.avi", numbered_frames(3))
    run(source, target)
    before = {path: path.stat().st_ctime_ns for path in target.glob("*.avi")}
    for name, seconds in (("second", 1), ("older", -9), ("newer", 9)):      # FAT rounds to two
        made = (source / f"{name}.avi").stat().st_mtime
        write_video(source / f"{name}.avi", numbered_frames(4))
        os.utime(source / f"{name}.avi", (made, made + seconds))
    write_video(source / "new.avi", numbered_frames(4))
    run(source, target)
    assert {path.stem for path in before if path.stat().st_ctime_ns != before[path]} == {
        "older", "newer"}
    counts = {path.stem: probe(path)[0] for path in target.glob("*.avi")}
    assert counts == dict(same=3, second=3, older=4, newer=4, new=4)


def test_a_damaged_video_is_kept_up_to_the_fault_and_listed_by_each_run(tmp_path):
    path = write_video(tmp_path / "in/a.avi", numbered_frames(30), "mjpeg")
    start = b"\xff\xd8\xff"                                     # of a JPEG
    images = path.read_bytes().split(start)
    images[21] = bytes(len(images[21]))
    path.write_bytes(start.join(images))
    for _ in range(2):
        target = run(tmp_path / "in", tmp_path / "out")
        assert report(target) == {"a.avi": dict(file="a.avi", frames=20, reason=INVALID)}
        assert numbers(target / "a.avi") == list(range(20))


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
    assert tree(run(world, target, "--workers", 1)) == tree(copied)


def test_a_full_disk_leaves_no_half_files(world, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    process = start(world, tmp_path / "out", preexec_fn=limit)
    assert "File too large" in process.communicate()[1] and process.returncode == 1
    left = tree(tmp_path / "out")
    assert not [path for path in left if is_video(path) or shrink.TMP in path]


# ---- What cannot be copied ----

def test_what_cannot_be_read_or_encoded_is_listed_and_too_much_is_an_error(
        tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    for name in "abcd":
        write_video(source / f"{name}.avi", numbered_frames(3))
    (source / "shrink.jsonl").write_text("of another copy\n")
    (source / "dangling.txt").symlink_to(source / "none")
    os.mkfifo(source / "pipe.txt")
    assert report(run(source, target)).keys() == {"dangling.txt", "pipe.txt"}   # no videos
    assert f"{target}: 4 videos, 2 other files\n" in capsys.readouterr().out
    write_video(source / "wide.avi", [np.zeros((16, 9000, 3), np.uint8)], "mjpeg")
    (source / "text.avi").write_text("no video")
    with pytest.raises(UserError, match="2 of 6 videos unreadable, more than 5%"):
        run(source, target)
    rows = report(target)
    assert rows["text.avi"] == dict(file="text.avi", frames=0, reason=INVALID)
    assert rows["wide.avi"]["reason"].startswith("cannot be encoded")
    assert f"text.avi ({INVALID}, 0 frames kept)" in capsys.readouterr().out
    monkeypatch.setattr(shrink, "MAX_BAD", 2 / 6)
    run(source, target)


def test_a_file_that_this_user_may_not_read_is_listed(world, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)         # root may read all
    copied = shrink.copy_file(world, tmp_path, tmp_path, {}, "classInd.txt")
    assert copied == (0, "not a readable file")


def test_a_copy_that_decodes_to_other_frames_is_not_kept(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "probe", lambda path: (69, 24, 32, ""))
    frames, reason = shrink.encode(world / "Spin/a.avi", tmp_path / "copy", 24, 4, False)
    assert frames == 0 and reason.startswith("the copy is wrong: (69, 24, 32, '')")


@pytest.mark.parametrize("source, target, message", [
    ("none", "out", "none does not exist"), ("in", "in", "must not lie in one another"),
    ("in", "in/out", "must not lie in one another"), ("in", ".", "must not lie in one another"),
    ("in", "other", "other is not a copy with"), ("in", "copy", "'size': 32")])
def test_a_wrong_invocation_is_refused_and_nothing_is_written(tmp_path, source, target, message):
    write_video(tmp_path / "in/a.avi", numbered_frames(2))
    for folder, name, text in (("other", "mine", ""), ("copy", "shrink.jsonl", '{"size": 16}\n')):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    before = tree(tmp_path)
    words = [tmp_path / source, tmp_path / target, "--size", 32]
    assert message in fails(shrink.main, words) and tree(tmp_path) == before
