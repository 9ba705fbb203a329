"""common/video.py: exactly the frames of a sequential decode, whatever the file. TEST_DECODES=10000: more for leaks"""
import contextlib
import csv
import ctypes
import gc
import itertools
import os
import random
import shutil
import socket
import threading
import wave
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType

from common import video
from common.toy import toy_video
from common.video import VideoError, decode, examine, open_container, read_needed
from conftest import SHARED, numbered, write_video
from data import draw_view

ODD = SHARED / "videos" / "odd"
MANIFEST = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.is_dir() else []
COUNTS = {row["file"]: int(row["decodable_frames"] or 0) for row in MANIFEST}
READABLE = [name for name in COUNTS if COUNTS[name] and name != "corrupted.mp4"]
UNREADABLE = [name for name in COUNTS if not COUNTS[name]]


def numbers(clip):
    """The numbers that decoded pictures show, whatever their size: uint8 (N, 3, H, W) -> N ints."""
    return np.packbits((clip.float().unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127).numpy(), axis=1)[:, 0].tolist()


def upright(frame):
    """A frame's pixels as players show them -> uint8 (H, W, 3)"""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def in_order(path, wanted):
    """The plain way: decode every frame in turn, convert and turn those wanted -> uint8 (n, H, W, 3), frames."""
    with open_container(path) as container:
        kept = {}
        for n, frame in enumerate(container.decode(video=0)):
            kept[n] = upright(frame) if n in wanted else None
    return np.stack([kept[n] for n in wanted]), len(kept)


def some(count, k, seed=0):
    """k frame numbers of count in random order, the first, the last and a repeat among them."""
    rng = random.Random(seed)
    chosen = [0, count - 1, count - 1] + [rng.randrange(count) for _ in range(k)]
    rng.shuffle(chosen)
    return chosen


def within(seconds, function, *args):
    """function(*args), or the VideoError it raises; a failure where it takes longer than `seconds`."""
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


def counted(path):
    """-> frames, height, width, problem"""
    return examine(path)[:4]


# ---- Exact frames: files whose pictures show their numbers ----

X264 = dict(codec="libx264", preset="ultrafast")
KINDS = {
    "h264_with_b_frames.mp4": dict(codec="libx264", bf="3", g="12"),
    "h264_with_open_gops.mp4": X264 | {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12:scenecut=0"},
    "h264_with_uneven_time_stamps.mp4": X264 | dict(bf="2", stamps=[n * n // 3 + n for n in range(60)]),
    "h264_with_b_frames.avi": X264 | dict(bf="3", g="12"),
    "h264_with_b_frames.ts": X264 | dict(bf="3", g="12"),
    "hevc.mp4": dict(codec="libx265", preset="ultrafast", **{"x265-params": "bframes=3:keyint=12:log-level=none"}),
    "mpeg4.avi": dict(codec="mpeg4", g="12"),
    "mpeg4_with_b_frames.avi": dict(codec="mpeg4", bf="2", g="12"),
    "all_key_frames.mp4": X264 | dict(g="1"),
    "motion_jpeg.avi": dict(codec="mjpeg"),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return {kind: write_video(folder / kind, numbered(60), **options) for kind, options in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_whose_numbers_were_asked_for(written, kind):
    wanted = some(60, 20)
    assert numbers(decode(written[kind], wanted)) == wanted
    assert numbers(decode(written[kind], wanted, size=24)) == wanted
    assert numbers(decode(written[kind], range(60))) == list(range(60))
    assert counted(written[kind]) == (60, 48, 64, "")


def test_written_files_hold_what_their_names_say(written):
    for kind, path in written.items():
        with av.open(str(path)) as container:
            types = {PictureType(frame.pict_type).name for frame in container.decode(video=0)}
        with av.open(str(path)) as container:
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
        keys = [k for k, (_, key) in enumerate(packets) if key]
        leading = any(packets[late][0] < packets[key][0] for key in keys for late in range(key, len(packets)))
        steps = {b - a for a, b in itertools.pairwise(sorted(pts for pts, _ in packets if pts is not None))}
        assert "B" in types or "b_frames" not in kind, kind
        assert leading or "open_gops" not in kind, kind                         # sent after a key, shown before
        assert len(steps) > 3 or "uneven" not in kind, kind
        assert len(keys) == 60 or "key_frames" not in kind, kind


def test_decoding_stops_at_the_last_frame_asked_for(written, monkeypatch):
    read, seen = video.read_frames, []
    monkeypatch.setattr(video, "read_frames", lambda path: (seen.append(1) or frame for frame in read(path)))
    decode(written["mpeg4.avi"], [7, 20, 3])
    assert len(seen) == 21


def test_a_frame_does_not_depend_on_what_else_is_asked_for(written):
    path, wanted = written["h264_with_b_frames.mp4"], some(60, 12)
    boxes = [draw_view(48, 64, seed % 4)[0] for seed in range(len(wanted))]     # some are shared
    for size, boxes in ((None, None), (24, None), (24, boxes)):
        together = decode(path, wanted, size, boxes)
        assert torch.equal(together, decode(path, wanted, size, boxes))
        for k, n in enumerate(wanted):
            assert torch.equal(together[k], decode(path, [n], size, boxes and [boxes[k]])[0])


def test_negative_frame_numbers_are_refused(written):
    with pytest.raises(ValueError, match="-1"):
        decode(written["mpeg4.avi"], [3, -1])


# ---- Exact frames: real files ----

@pytest.mark.parametrize("name", READABLE)
def test_real_files_give_the_frames_of_a_decode_in_order(name):
    wanted = some(COUNTS[name], 2 if COUNTS[name] < 200 and (ODD / name).suffix != ".avi" else 12)
    expected, count = in_order(ODD / name, wanted)
    assert count == COUNTS[name] == counted(ODD / name)[0]
    assert np.array_equal(decode(ODD / name, wanted).permute(0, 2, 3, 1), expected)


def test_original_ucf101_files_give_the_frames_of_a_decode_in_order(shared):
    folder = shared / "videos" / "ucf_original" / "UCF-101"
    crawling = sorted(folder.glob("BabyCrawling/*.avi"))[:4]                    # time stamps out of order
    for path in crawling + [sorted(folder.glob(f"{name}/*.avi"))[0] for name in ("Lunges", "Punch", "PushUps")]:
        count = counted(path)[0]
        expected, n = in_order(path, wanted := some(count, 12))
        assert n == count
        assert np.array_equal(decode(path, wanted).permute(0, 2, 3, 1), expected), path


# ---- Only what is needed: read_needed ----

MOVING = {
    "h264_with_b_pyramid.mp4": dict(codec="libx264", bf="7", g="32", **{"x264-params": "b-pyramid=normal"}),
    "h264_with_open_gops.ts": KINDS["h264_with_open_gops.mp4"],
    "h264_with_intra_refresh.mp4": dict(codec="libx264", bf="0", g="12", **{"x264-params": "intra-refresh=1"}),
    "h264_with_intra_refresh.ts": dict(codec="libx264", bf="0", g="12", **{"x264-params": "intra-refresh=1"}),
    "h264_interlaced.mp4": dict(codec="libx264", bf="2", g="12", **{"x264-params": "tff=1"}),
    "hevc_with_open_gops.mp4": dict(
        codec="libx265", **{"x265-params": "bframes=4:keyint=12:open-gop=1:log-level=none"}),
    "mpeg4_with_b_frames.avi": dict(codec="mpeg4", bf="2", g="12", flags="+qpel+mv4"),
    "mpeg2.mpg": dict(codec="mpeg2video", bf="2", g="12"),
    "vp9.webm": dict(codec="libvpx-vp9", deadline="realtime", g="12"),
}


@pytest.fixture(scope="session")
def moving(tmp_path_factory):
    """Videos in which something moves, so that a frame decoded from wrong references shows."""
    folder = tmp_path_factory.mktemp("moving")
    frames = list(toy_video("ChecksOrbit", np.random.default_rng(0), 64)[:60])
    return {kind: write_video(folder / kind, frames, **options) for kind, options in MOVING.items()}


def needed(path, asked=8):
    """Ask read_needed for clips at several speeds: every frame that it gives must be that of a decode in order, bit for
    bit -> how many frames were asked for, and given."""
    frames, *_, packets = examine(path)
    expected, _ = in_order(path, range(frames))
    rng, counts = random.Random(0), [0, 0]
    for _ in range(asked if packets else 0):
        speed, start = rng.choice([1, 2, 4, 8]), rng.randrange(frames)
        wanted = {rng.randrange(frames), *range(start, min(frames, start + 8 * speed), speed)}
        given = {n: upright(frame) for n, frame in read_needed(path, wanted, packets)}
        assert given.keys() <= wanted and all(np.array_equal(expected[n], image) for n, image in given.items()), path
        counts[0], counts[1] = counts[0] + len(wanted), counts[1] + len(given)
    return counts


@pytest.mark.parametrize("kind", KINDS | MOVING)
def test_needed_frames_are_those_of_a_decode_in_order(written, moving, kind):
    for files in (written, moving):
        if kind in files:
            asked, given = needed(files[kind])
            assert given == asked and (asked > 0) == known(kind)


def known(kind):
    """Whether `examine` tells packets: with intra refresh key frames are none."""
    return "refresh" not in kind


PACKED = ("RATRACE_wave_f_nm_np1_fr_goo_37.avi", "TrumanShow_wave_f_nm_np1_fr_med_26.avi", "cartwheel.avi", "test.avi",
          "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi", "v_BabyCrawling_g02_c01.avi",
          "v_BabyCrawling_g02_c05.avi", "v_JugglingBalls_g18_c02.avi")          # pictures in DivX's packets of two


@pytest.mark.parametrize("name", READABLE)
def test_needed_frames_of_real_files_are_those_of_a_decode_in_order(name):
    asked, given = needed(ODD / name, 1 if (ODD / name).suffix in (".webm", ".mkv") else 3)
    assert given == asked and (asked > 0) == (name not in PACKED + ("av1_video.mkv",))


def test_needed_frames_of_original_ucf101_files_are_those_of_a_decode_in_order(shared):
    for path in sorted((shared / "videos" / "ucf_original" / "UCF-101").glob("*/*.avi"))[::8]:
        asked, given = needed(path, 4)
        assert asked == given and (asked > 0 or path.parent.name == "BabyCrawling")     # many are packed


def test_what_the_scan_remembers_is_short(written, moving):
    for kind, path in (written | moving).items():
        assert len(examine(path)[4]) < 3 * 60, kind                             # bytes; there are 60 frames


@pytest.fixture
def sent(monkeypatch):
    """(time stamp, whether it may be passed over) of all packets that read_needed sends; None: it is emptied."""
    packets, opened = [], video.open_video

    class Recorder:
        def __init__(self, codec):
            vars(self).update(codec=codec)

        def __setattr__(self, name, value):
            setattr(self.codec, name, value)

        def decode(self, packet):
            if packet is not None:
                packets.append((packet.dts, self.codec.skip_frame == "NONREF"))
            return self.codec.decode(packet)

        def flush_buffers(self):
            packets.append(None)
            self.codec.flush_buffers()

    @contextlib.contextmanager
    def recording(path):
        with opened(path) as (codec, stream):
            yield Recorder(codec), stream
    monkeypatch.setattr(video, "open_video", recording)
    return packets


@pytest.mark.parametrize("kind, wanted, expected", [
    ("all_key_frames.mp4", [10, 40], [(10, False), None, (40, False), None]),
    ("motion_jpeg.avi", [0, 1, 3], [(0, False), None, (1, False), None, (3, False), None]),
    ("mpeg4.avi", [14, 51], [(12, True), (13, True), (14, False), None, (48, True), (49, True), (50, True), (51, False),
                             None]),
    ("mpeg4_with_b_frames.avi", [1], [(0, True), (1, True), (2, False), None])])                # I P B B: packet 2
def test_groups_and_packets_that_nothing_needs_are_not_sent(written, sent, kind, wanted, expected):
    with video.open_video(written[kind]) as (_, packets):
        number = {packet.dts: k for k, packet in enumerate(packets)}
    packets = examine(written[kind])[4]
    sent.clear()
    assert numbers(decode(written[kind], wanted, packets=packets)) == wanted
    assert [item and (number[item[0]], item[1]) for item in sent] == expected


@pytest.mark.parametrize("failure", ["leaves a frame out", "raises an error"])
def test_where_the_packets_do_not_hold_frames_are_counted(written, monkeypatch, failure):
    def broken(path, wanted, packets):
        yield from itertools.islice(read_needed(path, wanted, packets), 2)
        if failure == "raises an error":
            raise VideoError("broken")
    monkeypatch.setattr(video, "read_needed", broken)
    path, wanted = written["h264_with_b_frames.mp4"], [40, 3, 25, 40]
    assert numbers(decode(path, wanted, packets=examine(path)[4])) == wanted
    with pytest.raises(VideoError, match="frame 60 .* only 60 frames"):
        decode(path, [60], packets=examine(path)[4])


def test_a_file_that_changed_since_its_scan_is_counted(written, tmp_path):
    first, then = written["mpeg4.avi"], written["mpeg4_with_b_frames.avi"]
    path = Path(shutil.copy(first, tmp_path / "a.avi"))
    packets = examine(path)[4]
    assert len(list(read_needed(path, {3, 30}, packets))) == 2
    shutil.copy(then, path)
    assert not list(read_needed(path, {3, 30}, packets))
    assert numbers(decode(path, [3, 30], packets=packets)) == [3, 30]


def test_a_file_that_ends_in_an_error_or_has_p_frames_as_key_frames_has_no_packets(shared, moving):
    assert examine(shared / "videos" / "odd" / "corrupted.mp4")[4] == ""
    for kind, path in moving.items():
        assert bool(examine(path)[4]) == known(kind), kind


# ---- Files that cannot be read ----

@pytest.mark.parametrize("name", UNREADABLE)
def test_real_unreadable_files_are_reported_by_name_within_seconds(name):
    error = within(10, decode, ODD / name, [0])
    assert isinstance(error, VideoError) and str(ODD / name) in str(error)
    frames, *_, problem = within(10, counted, ODD / name)
    assert frames == 0 and problem


def test_corrupt_file_gives_the_frames_before_the_fault_and_does_not_hang(shared):
    path = shared / "videos" / "odd" / "corrupted.mp4"                          # frame threads would hang here
    clip = within(20, decode, path, [27, 0, 13], 90)
    assert clip.shape == (3, 3, 90, 160)
    error = within(20, decode, path, [0, 28])
    assert isinstance(error, VideoError) and str(path) in str(error)
    frames, _, _, problem = within(20, counted, path)
    assert frames == 28 and problem


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
    for name in ("empty.mp4", "text.avi", "head.mp4", "noise.mp4", "folder.mp4", "sound.wav", "missing.avi"):
        error = within(10, decode, tmp_path / name, [0])
        assert isinstance(error, VideoError) and str(error).startswith(f"{tmp_path / name}: "), name
        assert within(10, counted, tmp_path / name)[0] == 0


def test_what_pyav_raises_of_a_damaged_file_is_reported_by_its_name(written, monkeypatch):
    def demux(*args):
        raise IndexError("list index out of range")                             # where a stream begins in mid-file
    monkeypatch.setattr(video, "video_stream", demux)
    with pytest.raises(VideoError, match="mpeg4.avi: list index out of range"):
        decode(written["mpeg4.avi"], [3])
    assert counted(written["mpeg4.avi"]) == (0, 0, 0, "list index out of range")


def test_a_frame_past_the_end_is_refused_with_the_number_that_decode(written):
    with pytest.raises(VideoError, match=r"mpeg4\.avi: frame 75 .* only 60 frames"):
        decode(written["mpeg4.avi"], [3, 75, 60])


def test_a_file_that_gives_no_frame_for_too_long_is_given_up(written, monkeypatch):
    monkeypatch.setattr(video, "PATIENCE", -1)
    with pytest.raises(VideoError, match=r"mpeg4\.avi"):
        decode(written["mpeg4.avi"], [59])


# ---- File names ----

@pytest.mark.parametrize("name", [
    b"caf\xe9.avi", b"[a] (b) {c}; $(touch x) & '\"`.avi", b"-i.avi", b"concat:x.avi", b"http:x.avi",
    b"%03d*?.avi", b"new\nline.avi", "\u89c6\u9891".encode()])
def test_any_file_name_is_only_a_file_name(written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name)
    shutil.copy(written["mpeg4.avi"], tmp_path / name)
    assert numbers(decode(name, [7, 5])) == numbers(decode(tmp_path / name, [7, 5])) == [7, 5]
    assert os.listdir() == [name]


@pytest.mark.parametrize("name", [
    "http://127.0.0.1/x.mp4", "concat:a.avi|a.avi", "pipe:0", "subfile,,start,0,end,0,,:a.avi", "file:a.avi"])
def test_protocols_are_not_followed(written, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copy(written["mpeg4.avi"], "a.avi")
    error = within(10, decode, name, [0])
    assert isinstance(error, VideoError) and "No such file" in str(error)


@pytest.mark.parametrize("suffix", ["m3u8", "mp4"])
def test_a_playlist_does_not_reach_the_network(tmp_path, suffix):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        path = tmp_path / f"list.{suffix}"
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\n{url}\n#EXT-X-ENDLIST\n")
        assert isinstance(within(10, decode, path, [0]), VideoError)
        with pytest.raises(BlockingIOError):
            server.accept()


# ---- Leaks ----

class Malloc(ctypes.Structure):
    """What glibc's mallinfo2 says."""
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used f g".split()]


def memory():
    """kB that this process holds, and that malloc has given out: a small leak shows in the latter at once."""
    gc.collect()
    held = next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]
    malloc = ctypes.CDLL(None).mallinfo2
    malloc.restype = Malloc
    return np.array([int(held), (malloc().used + malloc().mapped) / 1024])


def test_memory_and_open_files_stay_flat(written, tmp_path):
    good, bad = written["mpeg4.avi"], tmp_path / "text.avi"
    bad.write_text("no video")
    growth, decodes, files = [], int(os.environ.get("TEST_DECODES", 1000)), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        before = memory()
        for k in range(decodes // 10):
            decode(good, [k % 7, 3], size=24, boxes=[(0.0, 0.1 * (k % 5), 1.0, 0.5), (0.0, 0.0, 0.5, 0.5)])
            with pytest.raises(VideoError):
                decode(bad if k % 3 else good, [60])
        growth.append(memory() - before)
    assert (np.median(growth, axis=0) < decodes / 200).all(), growth            # 0.3 kB a decode was lost once
    assert len(os.listdir("/proc/self/fd")) == files
