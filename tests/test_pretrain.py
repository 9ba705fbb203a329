"""pretrain.py from video files to checkpoint: what it learns, what it writes, how it goes on."""
import json

import av
import numpy as np
import pytest
import torch

import common
import pretrain


def write_video(file, frames):
    """uint8 (N, H, W, 3) -> an MPEG-4 AVI of very high quality."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "2"}, bit_rate=10**7)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def ramp(rng, n=120, side=32):
    """A texture that brightens steadily: direction is the sign of the change, speed its size, order the brightness."""
    texture = rng.uniform(-30, 30, (1, side // 4, side // 4, 1)).repeat(4, 1).repeat(4, 2)
    return (np.linspace(40, 215, n)[:, None, None, None] + texture).clip(0, 255).astype(np.uint8).repeat(3, 3)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Two folders of videos: ramps, and the same with their frames in random order."""
    root, rng = tmp_path_factory.mktemp("ramps"), np.random.default_rng(0)
    for k in range(48):
        frames = ramp(rng)
        write_video(root / "ordered" / f"{k}.avi", frames)
        write_video(root / "shuffled" / f"{k}.avi", rng.permutation(frames))
    return root


def pretrain_on(data, out, *flags):
    """Run pretrain.main in this process -> the lines of its log that report on steps."""
    pretrain.main(["--dataset", "folder", "--data", str(data), "--out", str(out), "--arch", "r3d18_narrow", "--workers",
                   "0", "--frames", "8", "--size", "16", "--batch-size", "12", *flags])
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


AUX = ("--losses", "speed", "direction", "order", "--epochs", "50", "--lr", "3e-3", "--warmup-epochs", "5")


def test_trivial_speed_direction_and_order_are_learned_within_a_minute(ramps, tmp_path):
    last = pretrain_on(ramps / "ordered", tmp_path, *AUX)[-5:]
    score = {name: np.mean([line[name] for line in last]) for name in last[0]}
    print(score)
    assert score["speed_acc"] > 0.7 and score["direction_acc"] > 0.95 and score["order_acc"] > 0.8


def test_shuffled_videos_bring_speed_and_direction_to_chance(ramps, tmp_path):
    last = pretrain_on(ramps / "shuffled", tmp_path, *AUX)[-5:]
    score = {name: np.mean([line[name] for line in last]) for name in last[0]}
    print(score)
    assert score["speed_acc"] < 0.35 and score["direction_acc"] < 0.6
