"""Run: python -m pytest tests/test_decode.py        TEST_DECODES=10000: a longer search for leaks"""
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
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from av.video.frame import PictureType
from conftest import SHARED

import data
from data import VideoError, count_frames, decode, draw_view, examine, read_needed, toy_video

ODD = SHARED / "videos" / "odd"
MANIFEST = list(csv.DictReader(open(ODD / "manifest.csv"))) if ODD.is_dir() else []
COUNTS = {row["file"]: int(row["decodable_frames"] or 0) for row in MANIFEST}
READABLE = [name for name in COUNTS if COUNTS[name] and name != "corrupted.mp4"]
UNREADABLE = [name for name in COUNTS if not COUNTS[name]]


def write_video(path, pictures, codec="mpeg4", stamps=None, **options):
    """Encode uint8 (H, W, 3) pictures; stamps: the time stamp of each, in frames; options: the encoder's."""
    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, _ = pictures[0].shape
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts = stamps[n] if stamps else n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered(frames):
    """Pictures that show their number: eight bits, eight black or white columns, (48, 64, 3) each."""
    rows = [np.unpackbits(np.uint8([n])).repeat(8) * np.uint8(255) for n in range(frames)]
    return [np.ascontiguousarray(np.broadcast_to(row[None, :, None], (48, 64, 3))) for row in rows]


def numbers(clip):
    """The numbers that decoded pictures show, whatever their size: uint8 (N, 3, H, W) -> N ints."""
    return np.packbits((clip.float().unflatten(-1, (8, -1)).mean((1, 2, 4)) > 127).numpy(), axis=1)[:, 0].tolist()


def ramps(height, width):
    """Two pictures that show where one looks: the first grows lighter from left to right, the second downwards."""
    down, right = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return [np.repeat(np.uint8(255 * grey)[..., None], 3, axis=2) for grey in (right, down)]


def resized(clip, height, width):
    """What a decode at that size should show, by torch: uint8 (N, 3, H, W) -> float (N, 3, height, width)."""
    return F.interpolate(clip.float(), (height, width), mode="bilinear", antialias=True)


def in_order(path, wanted):
    """The plain way: decode every frame in turn, convert those wanted -> uint8 (len(wanted), H, W, 3), frames."""
    with av.open(os.fspath(path), metadata_errors="ignore") as container:
        kept = {n: frame.to_ndarray(format="rgb24") if n in wanted else None
                for n, frame in enumerate(container.decode(video=0))}
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
    assert count_frames(written[kind]) == (60, 48, 64, "")


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
    read, seen = data.read_frames, []
    monkeypatch.setattr(data, "read_frames", lambda path: (seen.append(1) or frame for frame in read(path)))
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
    assert count == COUNTS[name] == count_frames(ODD / name)[0]
    assert np.array_equal(decode(ODD / name, wanted).permute(0, 2, 3, 1), expected)


def test_original_ucf101_files_give_the_frames_of_a_decode_in_order(shared):
    folder = shared / "videos" / "ucf_original" / "UCF-101"
    crawling = sorted(folder.glob("BabyCrawling/*.avi"))[:4]                    # time stamps out of order
    for path in crawling + [sorted(folder.glob(f"{name}/*.avi"))[0] for name in ("Lunges", "Punch", "PushUps")]:
        count = count_frames(path)[0]
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
    folder, frames = tmp_path_factory.mktemp("moving"), list(toy_video("Orbit", np.random.default_rng(0), 64)[:60])
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
        given = {n: frame.to_ndarray(format="rgb24") for n, frame in read_needed(path, wanted, packets)}
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
    """Whether `examine` tells packets: intra refresh gives corrupt frames, MPEG-TS and -PS cut packets into pieces."""
    return not ("refresh" in kind or kind.endswith((".ts", ".mpg")))


@pytest.mark.parametrize("name", READABLE)
def test_needed_frames_of_real_files_are_those_of_a_decode_in_order(name):
    asked, given = needed(ODD / name, 1 if (ODD / name).suffix in (".webm", ".mkv") else 3)
    assert (asked > 0) == (Path(name).suffix not in (".ts", ".mpeg")) and (given == asked or name == "av1_video.mkv")


def test_needed_frames_of_original_ucf101_files_are_those_of_a_decode_in_order(shared):
    for path in sorted((shared / "videos" / "ucf_original" / "UCF-101").glob("*/*.avi"))[::8]:
        asked, given = needed(path, 4)
        assert asked == given > 0


@pytest.fixture
def sent(monkeypatch):
    """(bytes, whether they may be passed over) for all that is sent to a decoder made from now on; None: it starts
    afresh."""
    packets, create = [], av.CodecContext.create

    class Recorder:
        def __init__(self, codec):
            vars(self).update(codec=codec)

        def __setattr__(self, name, value):
            setattr(self.codec, name, value)

        def decode(self, packet):
            packets.extend([] if packet is None else [(bytes(packet), self.codec.skip_frame == "NONREF")])
            return self.codec.decode(packet)

        def flush_buffers(self):
            packets.append(None)
            self.codec.flush_buffers()
    monkeypatch.setattr(av, "CodecContext", SimpleNamespace(create=lambda *args: Recorder(create(*args))))
    return packets


@pytest.mark.parametrize("kind, wanted, expected", [
    ("all_key_frames.mp4", [10, 40], [(10, False), None, (40, False), None]),
    ("motion_jpeg.avi", [0, 1, 3], [(0, False), None, (1, False), None, (3, False), None]),
    ("mpeg4.avi", [14, 51], [(12, True), (13, True), (14, False), None, (48, True), (49, True), (50, True), (51, False),
                             None]),
    ("mpeg4_with_b_frames.avi", [1], [(0, True), (1, True), (2, False), None])])                # I P B B: packet 2
def test_groups_and_packets_that_nothing_needs_are_not_sent(written, sent, kind, wanted, expected):
    with data.open_video(written[kind]) as (_, packets):
        number = {bytes(packet): k for k, packet in enumerate(packets)}
    assert numbers(decode(written[kind], wanted, packets=examine(written[kind])[4])) == wanted
    assert [item and (number[item[0]], item[1]) for item in sent] == expected


@pytest.mark.parametrize("failure", ["leaves a frame out", "raises an error"])
def test_where_the_packets_do_not_hold_frames_are_counted(written, monkeypatch, failure):
    def broken(path, wanted, packets):
        yield from itertools.islice(read_needed(path, wanted, packets), 2)
        if failure == "raises an error":
            raise av.error.InvalidDataError(1, "broken")
    monkeypatch.setattr(data, "read_needed", broken)
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
    frames, *_, problem = within(10, count_frames, ODD / name)
    assert frames == 0 and problem


def test_corrupt_file_gives_the_frames_before_the_fault_and_does_not_hang(shared):
    path = shared / "videos" / "odd" / "corrupted.mp4"                          # frame threads would hang here
    clip = within(20, decode, path, [27, 0, 13], 90)
    assert clip.shape == (3, 3, 90, 160)
    error = within(20, decode, path, [0, 28])
    assert isinstance(error, VideoError) and str(path) in str(error)
    frames, _, _, problem = within(20, count_frames, path)
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
        assert within(10, count_frames, tmp_path / name)[0] == 0


def test_a_frame_past_the_end_is_refused_with_the_number_that_decode(written):
    with pytest.raises(VideoError, match=r"mpeg4\.avi: frame 75 .* only 60 frames"):
        decode(written["mpeg4.avi"], [3, 75, 60])


def test_a_file_that_gives_no_frame_for_too_long_is_given_up(written, monkeypatch):
    monkeypatch.setattr(data, "PATIENCE", -1)
    with pytest.raises(VideoError, match=r"mpeg4\.avi"):
        decode(written["mpeg4.avi"], [59])


def test_a_change_of_picture_size_is_an_error_unless_pictures_are_scaled_to_boxes(tmp_path):
    parts = [write_video(tmp_path / f"{h}.h264", ramps(h, 64) * 2, **X264, bf="0") for h in (48, 80)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert count_frames(path) == (8, 80, 64, "")
    assert decode(path, [4, 7]).shape == (2, 3, 80, 64)
    with pytest.raises(VideoError, match="both.h264: the picture size changes"):
        decode(path, [0, 7])
    assert decode(path, [0, 7], 32, [(0, 0, 1, 1)] * 2).shape == (2, 3, 32, 32)


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


# ---- Sizes and boxes ----

SHAPES = [(48, 64), (64, 48), (50, 50), (36, 130), (201, 67)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Videos of several aspect ratios that show where one looks."""
    folder = tmp_path_factory.mktemp("pictures")
    return {shape: write_video(folder / f"{shape}.avi", ramps(*shape), b="4000000") for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES)
def test_size_is_the_short_side_and_the_aspect_ratio_stays(pictures, shape):
    clip = decode(pictures[shape], [0, 1])
    assert clip.shape == (2, 3, *shape)
    for size in (24, 37, 128):
        scaled = [round(side * size / min(shape)) for side in shape]
        small = decode(pictures[shape], [0, 1], size)
        assert small.shape == (2, 3, *scaled)
        assert (small - resized(clip, *scaled)).abs().mean() < 1.5


@pytest.mark.parametrize("shape", SHAPES)
def test_box_of_the_whole_picture_is_a_plain_resize(pictures, shape):
    whole = decode(pictures[shape], [0, 1], 32, [(0.0, 0.0, 1.0, 1.0)] * 2)
    assert (whole - resized(decode(pictures[shape], [0, 1]), 32, 32)).abs().mean() < 1
    if shape[0] == shape[1]:
        assert torch.equal(whole, decode(pictures[shape], [0, 1], 32))


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_what_a_crop_and_then_a_resize_show(pictures, shape):
    clip = decode(pictures[shape], [0, 1])
    corners = [(top, left, 0.5, 0.4) for top in (0.0, 0.5) for left in (0.0, 0.6)]
    for box in [draw_view(*shape, seed)[0] for seed in range(20)] + corners:
        top, left, height, width = (round(share * side) for share, side in zip(box, shape * 2))
        cropped = resized(clip[..., top:top + height, left:left + width], 64, 64)
        assert (decode(pictures[shape], [0, 1], 64, [box] * 2) - cropped).abs().mean() < 255 / 64, box  # a pixel


@pytest.mark.parametrize("suffix, codec", [("avi", "mpeg4"), ("avi", "mjpeg"), ("mp4", "libx264")])
def test_scaling_keeps_colours(tmp_path, suffix, codec):
    colours = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210], [128, 128, 128]])
    painted = [np.tile(colour, (48, 64, 1)) for colour in colours]
    path = write_video(tmp_path / f"colours.{suffix}", painted, codec, b="4000000")
    for size, boxes in ((None, None), (24, None), (40, [(0.1, 0.2, 0.5, 0.6)] * 6)):
        shown = decode(path, range(6), size, boxes).float()
        assert (shown.mean((2, 3)) - torch.from_numpy(colours)).abs().max() < 4
        assert shown.std((2, 3)).max() < 2


@pytest.mark.parametrize("shape", SHAPES)
def test_any_box_becomes_a_square_of_the_size_asked_for(pictures, shape):
    (height, width), rng = shape, random.Random(1)
    boxes = [(0.0, 0.99, 1.0, 0.01), (0.99, 0.0, 0.01, 1.0)]
    for side in range(20, min(shape)):                                          # as far down and right as there is
        boxes.append((1 - side / height, 1 - side / width, side / height, side / width))
    for _ in range(50):
        h, w = rng.uniform(0.2, 1), rng.uniform(0.2, 1)
        boxes.append((rng.uniform(0, 1 - h), rng.uniform(0, 1 - w), h, w))
    for size in (31, 112):
        assert decode(pictures[shape], [0] * len(boxes), size, boxes).shape == (len(boxes), 3, size, size)


def test_tall_and_tiny_real_videos_become_squares_too(shared):
    for name, shape in (("vertical-sample.ts", (4000, 16)), ("-video-with-dash-.mp4", (1, 1))):
        path, boxes = shared / "videos" / "odd" / name, [draw_view(*shape, seed)[0] for seed in range(4)]
        assert decode(path, [0]).shape[2:] == shape
        assert decode(path, [0], 64).shape[2:] == tuple(side * 64 // min(shape) for side in shape)
        assert decode(path, [0, 1, 2, 4], 128, boxes).shape == (4, 3, 128, 128)


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
