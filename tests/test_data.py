"""The sampler, the augmentation, and batches, which are the same whoever loads them."""
import itertools
import os
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LENGTHS
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms import v2

import data
from common.colour import draw_colour, jitter
from common.splits import load_split, scan
from common.video import decode
from data import Clips, Pairs, colour, draw_view, eval_windows, normalise, sample_pair

SPEEDS = (1, 2, 4, 8)


def relative(p, q):
    """The relative transformation of two clips (Fig. 1)."""
    return p.speed, p.reverse, q.speed, q.reverse, q.start - p.start


def draws(n, low=16, high=400, T=16):
    """n groups of two videos of random lengths -> pairs and labels of each."""
    rng = random.Random(0)
    for _ in range(n):
        yield sample_pair([rng.randint(low, high) for _ in "ij"], T, SPEEDS, rng)


def uniform(values, options):
    """Are the options equally frequent, by a chi-square test? (0.1 % of honest draws fail.)"""
    counts, mean, degrees = Counter(values), len(values) / len(options), max(1, len(options) - 1)
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * (2 / (9 * degrees)) ** 0.5) ** 3
    chi_square = sum((counts[x] - mean) ** 2 / mean for x in options)
    return set(counts) == set(options) and chi_square < limit


# ---- Temporal transformations ----

def test_tau_lists_its_frames_in_playing_order_and_ends_at_the_last():
    forwards, backwards = (data.Tau(5, 4, reverse) for reverse in (False, True))
    assert forwards.frames(4) == [5, 9, 13, 17] and backwards.frames(4) == [17, 13, 9, 5]
    for tau in (forwards, backwards):
        assert tau.end(4) == 17 and len(tau.frames()) == 16 and tau.end() == max(tau.frames())


@pytest.mark.parametrize("lengths", [(7, 20), (20, 7)])
def test_pairs_lie_anywhere_in_each_video_however_short_the_other_one_is(lengths):
    rng = random.Random(0)
    drawn = [sample_pair(lengths, 4, rng=rng)[0] for _ in range(12000)]
    for length, pairs in zip(lengths, zip(*drawn), strict=True):
        starts = defaultdict(list)                              # by the span of the pair
        for p, q in pairs:
            start = min(p.start, q.start)
            starts[max(p.end(4), q.end(4)) - start].append(start)
        assert starts.keys() == {3, 4, 5, 6}
        assert all(uniform(starts[n], range(length - n)) for n in starts)


def test_labels_are_those_of_the_transformations():
    before, after = defaultdict(set), defaultdict(set)
    for pairs, labels in draws(3000, low=6, high=40, T=5):
        for pair in pairs:
            assert [SPEEDS[k] for k in labels["speed"]] == [tau.speed for tau in pair]
            assert [bool(k) for k in labels["direction"]] == [tau.reverse for tau in pair]
            p, q = (set(range(min(tau.frames(5)), max(tau.frames(5)) + 1)) for tau in pair)
            assert labels["order"] == (2 if p & q else 0 if max(p) < min(q) else 1)
            before[max(p) - min(q)].add(labels["order"])
            after[max(q) - min(p)].add(labels["order"])
    assert (before[-1], before[0], after[-1], after[0]) == ({0}, {2}, {1}, {2})     # they touch


def test_pq_is_equal_exactly_where_the_relative_transformations_are():
    seen = {(labels["pq"], relative(*pair))
            for pairs, labels in draws(8000, 25, 40, T=4) for pair in pairs}    # of one group, too
    numbers, transformations = map(set, zip(*seen))
    assert len(seen) == len(numbers) == len(transformations) < 4000
    for _, labels in draws(100, 2_000_000, 2_592_000):          # a day of video
        assert torch.tensor(labels["pq"], dtype=torch.int64).item() == labels["pq"]


@pytest.mark.parametrize("length", [30, 31, 60, 61, 120, 121])
def test_speeds_are_uniform_over_those_that_fit_the_shorter_video(length):
    rng = random.Random(0)
    pairs = [sample_pair([500, length], rng=rng)[0] for _ in range(1500)]
    fit = [s for s in SPEEDS if 15 * s < length]
    speeds = [tau.speed for _, pair in pairs for tau in pair]
    assert uniform(speeds, fit)


def test_starts_and_directions_are_uniform():
    rng = random.Random(0)
    starts = [data.sample_tau(25, speeds=(1,), rng=rng).start for _ in range(4000)]
    assert uniform(starts, range(10))
    directions = [tuple(tau.reverse for tau in pairs[0]) for pairs, _ in draws(4000)]
    assert uniform(directions, list(itertools.product([False, True], repeat=2)))


def test_a_video_of_just_enough_frames_is_used_whole_and_a_shorter_one_is_refused():
    pairs, labels = sample_pair([16, 400])
    assert (pairs[0][0].start, pairs[0][1].start, labels["order"]) == (0, 0, 2)
    with pytest.raises(ValueError, match="15 frames"):
        sample_pair([400, 15])


def test_windows_are_spread_evenly_over_the_whole_video():
    lengths = *range(16, 130), 400, 1000
    for length, step, windows in itertools.product(lengths, (1, 2, 4), (2, 3, 10)):
        clips = eval_windows(length, 16, step, windows)
        starts, fit = [clip[0] for clip in clips], min(step, (length - 1) // 15)
        assert clips == [[start + fit * t for t in range(16)] for start in starts]
        assert len(clips) == windows and starts[0] == 0 and clips[-1][-1] == length - 1
        assert np.ptp(np.diff(starts)) <= 1


def test_one_window_lies_in_the_middle():
    for length in range(16, 200):
        (clip,) = eval_windows(length, 16, 4, 1)
        assert 0 <= (length - 1 - clip[-1]) - clip[0] <= 1


def test_windows_of_a_video_that_is_too_short_repeat_its_last_frame():
    for length in range(1, 16):
        window = [*range(length)] + [length - 1] * (16 - length)
        assert eval_windows(length, windows=3) == [window] * 3


# ---- Augmentation ----

def pictures(n, T=4):
    """-> uint8 (n, T, 8, 10, 3)"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, T, 8, 10, 3), dtype=torch.uint8, generator=generator)


def colours(seeds):
    return torch.stack([draw_colour(seed) for seed in seeds])


def test_views_and_colours_depend_on_their_seeds_alone_and_no_other_random_number_on_them():
    state, views = torch.get_rng_state(), [draw_view(240, 320, seed) for seed in range(50)]
    drawn = colours(range(50))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert views == [draw_view(240, 320, seed) for seed in range(50)] and len(set(views)) == 50
    assert torch.equal(drawn, colours(range(50)))


def test_each_clip_has_its_own_colour_whatever_the_size_of_the_batch():
    small, large = pictures(50), torch.randint(256, (3, 16, 128, 128, 3), dtype=torch.uint8)
    for clips in (small, large):                                # the large ones one by one
        drawn = colours(range(len(clips)))
        for clip, one, expected in zip(clips, drawn, colour(clips, drawn)):
            assert torch.equal(expected, colour(clip[None], one[None])[0])
    pairs, drawn = small[:12].unflatten(0, (6, 2)), colours(range(12))
    both = data.augment(pairs, drawn.unflatten(0, (6, 2)))
    assert torch.equal(both.flatten(0, 1), colour(small[:12], drawn))


def test_boxes_lie_inside_and_have_the_areas_and_aspect_ratios_asked_for():
    boxes, flips = zip(*(draw_view(240, 320, seed) for seed in range(1000)))
    top, left, height, width = np.array(boxes).T
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 1 + 1e-9 and (left + width).max() <= 1 + 1e-9
    ratio, area = width * 320 / (height * 240), height * width
    assert 3 / 4 - 0.02 < ratio.min() < 0.78 and 1.3 < ratio.max() < 4 / 3 + 0.02
    assert 0.24 < area.min() < 0.3 and 0.9 < area.max() <= 1 and 440 < sum(flips) < 560


def test_colours_are_torchvisions_for_the_same_seed():
    given = pictures(60)
    given[:, 0] = given[:, 1, ..., :1]                          # grey: no hue
    given[:, 2, :, :4] = 0
    planes, drawn = given.movedim(-1, 2), colours(range(60))
    reference = v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2)])
    ours = jitter(planes, drawn)
    for seed in range(60):
        torch.manual_seed(seed)
        theirs = 255 * reference(planes[seed] / 255)
        torch.testing.assert_close(ours[seed], theirs, rtol=0, atol=1e-3)
    assert torch.equal(colour(given, drawn), normalise(ours))


def test_network_input_is_normalised_as_torchvision_does_and_channels_last():
    given, preset = pictures(2), R3D_18_Weights.DEFAULT.transforms()
    mean, std = torch.tensor(preset.mean), torch.tensor(preset.std)
    out = normalise(given.movedim(-1, 2))
    torch.testing.assert_close(out, ((given / 255 - mean) / std).movedim(-1, 1))
    for x in (out, colour(given, colours([0, 1]))):
        assert x.shape == (2, 3, 4, 8, 10) and x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last_3d)


# ---- Batches ----

def dataset(root, kind=Pairs, **options):
    """All videos below root, in clips of 8 frames of 16x16."""
    split = scan(load_split("folder", root))
    speeds = dict(speeds=(1, 2, 4)) if kind is Pairs else {}
    return kind(split, split.paths, **dict(T=8, size=16) | speeds | options)


def batches(of, first, last, items=2, **options):
    return list(data.step_loader(of, items, first, last, **options))


def assert_same(one, other):
    """Two lists of batches are equal in everything."""
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.fixture
def seeds_as_colours(monkeypatch):
    """batch["colour"] is (..., 1, 1): the seeds from which colours would be drawn."""
    monkeypatch.setattr(data, "draw_colour", lambda seed: torch.tensor([[seed]]))


@pytest.mark.parametrize("kind, items", [(Pairs, 2), (Clips, 4)])
def test_batches_do_not_depend_on_workers_processes_or_the_first_step(videos, kind, items):
    whole = batches(dataset(videos, kind), 0, 8, items)
    again = dict(of=dataset(videos, kind), first=0, last=8, items=items)
    for workers in (1, 2):
        assert_same(batches(**again, workers=workers), whole)
    ranks = zip(*(batches(**again, rank=rank, world=2) for rank in (0, 1)), strict=True)
    assert_same([{name: torch.cat([a[name], b[name]]) for name in a} for a, b in ranks], whole)
    assert_same(batches(**again | dict(first=5)), whole[5:])


def test_an_epoch_visits_each_video_at_most_once_and_all_but_the_remainder(videos):
    pairs = dataset(videos)
    for items, steps in ((1, 6), (2, 3), (4, 1), (6, 1)):       # of 13 videos, 6 groups
        for epoch in (0, 1):
            visits = batches(pairs, epoch * steps, (epoch + 1) * steps, items)
            seen = sum((batch["video"].tolist() for batch in visits), [])
            assert len(seen) == len(set(seen)) == steps * 2 * items


@pytest.mark.parametrize("kind, items, steps", [(Pairs, 2, 3), (Clips, 13, 1)])
def test_epochs_and_seeds_draw_anew(videos, seeds_as_colours, kind, items, steps):
    drawn = batches(dataset(videos, kind), 0, 2 * steps, items)
    drawn += batches(dataset(videos, kind, seed=1), 0, steps, items)
    epochs = [drawn[k * steps:(k + 1) * steps] for k in range(3)]
    orders = {tuple(torch.cat([b["video"] for b in epoch]).tolist()) for epoch in epochs}
    assert len(orders) == 3
    seeds = torch.cat([batch["colour"].flatten() for batch in drawn])
    assert len(seeds.unique()) == len(seeds)                    # one for each clip ever shown


@pytest.mark.parametrize("n", [2, 4])                           # 4: p, q, both again: Fig. 5
def test_clips_show_the_frames_of_tau_each_in_a_view_of_its_own(
        videos, monkeypatch, seeds_as_colours, n):
    calls, read = [], Pairs.read
    monkeypatch.setattr(Pairs, "read", lambda *args: calls.append(args[1:]) or read(*args))
    pairs = dataset(videos, clips=n)
    (batch,) = batches(pairs, 0, 1, items=6)
    assert batch["colour"].unique().numel() == 12 * n
    for clips, (v, pair, views) in zip(batch["clips"], calls, strict=True):
        assert len(clips) == len(views) == n
        for clip, tau, (box, flip) in zip(clips, itertools.cycle(pair), views):
            shown = decode(os.fsdecode(pairs.files[v]), tau.frames(8), 16, [box] * 8)
            assert torch.equal(clip.movedim(-1, 1), shown.flip(-1) if flip else shown)
    assert batch["video"].tolist() == [v for v, _, _ in calls]
    taus = [pair for _, pair, _ in calls]
    assert batch["start"].tolist() == [[p.start, q.start] for p, q in taus]
    assert [[pairs.speeds[k] for k in row] for row in batch["speed"].tolist()] == [
        [p.speed, q.speed] for p, q in taus]
    assert batch["direction"].tolist() == [[p.reverse, q.reverse] for p, q in taus]
    assert batch["order"].tolist() == [data.order_of(*pair, 8) for pair in taus]
    assert batch["pq"].tolist() == [data.id_of(*pair) for pair in taus]
    assert {flip for _, _, views in calls for _, flip in views} == {False, True}


def test_clips_for_fine_tuning_are_labelled_and_lie_anywhere_at_the_step_that_fits(
        videos, monkeypatch):
    asked, starts = [], defaultdict(set)
    monkeypatch.setattr(
        data, "decode", lambda *args: asked.append(args) or torch.arange(16).expand(8, 3, 16, 16))
    split = scan(load_split("folder", videos))
    drawn = batches(Clips(split, split.paths[1::2], 8, 16), 0, 200, items=6)
    labels, clips = (torch.cat([batch[name] for batch in drawn]) for name in ("label", "clips"))
    assert uniform(clips[:, 0, 0, 0, 0].tolist(), [0, 15])      # half of them are mirrored
    for (file, frames, size, boxes), label in zip(asked, labels, strict=True):
        path = str(Path(file).relative_to(videos))
        step = min(4, (LENGTHS[path] - 1) // 7)
        assert path.startswith(["run", "walk"][label]) and size == 16
        assert frames == [frames[0] + step * t for t in range(8)] and len(set(boxes)) == 1
        starts[path, LENGTHS[path] - 7 * step].add(frames[0])
    assert len({boxes[0] for *_, boxes in asked}) > 1000        # each clip has its own
    for (_, count), seen in starts.items():
        assert seen == {*range(count)}


@pytest.mark.parametrize("kind", [Pairs, Clips])
def test_a_video_that_breaks_after_the_scan_is_named_and_replaced_with_any_workers(copy, kind):
    of = dataset(copy, kind)
    whole = batches(of, 0, 12, items=1)
    broken = os.fsdecode(of.files[3])
    os.truncate(broken, 100)
    with pytest.warns(UserWarning) as caught:
        replaced = batches(of, 0, 12, items=1)
        assert_same(batches(of, 0, 12, items=1, workers=2), replaced)
    message = f"replaced a video that does not decode: {broken}: "
    named = [warning for warning in caught if str(warning.message).startswith(message)]
    assert len(named) == 2 * sum(3 in batch["video"] for batch in whole) > 0
    for now, before in zip(replaced, whole):
        if 3 in before["video"]:
            assert 3 not in now["video"] and len(now["video"].unique()) == len(before["video"])
        else:
            assert_same([now], [before])


def test_a_group_in_the_place_of_a_broken_one_is_a_positive_of_no_other(copy):
    of = dataset(copy, equivariance="spatial")
    os.truncate(os.fsdecode(of.files[3]), 100)
    ids = [of[0, group]["pq"][0].item() for group in range(len(of))]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("kind", [Pairs, Clips])
def test_ten_failures_in_a_row_are_an_error(copy, kind):
    of = dataset(copy, kind)
    for file in of.files:
        os.truncate(file, 100)
    with pytest.raises(RuntimeError, match="^10 items in a row cannot be read: .*avi: Invalid"):
        of[0, 0]


@pytest.mark.parametrize("equivariance", ["temporal", "spatial", "both"])
def test_a_group_has_in_common_what_its_equivariance_says_and_nothing_else(
        videos, monkeypatch, seeds_as_colours, equivariance):
    reads, clips = [], [torch.zeros(8, 16, 16, 3)] * 2
    monkeypatch.setattr(data, "draw_view", lambda *shape_and_seed: shape_and_seed)
    monkeypatch.setattr(Pairs, "read", lambda self, v, *args: reads.append(args) or clips)
    of = dataset(videos, equivariance=equivariance)
    of.shapes[::2, 1:] = 50, 40                                 # of another aspect ratio
    drawn = batches(of, 0, 60, items=1)
    groups = list(zip(reads[0::2], reads[1::2], strict=True))
    temporal, spatial = equivariance == "temporal", equivariance == "spatial"
    ids = {}
    for ((one, views), (two, other_views)), batch in zip(groups, drawn, strict=True):
        assert spatial or relative(*one) == relative(*two)
        assert not spatial or (one[0] == one[1] and two[0] == two[1])
        assert len({*views, *other_views}) == (4 if temporal else 2) and views[0] != views[1]
        assert temporal or views == other_views                 # p's with p's, q's with q's
        assert len(batch["colour"].unique()) == 4               # never in common
        ids[batch["pq"][0].item()] = relative(*one)
    taus = [(one, two) for (one, _), (two, _) in groups]
    assert any(one != two for one, two in taus)                 # each video has its own position
    assert any(one[0] != one[1] for one, _ in taus) == (not spatial)
    assert any(relative(*one) != relative(*two) for one, two in taus) == spatial
    expected = {relative(*one) for one, _ in taus} if temporal else groups
    assert len(ids) == len(expected)                            # by value, or one a group
