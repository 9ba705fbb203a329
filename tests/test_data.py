"""Run: python -m pytest tests/test_data.py"""
import itertools
import json
import os
import pickle
import random
import re
import shutil
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from test_decode import numbered, write_video
from torchvision.models.video import R3D_18_Weights
from torchvision.transforms import v2

import data
from data import (Clips, Pairs, Split, Tau, VideoError, Windows, colour, decode, draw_view, eval_windows,
                  load_split, normalise, sample_pair, sample_tau, scan, sources, step_loader, usable)

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


# ---- Data sets ----

OFFICIAL = {("ucf101", 1): (9537, 3783), ("ucf101", 2): (9586, 3734), ("ucf101", 3): (9624, 3696),
            ("hmdb51", 1): (3570, 1530), ("hmdb51", 2): (3570, 1530), ("hmdb51", 3): (3570, 1530),
            ("diving48", 1): (15027, 1970)}


def touch(root, *names, text=""):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def ucf(root, lines, classes=("Run", "HandstandPushups"), end="\n"):
    """A UCF101 of one's own: lists in root/ucfTrainTestlist, videos (if any) in root/UCF-101 -> the latter."""
    for name, rows in (("classInd", [f"{k} {name}" for k, name in enumerate(classes, 1)]), ("trainlist01", lines)):
        touch(root, "UCF-101/readme.txt", f"ucfTrainTestlist/{name}.txt", text="")
        (root / f"ucfTrainTestlist/{name}.txt").write_bytes("".join(row + end for row in rows).encode())
    return root / "UCF-101"


@pytest.mark.parametrize("dataset, number", OFFICIAL)
def test_official_lists_give_the_published_counts(shared, tmp_path, dataset, number):
    lists, counts = shared / "annotations" / dataset, OFFICIAL[dataset, number]
    splits = [load_split(dataset, tmp_path, lists, number, part) for part in ("train", "test")]
    assert tuple(len(split.paths) for split in splits) == counts == data.PUBLISHED[dataset, number]
    assert not set(splits[0].paths) & set(splits[1].paths)
    for split in splits:
        assert len(split.classes) == {"ucf101": 101, "hmdb51": 51, "diving48": 48}[dataset]
        assert set(range(len(split.classes))) - set(split.labels) == ({30} if dataset == "diving48" else set())
        assert len(set(split.paths)) == len(split.paths) == len(split.labels)
        assert split.missing == split.paths and not split.found
        if dataset != "diving48":
            assert all(split.classes[k] == path.split("/")[0] for k, path in zip(split.labels, split.paths))


def test_ucf101_labels_are_those_its_training_lists_give(shared, tmp_path):
    rows = (shared / "annotations/ucf101/trainlist01.txt").read_text().split("\n")
    labels = load_split("ucf101", tmp_path, shared / "annotations/ucf101").labels
    assert [int(row.split()[1]) - 1 for row in rows if row] == labels           # classInd.txt counts from 1


def test_hmdb51_names_with_special_characters_are_found(shared, tmp_path):
    lists = shared / "annotations" / "hmdb51"
    paths = load_split("hmdb51", tmp_path, lists).paths
    special = [path for path in paths if re.search(r"[!#&()+;@[\]]", path)]
    split = load_split("hmdb51", touch(tmp_path, *special), lists)
    assert len(special) > 200 and split.found == {path: tmp_path / path for path in special}
    assert split.missing == [path for path in paths if path not in special]


def test_hmdb51_classes_whose_names_begin_alike_are_kept_apart(shared, tmp_path):
    split = load_split("hmdb51", tmp_path, shared / "annotations" / "hmdb51")
    assert set(Counter(split.classes[k] for k in split.labels).values()) == {70}
    assert {"climb", "climb_stairs", "shoot_ball", "shoot_bow", "ride_bike"} < set(split.classes)


def test_diving48_names_that_begin_with_a_dash_are_found_and_its_videos_lie_in_rgb(shared, tmp_path):
    lists = shared / "annotations" / "diving48"
    dashed = [path for path in load_split("diving48", tmp_path, lists).paths if path.startswith("-")]
    split = load_split("diving48", touch(tmp_path, *(f"rgb/{path}" for path in dashed)), lists)
    assert len(dashed) > 100 and list(split.found) == dashed and split.root == tmp_path / "rgb"


def test_a_real_tree_is_found_whole_with_the_lists_beside_it(shared):
    for part, count in (("train", 80), ("test", 40)):
        split = load_split("ucf101", shared / "videos" / "ucf_original" / "UCF-101", part=part)
        assert len(split.found) == len(split.paths) == count and not split.missing
        assert sorted(Counter(split.labels).items()) == [(k, count // 8) for k in range(8)]


@pytest.mark.parametrize("end", ["\n", "\r\n", " \r\n"])
@pytest.mark.parametrize("label", ["", " 1"])
def test_list_lines_may_carry_labels_and_either_line_end(tmp_path, label, end):
    paths = ["Run/v_Run_g01_c01.avi", "Run/my run 2.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]
    split = load_split("ucf101", ucf(tmp_path, [path + label for path in paths] + [""], end=end))
    assert split.paths == paths and split.labels == [0, 0, 1] and split.classes == ["Run", "HandstandPushups"]


def test_letter_case_is_ignored_where_that_finds_a_file(tmp_path):
    listed = ["HandStandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups/v_HandstandPushups_g01_c02.avi"]
    there = ["HandstandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c02.avi"]
    root = touch(ucf(tmp_path, listed), *there)
    split = load_split("ucf101", root)
    assert split.found == {path: root / file for path, file in zip(listed, there)} and split.labels == [1, 1]


@pytest.mark.parametrize("dataset", ["kinetics400", "folder"])
def test_a_folder_gives_all_its_videos_with_class_folders_as_labels(tmp_path, dataset):
    videos = ["run/a.mp4", "run/more/b.AVI", "walk/[c] d.webm", "walk/-e.mkv", "linked/f.mp4"]
    root = touch(tmp_path / "videos", *videos[:4], "run/._a.mp4", "run/notes.txt", "walk/mp4", "walk/.a.mp4.part")
    touch(tmp_path / "elsewhere", "f.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    split = load_split(dataset, root)
    assert split.paths == sorted(videos) and not split.missing
    assert [split.classes[k] for k in split.labels] == ["linked", "run", "run", "walk", "walk"]
    flat = load_split(dataset, touch(tmp_path / "flat", "b.mp4", "a.mp4"))
    assert flat.paths == ["a.mp4", "b.mp4"] and flat.labels == [None, None] and flat.classes == []


@pytest.mark.parametrize("path", ["../Run/a.avi", "Run/../../a.avi", "/etc/passwd"])
def test_a_list_cannot_name_files_outside_the_data_set(tmp_path, path):
    with pytest.raises(ValueError, match=re.escape(path)):
        load_split("ucf101", ucf(tmp_path, ["Run/b.avi 1", f"{path} 1"]))
    touch(tmp_path, "Diving48_V2_train.json", text=json.dumps([dict(vid_name=path, label=3)]))
    with pytest.raises(ValueError, match=re.escape(path)):
        load_split("diving48", tmp_path)


def test_what_is_wrong_with_the_files_is_said_with_what_was_looked_for_and_where(tmp_path):
    listed = [f"Run/v_Run_g01_c{k:02d}.avi" for k in range(40)]
    root = touch(ucf(tmp_path, listed), *listed[:20])
    with pytest.raises(ValueError, match="Jump.*lacks"):
        load_split("ucf101", ucf(tmp_path / "other", ["Jump/a.avi"]))
    with pytest.raises(ValueError, match=f"{tmp_path}/nowhere does not exist"):
        load_split("ucf101", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"testlist01.txt in .*{tmp_path}/ucfTrainTestlist"):
        load_split("ucf101", root, part="test")
    with pytest.raises(ValueError, match=f"no list trainlist01.txt in {root} or {root}/ucfTrainTestlist "):
        load_split("ucf101", root, annotations=root)
    with pytest.raises(ValueError, match="unknown data set 'ucf102'"):
        load_split("ucf102", root)
    with pytest.raises(ValueError, match=f"folder: looked for videos in {root}/empty, found 0"):
        scan(load_split("folder", touch(root, "empty/notes.txt") / "empty"))
    with pytest.raises(ValueError, match=f"looked for 40 listed videos in {root}, found 20; the first missing: "
                                         + ", ".join(listed[20:23]) + "(?!, Run)"):
        scan(load_split("ucf101", root))


def test_clips_cut_from_one_recording_share_a_source():
    ucf101 = [f"Run/v_Run_{clip}.avi" for clip in ("g01_c01", "g01_c02", "g02_c01")]
    hmdb51 = [f"climb/{name}.avi" for name in ("A_(b)_climb_f_cm_np1_ba_med_0", "A_(b)_climb_u_cm_np1_le_bad_1",
                                               "C_climb_f_cm_np1_ba_med_0")]
    diving48 = ["-x_00001.mp4", "-x_00023.mp4", "-y_00001.mp4"]
    for dataset, paths in (("ucf101", ucf101), ("hmdb51", hmdb51), ("diving48", diving48)):
        a, b, c = sources(dataset, paths)
        assert a == b != c
        assert sources("folder", paths) == paths


# ---- The index ----

LENGTHS = {f"{'walk' if k % 2 else 'run'}/{k:02d}.avi": 20 + 3 * k for k in range(13)}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Thirteen tiny videos in two class folders; tests that change them work on a copy."""
    root = touch(tmp_path_factory.mktemp("data") / "videos", "run/readme.txt", "walk/readme.txt")
    for path, length in LENGTHS.items():
        write_video(root / path, [picture[::2, ::2] + np.uint8(16) for picture in numbered(length)])
    return root


@pytest.fixture
def copy(videos, tmp_path):
    return Path(shutil.copytree(videos, tmp_path / "videos"))


@pytest.fixture
def counted(monkeypatch):
    """The names of the files that are decoded by scans from now on."""
    names, examine = [], data.examine
    monkeypatch.setattr(data, "examine", lambda file: (names.append(Path(file).name), examine(file))[1])
    return names


def test_scan_counts_frames_and_remembers_them(videos, tmp_path, counted):
    split = load_split("folder", videos)
    expected = {path: data.examine(videos / path) for path in LENGTHS}
    assert {path: entry[:4] for path, entry in expected.items()} == {p: (n, 24, 32, "") for p, n in LENGTHS.items()}
    del counted[:]
    assert scan(split, tmp_path / "new" / "index.json", workers=2) == expected and len(counted) == 13
    assert scan(split, tmp_path / "new" / "index.json") == expected and len(counted) == 13
    assert scan(split) == scan(split) == expected and len(counted) == 26         # remembered in the user's cache
    assert len(list(Path(os.environ["XDG_CACHE_HOME"]).glob("time-equivariance/*.json"))) >= 1


def test_a_changed_file_is_counted_again_and_no_other(copy, tmp_path, counted):
    split, index = load_split("folder", copy), tmp_path / "index.json"
    scan(split, index)
    times = [(copy / path).stat().st_mtime_ns for path in ("walk/01.avi", "run/02.avi")]
    shutil.copy(copy / "run/00.avi", copy / "walk/01.avi")
    os.utime(copy / "walk/01.avi", ns=(0, times[0]))                            # another size at the same time
    os.utime(copy / "run/02.avi", ns=(0, times[1] + 1))                         # another time
    del counted[:]
    assert scan(split, index)["walk/01.avi"][:4] == (20, 24, 32, "") and sorted(counted) == ["01.avi", "02.avi"]


@pytest.mark.parametrize("content", [b"\xff\x00", b"[]", b"null", b"7", b"Spin/a.avi 1", b'[{"vid_name": "a"}]',
                                     b'{"run/00.avi": null, "run/02.avi": 7}'])
def test_a_file_that_is_no_index_is_not_written_over(videos, tmp_path, content):
    index = tmp_path / "index.json"
    index.write_bytes(content)
    with pytest.raises(ValueError, match="index.json is no index of a scan.*: give another --index"):
        scan(load_split("folder", videos), index)
    assert index.read_bytes() == content


@pytest.mark.parametrize("damage", [None, b"", b"\0\0\0", b'{"run/00.avi": [1', b'{"run/00.avi": [1, 2]}',
                                    b'{"run/00.avi": [1, 2, 20, 24, 32, "", ""]}'])
def test_a_damaged_or_lost_index_is_made_anew(videos, tmp_path, counted, damage):
    split, index = load_split("folder", videos), tmp_path / "index.json"
    before = scan(split, index)
    index.unlink() if damage is None else index.write_bytes(damage)
    assert scan(split, index) == before and len(counted) == 26
    assert scan(split, index) == before and len(counted) == 26
    assert os.listdir(tmp_path) == ["index.json"]


def test_unreadable_files_are_reported_with_the_problem(copy, tmp_path):
    (copy / "run/00.avi").write_text("no video")
    (copy / "run/02.avi").write_bytes((copy / "run/02.avi").read_bytes()[:3000])
    os.rename(copy / "walk/01.avi", copy / os.fsdecode(b"walk/caf\xe9.avi"))
    split = load_split("folder", copy)
    index = scan(split, tmp_path / "index.json")
    assert index["run/00.avi"] == (0, 0, 0, "Invalid data found when processing input", "")
    assert index["run/02.avi"][0] < 26 and index[os.fsdecode(b"walk/caf\xe9.avi")][:4] == (23, 24, 32, "")
    assert scan(split, tmp_path / "index.json") == index


def planned(total, missing=0, unreadable=0, short=0, cut=0):
    """A split and its index, made up: so many videos missing, unreadable, short, unreadable after 20 frames."""
    paths = [f"{k:03d}.avi" for k in range(total)]
    kinds = [(0, 0, 0, "no moov", "")] * unreadable + [(9, 8, 8, "", "")] * short + [(20, 8, 8, "bad", "")] * cut
    index = dict(zip(paths[missing:], kinds + [(99, 8, 8, "", "")] * total))
    return Split("plan", Path("x"), paths, [None] * total, [], {p: Path(p) for p in index}, paths[:missing]), index


def test_short_missing_and_unreadable_videos_are_left_out_and_counted():
    good, report = usable(*planned(100, missing=2, unreadable=3, short=40, cut=5))
    assert good == [f"{k:03d}.avi" for k in range(45, 100)]                     # those cut still have 16 frames
    assert report == ("plan: 100 videos, 55 usable; 2 missing: 000.avi, 001.avi; 3 unreadable: 002.avi (no moov), "
                      "003.avi (no moov), 004.avi (no moov); 40 shorter than 16 frames: 005.avi, 006.avi, "
                      "007.avi, ...")
    assert len(usable(*planned(100, cut=4), T=32)[0]) == 96


def test_more_than_one_bad_video_in_twenty_is_an_error():
    for bad in (dict(missing=6), dict(unreadable=6), dict(missing=3, unreadable=3), dict(short=99)):
        with pytest.raises(ValueError, match="100 videos"):
            usable(*planned(100, **bad))


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
        with data.seeded(seed):
            return reference(clip)
    ours = data.jitter(given, range(60))
    theirs = torch.stack([expected(clip / 255, seed) for seed, clip in enumerate(given)]) * 255
    assert len({tuple(k for k, _ in data.draw_colour(seed)) for seed in range(60)}) > 20     # in many orders
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
    assert copy.packets.numel() > 3000 and copy.packets.is_shared()
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
