"""tools/shrink.py: what it keeps, what it lists, and what is on disk when it is stopped, killed or out of disk."""
import contextlib
import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from conftest import ROOT, SHARED, numbered, write_video

from common.splits import load_split
from common.tree import SUFFIXES, is_video, list_tree
from common.video import VideoError, decode, examine, read_frames
from tools import encode, shrink

ODD = SHARED / "videos" / "odd"
MANIFEST = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.is_dir() else []
COUNTS = {row["file"]: int(row["decodable_frames"] or 0) for row in MANIFEST}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data set with a bit of everything; to be read only."""
    root = tmp_path_factory.mktemp("world")
    for name in ("Spin/a.avi", "Spin/b.mp4", "Zoom/-i.avi", "Zoom/%03d.MP4", "Zoom/deep/c.mkv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / name, numbered(70), "mpeg4", b="4000000")
    for odd in (b"Spin/caf\xe9.avi", b"Spin/new\nline.avi", b"Zoom/concat:x.avi"):
        shutil.copy(root / "Spin/a.avi", root / os.fsdecode(odd))
    (root / "Zoom/linked.avi").symlink_to(root / "Spin/a.avi")
    (root / "Linked").symlink_to(root / "Spin")
    (root / "Spin/loop").symlink_to(root)
    (root / "empty").mkdir()
    (root / "lists").mkdir()
    (root / "lists/classInd.txt").write_text("1 Spin\n2 Zoom\n")
    (root / "lists/trainlist01.txt").write_text("Spin/a.avi 1\nZoom/deep/c.mkv 2\n")
    (root / "Spin/._a.avi").write_bytes(b"not a video")
    return root


@pytest.fixture(scope="module")
def copied(world, tmp_path_factory):
    target = tmp_path_factory.mktemp("copied") / "small"
    shrink.main([str(world), str(target), "--size", "32", "--workers", "2"])
    return target


def run(source, target, *more):
    """In this process; a refusal or a list of too many unreadable files is returned as what it says."""
    try:
        shrink.main([str(source), str(target), "--size", "32", "--workers", "1", *map(str, more)])
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def count(path):
    """frames, height, width, problem"""
    return examine(path)[:4]


def tree(root):
    """Everything below a folder but what shrink writes for itself: {path: bytes, None for a folder}."""
    found = {}
    for folder, _, files in os.walk(root, followlinks=False):
        found[os.path.relpath(folder, root)] = None
        for name in files:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, root)] = file.read()
    return {path: content for path, content in found.items() if path != "shrink.jsonl"}


def shown(path):
    """The numbers that a video's pictures show, as every script reads them."""
    frames = range(count(path)[0])
    return numbers(decode(path, frames, 32, [(0, 0, 1, 1)] * len(frames)))


def numbers(clip):
    """The numbers that decoded pictures show, whatever their size: uint8 (N, 3, H, W) -> N ints."""
    return np.packbits((clip.float().unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127).numpy(), axis=1)[:, 0].tolist()


def times(path):
    return [float(frame.pts * frame.time_base) for frame in read_frames(path)]


def kinds(path):
    return "".join(PictureType(frame.pict_type).name for frame in read_frames(path))


# ---- What is kept ----

def test_tree_names_and_lists_are_those_of_the_original(world, copied):
    _, files, _ = list_tree(world)
    assert len(files) == 17 and sorted(files) == sorted(list_tree(copied)[1])
    assert (copied / "empty").is_dir() and not any(path.is_symlink() for path in copied.rglob("*"))
    for path in files:
        if not is_video(path):
            assert (copied / path).read_bytes() == (world / path).read_bytes()
    splits = [load_split("ucf101", root, root / "lists") for root in (world, copied)]
    assert splits[0].paths == splits[1].paths and splits[0].labels == splits[1].labels and not splits[1].missing
    assert load_split("folder", copied).paths == load_split("folder", world).paths


def test_every_copy_shows_the_frames_of_its_original_in_order(world, copied):
    for path in filter(is_video, list_tree(world)[1]):
        assert count(copied / path) == (70, 32, 42, ""), path
        assert shown(copied / path) == list(range(70)), path


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_copy_reads_under_any_suffix(world, tmp_path, suffix):
    (tmp_path / "in").mkdir()
    shutil.copy(world / "Spin/a.avi", tmp_path / "in" / f"a{suffix}")           # FFmpeg goes by the content
    assert run(tmp_path / "in", tmp_path / "out") == ""
    assert shown(tmp_path / "out" / f"a{suffix}") == list(range(70))


def test_key_frames_and_frames_that_no_other_refers_to_lie_as_promised(copied):
    path = copied / "Spin/a.avi"
    assert kinds(path) == ("I" + "BBBBBBBP" * 4) * 2 + "IBBP"
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        keys = [k for k, packet in enumerate(packets) if packet.is_keyframe]
        decoder = av.CodecContext.create("mpeg4", "r")
        decoder.extradata = container.streams.video[0].codec_context.extradata
        group = packets[keys[1]:keys[2]]                                        # by itself, and without its B-frames
        frames = [frame for packet in [p for p in group if not is_b(p)] + [None] for frame in decoder.decode(packet)]
    assert len(keys) == 3 and len(group) == 33
    images = np.stack([frame.reformat(64, 48, "rgb24").to_ndarray() for frame in frames])
    assert numbers(torch.from_numpy(images).permute(0, 3, 1, 2)) == [33, 41, 49, 57, 65]


def is_b(packet):
    """Whether an MPEG-4 packet's picture is a B-frame: two bits after the start code of a picture."""
    content = bytes(packet)
    return content[content.index(b"\0\0\1\xb6") + 4] >> 6 == 2


def test_intra_gives_only_key_frames(world, tmp_path):
    assert run(world / "Spin", tmp_path / "out", "--intra") == ""
    with av.open(str(tmp_path / "out" / "a.avi")) as container:
        assert [packet.is_keyframe for packet in container.demux(video=0) if packet.size] == [True] * 70


def test_frame_times_are_kept_from_0_on(tmp_path):
    (tmp_path / "in").mkdir()
    stamps = [n * n // 3 + n + 9 for n in range(60)]
    source = write_video(tmp_path / "in" / "uneven.mp4", numbered(60), "libx264", stamps, preset="ultrafast", bf="2")
    assert run(tmp_path / "in", tmp_path / "out") == ""
    was, now = times(source), times(tmp_path / "out" / "uneven.mp4")
    assert len(set(np.diff(np.round(was, 4)).round(4))) > 3
    assert now == pytest.approx([t - was[0] for t in was], abs=1e-6)


@pytest.mark.parametrize("stamps, expected", [
    ([0, 1, 1, 2, 4], [0, 1, 2, 3, 4]), ([None] * 5, [0, 1, 2, 3, 4]), ([3, 5, 4, 6, 9], [0, 1, 2, 3, 6]),
    ([2, None, None, 8, None], [0, 2, 4, 6, 8])])
def test_frames_with_missing_repeated_or_unordered_time_stamps_get_times_in_order(
        tmp_path, monkeypatch, stamps, expected):
    path, read = write_video(tmp_path / "a.mp4", numbered(5)), encode.read_frames

    def stamped(path):
        for frame, pts in zip(read(path), stamps):
            frame.pts = None if pts is None else round(pts / 25 / frame.time_base)
            yield frame
    monkeypatch.setattr(encode, "read_frames", stamped)
    content, frames, *_ = encode.shrunk(path, 32, 4, False)
    monkeypatch.undo()
    (tmp_path / "b.mp4").write_bytes(content)
    assert frames == 5 and times(tmp_path / "b.mp4") == pytest.approx([n / 25 for n in expected])


@pytest.mark.parametrize("codec, pix_fmt, tags", [
    ("libx264", "yuv420p", {}), ("libx264", "yuv420p", dict(colorspace=1, color_primaries=1, color_trc=1)),
    ("libx264", "yuv444p", {}), ("mjpeg", "yuvj420p", dict(color_range=2)), ("libx264", "yuv420p10le", {})])
def test_colours_are_kept(tmp_path, codec, pix_fmt, tags):
    colours = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210], [128, 128, 128]])
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream(codec, 25, options=dict(qmax="4"))
        stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.tile(colour, (48, 64, 1))).reformat(
                format=pix_fmt, dst_colorspace=tags.get("colorspace", 5), dst_color_range=tags.get("color_range", 1))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content, *_ = encode.shrunk(tmp_path / "a.mkv", 32, 2, False)
    (tmp_path / "b.mp4").write_bytes(content)
    was, now = (decode(tmp_path / name, range(6)).float().mean((2, 3)) for name in ("a.mkv", "b.mp4"))
    assert (was - now).abs().max() < 3, (was, now)


def test_a_video_that_players_turn_becomes_upright_and_asks_for_no_turn(shared, tmp_path):
    source = shared / "videos" / "odd" / "video_90.mov"
    assert next(read_frames(source)).rotation == -90 and count(source)[:3] == (3, 568, 320)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mov").symlink_to(source)
    assert run(tmp_path / "in", tmp_path / "out", "--size", 320, "--quality", 1) == ""
    assert next(read_frames(tmp_path / "out" / "a.mov")).rotation == 0
    was, now = (decode(path, range(3)).float() for path in (source, tmp_path / "out" / "a.mov"))
    assert was.shape == now.shape == (3, 3, 568, 320) and (was - now).abs().mean() < 5


def test_videos_are_not_enlarged(tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.avi", numbered(3))
    assert run(tmp_path / "in", tmp_path / "out", "--size", 64) == ""
    assert count(tmp_path / "out" / "a.avi") == (3, 48, 64, "")


def test_every_odd_real_file_is_copied_with_its_frames_or_listed(shared, tmp_path):
    names = [name for name, count in COUNTS.items() if count < 100]             # the longer ones take long
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).symlink_to(shared / "videos" / "odd" / name)
    said = run(tmp_path / "in", tmp_path / "out", "--size", 64, "--workers", 2)
    listed = {row["file"]: row for row in map(json.loads, (tmp_path / "out/shrink.jsonl").read_text().splitlines()[1:])}
    for name in names:
        copy = tmp_path / "out" / name
        assert copy.exists() == (COUNTS[name] > 0), name
        assert (name in listed) == (COUNTS[name] == 0 or name == "corrupted.mp4"), name
        assert (name in said) == (name in listed)
        if copy.exists():
            frames, height, width, problem = count(copy)
            assert (frames, problem) == (COUNTS[name], ""), name
            short = min(count(shared / "videos" / "odd" / name)[1:3])
            assert min(height, width) == max(2, min(64, short) // 2 * 2), name
    assert listed["corrupted.mp4"]["frames"] == 28 and "after 28 frames" in said


def test_nothing_in_the_source_is_changed(world, tmp_path):
    def state():
        stamps = {path: (world / path).lstat().st_mtime_ns for path in tree(world)}
        return tree(world), stamps
    before = state()
    assert run(world, tmp_path / "out") == "" and state() == before


# ---- Going on ----

def test_several_processes_write_the_bytes_of_one(world, copied, tmp_path):
    assert run(world, tmp_path / "out") == ""
    assert tree(tmp_path / "out") == tree(copied)


def test_what_is_done_is_not_done_again_and_what_changed_is(world, tmp_path):
    source, target = tmp_path / "in", tmp_path / "out"
    shutil.copytree(world / "Spin", source, symlinks=True, ignore=shutil.ignore_patterns("loop"))
    (source / "bad.avi").write_text("no video")
    said = run(source, target)
    assert "bad.avi (Invalid data" in said
    nodes = {path: (target / path).stat().st_ino for path in tree(target) if (target / path).is_file()}
    write_video(source / "b.mp4", numbered(9))
    (source / "new.avi").write_bytes((source / "a.avi").read_bytes())
    shutil.copy(source / "a.avi", source / "bad.avi")
    os.utime(source / "bad.avi", (0, 0))
    assert run(source, target) == ""
    again = {path for path, node in nodes.items() if (target / path).stat().st_ino != node}
    assert again == {"b.mp4"} and count(target / "b.mp4")[0] == 9 and count(target / "bad.avi")[0] == 70
    assert (target / "new.avi").exists() and len((target / "shrink.jsonl").read_text().splitlines()) == 1


def test_a_damaged_video_is_kept_up_to_the_fault_and_stays_listed_on_going_on(world, tmp_path, monkeypatch):
    source, target, read = tmp_path / "in", tmp_path / "out", encode.read_frames
    source.mkdir()
    shutil.copy(world / "Spin/a.avi", source / "cut.avi")

    def damaged(path):
        for n, frame in enumerate(read(path)):
            if n == 20 and source in path.parents:
                raise VideoError(f"{path}: broken")
            yield frame
    monkeypatch.setattr(encode, "read_frames", damaged)
    for _ in range(2):
        assert run(source, target) == ""
        rows = [json.loads(line) for line in (target / "shrink.jsonl").read_text().splitlines()]
        assert rows[1:] == [dict(file="cut.avi", frames=20, problem="broken")]
    assert shown(target / "cut.avi") == list(range(20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_no_half_file_and_goes_on(world, copied, tmp_path, number):
    target = tmp_path / "out"
    command = [sys.executable, ROOT / "tools/shrink.py", world, target, "--size", "32", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len([*target.glob("Spin/*.*"), *target.glob("Zoom/*.*")]) < 3:     # whole copies
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    left = {path: content for path, content in tree(target).items() if not path.startswith(".shrinking")}
    assert left.items() <= tree(copied).items() and 1 < len(left)
    if number != signal.SIGKILL:
        assert process.returncode == 1 and "Traceback" not in error and not (target / ".shrinking").exists()
        assert error.splitlines()[-1] == "interrupted: the same command goes on from here"
    with pytest.raises(ProcessLookupError):                                     # not one process of the session is left
        for _ in range(500):
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    assert run(world, target) == "" and tree(target) == tree(copied)


def test_a_full_disk_ends_in_one_sentence_without_half_files(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "start_process", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)))
    said = run(world, tmp_path / "out", "--quality", 1)
    assert said.startswith(f"cannot write to {tmp_path / 'out'} (disk full?): ") and "File too large" in said
    assert all(content is None or len(content) < 9000 for content in tree(tmp_path / "out").values())
    for path in filter(is_video, list_tree(tmp_path / "out")[1]):
        assert count(tmp_path / "out" / path)[0] == 70


def test_a_killed_process_of_the_pool_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "shrunk", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL))
    said = run(world, tmp_path / "out")
    assert "a process was killed" in said and ".avi" in said


# ---- What it refuses ----

def test_what_cannot_be_read_is_named_and_too_much_of_it_is_an_error(world, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(world / "Spin", source, symlinks=True, ignore=shutil.ignore_patterns("loop"))
    (source / "dangling.txt").symlink_to(source / "none")
    os.mkfifo(source / "pipe.txt")
    assert run(source, tmp_path / "out") == ""                                  # no video is lost
    names = {json.loads(line).get("file") for line in (tmp_path / "out/shrink.jsonl").read_text().splitlines()}
    assert names == {None, "dangling.txt", "pipe.txt"}
    (source / "text.avi").write_text("no video")
    said = run(source, tmp_path / "out")
    assert "text.avi (Invalid data" in said and "at most 5% of the videos may be unreadable" in said


@pytest.mark.parametrize("words, said", [
    (lambda here: [here / "none", here / "out"], "the folder .*none does not exist"),
    (lambda here: [here / "in", here / "in"], "must not lie in one another"),
    (lambda here: [here / "in", here / "in" / "out"], "must not lie in one another"),
    (lambda here: [here / "in", here], "must not lie in one another"),
    (lambda here: [here / "in", here / "other"], "other is not empty and no copy made by this command"),
    (lambda here: [here / "in", here / "copy"], "asked for is .*'size': 32.*: give another DST"),
    (lambda here: [here / "in", here / "in" / "a.avi" / "b"], "Not a directory|must not lie"),
    (lambda here: [here / "in", here / "hard"], "hard/a.avi is .*in/a.avi itself: give another DST")])
def test_a_wrong_invocation_is_refused_in_one_sentence_and_nothing_is_written(tmp_path, words, said):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.avi", numbered(2))
    for name in ("other", "copy", "hard"):
        (tmp_path / name).mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    (tmp_path / "copy" / "shrink.jsonl").write_text('{"size": 16, "quality": 4, "intra": false}\n')
    (tmp_path / "hard" / "shrink.jsonl").write_text('{"size": 32, "quality": 4, "intra": false}\n')
    (tmp_path / "hard" / "a.avi").symlink_to(tmp_path / "in" / "a.avi")
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError), match=said):
        shrink.main([*map(str, words(tmp_path)), "--size", "32"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flags, said", [
    (["--size", "113"], "--size must be even"),
    (["--size", "7"], "--size must lie between 8 and 1024, but is 7"),
    (["--quality", "0"], "--quality must lie between"), (["--workers", "0"], "--workers must lie between"),
    (["--crf", "3"], "unrecognized arguments: --crf 3")])
def test_a_wrong_flag_is_refused(capsys, flags, said):
    with contextlib.suppress(SystemExit):
        shrink.main(["in", "out", *flags])
    assert said in capsys.readouterr().err
