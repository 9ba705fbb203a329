"""common/pictures.py: sizes, boxes, colours, and pictures turned upright."""
import random

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.pictures import upright
from common.video import VideoError, decode, examine, read_frames
from conftest import drifting, numbered, write_video
from data import draw_view
from tools.encode import shrunk


def ramps(height, width):
    """Two pictures that show where one looks: the first grows lighter from left to right, the second downwards."""
    down, right = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return [np.repeat(np.uint8(255 * grey)[..., None], 3, axis=2) for grey in (right, down)]


def resized(clip, height, width):
    """What a decode at that size should show, by torch: uint8 (N, 3, H, W) -> float (N, 3, height, width)."""
    return F.interpolate(clip.float(), (height, width), mode="bilinear", antialias=True)


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


def test_a_change_of_picture_size_is_an_error_unless_pictures_are_scaled_to_boxes(tmp_path):
    x264 = dict(codec="libx264", preset="ultrafast", bf="0")
    parts = [write_video(tmp_path / f"{h}.h264", ramps(h, 64) * 2, **x264) for h in (48, 80)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert examine(path)[:4] == (8, 80, 64, "")
    assert decode(path, [4, 7]).shape == (2, 3, 80, 64)
    with pytest.raises(VideoError, match="both.h264: the picture size changes"):
        decode(path, [0, 7])
    assert decode(path, [0, 7], 32, [(0, 0, 1, 1)] * 2).shape == (2, 3, 32, 32)


# ---- Rotation, and which stream ----

def test_a_phones_video_is_upright_in_frames_sizes_and_boxes(shared):
    path = shared / "videos/odd/video_90.mov"                                   # stored 568 x 320, to be turned by -90
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert frames[0].rotation == -90 and (frames[0].height, frames[0].width) == (320, 568)
    stored = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    shown = torch.from_numpy(np.rot90(stored, -1, axes=(1, 2)).copy()).permute(0, 3, 1, 2)
    assert examine(path)[1:3] == (568, 320)
    wanted = [0, len(frames) - 1]
    assert torch.equal(decode(path, wanted), shown[wanted])
    top, left, height, width = 100, 40, 200, 160
    box = (top / 568, left / 320, height / 568, width / 320)
    cropped = resized(shown[wanted][..., top:top + height, left:left + width], 64, 64)
    assert (decode(path, wanted, 64, [box] * 2).float() - cropped).abs().mean() < 4
    assert (decode(path, wanted, 80).float() - resized(shown[wanted], 142, 80)).abs().mean() < 4


SHOWN_AT = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}             # clockwise quarter turns: a, b, c, d


@pytest.fixture(params=SHOWN_AT)
def turned(request, tmp_path):
    """A video whose header asks for quarter turns: its matrix is written over -> the same without, with, turns."""
    plain = write_video(tmp_path / "plain.mp4", drifting(20, side=64)[:, :48], codec="libx264", bf="2", g="8")
    content = plain.read_bytes()
    at = content.index(b"tkhd") + 44
    a, b, c, d = SHOWN_AT[request.param]
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14]) << 16
    path = tmp_path / "turned.mp4"
    path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 36:])
    return plain, path, request.param


def test_frames_and_sizes_are_turned_as_the_header_asks(turned):
    plain, path, turns = turned
    stored = decode(plain, range(20))
    assert torch.equal(decode(path, range(20)), stored.rot90(-turns, (2, 3)))
    assert examine(path)[:4] == ((20, 64, 48, "") if turns % 2 else (20, 48, 64, ""))


def test_sizes_and_boxes_of_a_turned_video_are_those_of_the_same_video_stored_upright(turned, tmp_path):
    _, path, _ = turned
    stored = tmp_path / "upright.mkv"
    with av.open(str(stored), "w") as container:
        for frame in map(upright, read_frames(path)):
            if not container.streams:
                stream = container.add_stream("ffv1", 25)
                stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "yuv420p"
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert torch.equal(decode(path, range(20)), decode(stored, range(20)))
    boxes = [draw_view(*examine(path)[1:3], seed)[0] for seed in range(20)]
    for size, some in ((24, None), (33, None), (24, boxes)):
        assert torch.equal(decode(path, range(20), size, some), decode(stored, range(20), size, some))


def test_a_shrunk_copy_of_a_turned_video_is_stored_upright(turned, tmp_path):
    _, path, _ = turned
    content, frames, height, width, problem = shrunk(path, size=64, quality=1, intra=True)
    (tmp_path / "small.mp4").write_bytes(content)
    assert (frames, height, width, problem) == examine(path)[:4]
    difference = decode(tmp_path / "small.mp4", range(20)).float() - decode(path, range(20))
    assert difference.abs().mean() < 4


@pytest.mark.parametrize("suffix", ("mkv", "mov"))
@pytest.mark.parametrize("first", (True, False))
def test_a_stream_of_one_picture_beside_the_video_is_passed_over(tmp_path, suffix, first):
    path = tmp_path / f"two.{suffix}"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream(codec, 25) for codec in (("mjpeg", "mpeg4") if first else ("mpeg4", "mjpeg"))]
        cover, video = streams if first else reversed(streams)
        cover.width, cover.height, cover.pix_fmt = 160, 120, "yuvj420p"
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((120, 160, 3), np.uint8))))
        container.mux(cover.encode())
        for picture in numbered(40):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))))
        container.mux(video.encode())
    alone = write_video(tmp_path / f"alone.{suffix}", numbered(40))
    frames, height, width, problem, packets = examine(path)
    assert (frames, height, width, problem) == (40, 48, 64, "")
    for known in ("", packets):
        assert torch.equal(decode(path, [39, 3], packets=known), decode(alone, [39, 3]))
    assert shrunk(path, size=128, quality=4, intra=False)[1:] == (40, 48, 64, "")


def test_pictures_that_cannot_be_converted_are_an_error_that_names_the_video(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError(95, "Operation not supported")                            # what FFmpeg says of some formats
    path = write_video(tmp_path / "a.avi", numbered(5))
    monkeypatch.setattr("common.pictures.as_rgb", refused)
    with pytest.raises(VideoError, match="a.avi: Operation not supported"):
        decode(path, [3], 24)
    monkeypatch.setattr("common.video.checksum", refused)
    assert examine(path)[3:] == ("Operation not supported", "")
