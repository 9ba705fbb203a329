"""Frames bit for bit those of a sequential decode, whatever codec, pixel format and container: files written here."""
import contextlib
import random
import zlib

import av
import numpy as np
import pytest

from common.video import VideoError, examine, read_frames, wanted_frames

FRAMES = 24
GOP = dict(g="6")
B_FRAMES = dict(g="6", bf="2")
OPEN_GOPS = {"preset": "ultrafast", "x264-params": "open-gop=1:bframes=3:keyint=6:min-keyint=6:scenecut=0"}
PYRAMID = {"preset": "veryfast", "x264-params": "bframes=7:keyint=12:b-pyramid=normal:ref=4"}
INTERLACED = {"preset": "veryfast", "x264-params": "tff=1:keyint=6:bframes=2"}
HEVC = {"preset": "ultrafast", "x265-params": "bframes=3:keyint=6:min-keyint=6:log-level=none:open-gop=1"}
VPX = {"g": "6", "deadline": "realtime", "auto-alt-ref": "0"}
HIDDEN = {"g": "6", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "10"}     # frames that are never shown
ROWS = (                                        # encoder, its options, pixel formats, containers
    ("png", {}, "rgba pal8 rgb24 gray rgb48be monob", "mov"),
    ("png", {}, "rgba gray16be", "avi"),
    ("apng", {}, "rgba", "apng"),
    ("qtrle", GOP, "rgb24 argb gray", "mov"),
    ("huffyuv", {}, "yuv422p rgb24", "avi"),
    ("ffvhuff", {}, "yuv444p10le yuva420p", "avi"),
    ("ffv1", GOP, "yuv420p yuv422p10le yuv444p12le yuva444p16le gray16le bgra", "mkv"),
    ("rawvideo", {}, "rgb24 yuyv422 pal8", "avi"),
    ("rawvideo", {}, "gray pal8", "mov"),
    ("prores_ks", {}, "yuv422p10le yuva444p10le", "mov"),
    ("dnxhd", dict(profile="dnxhr_sq"), "yuv422p", "mov"),
    ("dvvideo", {}, "yuv420p", "avi mov"),
    ("mjpeg", {}, "yuvj420p yuvj444p", "avi mov"),
    ("mpeg1video", B_FRAMES, "yuv420p", "avi mkv"),
    ("mpeg2video", B_FRAMES, "yuv420p", "ts mkv mov"),
    ("mpeg4", B_FRAMES, "yuv420p", "avi mp4 mkv ts"),
    ("mpeg4", GOP, "yuv420p", "avi mp4"),
    ("wmv2", GOP, "yuv420p", "avi"),
    ("flv", GOP, "yuv420p", "flv"),
    ("libx264", B_FRAMES | dict(preset="ultrafast"), "yuv420p", "mp4 mkv avi ts mov"),
    ("libx264", OPEN_GOPS, "yuv420p", "mp4 ts"),
    ("libx264", PYRAMID, "yuv420p", "mp4"),
    ("libx264", INTERLACED, "yuv420p", "mp4"),
    ("libx264", B_FRAMES | dict(preset="veryfast"), "yuv444p yuv420p10le gray", "mp4"),
    ("libx265", HEVC, "yuv420p yuv420p10le", "mp4 ts"),
    ("libvpx", VPX, "yuv420p yuva420p", "webm"),
    ("libvpx", HIDDEN, "yuv420p", "webm"),
    ("libvpx-vp9", VPX | {"cpu-used": "8"}, "yuv420p", "webm mp4"),
    ("libvpx-vp9", {"g": "6", "profile": "2"}, "yuv420p10le", "webm"),
    ("libvpx-vp9", HIDDEN | {"cpu-used": "5"}, "yuv420p", "webm"),
    ("libsvtav1", {"g": "6", "preset": "12"}, "yuv420p", "mp4 webm"),
    ("libaom-av1", {"g": "6", "cpu-used": "8"}, "yuv420p", "mkv"),
    ("gif", {}, "rgb8", "gif"))
CASES = [(codec, options, form, suffix) for codec, options, forms, suffixes in ROWS
         for form in forms.split() for suffix in suffixes.split()]


def pictures(height, width):
    """Gradients that move, a patch that jumps, every fifth picture noisy -> uint8 (height, width, 3) after another."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3))
    for t in range(FRAMES):
        picture = np.stack([x * 5 + t * 7, y * 6 + t * 11, x * 3 + y * 4 + t * 5], axis=2) % 256
        picture[8 + t % 16:16 + t % 16, t:t + 10] = (255 * (t % 2), 60, 200)
        yield ((picture + noise) // 2 if t % 5 == 4 else picture).astype(np.uint8)


def frame_of(picture, form, t):
    """An av.VideoFrame in the pixel format; a palette changes every eight frames."""
    if form != "pal8":
        return av.VideoFrame.from_ndarray(picture).reformat(format=form)
    ramp = np.arange(256)
    palette = np.stack([ramp, ramp * (t // 8 + 1) % 256, 255 - ramp, np.full(256, 255)], axis=1).astype(np.uint8)
    return av.VideoFrame.from_ndarray((np.ascontiguousarray(picture[..., 0]), palette), format="pal8")


def write(path, codec, options, form):
    """-> whether this build of PyAV has the encoder."""
    sizes = {"dvvideo": (576, 720), "libx265": (64, 64), "libsvtav1": (64, 64), "dnxhd": (144, 256)}
    height, width = sizes.get(codec, (32, 48))
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, 25, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, form
            stream.codec_context.thread_count = 1
            for t, picture in enumerate(pictures(height, width)):
                frame = frame_of(picture, form, t)
                frame.pts = t
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except (av.error.FFmpegError, ValueError) as error:
        pytest.skip(f"PyAV here cannot write {codec} {form} as {path.suffix}: {error}")


def pixels(frame):
    """A checksum of all that a frame holds."""
    try:
        return zlib.crc32(np.ascontiguousarray(frame.to_ndarray()))
    except (ValueError, AttributeError, NotImplementedError):                   # a format that PyAV knows no array of
        return zlib.crc32(np.ascontiguousarray(frame.to_ndarray(format="rgba64le")))


@pytest.mark.parametrize("codec, options, form, suffix", CASES)
def test_every_format_gives_the_frames_of_a_sequential_decode(tmp_path, codec, options, form, suffix):
    path = tmp_path / f"{codec}.{suffix}"
    write(path, codec, options, form)
    try:
        truth = [pixels(frame) for frame in read_frames(path)]
    except VideoError as error:
        pytest.skip(f"FFmpeg here does not read what it wrote: {error}")
    frames, *_, packets = examine(path)
    assert frames == len(truth) > 0
    rng = random.Random(0)
    for speed in (1, 2, 4, 8, 1, 3):
        start = rng.randrange(frames)
        wanted = {rng.randrange(frames), *range(start, min(frames, start + 4 * speed), speed)}
        assert {n: pixels(frame) for n, frame in wanted_frames(path, wanted, packets)} == {n: truth[n] for n in wanted}


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_give_the_frames_of_a_sequential_decode_or_an_error(tmp_path, seed):
    rng = random.Random(seed)
    codec, options, form, suffix = CASES[rng.randrange(len(CASES))] if seed > 5 else (
        "libx264", OPEN_GOPS, "yuv420p", ("mp4", "ts")[seed % 2])
    path = tmp_path / f"damaged.{suffix}"
    write(path, codec, options, form)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 6)):
        content[rng.randrange(len(content) // 8, len(content))] = rng.randrange(256)
    path.write_bytes(content[:rng.randrange(len(content) // 2, len(content) + 1)])
    truth, kept = [], []
    with contextlib.suppress(VideoError):
        for frame in read_frames(path):
            truth.append(pixels(frame))
    with contextlib.suppress(VideoError):
        for frame in read_frames(path):
            kept.append(frame)                                                  # whose memory is not used anew
    if [pixels(frame) for frame in kept] != truth:
        pytest.skip("where it is damaged, a frame shows what its memory held before: nothing that could be compared")
    packets = examine(path)[4]
    for n in rng.sample(range(len(truth)), min(4, len(truth))):
        assert {k: pixels(frame) for k, frame in wanted_frames(path, {n}, packets)} == {n: truth[n]}
