"""common/toy.py: layout and lists, grey levels, strokes and flows."""
from collections import Counter

import numpy as np
import pytest

from common import toy
from common.splits import load_split
from common.toy import FADE, FLOWS, TOY_CLASSES, flow_back, make_toy, strokes, toy_video


def test_each_class_has_ten_training_and_six_test_videos_of_other_groups(tmp_path, monkeypatch):
    def video(cls, rng):
        drawn.add((cls, rng.random()))
        return np.zeros((1, 16, 16, 3), np.uint8)
    drawn = set()
    monkeypatch.setattr(toy, "toy_video", video)
    make_toy(tmp_path / "toy")
    make_toy(tmp_path / "toy")                              # it is there already
    for part, videos, groups in (("train", 10, range(4, 9)), ("test", 6, range(1, 4))):
        split = load_split("toy", tmp_path / "toy", part=part)
        assert split.classes == [*TOY_CLASSES] and not split.failed
        assert Counter(split.labels) == dict.fromkeys(range(32), videos)
        assert {int(path.split("_g")[1][:2]) for path in split.paths} == {*groups}
    assert drawn == {(TOY_CLASSES[seed // 16], np.random.default_rng(seed).random())
                     for seed in range(32 * 16)}


def test_a_video_is_grey_long_enough_for_every_speed_and_fades():
    for cls in TOY_CLASSES[::5]:
        frames = toy_video(cls, np.random.default_rng(0))
        assert 112 <= len(frames) <= 144 and frames.shape[1:] == (32, 32, 3)
        assert (frames == frames[..., :1]).all()
        contrast = frames[..., 0].std((1, 2))
        assert contrast[FADE] / contrast[0] == pytest.approx(np.exp(-1), abs=0.12)


def test_a_stroke_is_fast_first_and_a_swing_goes_back_and_forth():
    done, swing = strokes(np.linspace(0, 2, 65))            # two strokes of 32 frames
    assert done[[0, 32, 64]] == pytest.approx([0, 1, 2])
    assert swing[[0, 32, 64]] == pytest.approx([-0.5, 0.5, -0.5])
    first, second = np.diff(done).reshape(2, 32)
    assert first == pytest.approx(second) and (np.diff(first) < 0).all()
    assert first[0] / first[-1] == pytest.approx(np.exp(1.2), 0.05)


def test_the_eight_flows_differ_and_move_every_point():
    z = np.array([[3 + 4j, -5 + 1j]])
    done, swing = (x[:, None, None] for x in strokes(np.array([0.2, 0.7, 1.3])))
    paths = [flow_back(flow, z, done, swing) for flow in FLOWS]
    for a, path in enumerate(paths):
        assert len(np.unique(path.round(6))) == 6
        assert not any(np.allclose(path, other) for other in paths[:a])
