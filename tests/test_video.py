"""common/video.py: exactly the frames of a sequential decode, whatever the file.

TEST_DECODES=10000 looks longer for leaks.
"""
import csv
import ctypes
import gc
import os
import random
import shutil
import socket
import threading
import wave

import av
import numpy as np
import pytest
from conftest import SHARED, numbered_frames, write_video

from common import video
from common.video import VideoError, decode, probe
from data import draw_view

ODD = SHARED / "videos" / "odd"
MANIFEST = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.is_dir() else []
COUNTS = {row["file"]: int(row["decodable_frames"] or 0) for row in MANIFEST}
READABLE = [name for name in COUNTS if COUNTS[name] and name != "corrupted.mp4"]
UNREADABLE = [name for name in COUNTS if not COUNTS[name]]


def numbers(clip):
    """The numbers that decoded pictures show, at any size: uint8 (N, 3, H, W) -> N ints."""
    bits = clip.float().unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127
    return np.packbits(bits.numpy(), axis=1)[:, 0].tolist()


def some(count, k, seed=0):
    """k frame numbers in random order, the first, the last and a repeat among them."""
    rng = random.Random(seed)
    chosen = [0, count - 1, count - 1] + [rng.randrange(count) for _ in range(k)]
    rng.shuffle(chosen)
    return chosen


def assert_exact(path, k=12):
    """decode(path) gives the pixels of PyAV's own decode of the whole file -> number of frames"""
    count = probe(path)[0]
    wanted = some(count, k)
    expected, n = {}, -1
    with av.open(str(path), **video.METADATA) as container:
        for n, frame in enumerate(container.decode(video=0)):
            if n in wanted:
                picture = frame.to_ndarray(format="rgb24")
                expected[n] = np.rot90(picture, frame.rotation // 90)       # as players show it
    assert n + 1 == count
    given = decode(path, wanted).permute(0, 2, 3, 1).numpy()
    for number, picture in zip(wanted, given, strict=True):
        assert np.array_equal(picture, expected[number]), (path, number)
    return count


def within(seconds, function, *args):
    """function(*args), or the VideoError it raises; fail where it takes longer than `seconds`."""
    results = []

    def call():
        try:
            results.append(function(*args))
        except VideoError as error:
            results.append(error)
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no answer within {seconds} seconds"
    return results[0]


# ---- Exact frames ----

X264 = dict(codec="libx264", preset="ultrafast")
OPEN_GOPS = "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0"
KINDS = {
    "h264_with_b_frames.mp4": dict(codec="libx264", bf="3", g="12"),
    "h264_with_open_gops.mp4": X264 | {"x264-params": OPEN_GOPS},
    "h264_with_uneven_time_stamps.mp4": X264 | dict(
        bf="2", stamps=[n * n // 3 + n for n in range(60)]),
    "h264_with_b_frames.avi": X264 | dict(bf="3", g="12"),
    "mpeg4.avi": dict(codec="mpeg4", g="12"),
    "motion_jpeg.avi": dict(codec="mjpeg"),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """60 pictures that show their numbers, in each of KINDS."""
    folder = tmp_path_factory.mktemp("written")
    return {kind: write_video(folder / kind, numbered_frames(60), **options)
            for kind, options in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_whose_numbers_were_asked_for(written, kind):
    wanted = some(60, 20)
    assert numbers(decode(written[kind], wanted)) == wanted
    assert numbers(decode(written[kind], wanted, size=24)) == wanted
    assert numbers(decode(written[kind], range(60))) == list(range(60))
    assert probe(written[kind]) == (60, 48, 64, "")


def test_decoding_stops_at_the_last_frame_asked_for(written, monkeypatch):
    read, seen = video.read_frames, []
    monkeypatch.setattr(
        video, "read_frames", lambda path: (seen.append(frame) or frame for frame in read(path)))
    decode(written["mpeg4.avi"], [7, 20, 3])
    assert len(seen) == 21


def test_a_frame_does_not_depend_on_what_else_is_asked_for(written):
    path, wanted = written["h264_with_b_frames.mp4"], some(60, 12)
    crops = [draw_view(48, 64, seed % 4)[0] for seed in range(len(wanted))]     # some repeat
    for size, boxes in ((None, None), (24, None), (24, crops)):
        together = decode(path, wanted, size, boxes)
        for k, n in enumerate(wanted):
            alone = decode(path, [n], size, boxes and [boxes[k]])
            assert together[k].equal(alone[0])


@pytest.mark.parametrize("name", READABLE)
def test_real_files_give_the_frames_of_a_full_decode(name):
    long = COUNTS[name] > 200 or (ODD / name).suffix == ".avi"
    assert assert_exact(ODD / name, 12 if long else 2) == COUNTS[name]


def test_original_ucf101_files_give_the_frames_of_a_full_decode(shared):
    folder = shared / "videos" / "ucf_original" / "UCF-101"
    paths = sorted(folder.glob("BabyCrawling/*.avi"))[:4]       # time stamps out of order
    paths += [min(folder.glob(f"{name}/*.avi")) for name in ("Lunges", "Punch", "PushUps")]
    for path in paths:
        assert assert_exact(path) > 20


# ---- Exact frames, whatever codec, pixel format and container ----

GOP = dict(g="6")
B_FRAMES = dict(g="6", bf="2")
FAST = dict(preset="ultrafast")
PYRAMID = "bframes=7:keyint=12:b-pyramid=normal:ref=4"
HEVC = "bframes=3:keyint=6:min-keyint=6:log-level=none:open-gop=1"
VPX = {"g": "6", "deadline": "realtime", "auto-alt-ref": "0"}
HIDDEN = {"g": "6", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "10"}
ROWS = (                                        # encoder, its options, pixel formats, containers
    ("png", {}, "rgba rgb24 gray rgb48be monob", "mov"),
    ("apng", {}, "rgba", "apng"),
    ("qtrle", GOP, "rgb24 argb gray", "mov"),
    ("huffyuv", {}, "yuv422p rgb24", "avi"),
    ("ffvhuff", {}, "yuv444p10le yuva420p", "avi"),
    ("ffv1", GOP, "yuv420p yuv422p10le yuv444p12le yuva444p16le gray16le bgra", "mkv"),
    ("rawvideo", {}, "rgb24 yuyv422 gray", "avi"),
    ("prores_ks", {}, "yuv422p10le yuva444p10le", "mov"),
    ("mjpeg", {}, "yuvj420p yuvj444p", "avi mov"),
    ("mpeg1video", B_FRAMES, "yuv420p", "avi mkv"),
    ("mpeg2video", B_FRAMES, "yuv420p", "ts mkv mov"),
    ("mpeg4", B_FRAMES, "yuv420p", "avi mp4 mkv ts"),
    ("wmv2", GOP, "yuv420p", "avi"),
    ("flv", GOP, "yuv420p", "flv"),
    ("libx264", B_FRAMES | FAST, "yuv420p", "mp4 mkv avi ts mov"),
    ("libx264", B_FRAMES, "yuv444p yuv420p10le gray", "mp4"),
    ("libx264", FAST | {"x264-params": OPEN_GOPS}, "yuv420p", "mp4 ts"),
    ("libx264", {"x264-params": PYRAMID}, "yuv420p", "mp4"),
    ("libx264", {"x264-params": "tff=1:keyint=6:bframes=2"}, "yuv420p", "mp4"),         # interlaced
    ("libx264", {"x264-params": "intra-refresh=1", "g": "12", "bf": "0"}, "yuv420p", "mp4 ts"),
    ("libx265", FAST | {"x265-params": HEVC}, "yuv420p yuv420p10le", "mp4 ts"),
    ("libvpx", VPX, "yuv420p yuva420p", "webm"),
    ("libvpx", HIDDEN, "yuv420p", "webm"),      # some frames are never shown
    ("libvpx-vp9", VPX | {"cpu-used": "8"}, "yuv420p", "webm mp4"),
    ("libvpx-vp9", HIDDEN | {"cpu-used": "5"}, "yuv420p", "webm"),
    ("libsvtav1", {"g": "6", "preset": "12"}, "yuv420p", "mp4 webm"),
    ("libaom-av1", {"g": "6", "cpu-used": "8"}, "yuv420p", "mkv"),
    ("gif", {}, "rgb8", "gif"))
CASES = [(codec, options, form, suffix) for codec, options, forms, suffixes in ROWS
         for form in forms.split() for suffix in suffixes.split()]


def moving(frames=24, side=64):
    """Gradients that move, a patch that jumps, every fifth noisy -> uint8 (side, side, 3) each."""
    y, x = np.mgrid[:side, :side]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3))
    for t in range(frames):
        picture = np.stack([x * 5 + t * 7, y * 6 + t * 11, x * 3 + y * 4 + t * 5], axis=2) % 256
        picture[8 + t % 16:16 + t % 16, t:t + 10] = (255 * (t % 2), 60, 200)
        yield ((picture + noise) // 2 if t % 5 == 4 else picture).astype(np.uint8)


def write(path, codec, options, form):
    """Write `moving` in a pixel format; skip where this build of PyAV lacks the encoder."""
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, 25, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 64, form
            stream.codec_context.thread_count = 1
            for t, picture in enumerate(moving()):
                frame = av.VideoFrame.from_ndarray(picture).reformat(format=form)
                frame.pts = t
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"PyAV here cannot write {codec} {form} as {path.suffix}: {error}")


@pytest.mark.parametrize("codec, options, form, suffix", CASES)
def test_every_format_gives_the_frames_of_a_full_decode(tmp_path, codec, options, form, suffix):
    path = tmp_path / f"{codec}.{suffix}"
    write(path, codec, options, form)
    assert assert_exact(path) >= 23
    assert decode(path, [0, 9], 32).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_give_the_frames_of_a_full_decode_up_to_the_fault(tmp_path, seed):
    path, rng = tmp_path / f"damaged.{('mp4', 'ts', 'avi')[seed % 3]}", random.Random(seed)
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    write_video(path, list(moving(60)), codec, bf="2", g="12")
    content = bytearray(path.read_bytes())
    for _ in range(5):
        content[rng.randrange(len(content) // 8, len(content))] = rng.randrange(256)
    if path.suffix != ".mp4":                   # whose index is at its end
        content = content[:rng.randrange(len(content) // 2, len(content))]
    path.write_bytes(content)
    expected = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            for frame in container.decode(stream):
                expected.append(frame.to_ndarray(format="rgb24"))
    except av.error.FFmpegError as error:
        assert probe(path)[3] == error.strerror
    assert probe(path)[0] == len(expected)
    if expected:
        given = decode(path, range(len(expected))).permute(0, 2, 3, 1)
        assert np.array_equal(given, expected)
    with pytest.raises(VideoError, match=f"^{path}: "):
        decode(path, [len(expected)])


# ---- Files that cannot be read ----

@pytest.mark.parametrize("name", UNREADABLE)
def test_real_unreadable_files_are_reported_by_name_within_seconds(name):
    error = within(10, decode, ODD / name, [0])
    assert isinstance(error, VideoError) and str(error).startswith(f"{ODD / name}: ")
    frames, _, _, reason = within(10, probe, ODD / name)
    assert frames == 0 and str(error) == f"{ODD / name}: {error.reason}"
    assert reason in (error.reason, "no frames")


def test_corrupt_file_gives_the_frames_before_the_fault_and_does_not_hang(shared):
    path = ODD / "corrupted.mp4"                                # frame threads would hang here
    assert within(20, decode, path, [27, 0, 13], 90).shape == (3, 3, 90, 160)
    error = within(20, decode, path, [0, 28])
    assert isinstance(error, VideoError) and str(path) in str(error)
    frames, _, _, reason = within(20, probe, path)
    assert frames == 28 and reason


def test_unreadable_files_are_reported_by_name(tmp_path, written):
    whole = written["h264_with_b_frames.mp4"].read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.avi").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "head.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(random.Random(0).randbytes(10_000))
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    for path in (*tmp_path.iterdir(), tmp_path / "missing.avi"):
        error = within(10, decode, path, [0])
        assert isinstance(error, VideoError) and str(error) == f"{path}: {error.reason}"
        assert within(10, probe, path) == (0, 0, 0, error.reason)


def test_an_error_of_pyav_in_a_damaged_file_is_reported_by_name(written, monkeypatch):
    def broken(path):
        raise IndexError("list index out of range")             # where a stream begins in mid-file
    monkeypatch.setattr(video, "open_container", broken)
    with pytest.raises(VideoError, match="mpeg4.avi: list index out of range"):
        decode(written["mpeg4.avi"], [3])
    assert probe(written["mpeg4.avi"]) == (0, 0, 0, "list index out of range")


def test_a_frame_past_the_end_is_refused(written):
    with pytest.raises(VideoError, match=r"mpeg4\.avi: only \d+ frames decode"):
        decode(written["mpeg4.avi"], [3, 75, 60])


# ---- File names ----

@pytest.mark.parametrize("name", [
    b"caf\xe9.avi", b"[a] (b) {c}; $(touch x) & '\"`.avi", b"-i.avi", b"concat:x.avi",
    b"http:x.avi", b"%03d*?.avi", b"new\nline.avi", "\u89c6\u9891".encode()])
def test_any_file_name_is_only_a_file_name(written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name)
    shutil.copy(written["mpeg4.avi"], tmp_path / name)
    assert numbers(decode(name, [7, 5])) == numbers(decode(tmp_path / name, [7, 5])) == [7, 5]
    assert os.listdir() == [name]


@pytest.mark.parametrize("name", [
    "http://127.0.0.1/x.mp4", "concat:a.avi|a.avi", "pipe:0", "subfile,,start,0,end,0,,:a.avi",
    "file:a.avi"])
def test_protocols_are_not_followed(written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(written["mpeg4.avi"], "a.avi")
    error = within(10, decode, name, [0])
    assert isinstance(error, VideoError) and error.reason == "No such file or directory"


@pytest.mark.parametrize("suffix", ["m3u8", "mp4"])
def test_a_playlist_does_not_reach_the_network(tmp_path, suffix):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        path = tmp_path / f"list.{suffix}"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n")
        assert isinstance(within(10, decode, path, [0]), VideoError)
        with pytest.raises(BlockingIOError):
            server.accept()


# ---- Leaks ----

class Malloc(ctypes.Structure):
    """glibc's mallinfo2"""
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used f g".split()]


def memory():
    """kB that this process holds, and that malloc has given out, where small leaks show at once."""
    gc.collect()
    status = open("/proc/self/status").read().split()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Malloc
    malloc = mallinfo()
    held = int(status[status.index("VmRSS:") + 1])
    return np.array([held, (malloc.used + malloc.mapped) / 1024])


def test_memory_and_open_files_stay_flat(written, tmp_path):
    good, bad = written["mpeg4.avi"], tmp_path / "text.avi"
    bad.write_text("no video")
    decodes, files = int(os.environ.get("TEST_DECODES", 1000)), len(os.listdir("/proc/self/fd"))
    growth = []
    for _ in range(5):
        before = memory()
        for k in range(decodes // 10):
            boxes = [(0.0, 0.1 * (k % 5), 1.0, 0.5), (0.0, 0.0, 0.5, 0.5)]
            decode(good, [k % 7, 3], 24, boxes)
            with pytest.raises(VideoError):
                decode(bad if k % 3 else good, [60])
        growth.append(memory() - before)
    assert (np.median(growth, axis=0) < decodes / 200).all(), growth        # 0.2 kB a decode
    assert len(os.listdir("/proc/self/fd")) == files
