"""Official lists, the files that are there, and the index: which videos a run uses, and what it says of the others."""
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import LENGTHS

from common import splits
from common.splits import Split, load_split, scan, sources, usable

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
    both = [load_split(dataset, tmp_path, lists, number, part) for part in ("train", "test")]
    assert tuple(len(split.paths) for split in both) == counts
    assert tuple(splits.PUBLISHED[split.title] for split in both) == counts
    assert not set(both[0].paths) & set(both[1].paths)
    for split in both:
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

@pytest.fixture
def copy(videos, tmp_path):
    return Path(shutil.copytree(videos, tmp_path / "videos"))


@pytest.fixture
def counted(monkeypatch):
    """The names of the files that are decoded by scans from now on."""
    names, examine = [], splits.examine
    monkeypatch.setattr(splits, "examine", lambda file: (names.append(Path(file).name), examine(file))[1])
    return names


def test_scan_counts_frames_and_remembers_them(videos, tmp_path, counted):
    split = load_split("folder", videos)
    expected = {path: splits.examine(videos / path) for path in LENGTHS}
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
