"""common/splits.py: official lists, own folders, and the scan of their videos."""
import json
import os
import re
import shutil
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import LENGTHS, evaluation_words, write_lists

import finetune
import linear_probe
import retrieval
from common import UserError, splits
from common.splits import check_test, load_and_scan, load_split, scan, sources, usable

OFFICIAL = {
    ("ucf101", 1): (9537, 3783), ("ucf101", 2): (9586, 3734), ("ucf101", 3): (9624, 3696),
    ("hmdb51", 1): (3570, 1530), ("hmdb51", 2): (3570, 1530), ("hmdb51", 3): (3570, 1530),
    ("diving48", 1): (15027, 1970)}
CLASSES = {"ucf101": 101, "hmdb51": 51, "diving48": 48}


@pytest.fixture
def unchecked(monkeypatch):
    """Lists are loaded though most of their videos are missing."""
    monkeypatch.setattr(splits, "check_failed", lambda split: None)


def touch(root, *names, text=""):
    """Write files of that text, byte for byte, and their folders -> root"""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, newline="")
    return root


def ucf(root, lines):
    """Write UCF101's lists of two classes, next to an empty folder of videos -> the folder"""
    write_lists(root / "ucfTrainTestlist", ("Run", "HandstandPushups"), trainlist01=lines)
    (root / "UCF-101").mkdir(exist_ok=True)
    return root / "UCF-101"


# ---- Official lists ----

@pytest.mark.parametrize("dataset, number", OFFICIAL)
def test_official_lists_give_the_published_counts(shared, tmp_path, unchecked, dataset, number):
    lists, counts = shared / "annotations" / dataset, OFFICIAL[dataset, number]
    both = [load_split(dataset, tmp_path, lists, number, part) for part in ("train", "test")]
    assert tuple(len(split.paths) for split in both) == counts
    assert tuple(splits.PUBLISHED[split.title] for split in both) == counts
    assert not set(both[0].paths) & set(both[1].paths)
    for split, a_class in zip(both, (70, 30)):
        assert len(split.classes) == CLASSES[dataset]
        unused = set(range(len(split.classes))) - set(split.labels)
        assert unused == ({30} if dataset == "diving48" else set())
        assert len(set(split.paths)) == len(split.paths) == len(split.labels)
        assert dataset != "hmdb51" or set(Counter(split.labels).values()) == {a_class}
        if dataset != "diving48":
            folders = [path.split("/")[0] for path in split.paths]
            assert [split.classes[k] for k in split.labels] == folders


def test_ucf101_labels_are_those_of_its_training_lists(shared, tmp_path, unchecked):
    rows = (shared / "annotations/ucf101/trainlist01.txt").read_text().splitlines()
    labels = load_split("ucf101", tmp_path, shared / "annotations/ucf101").labels
    assert [int(row.split()[1]) - 1 for row in rows if row] == labels       # from 1


@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_the_three_splits_differ(shared, tmp_path, unchecked, dataset, part):
    lists = shared / "annotations" / dataset
    paths = [load_split(dataset, tmp_path, lists, number, part).paths for number in (1, 2, 3)]
    assert paths[0] != paths[1] != paths[2] != paths[0]


@pytest.mark.parametrize("dataset, folder, pattern", [
    ("hmdb51", "", r".*[!#&()+;@[\]]"), ("diving48", "rgb", "-")])
def test_names_with_special_characters_are_found(
        shared, tmp_path, unchecked, dataset, folder, pattern):
    lists = shared / "annotations" / dataset
    paths = load_split(dataset, tmp_path, lists).paths
    special = [path for path in paths if re.match(pattern, path)]
    root = touch(tmp_path, *(f"{folder}/{path}".lstrip("/") for path in special)) / folder
    split = load_split(dataset, tmp_path, lists)
    assert len(special) > 100 and split.files == {path: root / path for path in special}
    assert split.failed == {path: "not found" for path in paths if path not in special}


def test_a_real_folder_is_found_whole_with_the_lists_next_to_it(shared):
    for part, count in (("train", 80), ("test", 40)):
        split = load_split("ucf101", shared / "videos" / "ucf_original" / "UCF-101", part=part)
        assert len(split.files) == len(split.paths) == count and not split.failed
        assert Counter(split.labels) == {k: count // 8 for k in range(8)}


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("line", ["{}\n", "{} 1\n", "{} 1 \r\n \r\n"])
def test_list_lines_may_carry_labels_and_either_line_end(tmp_path, line, start):
    paths = ["Run/v_Run_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]
    root = touch(ucf(tmp_path, []), *paths)
    text = start + "".join(line.format(path) for path in paths)
    touch(tmp_path, "ucfTrainTestlist/trainlist01.txt", text=text)
    split = load_split("ucf101", root)
    assert split.paths == paths and split.labels == [0, 1] and not split.failed
    assert split.classes == ["Run", "HandstandPushups"]


def test_hmdb51_names_may_hold_blanks_commas_and_digits_at_the_end(tmp_path):
    names = ["a b;c, 2.avi", "#(2) 1.avi", "x.avi, 1.avi"]
    touch(tmp_path, *(f"Run/{name}" for name in names))
    lines = [f"{name} 1 \n" for name in names] + ["y.avi 0 \n", "z.avi 2 \n"]
    touch(tmp_path, "Run_test_split1.txt", text="".join(lines))
    touch(tmp_path, "._Run_test_split1.txt", text="macOS adds these")
    split = load_split("hmdb51", tmp_path)
    assert split.paths == [f"Run/{name}" for name in names] and split.classes == ["Run"]
    assert not split.failed


def test_letter_case_is_ignored_as_ucf101_spells_handstand_pushups_in_two_ways(tmp_path):
    listed = ["HandStandPushups/v_HandStandPushups_g01_c01.avi",
              "HandstandPushups/v_HandstandPushups_g01_c02.avi"]
    there = ["HandstandPushups/v_HandStandPushups_g01_c01.avi",
             "HandstandPushups/v_HandStandPushups_g01_c02.avi"]
    root = touch(ucf(tmp_path, listed), *there)
    split = load_split("ucf101", root)
    assert split.files == {path: root / file for path, file in zip(listed, there)}
    assert split.labels == [1, 1]


def test_lists_may_name_files_in_any_bytes(tmp_path):
    path = os.fsdecode(b"Run/caf\xe9.avi")
    root = touch(ucf(tmp_path, []), path)
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_bytes(b"Run/caf\xe9.avi 1\n")
    assert load_split("ucf101", root).files == {path: root / path}


def test_a_missing_folder_or_list_is_named_with_the_places_searched(tmp_path):
    root = touch(ucf(tmp_path, ["Run/a.avi"]), "Run/a.avi")
    with pytest.raises(UserError, match=f"video folder {tmp_path}/nowhere does not exist"):
        load_split("ucf101", tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"no list testlist01.txt in .*{tmp_path}/ucfTrainTestlist"):
        load_split("ucf101", root, part="test")
    with pytest.raises(UserError, match=f"trainlist01.txt in {root} or {root}/ucfTrainTestlist "):
        load_split("ucf101", root, annotations=root)


def test_clips_cut_from_one_recording_have_one_source():
    names = {
        "ucf101": [f"Run/v_Run_{clip}.avi" for clip in ("g01_c01", "g01_c02", "g02_c01")],
        "hmdb51": [
            f"climb/{name}_cm_np1_le_bad_1.avi"
            for name in ("A_(b)_climb_f", "A_(b)_climb_u", "C_climb_f")],
        "diving48": ["-x_00001.mp4", "-x_00023.mp4", "-y_00001.mp4"]}
    for dataset, paths in names.items():
        a, b, c = sources(dataset, paths)
        assert a == b != c
        assert sources("folder", paths) == paths


# ---- Own folders ----

@pytest.mark.parametrize("dataset", ["kinetics400", "folder"])
def test_a_folder_gives_all_its_videos_with_class_folders_as_labels(tmp_path, dataset):
    paths = ["linked/f.mp4", "run/a.mp4", "run/more/b.AVI", "walk/-e.mkv", "walk/[c] d.webm"]
    root = touch(tmp_path / "videos", *paths[1:])
    touch(root, "run/._a.mp4", "run/notes.txt", "walk/mp4", "walk/.a.mp4.part")
    touch(tmp_path / "elsewhere", "f.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    split = load_split(dataset, root)
    assert split.files == {path: root / path for path in paths} and split.paths == paths
    classes = [split.classes[k] for k in split.labels]
    assert classes == ["linked", "run", "run", "walk", "walk"]
    flat = load_split(dataset, touch(tmp_path / "flat", "b.mp4", "a/a.mp4"))
    assert (flat.paths, flat.labels, flat.classes) == (["a/a.mp4", "b.mp4"], [None, None], [])


@pytest.mark.parametrize("test", ["val", "test"])
def test_own_train_and_test_folders_have_the_classes_of_train(tmp_path, test):
    touch(tmp_path, "train/run/a.mp4", "train/walk/b.mp4", "train/walk/more/c.mp4", "readme.txt")
    touch(tmp_path, f"{test}/walk/d.mp4", *(["test/run/e.mp4"] if test == "val" else []))
    train, held_out = (load_split("folder", tmp_path, part=part) for part in ("train", "test"))
    assert train.paths == ["run/a.mp4", "walk/b.mp4", "walk/more/c.mp4"]
    assert train.labels == [0, 1, 1] and train.title == "folder train"
    assert held_out.paths == ["walk/d.mp4"] and held_out.files["walk/d.mp4"].parts[-3] == test
    assert held_out.labels == [1] and held_out.title == f"folder {test}"
    assert train.classes == held_out.classes == ["run", "walk"]
    check_test(train, held_out)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    root, real = touch(tmp_path, "run/a.mp4", "walk/b.mp4"), os.scandir

    def scandir(folder):
        if Path(folder).name == "walk":
            raise PermissionError(f"{folder}: Permission denied")           # root may read all
        return real(folder)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="walk"):
        load_split("folder", root)


def test_there_is_no_test_result_without_labels_or_on_videos_of_training(tmp_path):
    flat = load_split("folder", touch(tmp_path / "flat", "a.mp4", "b.mp4"))
    with pytest.raises(UserError, match="folder has no labels to learn .*train/CLASS/"):
        check_test(flat, flat)
    root = touch(ucf(tmp_path, ["Run/a.avi", "Run/b.avi"]), "Run/a.avi", "Run/b.avi")
    touch(tmp_path, "ucfTrainTestlist/testlist01.txt", text="RUN/a.avi")
    train, test = (load_split("ucf101", root, part=part) for part in ("train", "test"))
    with pytest.raises(UserError, match="1 test videos are also training videos, .*Run/a.avi"):
        check_test(train, test)


@pytest.mark.parametrize("script", [linear_probe, finetune, retrieval])
def test_own_labelled_videos_are_evaluated(videos, tmp_path, script):
    for n, path in enumerate(LENGTHS):
        part = "train" if n < 9 else "val"
        (tmp_path / part / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / path, tmp_path / part / path)
    name = script.__name__
    more = {"finetune": ["--epochs", 1, "--batch-size", 4], "retrieval": ["--k", 1]}.get(name, [])
    script.main(evaluation_words(
        name, tmp_path, tmp_path, tmp_path / "out", "--dataset", "folder", "--data", tmp_path,
        "--arch", "r3d18_narrow", "--checkpoint", "random", "--frames", 4, "--size", 16, *more))
    (file,) = (tmp_path / "out").glob("*.json")
    (split,) = json.loads(file.read_text())["splits"]
    parts = [part for part in split.values() if isinstance(part, dict) and "expected" in part]
    counts = {part["title"]: part["scored"] for part in parts}
    assert counts == {"folder train": 9, "folder val": 4}


# ---- The scan ----

@pytest.fixture
def copy(videos, tmp_path):
    """The small videos, to be changed."""
    return Path(shutil.copytree(videos, tmp_path / "videos"))


@pytest.fixture
def probed(monkeypatch):
    """The names of the files that scans decode from now on."""
    names, probe = [], splits.probe
    monkeypatch.setattr(
        splits, "probe", lambda file: names.append(Path(file).name) or probe(file))
    return names


def test_scan_counts_frames_and_caches_them(videos, tmp_path, probed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    index = tmp_path / "new" / "index.json"
    expected = {path: (length, 24, 32) for path, length in LENGTHS.items()}
    for count, file in ((13, index), (13, index), (26, None), (26, None)):
        split = scan(load_split("folder", videos), file, workers=2)
        assert {path: tuple(shape) for path, shape in split.shapes.items()} == expected
        assert not split.failed and len(probed) == count
    index.unlink()
    scan(load_split("folder", videos), index)
    assert len(probed) == 39 and os.listdir(index.parent) == ["index.json"]
    assert len(list((tmp_path / "cache").glob("time-equivariance/*.json"))) == 1


def test_a_changed_file_is_scanned_again_and_no_other(copy, tmp_path, probed):
    index = tmp_path / "index.json"
    scan(load_split("folder", copy), index)
    times = [(copy / path).stat().st_mtime_ns for path in ("walk/01.avi", "run/02.avi")]
    shutil.copy(copy / "run/00.avi", copy / "walk/01.avi")
    os.utime(copy / "walk/01.avi", ns=(0, times[0]))            # another size at the same time
    os.utime(copy / "run/02.avi", ns=(0, times[1] + 1))         # another time
    del probed[:]
    shapes = scan(load_split("folder", copy), index).shapes
    assert tuple(shapes["walk/01.avi"]) == (20, 24, 32) and sorted(probed) == ["01.avi", "02.avi"]


def test_undecodable_files_of_any_name_are_named_with_the_reason(copy, tmp_path):
    name = os.fsdecode(b"walk/caf\xe9.avi")
    (copy / "run/00.avi").write_text("no video")
    os.rename(copy / "walk/01.avi", copy / name)
    os.truncate(copy / name, 100)
    for _ in range(2):                                          # from the cache, too
        split = scan(load_split("folder", copy), tmp_path / "index.json")
        assert split.failed == dict.fromkeys(
            ["run/00.avi", name], "Invalid data found when processing input")
        assert len(split.shapes) == 11


def test_more_than_one_failed_video_in_twenty_is_an_error(tmp_path, monkeypatch):
    paths = [f"Run/{k:02d}.avi" for k in range(40)]
    results = {"01.avi": (0, 0, 0, "no moov"), "03.avi": (20, 8, 8, "Invalid data")}
    monkeypatch.setattr(
        splits, "probe", lambda file: results.get(Path(file).name, (99, 8, 8, "")))
    root = touch(ucf(tmp_path, paths), *paths[1:])
    args = Namespace(dataset="ucf101", data=root, annotations=None, index=None, workers=0)
    split = load_and_scan(args, 1, "train")
    assert split.failed == {"Run/00.avi": "not found", "Run/01.avi": "no moov"}
    assert split.shapes["Run/03.avi"] == (20, 8, 8)             # the frames before the fault
    results["02.avi"] = results["01.avi"]
    os.utime(root / "Run/02.avi", ns=(0, 0))
    said = r"are missing or undecodable, more than 5%: Run/00.avi \(not found\), Run/01.avi \(no"
    with pytest.raises(UserError, match=f"3 of 40 videos in {root} {said}"):
        load_and_scan(args, 1, "train")
    for path in paths[1:3]:
        (root / path).unlink()
    with pytest.raises(UserError, match="3 of 40 videos"):
        load_split("ucf101", root)
    with pytest.raises(UserError, match="no videos in"):
        load_split("folder", touch(tmp_path / "empty", "notes.txt"))


def test_failed_and_short_videos_are_left_out_of_training_and_named():
    shapes = {f"{k}.avi": (k, 8, 8) for k in range(10, 30)}
    split = splits.Split(
        "hmdb51 test split 3", Path("x"), ["gone.avi", *shapes, "bad.avi"], [], [], {}, shapes,
        {"gone.avi": "not found", "bad.avi": "no moov"})
    good, report = usable(split)
    assert good == [f"{k}.avi" for k in range(16, 30)]
    assert report == (
        "hmdb51 test split 3: 22 videos (published: 1530), 14 usable; "
        "2 failed: gone.avi (not found), bad.avi (no moov); 6 shorter than 16 frames")
    good, report = usable(replace(split, title="own"), T=20)
    assert len(good) == 10 and report.startswith("own: 22 videos, 10 usable; ")
