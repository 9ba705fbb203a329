"""common/video.py: sizes, boxes, colours, and pictures turned upright."""
import random

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import drifting, write_video

from common.video import VideoError, copy_upright, decode, probe, read_frames, upright_shape
from data import draw_view
from tools.shrink import encode

SHAPES = [(48, 64), (64, 48), (50, 50), (36, 130), (201, 67)]


def ramps(height, width):
    """Two pictures that show places: lighter from left to right, and lighter downwards."""
    down, right = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return [np.repeat(np.uint8(255 * grey)[..., None], 3, axis=2) for grey in (right, down)]


def resized(clip, height, width):
    """torch's bilinear resize: uint8 (N, 3, H, W) -> float (N, 3, height, width)"""
    return F.interpolate(clip.float(), (height, width), mode="bilinear", antialias=True)


def cropped(clip, box):
    """The pixels of a box of fractions: (N, 3, H, W) -> (N, 3, h, w)"""
    sides = clip.shape[2:] * 2
    top, left, height, width = (round(part * side) for part, side in zip(box, sides))
    return clip[..., top:top + height, left:left + width]


# ---- Sizes and boxes ----

@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Videos of `ramps` in each of SHAPES."""
    folder = tmp_path_factory.mktemp("pictures")
    return {shape: write_video(folder / f"{shape}.avi", ramps(*shape), b="4000000")
            for shape in SHAPES}


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
def test_a_box_is_cropped_and_resized_to_a_square(pictures, shape):
    clip = decode(pictures[shape], [0, 1])
    boxes = [(top, left, 0.5, 0.4) for top in (0.0, 0.5) for left in (0.0, 0.6)]
    boxes += [(0.0, 0.0, 1.0, 1.0)] + [draw_view(*shape, seed)[0] for seed in range(20)]
    for box in boxes:
        expected = resized(cropped(clip, box), 64, 64)
        given = decode(pictures[shape], [0, 1], 64, [box] * 2)
        assert (given - expected).abs().mean() < 255 / 64, box              # a pixel


@pytest.mark.parametrize("shape", SHAPES)
def test_any_box_becomes_a_square_of_the_size_asked_for(pictures, shape):
    (height, width), rng = shape, random.Random(1)
    boxes = [(0.0, 0.99, 1.0, 0.01), (0.99, 0.0, 0.01, 1.0)]
    for side in range(20, min(shape)):                          # as far down and right as there is
        boxes.append((1 - side / height, 1 - side / width, side / height, side / width))
    for _ in range(50):
        h, w = rng.uniform(0.2, 1), rng.uniform(0.2, 1)
        boxes.append((rng.uniform(0, 1 - h), rng.uniform(0, 1 - w), h, w))
    for size in (31, 112):
        clip = decode(pictures[shape], [0] * len(boxes), size, boxes)
        assert clip.shape == (len(boxes), 3, size, size)


def test_tall_and_tiny_real_videos_become_squares_too(shared):
    for name, shape in (("vertical-sample.ts", (4000, 16)), ("-video-with-dash-.mp4", (1, 1))):
        path = shared / "videos" / "odd" / name
        boxes = [draw_view(*shape, seed)[0] for seed in range(4)]
        assert decode(path, [0]).shape[2:] == shape
        assert decode(path, [0], 64).shape[2:] == tuple(side * 64 // min(shape) for side in shape)
        assert decode(path, [0, 1, 2, 4], 128, boxes).shape == (4, 3, 128, 128)


@pytest.fixture
def two_sizes(tmp_path):
    """A video whose pictures have 48 lines, then 80 -> the file, its two parts"""
    x264 = dict(codec="libx264", preset="ultrafast", bf="0")
    parts = [write_video(tmp_path / f"{h}.h264", ramps(h, 64) * 2, **x264) for h in (48, 80)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path, parts


def test_boxes_become_squares_though_the_picture_size_changes(two_sizes):
    path, parts = two_sizes
    assert probe(path) == (8, 80, 64, "")
    box = 0.5, 0.0, 0.5, 1.0
    clip = decode(path, [3, 7], 32, [box] * 2)
    for part, given in zip(parts, clip):
        assert torch.equal(given, decode(part, [3], 32, [box])[0])


def test_without_boxes_a_change_of_the_picture_size_is_reported_by_name(two_sizes):
    path, _ = two_sizes
    with pytest.raises(VideoError, match="both.h264: all input arrays must have the same shape"):
        decode(path, [3, 7], 32)


COLOURS = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210],
                    [128, 128, 128]])


@pytest.mark.parametrize("suffix, codec, matrix", [
    ("avi", "mpeg4", ""), ("avi", "mjpeg", ""), ("mp4", "libx264", ""),
    ("mp4", "libx264", "colormatrix=bt709:fullrange=on")])
def test_scaling_keeps_colours(tmp_path, suffix, codec, matrix):
    painted = [np.tile(colour, (48, 64, 1)) for colour in COLOURS]
    options = {"x264-params": matrix} if matrix else dict(b="4000000")
    path = write_video(tmp_path / f"colours.{suffix}", painted, codec, **options)
    whole = decode(path, range(6)).float()
    error = (whole.mean((2, 3)) - torch.from_numpy(COLOURS)).abs().max()
    assert error > 10 if matrix else error < 4                  # written as BT.601, named BT.709
    for size, boxes in ((24, None), (40, [(0.1, 0.2, 0.5, 0.6)] * 6)):
        shown = decode(path, range(6), size, boxes).float()
        assert (shown.mean((2, 3)) - whole.mean((2, 3))).abs().max() < 2
        assert shown.std((2, 3)).max() < 2


# ---- Rotation ----

def test_a_phones_video_is_upright_in_frames_sizes_and_boxes(shared):
    path = shared / "videos/odd/video_90.mov"                   # 568 x 320, to be turned by -90
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert frames[0].rotation == -90 and (frames[0].height, frames[0].width) == (320, 568)
    stored = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    shown = np.rot90(stored, -1, axes=(1, 2)).copy()
    shown = torch.from_numpy(shown).permute(0, 3, 1, 2)[[0, -1]]
    wanted = [0, len(frames) - 1]
    assert probe(path)[1:3] == (568, 320)
    assert torch.equal(decode(path, wanted), shown)
    assert (decode(path, wanted, 80) - resized(shown, 142, 80)).abs().mean() < 4
    box = 0.2, 0.1, 0.35, 0.5
    crop = resized(cropped(shown, box), 64, 64)
    assert (decode(path, wanted, 64, [box] * 2) - crop).abs().mean() < 4


SHOWN_AT = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}         # clockwise quarter turns


@pytest.fixture(params=SHOWN_AT)
def turned(request, tmp_path):
    """A video whose header asks for quarter turns -> the file without, the file with, turns."""
    pictures = drifting(20, side=64)[:, :48]
    plain = write_video(tmp_path / "plain.mp4", pictures, codec="libx264", bf="2", g="8")
    content = plain.read_bytes()
    at = content.index(b"tkhd") + 44
    a, b, c, d = SHOWN_AT[request.param]
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14]) << 16
    path = tmp_path / "turned.mp4"
    path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 36:])
    return plain, path, request.param


def test_frames_and_sizes_are_turned_as_the_header_asks(turned):
    plain, path, turns = turned
    assert torch.equal(decode(path, range(20)), decode(plain, range(20)).rot90(-turns, (2, 3)))
    assert probe(path) == ((20, 64, 48, "") if turns % 2 else (20, 48, 64, ""))


def test_sizes_and_boxes_of_a_turned_video_are_those_of_the_same_video_stored_upright(
        turned, tmp_path):
    _, path, _ = turned
    stored = tmp_path / "upright.mkv"
    with av.open(str(stored), "w") as container:
        stream = container.add_stream("ffv1", 25)
        _, stream.height, stream.width, _ = probe(path)
        stream.pix_fmt = "yuv420p"
        for frame in read_frames(path):
            upright = av.VideoFrame(*upright_shape(frame)[::-1], "yuv420p")
            copy_upright(frame, upright)
            container.mux(stream.encode(upright))
        container.mux(stream.encode())
    boxes = [draw_view(*probe(path)[1:3], seed)[0] for seed in range(20)]
    for size, some in ((None, None), (24, None), (33, None), (24, boxes)):
        given, expected = (decode(file, range(20), size, some) for file in (path, stored))
        assert torch.equal(given, expected)


def test_a_shrunk_copy_of_a_turned_video_is_stored_upright(turned, tmp_path):
    _, path, _ = turned
    copy = tmp_path / "small.mp4"
    assert encode(path, copy, size=64, quality=1, intra=True) == (20, "")
    assert probe(copy) == probe(path)
    difference = decode(copy, range(20)).float() - decode(path, range(20))
    assert difference.abs().mean() < 4
