"""What the sampler draws, what the augmentation does to it, and that batches hold it whoever loads them."""
import itertools
import os
import pickle
import random
import shutil
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LENGTHS
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms import v2

import data
from common.colour import draw_colour, jitter, seeded
from common.splits import load_split, scan
from common.video import VideoError, decode
from data import (Clips, Pairs, Tau, Windows, colour, draw_view, eval_windows, normalise, sample_pair, sample_tau,
                  step_loader)

SPEEDS = (1, 2, 4, 8)


def relative(p, q):
    """What two pairs of clips have in common where their relative transformation is the same (Fig. 1)."""
    return p.speed, p.reverse, q.speed, q.reverse, q.start - p.start


def draws(n, low=16, high=400, T=16, speeds=SPEEDS):
    """n groups of two videos with random lengths, as sample_pair sees them: lengths, pairs, labels."""
    rng = random.Random(0)
    for _ in range(n):
        lengths = [rng.randint(low, high) for _ in "ij"]
        yield lengths, *sample_pair(lengths, T, speeds, rng)


def uniform(values, options):
    """Are the options equally frequent, as far as a chi-square test sees? (0.1 % of honest draws fail.)"""
    counts, mean = Counter(values), len(values) / len(options)
    degrees = len(options) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    return set(counts) == set(options) and sum((counts[x] - mean) ** 2 / mean for x in options) < limit


# ---- Temporal transformations ----

@pytest.mark.parametrize("reverse", [False, True])
def test_tau_lists_its_frames_in_playing_order_and_ends_at_the_last(reverse):
    tau = Tau(5, 4, reverse)
    assert tau.frames(4) == ([17, 13, 9, 5] if reverse else [5, 9, 13, 17])
    assert tau.end(4) == 17 and len(tau.frames()) == 16 and tau.end() == max(tau.frames())


def test_every_frame_lies_in_its_video():
    for lengths, pairs, _ in draws(3000):
        for length, pair in zip(lengths, pairs, strict=True):
            assert all(0 <= n < length for tau in pair for n in tau.frames(16))


def test_speeds_directions_and_shift_are_the_groups_and_the_place_is_the_videos():
    same_place = 0
    for _, (first, second), _ in draws(2000, low=130):
        assert relative(*first) == relative(*second)
        same_place += first[0].start == second[0].start
    assert same_place < 200


def test_pairs_lie_anywhere_in_a_video_however_short_the_other_one_is():
    rng = random.Random(0)
    drawn = [sample_pair([16, 40], 4, rng=rng)[0][1] for _ in range(2000)]
    assert {min(p.start, q.start) for p, q in drawn} == {*range(37)}
    assert {max(p.end(4), q.end(4)) for p, q in drawn} == {*range(3, 40)}


def test_labels_say_what_the_transformations_are():
    for _, pairs, labels in draws(2000):
        for pair in pairs:
            assert [SPEEDS[k] for k in labels["speed"]] == [tau.speed for tau in pair]
            assert [bool(k) for k in labels["direction"]] == [tau.reverse for tau in pair]
            sets = [set(range(min(tau.frames()), max(tau.frames()) + 1)) for tau in pair]
            assert labels["order"] == (2 if sets[0] & sets[1] else 0 if pair[0].start < pair[1].start else 1)


def test_pq_is_equal_exactly_where_the_relative_transformations_are():
    seen = {(labels["pq"], relative(*pairs[0])) for _, pairs, labels in draws(8000, 25, 40, T=4)}
    assert len(seen) == len({pq for pq, _ in seen}) == len({transformation for _, transformation in seen}) < 4000
    for _, _, labels in draws(100, 2_000_000, 2_592_000):                       # a day of video
        assert torch.tensor(labels["pq"], dtype=torch.int64).item() == labels["pq"]


@pytest.mark.parametrize("p, q, order", [
    ((0, 1), (16, 1), 0), ((16, 1), (0, 1), 1), ((0, 8), (150, 1), 0), ((150, 1), (0, 8), 1),
    ((0, 1), (15, 1), 2), ((15, 1), (0, 1), 2),                                 # they touch at one frame
    ((0, 8), (1, 1), 2), ((0, 8), (1, 8), 2), ((3, 1), (3, 1), 2)])            # some, no, all frames in common
def test_order_is_that_of_the_intervals_whatever_the_direction(monkeypatch, p, q, order):
    for reverse in itertools.product([False, True], repeat=2):
        taus = [Tau(*p, reverse[0]), Tau(*q, reverse[1])]
        monkeypatch.setattr(data, "sample_tau", lambda *_: taus.pop(0))
        pairs, labels = sample_pair([200, 300], rng=random.Random(0))
        assert labels["order"] == order and labels["direction"] == [int(r) for r in reverse]
        assert relative(*pairs[0]) == (p[1], reverse[0], q[1], reverse[1], q[0] - p[0])


@pytest.mark.parametrize("length", [16, 30, 31, 60, 61, 120, 121, 400])
def test_speeds_are_uniform_over_those_that_fit_the_shorter_video(length):
    rng = random.Random(0)
    pairs = [sample_pair([500, length], rng=rng)[0] for _ in range(1500)]
    fit = [s for s in SPEEDS if 15 * s < length]
    assert uniform([tau.speed for (p, q), _ in pairs for tau in (p, q)], fit) if len(fit) > 1 else fit == [1]
    assert {tau.speed for pair in pairs for tau in pair[1]} == set(fit)


def test_starts_and_directions_are_uniform():
    rng = random.Random(0)
    taus = [sample_tau(25, speeds=(1,), rng=rng) for _ in range(4000)]
    assert uniform([tau.start for tau in taus], range(10))
    assert uniform([tau.reverse for tau in taus], [False, True])
    assert uniform([tuple(t.reverse for t in pairs[0]) for _, pairs, _ in draws(4000)],
                   list(itertools.product([False, True], repeat=2)))


def test_a_video_of_just_enough_frames_is_used_whole_and_a_shorter_one_is_refused():
    pairs, labels = sample_pair([16, 400])
    assert (pairs[0][0].start, pairs[0][1].start, labels["order"]) == (0, 0, 2)
    with pytest.raises(ValueError, match="15 frames"):
        sample_pair([400, 15])


def test_windows_are_spread_evenly_over_the_whole_video():
    for length, step, windows in itertools.product([*range(16, 130), 400, 1000], (1, 2, 4), (2, 3, 10)):
        clips = eval_windows(length, 16, step, windows)
        starts, fit = [clip[0] for clip in clips], min(step, (length - 1) // 15)
        assert clips == [[start + fit * t for t in range(16)] for start in starts]
        assert len(clips) == windows and starts[0] == 0 and clips[-1][-1] == length - 1
        gaps = np.diff(starts)
        assert gaps.max() - gaps.min() <= 1


def test_one_window_lies_in_the_middle():
    for length in range(16, 200):
        (clip,) = eval_windows(length, 16, 4, 1)
        assert 0 <= (length - 1 - clip[-1]) - clip[0] <= 1


def test_windows_of_a_video_that_is_too_short_repeat_its_last_frame():
    for length in range(1, 16):
        assert eval_windows(length, windows=3) == [[*range(length)] + [length - 1] * (16 - length)] * 3


# ---- Augmentation ----

def clips(n, T=4):
    return torch.randint(0, 256, (n, T, 3, 8, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_views_and_colours_are_functions_of_their_seeds_and_leave_other_random_numbers_alone():
    state, python = torch.get_rng_state(), random.getstate()
    views = [draw_view(240, 320, seed) for seed in range(50)]
    jittered = colour(clips(3), [5, 6, 7])
    torch.manual_seed(1)
    assert views == [draw_view(240, 320, seed) for seed in range(50)] and len(set(views)) == 50
    assert torch.equal(jittered, colour(clips(3), [5, 6, 7]))
    assert torch.equal(jittered[[2, 0]], colour(clips(3)[[2, 0]], [7, 5]))      # whatever else is in the batch
    torch.set_rng_state(state)
    draw_view(240, 320, 2**63 - 1)
    colour(clips(1), [2**63 - 1])
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_boxes_lie_in_the_picture_with_the_areas_and_shapes_asked_for():
    areas, flips = [], 0
    for (top, left, height, width), flip in (draw_view(240, 320, seed) for seed in range(1000)):
        assert min(top, left) >= 0 and max(top + height, left + width) <= 1 + 1e-9
        assert 3 / 4 - 0.02 < width * 320 / (height * 240) < 4 / 3 + 0.02
        areas, flips = areas + [height * width], flips + flip
    assert 0.24 < min(areas) < 0.3 and 0.9 < max(areas) <= 1 and 440 < flips < 560


def test_boxes_of_pictures_of_any_shape_lie_in_them():
    for shape in ((1, 1), (4000, 16), (16, 4000), (2, 3)):
        for top, left, height, width in (draw_view(*shape, seed)[0] for seed in range(20)):
            assert min(height, width) > 0 and min(top, left) >= 0 and max(top + height, left + width) <= 1 + 1e-9


def test_colour_is_constant_over_a_clip_and_differs_between_clips():
    still = clips(1, T=1).expand(20, 6, -1, -1, -1)
    jittered = colour(still, range(20))
    assert torch.equal(jittered, jittered[:, :, :1].expand_as(jittered))
    assert len({clip.numpy().tobytes() for clip in jittered}) > 12              # 16 % keep their colours


def test_colours_are_torchvisions_for_the_same_seed():
    given = clips(60)
    given[:, 0] = given[:, 1, :1]                                               # grey: no hue
    given[:, 2, :, :4] = 0
    reference = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)])

    def expected(clip, seed):
        with seeded(seed):
            return reference(clip)
    ours = jitter(given, range(60))
    theirs = torch.stack([expected(clip / 255, seed) for seed, clip in enumerate(given)]) * 255
    assert len({tuple(k for k, _ in draw_colour(seed)) for seed in range(60)}) > 20     # in many orders
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    cut = torch.stack([expected(clip, seed) for seed, clip in enumerate(given)])        # uint8 is cut off at each step
    assert (ours - cut).abs().mean() < 1.5
    torch.testing.assert_close(colour(given, range(60)), normalise(ours), rtol=0, atol=0)


def test_colours_are_jittered_and_lost_as_often_as_said():
    n, clip = 600, clips(1, T=1)
    out = colour(clip.expand(n, -1, -1, -1, -1), range(n)) * torch.tensor(data.STD).view(3, 1, 1, 1)
    out = out + torch.tensor(data.MEAN).view(3, 1, 1, 1)                        # (n, 3, 1, H, W) in 0 ... 1
    kept = ((out - clip[0].transpose(0, 1) / 255).abs().amax((1, 2, 3, 4)) < 1e-4).float().mean()
    grey = ((out.amax(1) - out.amin(1)).amax((1, 2, 3)) < 1e-4).float().mean()
    assert abs(kept - 0.2 * 0.8) < 0.06 and abs(grey - 0.2) < 0.06


def test_network_input_is_normalised_as_torchvision_does_and_channels_last():
    given = clips(2)
    out, preset = normalise(given), R3D_18_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (preset.mean, preset.std))
    torch.testing.assert_close(out, (given.transpose(1, 2) / 255 - mean) / std)
    for x in (out, colour(given, [0, 1])):
        assert x.shape == (2, 3, 4, 8, 10) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last_3d)


# ---- Batches ----

@pytest.fixture
def copy(videos, tmp_path):
    """The small videos, to be changed."""
    return Path(shutil.copytree(videos, tmp_path / "videos"))


def dataset(root, kind=Pairs, **options):
    """All videos below root, in clips of 8 frames of 16x16."""
    split = load_split("folder", root)
    index = scan(split)
    settings = dict(T=8, size=16) | (dict(speeds=(1, 2, 4)) if kind is Pairs else {}) | options
    return kind(split, split.paths, index, **settings)


def batches(of, first, last, items=2, **options):
    return list(step_loader(of, items, first, last, **options))


def same(one, other):
    """Are two lists of batches equal in everything?"""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and a["failed"] == b["failed"]
        and all(torch.equal(a[name], b[name]) for name in a if name != "failed") for a, b in zip(one, other))


@pytest.mark.parametrize("kind", [Pairs, Clips])
def test_batches_do_not_depend_on_workers_processes_or_the_step_one_starts_at(videos, kind):
    whole = batches(dataset(videos, kind), 0, 8, items=4 if kind is Clips else 2)
    again = dict(of=dataset(videos, kind), first=0, last=8, items=4 if kind is Clips else 2)
    for workers in (0, 1, 2):
        assert same(batches(**again, workers=workers), whole)
    ranks = zip(*(batches(**again, rank=rank, world=2) for rank in (0, 1)), strict=True)
    assert same([{name: pair[0][name] + pair[1][name] if name == "failed" else torch.cat([b[name] for b in pair])
                  for name in pair[0]} for pair in ranks], whole)
    assert same(batches(**again | dict(first=5)), whole[5:])


def test_loader_processes_share_what_the_scan_knows_of_packets_even_if_not_forked(videos):
    pairs = dataset(videos)
    copy = pickle.loads(ForkingPickler.dumps(pairs))                            # as a new process gets it
    assert copy.packets.numel() > 1000 and copy.packets.is_shared()
    pairs.packets.zero_()
    assert not copy.packets.any()


def test_an_epoch_visits_each_video_at_most_once_and_all_but_the_remainder(videos):
    pairs = dataset(videos)
    for items, steps in ((1, 6), (2, 3), (4, 1), (6, 1)):                       # of 13 videos, 6 groups
        for epoch in (0, 1):
            visits = batches(pairs, epoch * steps, (epoch + 1) * steps, items)
            seen = sum((batch["video"].tolist() for batch in visits), [])
            assert len(seen) == len(set(seen)) == steps * 2 * items


def test_epochs_and_seeds_draw_anew(videos):
    epochs = batches(dataset(videos), 0, 6) + batches(dataset(videos, seed=1), 0, 3)
    orders, seeds = ([torch.cat([b[name].flatten() for b in epochs[k:k + 3]]).tolist() for k in (0, 3, 6)]
                     for name in ("video", "seed"))
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len(set(sum(seeds, []))) == 3 * 24                                   # a colour for each clip ever shown
    clips = batches(dataset(videos, Clips), 0, 3, 13) + batches(dataset(videos, Clips, seed=1), 0, 3, 13)
    assert len(torch.cat([batch["seed"] for batch in clips]).unique()) == 6 * 13


def test_batches_hold_what_the_network_and_the_losses_expect(videos):
    (batch,) = batches(dataset(videos), 0, 1, items=3)
    shapes = dict.fromkeys(["video", "pq", "order"], (6,)) | dict.fromkeys(["speed", "direction", "seed"], (6, 2))
    shapes["clips"] = (6, 2, 8, 3, 16, 16)
    assert batch.pop("failed") == [] and {name: tuple(batch[name].shape) for name in shapes} == shapes
    assert all(value.dtype == (torch.uint8 if name == "clips" else torch.int64) for name, value in batch.items())
    for name in ("pq", "speed", "direction", "order"):
        assert torch.equal(batch[name][0::2], batch[name][1::2])                # the group's
    (batch,) = batches(dataset(videos, Clips), 0, 1, items=3)
    assert batch["clips"].shape == (3, 8, 3, 16, 16) and batch["label"].shape == batch["seed"].shape == (3,)


@pytest.mark.parametrize("n", [2, 4])                                           # 4: p, q, both once more: Fig. 5
def test_clips_show_the_frames_of_tau_each_in_a_view_of_its_own(videos, monkeypatch, n):
    calls, read = [], Pairs.read
    monkeypatch.setattr(Pairs, "read", lambda self, *args: (calls.append(args), read(self, *args))[1])
    pairs = dataset(videos, clips=n)
    (batch,) = batches(pairs, 0, 1, items=6)
    assert batch["clips"].shape == (12, n, 8, 3, 16, 16) and batch["seed"].unique().numel() == 12 * n
    for clips, (v, pair, views) in zip(batch["clips"], calls, strict=True):
        assert len(views) == n
        for clip, tau, (box, flip) in zip(clips, itertools.cycle(pair), views):
            shown = decode(os.fsdecode(pairs.files[v]), tau.frames(8), 16, [box] * 8)
            assert torch.equal(clip, shown.flip(-1) if flip else shown)
    assert batch["video"].tolist() == [v for v, _, _ in calls]
    assert batch["start"].tolist() == [[tau.start for tau in pair] for _, pair, _ in calls]
    assert batch["speed"].tolist() == [[pairs.speeds.index(tau.speed) for tau in pair] for _, pair, _ in calls]
    assert {flip for _, _, views in calls for _, flip in views} == {False, True}


def test_clips_for_fine_tuning_are_labelled_and_play_forwards_at_the_step_that_fits(videos, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "decode", lambda *args: asked.append(args) or torch.zeros(8, 3, 16, 16))
    (batch,) = batches(dataset(videos, Clips), 0, 1, items=13)
    for (file, frames, _, boxes, _), label in zip(asked, batch["label"].tolist(), strict=True):
        path = str(Path(file).relative_to(videos))
        step = min(4, (LENGTHS[path] - 1) // 7)
        assert path.startswith(["run", "walk"][label]) and len(set(boxes)) == 1
        assert frames == [frames[0] + step * t for t in range(8)] and 0 <= frames[0] and frames[-1] < LENGTHS[path]


def test_a_video_that_breaks_after_the_scan_is_replaced_alike_everywhere_and_reported(copy):
    pairs = dataset(copy)
    whole = batches(pairs, 0, 12, items=1)
    broken = os.fsdecode(pairs.files[3])
    os.truncate(broken, 100)
    mended = batches(pairs, 0, 12, items=1)
    assert same(mended, batches(pairs, 0, 12, items=1, workers=2))
    for now, before in zip(mended, whole):
        if 3 in before["video"]:
            ((name, problem),) = now["failed"]
            assert name == broken and problem.startswith(f"{broken}: ")
            assert 3 not in now["video"] and len(now["video"].unique()) == 2
        else:
            assert same([now], [before])
    assert any(batch["failed"] for batch in mended)


def test_a_video_that_breaks_is_replaced_in_fine_tuning_too(copy):
    clips = dataset(copy, Clips)
    broken = os.fsdecode(clips.files[3])
    os.truncate(broken, 100)
    (batch,) = batches(clips, 0, 1, items=13)
    assert same([batch], batches(clips, 0, 1, items=13, workers=1))
    assert {name for name, _ in batch["failed"]} == {broken} and len(batch["clips"]) == 13


@pytest.mark.parametrize("kind", [Pairs, Clips])
def test_ten_failures_in_a_row_are_an_error(copy, kind):
    of = dataset(copy, kind)
    for file in of.files:
        os.truncate(file, 100)
    with pytest.raises(VideoError, match="^10 videos in a row"):
        of[0, 0]


def test_a_broken_video_that_nothing_can_replace_is_an_error(tmp_path, videos):
    for path in ("run/00.avi", "walk/01.avi"):
        shutil.copy(videos / path, tmp_path)
    pairs = dataset(tmp_path)
    os.truncate(pairs.files[1], 100)
    with pytest.raises(VideoError, match="01.avi"):
        pairs[0, 0]


@pytest.mark.parametrize("equivariance", ["temporal", "spatial", "both"])
def test_a_group_shares_what_its_equivariance_says_and_nothing_else(videos, monkeypatch, equivariance):
    reads = []
    monkeypatch.setattr(data, "draw_view", lambda height, width, seed: seed)    # a view is known by its seed
    monkeypatch.setattr(Pairs, "read", lambda self, v, *args: reads.append(args) or torch.zeros(2, 8, 3, 16, 16))
    drawn = batches(dataset(videos, equivariance=equivariance), 0, 60, items=1)
    groups = list(zip(reads[0::2], reads[1::2], strict=True))
    for ((pair, views), (other_pair, other_views)), batch in zip(groups, drawn, strict=True):
        assert relative(*pair) == relative(*other_pair) or equivariance == "spatial"
        assert (pair[0] == pair[1] and other_pair[0] == other_pair[1]) or equivariance != "spatial"
        assert len({*views, *other_views}) == (4 if equivariance == "temporal" else 2) and views[0] != views[1]
        assert views == other_views or equivariance == "temporal"               # p's with p's, q's with q's
        assert len(batch["seed"].unique()) == 4                                 # colour is never shared
    assert any(pair != other_pair for (pair, _), (other_pair, _) in groups)     # the place is each video's own
    assert any(pair[0] != pair[1] for (pair, _), _ in groups) == (equivariance != "spatial")
    assert any(relative(*pair) != relative(*other) for (pair, _), (other, _) in groups) == (equivariance == "spatial")
    known = {batch["pq"][0].item(): relative(*pair) for ((pair, _), _), batch in zip(groups, drawn)}
    expected = {relative(*pair) for (pair, _), _ in groups} if equivariance == "temporal" else groups
    assert len(known) == len(expected)                                          # by value, or each group its own


def test_windows_are_whole_frames_and_unreadable_videos_are_told_not_replaced(copy):
    split = load_split("folder", copy)
    index = scan(split)
    windows = Windows(split, index | {"run/00.avi": (0, 0, 0, "bad", "")}, T=8, size=14, windows=3)
    os.truncate(copy / "run/02.avi", 100)
    frames = sum(eval_windows(index[split.paths[5]][0], 8, 4, 3), [])
    v, clip, problem = windows[5]
    assert (v, problem) == (5, "") and clip.shape == (3, 8, 3, 16, 21)
    assert torch.equal(clip.flatten(0, 1), decode(copy / split.paths[5], frames, size=16))
    for k, reason in ((0, "bad"), (1, "Invalid data")):
        v, clip, problem = windows[k]
        assert v == k and clip is None and reason in problem
