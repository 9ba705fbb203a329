"""The benchmark runs on a CPU, times what it says it times, and its verdict follows from its numbers."""
import json

import numpy as np
import pytest
import torch

import benchmark
from data import examine, toy_video, write_video


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder of four toy videos large enough for crops."""
    folder = tmp_path_factory.mktemp("toys")
    for n in range(4):
        write_video(folder / f"toy{n}.avi", toy_video("Spin", np.random.default_rng(n), 64))
    return folder


@pytest.fixture(scope="module")
def video(toys):
    return benchmark.described(str(toys / "toy0.avi"), examine(toys / "toy0.avi"))


def shifted(video, frames, boxes=None):
    """A route that is off by one, as torchcodec is on some files."""
    return benchmark.ours(video, [min(n + 1, video.length - 1) for n in frames], boxes)


def test_a_rehearsal_writes_all_parts_and_a_verdict(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROUTES", {name: benchmark.ROUTES[name] for name in ("ours", "naive")})
    benchmark.main(["--quick", "--videos", str(toys), "--shrunk", str(toys), "--out", str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert {"machine", "verdict", "paper_hours", *(f"part_{n}" for n in range(1, 6))} <= result.keys()
    assert set(result["part_1"]["ratios"]["originals"]) == {"naive", "floor", "pictures", "shrunk"}
    assert set(result["part_2"]) == set(result["part_4"]) == {"originals", "shrunk"}
    assert result["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize("name", benchmark.ROUTES)
def test_each_route_gives_the_frames_and_the_crops_asked_for(name, video):
    routes, absent = benchmark.installed()
    if name in absent:
        pytest.skip(f"{name}: {absent[name]}")
    try:
        right, asked = benchmark.exactness(routes[name], video, range(2))
    except RuntimeError as error:                                               # its FFmpeg is not there
        pytest.skip(f"{name}: {error}"[:80])
    assert right == asked > 30
    frames, boxes = benchmark.drawn(video, 3)
    clips, expected = (routes[k](video, frames, boxes) for k in (name, "naive"))
    assert clips.shape == (32, 3, 128, 128) and clips.dtype == torch.uint8
    assert (clips.float() - expected.float()).abs().mean() < 8                  # scalers and edges differ


def test_a_route_that_is_off_by_one_is_told(video):
    right, asked = benchmark.exactness(shifted, video, range(2))
    assert right < asked / 10


def test_the_floor_decodes_the_frames_asked_for_and_fewer_packets_than_there_are(video):
    frames, boxes = benchmark.drawn(video, 0)
    for floor in (benchmark.Floor(video), benchmark.Floor(video, pictures=True)):
        assert floor(video, frames, boxes) == len(set(frames)) == floor(video, frames, boxes)  # again: afresh
    assert floor.start[0] == 0 and len(set(floor.start)) > 1


def test_a_route_that_hangs_is_given_up_and_the_next_file_goes_on():
    assert benchmark.in_child(pause, [(0,), (100,), (0,)], timeout=2) == ["awake", "hangs", "awake"]


def pause(seconds):
    benchmark.time.sleep(seconds)
    return "awake"


@pytest.mark.parametrize("step, loader, shrunk, words", [
    (400, {1: 60, 2: 100}, None, ("loader-bound: ", "6 more workers or a shrunk copy")),
    (400, {1: 60, 2: 100}, {1: 210, 2: 400}, ("loader-bound: ", "6 more workers or the shrunk copy", "2 would do")),
    (100, {1: 60, 8: 400}, None, ("step-bound: ", "2 would do")),
    (100, {1: 60, 2: 105}, None, ("balanced: ",))])
def test_the_verdict_follows_from_the_rates(step, loader, shrunk, words):
    told = benchmark.verdict(step, loader, shrunk)
    assert told.startswith(words[0]) and all(word in told for word in words)


def test_flops_grow_with_the_size_of_a_clip():
    small, large = (benchmark.flops_of_a_clip("r3d18_narrow", *shape) for shape in ((8, 32), (16, 64)))
    assert 3.5 < large / small < 9                                              # 8 times the positions, and heads


def test_a_place_without_videos_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no videos in"):
        benchmark.gather([tmp_path], tmp_path / "links")
    with pytest.raises(ValueError, match="there is no"):
        benchmark.gather([tmp_path / "nowhere"], tmp_path / "links")
