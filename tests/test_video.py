"""common/video.py: exactly the frames of a sequential decode, whatever the file."""
import csv
import ctypes
import gc
import os
import random
import wave

import av
import numpy as np
import pytest
from conftest import INVALID, SHARED, drifting, garble_frame, numbered_frames, numbers, write_video

from common import video
from common.video import VideoError, decode, probe

ODD = SHARED / "videos" / "odd"
MANIFEST = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.is_dir() else []
COUNTS = {row["file"]: int(row["decodable_frames"] or 0) for row in MANIFEST}


def numbered_textures(frames=60):
    """`numbered_frames` over a texture that moves"""
    textures = drifting(frames, side=64)[:, :48]
    return [n // 4 * 3 + t // 4 for n, t in zip(numbered_frames(frames), textures)]


def some(count, k=20):
    """k frame numbers in random order, the first, the last and a repeat among them."""
    rng = random.Random(0)
    chosen = [0, count - 1, count - 1] + rng.choices(range(count), k=k - 3)
    rng.shuffle(chosen)
    return chosen


def assert_exact(path, wanted, count):
    """decode(path) gives the pixels of PyAV's decode of all frames by one thread, upright."""
    expected = {}
    with av.open(str(path), **video.METADATA) as container:
        container.streams.video[0].thread_type = "NONE"
        for n, frame in enumerate(container.decode(video=0)):
            if n in wanted:
                picture = frame.to_ndarray(format="rgb24")
                expected[n] = np.rot90(picture, frame.rotation // 90)
    assert n + 1 == probe(path)[0] == count
    given = decode(path, wanted).permute(0, 2, 3, 1).numpy()
    for number, picture in zip(wanted, given, strict=True):
        assert np.array_equal(picture, expected[number]), number


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """An MPEG-4 video of 60 frames"""
    return write_video(tmp_path_factory.mktemp("plain") / "plain.avi", numbered_textures())


# ---- Exact frames ----

B_FRAMES = dict(codec="libx264", preset="ultrafast", bf="3", g="12")
KINDS = {
    "mpeg4.avi": dict(codec="mpeg4", g="12"),
    "full_range.avi": dict(codec="mjpeg"),
    "b_frames.mp4": B_FRAMES,
    "uneven_time_stamps.mp4": B_FRAMES | dict(stamps=[n * n // 3 + n for n in range(60)]),
    "interlaced.ts": dict(codec="mpeg2video", bf="2", flags="+ildct+ilme"),
    "full_chroma.mp4": B_FRAMES | dict(pixel_format="yuv444p"),
    "ten_bits.mp4": B_FRAMES | dict(pixel_format="yuv420p10le"),
    "transparent.mov": dict(codec="png", pixel_format="rgba"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_whose_numbers_were_asked_for(tmp_path, kind):
    path = write_video(tmp_path / kind, numbered_textures(), **KINDS[kind])
    wanted = some(60)
    assert_exact(path, wanted, 60)
    for size in (None, 24):
        assert numbers(decode(path, wanted, size)) == wanted


@pytest.mark.parametrize("name", [n for n in COUNTS if COUNTS[n] and n != "corrupted.mp4"])
def test_real_files_give_the_frames_of_a_full_decode(name):
    assert_exact(ODD / name, some(COUNTS[name], 6), COUNTS[name])
    assert decode(ODD / name, [0], 32, [(0.2, 0.1, 0.5, 0.3)]).shape == (1, 3, 32, 32)


def test_a_frame_does_not_depend_on_what_else_is_asked_for(plain):
    wanted = some(60)
    boxes = [(0.1 * (k % 3), 0.2 * (k % 2), 0.5, 0.6) for k in range(20)]       # some repeat
    for n, box, shown in zip(wanted, boxes, decode(plain, wanted, 24, boxes), strict=True):
        assert shown.equal(decode(plain, [n], 24, [box])[0])


# ---- Files that cannot be read ----

def test_a_damaged_video_gives_the_frames_before_the_fault(tmp_path):
    path = write_video(tmp_path / "a.avi", numbered_textures(), "mjpeg")
    garble_frame(path, 20)
    assert probe(path) == (20, 48, 64, INVALID)
    assert numbers(decode(path, range(20))) == list(range(20))  # stops after the last
    with pytest.raises(VideoError, match=f"^{path}: {INVALID}$"):
        decode(path, [5, 20])


def test_damage_inside_a_frame_is_concealed_as_by_one_thread(tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered_textures(), **B_FRAMES)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle:middle + 40] = bytes(40)
    path.write_bytes(content)
    assert_exact(path, range(60), 60)                           # several threads conceal otherwise


def test_unreadable_files_are_named_with_the_reason(tmp_path, plain):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "unknown.avi").write_bytes(plain.read_bytes().replace(b"FMP4", b"what"))     # codec
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    no_stream = "no video stream that FFmpeg decodes"
    for name, reason in {
            "empty.mp4": INVALID, "folder.mp4": "Is a directory", "sound.wav": no_stream,
            "missing.avi": "No such file or directory", "unknown.avi": no_stream}.items():
        assert probe(tmp_path / name) == (0, 0, 0, reason)
        with pytest.raises(VideoError) as caught:
            decode(tmp_path / name, [0])
        assert caught.value.reason == reason
        assert str(caught.value) == f"{tmp_path / name}: {reason}"


def test_a_video_without_frames_has_failed(tmp_path):
    with av.open(str(tmp_path / "none.avi"), "w") as container:
        stream = container.add_stream("mpeg4", 25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    assert probe(tmp_path / "none.avi") == (0, 0, 0, "no frames")


@pytest.mark.parametrize("error, reason", [
    (IndexError("list index out of range"), "list index out of range"),     # by PyAV
    (MemoryError(), "MemoryError")])
def test_any_error_of_a_library_is_reported_by_name(plain, monkeypatch, error, reason):
    def broken(path):
        raise error
    monkeypatch.setattr(video, "open_container", broken)
    with pytest.raises(VideoError, match=f"^{plain}: {reason}$"):
        decode(plain, [3])
    assert probe(plain) == (0, 0, 0, reason)


def test_a_frame_past_the_end_is_refused(plain):
    for wanted in ([60], [3, 75, 60]):
        with pytest.raises(VideoError, match=f"^{plain}: only 60 frames decode$"):
            decode(plain, wanted)


def test_a_disk_that_does_not_answer_is_an_error(plain, monkeypatch):
    monkeypatch.setattr(video, "TIMEOUT", 1e-9)
    assert probe(plain) == (0, 0, 0, "Immediate exit requested")


def test_metadata_may_be_any_bytes(plain, tmp_path):
    content = plain.read_bytes()
    assert b"Lavf" in content                                   # the writer's name
    (tmp_path / "a.avi").write_bytes(content.replace(b"Lavf", b"caf\xe9"))
    assert probe(tmp_path / "a.avi") == (60, 48, 64, "")


# ---- Leaks ----

class Malloc(ctypes.Structure):
    """glibc's mallinfo2"""
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used f g".split()]


def memory():
    """Bytes that malloc has given out, where small leaks show at once."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Malloc
    malloc = mallinfo()
    return malloc.used + malloc.mapped


def test_memory_and_open_files_stay_flat(plain):
    sizes, files = [], len(os.listdir("/proc/self/fd"))
    for _ in range(4):
        for k in range(100):
            decode(plain, [k % 7, 3], 24, [(0.0, 0.1 * (k % 5), 1.0, 0.5), (0.0, 0.0, 0.5, 0.5)])
        sizes.append(memory())
    growth = np.diff(sizes) / 100
    assert np.median(growth) < 50, growth                       # bytes; a leak is of 150 or more
    assert len(os.listdir("/proc/self/fd")) == files
