"""tools/shrink.py: what a copy keeps, what is listed, what a stop or a full disk leaves."""
import csv
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
from conftest import ROOT, SHARED, fails, numbered_frames, read_rows, write_video

from common import UserError
from common.splits import SUFFIXES, find_videos, load_split
from common.video import decode, probe, read_frames
from tools import shrink

ODD = SHARED / "videos" / "odd"
MANIFEST = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.is_dir() else []
FRAMES = {row["file"]: int(row["decodable_frames"] or 0) for row in MANIFEST}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small data set with a bit of everything; read-only."""
    root = tmp_path_factory.mktemp("world")
    for name in ("Spin/a.avi", "Spin/b.mp4", "Zoom/-i.avi", "Zoom/%03d.MP4", "Zoom/deep/c.mkv"):
        write_video(root / name, numbered_frames(70), b="4000000")
    for odd in (b"Spin/caf\xe9.avi", b"Spin/new\nline.avi", b"Zoom/concat:x.avi"):
        shutil.copy(root / "Spin/a.avi", root / os.fsdecode(odd))
    (root / "Zoom/linked.avi").symlink_to(root / "Spin/a.avi")
    (root / "Linked").symlink_to(root / "Spin")
    (root / "empty").mkdir()
    (root / "lists").mkdir()
    (root / "lists/classInd.txt").write_text("1 Spin\n2 Zoom\n")
    (root / "lists/trainlist01.txt").write_text("Spin/a.avi 1\nZoom/deep/c.mkv 2\n")
    (root / "Spin/._a.avi").write_bytes(b"not a video")
    return root


@pytest.fixture(scope="module")
def copied(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("copied") / "small", "--workers", 2)


def run(source, target, *more):
    """Copy in this process -> target"""
    words = [source, target, "--size", 32, "--workers", 1, *more]
    shrink.main([str(word) for word in words])
    return target


def command(source, target, *more):
    """The same as a command."""
    return [str(word) for word in (sys.executable, ROOT / "tools/shrink.py", source, target,
                                   "--size", 32, "--workers", 2, *more)]


def report(target):
    """{path: the row} of the files that are not whole"""
    return {row["file"]: row for row in read_rows(target / "shrink.jsonl")[1:]}


def tree(root):
    """{path: bytes, None for a folder} below a folder, links followed, without shrink.jsonl"""
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        found[os.path.relpath(folder, root)] = None
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                found[os.path.relpath(file.name, root)] = file.read()
    found.pop("shrink.jsonl", None)
    return found


def numbers(path):
    """The numbers that the frames of a video show."""
    frames = range(probe(path)[0])
    clip = decode(path, frames, 32, [(0, 0, 1, 1)] * len(frames)).float()       # (N, 3, 32, 32)
    bits = clip.unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127
    return np.packbits(bits.numpy(), axis=1)[:, 0].tolist()


def times(path):
    return [float(frame.pts * frame.time_base) for frame in read_frames(path)]


# ---- What is kept ----

def test_tree_names_and_lists_are_those_of_the_original(world, copied):
    assert tree(copied).keys() == tree(world).keys() and len(find_videos(copied)) == 13
    assert not any(path.is_symlink() for path in copied.rglob("*"))
    for path in ("lists/classInd.txt", "Spin/._a.avi"):
        assert (copied / path).read_bytes() == (world / path).read_bytes()
    splits = [load_split("ucf101", root, root / "lists") for root in (world, copied)]
    assert splits[0].paths == splits[1].paths and splits[0].labels == splits[1].labels
    assert not splits[1].failed


def test_every_copy_shows_the_frames_of_its_original_in_order(world, copied):
    for path in find_videos(world):
        assert probe(copied / path) == (70, 32, 42, ""), path
        assert numbers(copied / path) == list(range(70)), path


def test_frames_of_a_real_video_are_those_of_its_original_scaled(shared, tmp_path):
    path = "v_BabyCrawling_g02_c05.avi"
    (tmp_path / "in").mkdir()
    shutil.copy(ODD / path, tmp_path / "in" / path)
    run(tmp_path / "in", tmp_path / "out", "--size", 128)
    n = FRAMES[path]
    was, now = (decode(folder / path, range(n), 128, [(0, 0, 1, 1)] * n).float()
                for folder in (ODD, tmp_path / "out"))
    error = (was - now).square().mean((1, 2, 3))
    off = (was[1:] - now[:-1]).square().mean((1, 2, 3))         # of the frame before
    assert 10 * np.log10(255 ** 2 / error.max().item()) > 33           # PSNR in dB
    assert (error[1:] < off).all()


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_copy_reads_under_any_suffix(copied, tmp_path, suffix):
    shutil.copy(copied / "Spin/a.avi", tmp_path / f"a{suffix}")
    assert numbers(tmp_path / f"a{suffix}") == list(range(70))


def test_intra_gives_only_key_frames(world, tmp_path):
    target = run(world / "Spin", tmp_path / "out", "--intra")
    with av.open(str(target / "a.avi")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert [packet.is_keyframe for packet in packets] == [True] * 70


def test_frame_times_are_kept_from_0_on(tmp_path):
    stamps = [n * n // 3 + n + 9 for n in range(60)]
    source = write_video(tmp_path / "in/uneven.mp4", numbered_frames(60), "libx264", stamps, bf="2")
    was, now = times(source), times(run(tmp_path / "in", tmp_path / "out") / "uneven.mp4")
    assert len(set(np.diff(was).round(4))) > 3
    assert now == pytest.approx([t - was[0] for t in was], abs=1e-6)


@pytest.mark.parametrize("stamps, expected", [
    ([3, 5, 4, 6, 9], [0, 1, 2, 3, 6]), ([0, 1, 1, 2, 4], [0, 1, 2, 3, 4]),
    ([2, None, None, 10, None], [0, 2, 4, 6, 8]), ([None] * 3, [0, 1, 2])])
def test_time_stamps_are_sorted_or_evenly_spaced_where_some_are_missing(stamps, expected):
    assert list(shrink.times_of(stamps)) == expected


@pytest.mark.parametrize("codec, pix_fmt, tags", [
    ("libx264", "yuv420p", {}),
    ("libx264", "yuv420p", dict(colorspace=1, color_primaries=1, color_trc=1)),
    ("libx264", "yuv444p", {}), ("mjpeg", "yuvj420p", dict(color_range=2)),
    ("libx264", "yuv420p10le", {})])
def test_colours_are_kept(tmp_path, codec, pix_fmt, tags):
    colours = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210]])
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in/a.mkv"), "w") as container:
        stream = container.add_stream(codec, 25, options=dict(qmax="4"))
        stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.tile(colour, (48, 64, 1)))
            container.mux(stream.encode(frame.reformat(
                format=pix_fmt, dst_colorspace=tags.get("colorspace", 5),
                dst_color_range=tags.get("color_range", 1))))
        container.mux(stream.encode())
    run(tmp_path / "in", tmp_path / "out", "--quality", 2)
    was, now = (decode(tmp_path / folder / "a.mkv", range(5)).float().mean((2, 3))
                for folder in ("in", "out"))
    assert (was - now).abs().max() < 3, (was, now)


def test_a_rotated_video_becomes_upright(shared, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mov").symlink_to(ODD / "video_90.mov")
    run(tmp_path / "in", tmp_path / "out", "--size", 320, "--quality", 1)
    source, copy = tmp_path / "in/a.mov", tmp_path / "out/a.mov"
    assert [next(read_frames(path)).rotation for path in (source, copy)] == [-90, 0]
    was, now = (decode(path, range(3)).float() for path in (source, copy))
    assert was.shape == now.shape == (3, 3, 568, 320)
    assert (was - now).abs().mean() < 5


def test_videos_are_not_enlarged(tmp_path):
    write_video(tmp_path / "in/a.avi", numbered_frames(3))
    assert probe(run(tmp_path / "in", tmp_path / "out", "--size", 64) / "a.avi") == (3, 48, 64, "")


def test_every_odd_real_file_is_copied_with_its_frames_or_listed(shared, tmp_path):
    names = [name for name, count in FRAMES.items() if count < 100]     # the longer ones take long
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).symlink_to(ODD / name)
    with pytest.raises(UserError, match="3 of .* videos unreadable, more than 5%"):
        run(tmp_path / "in", tmp_path / "out", "--workers", 2)
    rows = report(tmp_path / "out")
    assert rows.keys() == {name for name in names if not FRAMES[name]} | {"corrupted.mp4"}
    for name in names:
        if FRAMES[name]:
            assert probe(tmp_path / "out" / name)[0] == FRAMES[name], name
        else:
            assert not (tmp_path / "out" / name).exists(), name


def test_nothing_in_the_source_is_changed(world, tmp_path):
    def state():
        return tree(world), {path: (world / path).lstat().st_mtime_ns for path in tree(world)}

    before = state()
    run(world, tmp_path / "out")
    assert state() == before


# ---- Resuming ----

def test_several_processes_write_the_bytes_of_one(world, copied, tmp_path):
    assert tree(run(world, tmp_path / "out")) == tree(copied)


def test_what_is_done_is_not_done_again_and_what_changed_is(world, tmp_path):
    source, target = shutil.copytree(world / "Spin", tmp_path / "in"), tmp_path / "out"
    run(source, target)
    changes = {path: path.stat().st_ctime_ns for path in target.glob("*.*")}
    write_video(source / "b.mp4", numbered_frames(9))
    os.utime(source / "b.mp4", (0, 0))
    shutil.copy(source / "a.avi", source / "new.avi")
    run(source, target)
    again = {path.name for path, change in changes.items() if path.stat().st_ctime_ns != change}
    assert again == {"b.mp4", "shrink.jsonl"} and (target / "new.avi").exists()
    assert numbers(target / "b.mp4") == list(range(9))


def test_a_damaged_video_is_kept_up_to_the_fault_and_listed_by_each_run(tmp_path):
    path = write_video(tmp_path / "in/a.avi", numbered_frames(30), "mjpeg")
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
        position, size = packet.pos, packet.size
    with path.open("r+b") as file:
        file.seek(position + 8)                                 # past the header of a chunk
        file.write(bytes(size))
    for _ in range(2):
        target = run(tmp_path / "in", tmp_path / "out")
        reason = "Invalid data found when processing input"
        assert report(target) == {"a.avi": dict(file="a.avi", frames=20, reason=reason)}
        assert numbers(target / "a.avi") == list(range(20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_no_half_file_and_resumes(world, copied, tmp_path, number):
    target = tmp_path / "out"

    def listen():                                               # a job in the background does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command(world, target), stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=listen)
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
    assert tree(run(world, target)) == tree(copied)


def test_a_copy_that_decodes_to_other_frames_is_not_kept(world, tmp_path, monkeypatch):
    monkeypatch.setattr(shrink, "probe", lambda path: (69, 32, 42, ""))
    frames, reason = shrink.encode(world / "Spin/a.avi", tmp_path / "copy", 32, 4, False)
    assert frames == 0 and reason.startswith("the copy is wrong: (69, 32, 42, '')")


def test_a_full_disk_leaves_no_half_files(world, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))

    done = subprocess.run(command(world, tmp_path / "out", "--quality", 1), preexec_fn=limit,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    files = [content for content in tree(tmp_path / "out").values() if content is not None]
    assert max(map(len, files), default=0) < 9000 and not [*tmp_path.glob(f"out/{shrink.TMP}*")]
    for path in find_videos(tmp_path / "out"):
        assert probe(tmp_path / "out" / path)[0] == 70


# ---- What cannot be copied ----

def test_what_cannot_be_read_or_encoded_is_listed_and_too_much_is_an_error(world, tmp_path, capsys):
    source, target = shutil.copytree(world / "Spin", tmp_path / "in"), tmp_path / "out"
    (source / "dangling.txt").symlink_to(source / "none")
    os.mkfifo(source / "pipe.txt")
    assert report(run(source, target)).keys() == {"dangling.txt", "pipe.txt"}   # no videos
    write_video(source / "wide.avi", [np.zeros((16, 9000, 3), np.uint8)], "mjpeg")
    (source / "text.avi").write_text("no video")
    with pytest.raises(UserError, match="2 of 6 videos unreadable, more than 5%"):
        run(source, target)
    rows = report(target)
    assert rows["text.avi"]["reason"] == "Invalid data found when processing input"
    assert rows["wide.avi"]["reason"].startswith("cannot be encoded")
    assert "text.avi (Invalid data" in capsys.readouterr().out


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
