"""common/video.py: sizes, boxes, colours, and pictures turned upright."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import drifting, write_video

from common.video import decode, pixels, probe
from tools.shrink import encode

BOXES = [(0.0, 0.0, 1.0, 1.0), (0.0, 0.6, 0.4, 0.4), (0.55, 0.1, 0.45, 0.3), (0.1, 0.3, 0.8, 0.6)]
X264 = dict(codec="libx264", preset="ultrafast", bf="0")


def grey_texture(height, width):
    """Two pictures of a grey texture that moves; chroma, which has fewer pixels, is constant."""
    pictures = drifting(2, side=220)[:, :height, :width]
    return pictures[..., :1].repeat(3, axis=3)


def assert_resized(given, clip, height, width):
    """given is clip, (N, 3, H, W), resized bilinearly; other filters are further from torch's."""
    expected = F.interpolate(clip.float(), (height, width), mode="bilinear", antialias=True)
    assert given.shape == expected.shape
    assert (given - expected).abs().mean() < 1.5


def assert_sizes_and_boxes_of(clip, path):
    """decode(path, [0, 1]) crops and resizes clip, the upright frames of original size."""
    sides = clip.shape[2:]
    for size in (24, 37, 128):
        scaled = [round(side * size / min(sides)) for side in sides]
        assert_resized(decode(path, [0, 1], size), clip, *scaled)
    for box in BOXES:
        top, left, height, width = (round(part * side) for part, side in zip(box, sides * 2))
        crop = clip[..., top:top + height, left:left + width]
        assert_resized(decode(path, [0, 1], 64, [box] * 2), crop, 64, 64)


# ---- Sizes and boxes ----

@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (201, 67)])
def test_size_is_the_short_side_and_a_box_becomes_a_square(tmp_path, shape):
    path = write_video(tmp_path / "a.avi", grey_texture(*shape), b="4000000")
    clip = decode(path, [0, 1])
    assert clip.shape == (2, 3, *shape)
    assert_sizes_and_boxes_of(clip, path)


@pytest.mark.parametrize("box, expected", [
    ((0.1, 0.2, 0.5, 0.6), (5, 20, 25, 60)),
    ((0.0, 0.99, 1.0, 0.001), (0, 99, 50, 1)),                  # at least a pixel
    ((0.99, 0.0, 0.001, 1.0), (49, 0, 1, 100)),
    ((0.71, 0.476, 0.29, 0.525), (36, 48, 14, 52))])            # 35.5 + 14.5, 47.6 + 52.5
def test_a_box_lies_inside_the_frame(box, expected):
    assert pixels(box, 50, 100) == expected


def test_frames_of_another_size_than_the_first_are_scaled_to_that(tmp_path):
    parts = [write_video(tmp_path / f"{height}.h264", grey_texture(height, 64), **X264)
             for height in (48, 80)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert probe(path) == (4, 48, 64, "")
    box = 0.5, 0.0, 0.5, 1.0
    clip = decode(path, [1, 3], 32, [box] * 2)
    for part, given in zip(parts, clip):
        assert torch.equal(given, decode(part, [1], 32, [box])[0])
    clip = decode(path, [1, 3], 32)
    assert torch.equal(clip[0], decode(parts[0], [1], 32)[0])
    tall = decode(parts[1], [1])
    assert_resized(clip[1:], tall, 32, 43)
    assert_resized(decode(path, [3]), tall, 48, 64)


# ---- Colours ----

COLOURS = np.uint8([[255, 255, 255], [0, 0, 0], [200, 30, 40], [30, 160, 60], [20, 40, 210],
                    [128, 128, 128]])


@pytest.mark.parametrize("codec, options", [
    ("mjpeg", {}), ("mjpeg", dict(pixel_format="yuvj444p")),
    ("libx264", dict(colorspace="bt709")), ("libx264", dict(color_range="pc")),
    ("libx264", dict(colorspace="bt709", pixel_format="yuv444p10le"))])
def test_scaling_keeps_colours(tmp_path, codec, options):
    painted = [np.tile(colour, (48, 64, 1)) for colour in COLOURS]
    path = write_video(tmp_path / "colours.mkv", painted, codec, **options)
    whole = decode(path, range(6)).float()
    for size, boxes in ((24, None), (40, [(0.1, 0.2, 0.5, 0.6)] * 6)):
        shown = decode(path, range(6), size, boxes).float()
        assert (shown.mean((2, 3)) - whole.mean((2, 3))).abs().max() < 3
        assert shown.std((2, 3)).max() < 2


# ---- Rotation ----

TURNS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0),       # clockwise quarters
         (-1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 0, -1), (0, -1, -1, 0)]       # and their mirror images


@pytest.fixture(params=TURNS)
def turned(request, tmp_path):
    """A video whose header asks for a turn -> its file, the frames as they are shown

    a, b, c, d: a pixel in row y and column x is shown in row b x + d y and column a x + c y.
    """
    path = write_video(tmp_path / "turned.mp4", grey_texture(48, 64), **X264)
    stored = decode(path, [0, 1])
    content = path.read_bytes()
    at = content.index(b"tkhd") + 44
    a, b, c, d = request.param
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14]) << 16
    path.write_bytes(content[:at] + matrix.astype(">i4").tobytes() + content[at + 36:])
    y, x = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    row, column = b * x + d * y, a * x + c * y
    row, column = row - row.min(), column - column.min()
    shown = torch.empty(2, 3, row.max() + 1, column.max() + 1, dtype=torch.uint8)
    shown[:, :, row, column] = stored
    return path, shown


def test_frames_sizes_and_boxes_are_upright_as_the_header_asks(turned):
    path, shown = turned
    assert torch.equal(decode(path, [0, 1]), shown)
    assert probe(path) == (2, *shown.shape[2:], "")
    assert_sizes_and_boxes_of(shown, path)


def test_a_shrunk_copy_is_stored_upright(turned, tmp_path):
    path, shown = turned
    copy = tmp_path / "small.mp4"
    assert encode(path, copy, size=64, quality=1, intra=True) == (2, "")
    assert probe(copy) == probe(path)
    assert (decode(copy, [0, 1]).float() - shown).abs().mean() < 4
