"""The benchmark runs on a CPU, times what it says it times, and its verdicts follow from its numbers."""
import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from conftest import drifting, fails, write_video

from common.video import examine
from tools import benchmark, readers, reading


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder of four toy videos large enough for crops."""
    folder = tmp_path_factory.mktemp("toys")
    for n in range(4):
        write_video(folder / f"toy{n}.avi", drifting(120, seed=n, side=64) // 2 + 64)
    return folder


@pytest.fixture(scope="module")
def video(toys):
    video, codec = reading.described(str(toys / "toy0.avi"), examine(toys / "toy0.avi"))
    assert (video.kind, codec) == (reading.ORIGINALS, "FMP4")
    return video


def shifted(video, frames, boxes=None):
    """A reader that is off by one, as torchcodec is on some files."""
    return readers.ours(video, [min(n + 1, video.length - 1) for n in frames], boxes)


def test_a_rehearsal_writes_all_parts_and_a_verdict(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readers, "READERS", dict(ours=readers.ours, naive=readers.naive))
    shutil.copytree(toys, tmp_path / "copy")
    benchmark.main(["--quick", "--videos", str(toys), "--shrunk", str(tmp_path / "copy"), "--out",
                    str(tmp_path / "b.json")])
    result = json.loads((tmp_path / "b.json").read_text())
    assert {"machine", "verdict", "paper_hours", *(f"part_{n}" for n in range(1, 6))} <= result.keys()
    summary, entrants = result["part_1"]["summary"], {"ours", "naive", "floor", "pictures"}
    assert set(summary[reading.ORIGINALS]) == entrants | {"shrunk"} and set(summary[reading.SHRUNK]) == entrants
    assert set(result["part_2"]) == set(result["part_4"]) == {"originals", "shrunk"}
    assert {row["arch"] for row in result["part_3"]} == {"r3d18_narrow"} and "clips_per_s" in result["part_3"][0]
    assert result["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize("name", readers.READERS)
def test_each_reader_gives_the_frames_and_the_crops_asked_for(name, video):
    found, absent = readers.installed()
    if name in absent:
        pytest.skip(f"{name}: {absent[name]}")
    try:
        right, asked = readers.exactness(found[name], video, range(2))
    except RuntimeError as error:                                               # its FFmpeg is not there
        pytest.skip(f"{name}: {error}"[:80])
    assert right == asked > 30
    frames, boxes = readers.draw_request(video, 3)
    clips, expected = (found[k](video, frames, boxes) for k in (name, "naive"))
    assert clips.shape == (32, 3, 128, 128) and clips.dtype == torch.uint8
    assert (clips.float() - expected.float()).abs().mean() < 8                  # scalers and edges differ


def test_a_reader_that_is_off_by_one_is_found_out(video):
    right, asked = readers.exactness(shifted, video, range(2))
    assert right < asked / 10


@pytest.mark.parametrize("levels, shown, right", [((0, 2, 4), 2, True), ((0, 2, 4), 4, False), ((0, 2, 4), 0, False),
                                                 ((0, 100, 200), 102, True), ((0, 100, 200), 104, False)])
def test_a_frame_is_the_right_one_where_it_is_near_and_no_neighbour_is_nearer(levels, shown, right):
    truth = {n: np.full((2, 2, 3), level) for n, level in enumerate(levels)}
    assert readers.is_frame(np.full((2, 2, 3), shown), 1, truth) == right


@pytest.mark.parametrize("place", ("data.py", "common/video.py"))
def test_the_reader_of_another_checkout_with_its_own_modules_is_measured_beside_ours(place, video, tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    (tmp_path / "common" / "files.py").write_text("SCANNED = 'scanned'\n")      # we have one, too
    (tmp_path / place).write_text("from common.files import SCANNED\n\n\ndef examine(path):\n"
                                  "    return 0, 0, 0, '', SCANNED\n\n\ndef decode(*request):\n    return request\n")
    modules, path = dict(sys.modules), list(sys.path)
    found, _ = readers.installed(str(tmp_path))
    assert found["old"](video, [3], [(0, 0, 1, 1)]) == (video.path, [3], 128, [(0, 0, 1, 1)], "scanned")
    assert found["old"](video, [3]) == (video.path, [3], None, None, "scanned")
    assert modules.items() <= sys.modules.items() and sys.path == path
    with pytest.raises(ValueError, match="no checkout"):
        readers.installed(str(tmp_path / "elsewhere"))


def test_the_floor_decodes_the_frames_asked_for_and_fewer_packets_than_there_are(video):
    frames, boxes = readers.draw_request(video, 0)
    for pictures in (False, True):
        floor = readers.Floor(video, pictures)
        decoded = []
        plain = floor.codec
        floor.codec = Spy(plain, decoded)
        assert floor(video, frames, boxes) == len(set(frames)) == floor(video, frames, boxes)   # again: afresh
        assert floor.gives([(frames, boxes)])
        assert len(decoded) / 3 < len(floor.packets) and set(floor.packet_of) == set(range(video.length))
        assert floor.start[0] == 0 and len(set(floor.start)) > 1


class Spy:
    """A decoder that notes the packets it gets."""

    def __init__(self, codec, seen):
        self.codec, self.seen = codec, seen

    def decode(self, packet):
        if packet:
            self.seen.append(packet)
        return self.codec.decode(packet)

    def flush_buffers(self):
        self.codec.flush_buffers()


def test_a_reader_that_hangs_is_given_up_and_the_next_file_goes_on():
    first, hanging, last = reading.in_child(pause, [(0,), (100,), (0,)], timeout=3)
    assert (first, last) == ("awake", "awake") and hanging.startswith("hangs")


def test_a_reader_that_raises_is_quoted_and_the_next_file_goes_on():
    assert reading.in_child(pause, [("x",), (0,)])[1] == "awake"
    assert reading.in_child(pause, [("x",)])[0].startswith("TypeError")


def pause(seconds):
    time.sleep(seconds)
    return "awake"


RIGHT = dict(files=2, failed=0, right=9, asked=9, mean=1)


@pytest.mark.parametrize("name, figures, reached", [
    ("ours", RIGHT, True), ("ours", RIGHT | dict(right=8), False), ("ours", RIGHT | dict(failed=1), False),
    ("decord", RIGHT | dict(mean=1.1, right=0), True), ("decord", RIGHT | dict(mean=0.9), False),
    ("decord", dict(files=2, failed=2), True), ("floor", RIGHT | dict(mean=0.6), True),
    ("shrunk", dict(mean=0.7, size=0.9), True), ("shrunk", dict(mean=0.8, size=0.9), False),
    ("shrunk", dict(mean=0.7, size=1.1), False)])
def test_what_our_reader_misses_is_said(name, figures, reached):
    assert (reading.missed(reading.ORIGINALS, name, figures) == "") == reached


@pytest.mark.parametrize("step, loader, shrunk, words", [
    (400, {1: 60, 2: 100}, None, ("loader-bound: ", "6 more workers or a shrunk copy")),
    (400, {1: 60, 2: 100}, {1: 210, 2: 400}, ("loader-bound: ", "6 more workers or the shrunk copy", "2 would do")),
    (100, {1: 60, 8: 400}, None, ("step-bound: ", "2 would do")),
    (100, {1: 60, 2: 105}, None, ("balanced: ",))])
def test_the_verdict_follows_from_the_rates(step, loader, shrunk, words):
    verdict = benchmark.verdict(step, loader, shrunk)
    assert verdict.startswith(words[0]) and all(word in verdict for word in words)


def test_a_place_without_videos_or_copies_of_them_is_refused_in_a_sentence(toys, tmp_path):
    out = ["--out", tmp_path / "b.json", "--parts", "1"]
    assert "no videos in" in fails(benchmark.main, [*out, "--videos", tmp_path])
    assert "there is no" in fails(benchmark.main, [*out, "--videos", tmp_path / "nowhere"])
    write_video(tmp_path / "other.avi", drifting(120, seed=0, side=64) // 2 + 64)
    assert "no copy of these videos" in fails(benchmark.main, [*out, "--videos", toys, "--shrunk", tmp_path])
    assert "fewer than two videos" in fails(benchmark.main, [*out, "--videos", tmp_path / "other.avi"])
