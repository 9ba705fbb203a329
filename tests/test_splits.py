"""common/splits.py: official lists, own folders, and the scan of their videos."""
import itertools
import json
import os
import shutil
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import INVALID, LENGTHS, numbered_frames, write_lists, write_video

from common import UserError, splits, write_text
from common.splits import (
    check_test,
    labelled_folder,
    load_and_scan,
    load_split,
    own_parts,
    scan,
    usable,
)


def touch(root, *names, text=""):
    """Write files of that text, byte for byte, and their folders -> root"""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(text))
    return root


def ucf(root, lines):
    """Write UCF101's lists of two classes, next to an empty folder of videos -> the folder"""
    write_lists(root / "ucfTrainTestlist", ("Run", "HandstandPushups"), trainlist01=lines)
    (root / "UCF-101").mkdir(exist_ok=True)
    return root / "UCF-101"


# ---- Official lists ----

@pytest.mark.parametrize("dataset, number, train, test", [
    ("ucf101", 1, 9537, 3783), ("ucf101", 2, 9586, 3734), ("ucf101", 3, 9624, 3696),
    ("hmdb51", 1, 3570, 1530), ("hmdb51", 2, 3570, 1530), ("hmdb51", 3, 3570, 1530),
    ("diving48", 1, 15027, 1970)])
def test_official_lists_give_the_published_counts(
        shared, tmp_path, dataset, number, train, test):
    lists, paths = shared / "annotations" / dataset, []
    for part, count, a_class in (("train", train, 70), ("test", test, 30)):
        split = load_split(dataset, tmp_path, lists, number, part)
        paths += split.paths
        assert len(split.paths) == len(split.labels) == splits.PUBLISHED[split.title] == count
        assert len(split.classes) == dict(ucf101=101, hmdb51=51, diving48=48)[dataset]
        unused = set(range(len(split.classes))) - set(split.labels)
        assert unused == ({30} if dataset == "diving48" else set())
        assert dataset != "hmdb51" or set(Counter(split.labels).values()) == {a_class}
    assert len(set(paths)) == train + test


def test_each_split_part_and_version_has_its_own_list(tmp_path):
    touch(tmp_path, "classInd.txt", text="1 Run")
    for n, part in itertools.product((1, 2), ("train", "test")):
        touch(tmp_path, f"Run/{part}{n}.avi", f"{part} V{n}.mp4")
        touch(tmp_path, f"{part}list0{n}.txt", text=f"Run/{part}{n}.avi")
        rows = f"train{n}.avi 1 \nnone.avi 0 \ntest{n}.avi 2 \n"
        touch(tmp_path, f"testTrainMulti_7030_splits/Run_test_split{n}.txt", text=rows)
        for dataset in ("ucf101", "hmdb51"):
            split = load_split(dataset, tmp_path, None, n, part)
            assert split.paths == [f"Run/{part}{n}.avi"]
            assert split.title == f"{dataset} {part} split {n}"
        dataset, version = ("diving48v1", "") if n == 1 else ("diving48", "_V2")
        row = dict(vid_name=f"{part} V{n}", label=7)
        touch(tmp_path, f"Diving48{version}_{part}.json", text=json.dumps([row]))
        assert load_split(dataset, tmp_path, part=part).paths == [f"{part} V{n}.mp4"]


def test_diving48_has_its_videos_in_rgb_and_numbers_as_classes(tmp_path):
    row = dict(vid_name="-x_00001", label=31)
    touch(tmp_path, "Diving48_V2_train.json", text=json.dumps([row]))
    split = load_split("diving48", touch(tmp_path, "rgb/-x_00001.mp4"))
    assert split.files == {"-x_00001.mp4": tmp_path / "rgb/-x_00001.mp4"}
    assert split.labels == [31] and split.classes == [str(k) for k in range(48)]


@pytest.mark.parametrize("start, line", [
    ("", "{}\n"), ("", "{} 1\n"), ("\ufeff", "{} 1 \r\n \r\n")])
def test_list_lines_may_carry_labels_any_bytes_and_either_line_end(tmp_path, start, line):
    paths = [os.fsdecode(b"Run/caf\xe9.avi"), "HandstandPushups/a.avi"]
    root = touch(ucf(tmp_path, []), *paths)
    text = start + "".join(line.format(path) for path in paths)
    touch(tmp_path, "ucfTrainTestlist/trainlist01.txt", text=text)
    split = load_split("ucf101", root)
    assert split.files == {path: root / path for path in paths}
    assert split.labels == [0, 1] and split.classes == ["Run", "HandstandPushups"]


def test_hmdb51_names_may_hold_blanks_commas_separators_and_digits_at_the_end(tmp_path):
    names = ["a b;c, 2.avi", "#(2)\u2028 1.avi", "x.avi, 1.avi"]
    touch(tmp_path, *(f"Run/{name}" for name in names))
    touch(tmp_path, "Run_test_split1.txt", text="".join(f"{name} 1 \n" for name in names))
    touch(tmp_path, "._Run_test_split1.txt", text="macOS adds these")
    split = load_split("hmdb51", tmp_path)
    assert split.paths == [f"Run/{name}" for name in names] and split.classes == ["Run"]
    assert not split.failed


def test_letter_case_is_ignored_as_ucf101_spells_handstand_pushups_in_two_ways(tmp_path):
    root = touch(ucf(tmp_path, ["HandStandPushups/a.avi"]), "HandstandPushups/A.avi")
    split = load_split("ucf101", root)
    assert split.files == {"HandStandPushups/a.avi": root / "HandstandPushups/A.avi"}
    assert split.labels == [1]


# ---- Own folders ----

@pytest.mark.parametrize("dataset", ["kinetics400", "folder"])
def test_a_folder_gives_all_its_videos_with_class_folders_as_labels(tmp_path, dataset):
    paths = ["linked/f.mp4", "run/a.mp4", "run/more/b.AVI", "walk/-e.mkv", "walk/[c] d.webm"]
    root = touch(tmp_path / "videos", *paths[1:])
    touch(root, "run/._a.mp4", "run/notes.txt", "walk/mp4", "walk/.a.mp4.part", "@eaDir/a/a.mp4",
          ".Trash-1000/files/a.mp4", "run/.ipynb_checkpoints/a.mp4", "run/@eaDir/a.mp4")
    touch(tmp_path / "elsewhere", "f.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    split = load_split(dataset, root)
    assert split.title == dataset
    assert split.files == {path: root / path for path in paths} and split.paths == paths
    classes = [split.classes[k] for k in split.labels]
    assert classes == ["linked", "run", "run", "walk", "walk"]
    assert split.notes == [f"{dataset}: skipped 2 without a video suffix: run/notes.txt, walk/mp4"]


@pytest.mark.parametrize("suffix", ["MTS", "m2ts", "vob", "ogv", "asf", "3g2", "divx"])
def test_videos_of_cameras_discs_and_phones_are_videos(tmp_path, suffix):
    root = touch(tmp_path, f"run/a.{suffix}", "walk/b.mp4")
    assert load_split("folder", root).paths == [f"run/a.{suffix}", "walk/b.mp4"]


@pytest.mark.parametrize("paths", [["a/a.mp4", "b.mp4"], ["a/a.mp4", "a/b.mp4"]])
def test_videos_outside_class_folders_or_of_a_single_one_have_no_labels(tmp_path, paths):
    split = load_split("folder", touch(tmp_path, *paths))
    assert (split.paths, split.labels, split.classes) == (paths, [None, None], [])


@pytest.mark.parametrize("test", ["val", "test"])
def test_own_train_and_test_folders_have_the_classes_of_train(tmp_path, test):
    touch(tmp_path, "train/run/a.mp4", "train/walk/d.mp4", "train/walk/more/c.mp4", "readme.txt")
    touch(tmp_path, f"{test}/walk/d.mp4", *(["test/run/e.mp4"] if test == "val" else []))
    train, held_out = (load_split("folder", tmp_path, part=part) for part in ("train", "test"))
    assert train.paths == ["run/a.mp4", "walk/d.mp4", "walk/more/c.mp4"]
    assert train.labels == [0, 1, 1] and train.title == "folder train"
    assert held_out.files == {"walk/d.mp4": tmp_path / test / "walk/d.mp4"}
    assert held_out.labels == [1] and held_out.title == f"folder {test}"
    assert train.classes == held_out.classes == ["run", "walk"]
    check_test(train, held_out)                                 # of one name, but another file


@pytest.mark.parametrize("train, test", [
    ("videos_train", "videos_val"), ("Train", "Test"), ("training", "validation"),
    ("train_256", "val_256"), ("train", "test")])
def test_folders_with_the_same_classes_are_parts_by_their_names(tmp_path, train, test):
    parts = train, test, "invalid", "valentines"
    root = touch(tmp_path, *(f"{part}/{name}/a.mp4" for part in parts for name in ("run", "walk")),
                 f"{train}/jump/a.mp4", "val_labels/a.txt")
    for part, folder, labels in (("train", train, [0, 1, 2]), ("test", test, [1, 2])):
        split = load_split("folder", root, part=part)
        assert split.files.keys() == {path: root / folder / path for path in split.paths}.keys()
        assert split.title == f"folder {folder}" and split.labels == labels
        assert split.classes == ["jump", "run", "walk"]
        said = [f"{root}: only the videos in {train} are used"]
        assert split.notes == (said if part == "train" else [])


def test_parts_without_classes_are_parts_too(tmp_path):
    root = touch(tmp_path, "Train/a.mp4", "Test/b.mp4")
    assert [load_split("folder", root, part=part).paths for part in ("train", "test")] == [
        ["a.mp4"], ["b.mp4"]]


def test_class_folders_are_no_parts(tmp_path):
    root = touch(tmp_path, "training dog/x/a.mp4", "train 1/x/a.mp4", "walk/y/b.mp4", "walk/x/c.ts",
                 "test drive/a.mp4", "train 1/z/a.mp4", "train_station/a.mp4")
    assert load_split("folder", root).classes == [
        "test drive", "train 1", "train_station", "training dog", "walk"]
    assert own_parts(root) == ("", "")


@pytest.mark.parametrize("paths, part, sentence", [
    (["a/run/1.mp4", "b/run/1.mp4", "0/x/1.mp4"], "train", 'a and b have .* call .* part "train"'),
    (["train1/run/1.mp4", "train2/run/1.mp4"], "train", "train1 and train2 have sub-folders in"),
    (["K400/Train/run/1.mp4", "K400/val/run/1.mp4"], "train", "has train: give --data .*/K400$"),
    (["train/train/1.mp4"], "test", "has no folder val or test, only train"),
    (["train/a/1.mp4", "other/b/1.mp4"], "test", "has no folder val or test, only train"),
    (["train/a/1.mp4", "train/b/1.mp4", "val/c/1.mp4"], "test", "val/c/1.mp4 is in no class"),
    (["a.rmvb"], "train", "no videos in .*; folder: skipped 1 without a video suffix: a.rmvb")])
def test_folders_that_are_not_clear_are_refused(tmp_path, paths, part, sentence):
    with pytest.raises(UserError, match=sentence):
        load_split("folder", touch(tmp_path, *paths), part=part)


@pytest.mark.parametrize("dataset, path, below", [
    ("ucf101", "Run/a.avi", "UCF-101"), ("hmdb51", "Run/a.avi", "org"),
    ("diving48", "a.mp4", "Diving48/rgb")])
def test_data_one_folder_too_high_is_told_the_right_one(tmp_path, dataset, path, below):
    write_lists(tmp_path, ["Run"], trainlist01=["Run/a.avi"], Run_test_split1=["a.avi 1"])
    touch(tmp_path, "Diving48_V2_train.json", text='[{"vid_name": "a", "label": 7}]')
    touch(tmp_path, f"{below}/{path}")
    right = tmp_path / below.split("/")[0]
    with pytest.raises(UserError, match=f"no videos, but in .*: give --data {right}$"):
        load_split(dataset, tmp_path)
    assert load_split(dataset, right, tmp_path).files
    for file in tmp_path.glob("*.*"):
        file.rename(right / file.name)                          # the lists, too
    with pytest.raises(UserError, match=f"no list .* in {tmp_path} .*: give --data {right}$"):
        load_split(dataset, tmp_path)
    assert load_split(dataset, right).files


def test_a_wrong_folder_of_lists_is_not_taken_for_wrong_data(tmp_path):
    root = ucf(tmp_path, ["Run/a.avi"])
    with pytest.raises(UserError, match=r"no list trainlist01.txt in none .*\(--annotations\)$"):
        load_split("ucf101", root.parent, "none")


def test_only_regular_files_are_videos_and_the_others_are_named(tmp_path, capsys):
    root = touch(tmp_path, "a.mp4")
    (root / "b.mp4").symlink_to("nowhere")
    os.mkfifo(root / "c.mp4")                                   # to open it would wait for ever
    split = scan(labelled_folder("own", root), tmp_path / "index.json")
    assert split.paths == ["a.mp4"]
    assert "own: skipped 2 links or pipes: b.mp4, c.mp4\n" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    def scandir(folder):
        if Path(folder).name == "walk":
            raise PermissionError(f"{folder}: Permission denied")           # root may read all
        return real(folder)
    root, real = touch(tmp_path, "run/a.mp4", "walk/b.mp4"), os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="walk"):
        load_split("folder", root)


# ---- The scan ----

@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that scans decode from now on."""
    names, probe = [], splits.probe
    monkeypatch.setattr(
        splits, "probe", lambda file: names.append(Path(file).name) or probe(file))
    return names


def test_scan_counts_frames_and_decodes_again_only_what_has_changed(copy, tmp_path, decoded):
    index = tmp_path / "index.json"
    split = scan(load_split("folder", copy), index, workers=2)
    assert split.shapes == {path: (length, 24, 32) for path, length in LENGTHS.items()}
    assert not split.failed and len(decoded) == 13
    times = [(copy / path).stat().st_mtime_ns for path in ("walk/01.avi", "run/02.avi")]
    shutil.copy(copy / "run/00.avi", copy / "walk/01.avi")
    os.utime(copy / "walk/01.avi", ns=(0, times[0]))            # another size at the same time
    os.utime(copy / "run/02.avi", ns=(0, times[1] + 1))         # another time
    shapes = scan(load_split("folder", copy), index).shapes
    assert shapes == split.shapes | {"walk/01.avi": (20, 24, 32)}
    assert sorted(decoded[13:]) == ["01.avi", "02.avi"]


def test_data_sets_may_share_an_index(copy, tmp_path, decoded):
    other = shutil.copytree(copy, tmp_path / "other")
    for count in (26, 26):
        for root in (copy, other):
            scan(load_split("folder", root), tmp_path / "index.json")
        assert len(decoded) == count


def test_the_default_index_is_one_a_folder_in_the_users_cache(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scan(load_split("folder", videos))
    (index,) = tmp_path.glob("cache/time-equivariance/*.json")
    (tmp_path / "link").symlink_to(videos)
    assert splits.default_index(tmp_path / "link") == index
    assert splits.default_index(videos / "run") != index
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert splits.default_index(videos) == tmp_path / ".cache/time-equivariance" / index.name


def test_failed_files_of_any_name_are_named_with_the_reason_and_tried_again(
        copy, tmp_path, decoded):
    name = os.fsdecode(b"walk/caf\xe9.avi")
    (copy / "run/00.avi").write_text("no video")
    os.rename(copy / "walk/01.avi", copy / name)
    os.truncate(copy / name, 100)
    (copy / "run/02.avi").unlink()
    (copy / "run/02.avi").symlink_to("nowhere")
    for count in (12, 12 + 2):
        split = scan(load_split("folder", copy), tmp_path / "index.json")
        assert split.failed == {
            "run/00.avi": INVALID, name: INVALID}
        assert len(split.shapes) == 10 and len(decoded) == count


def test_a_scan_that_is_stopped_keeps_what_it_has_done(tmp_path, monkeypatch):
    clock = Namespace(monotonic=itertools.count(0, 31).__next__)            # half a minute a video
    monkeypatch.setattr(splits, "time", clock)
    results = [(9, 8, 8, "")] * 5
    monkeypatch.setattr(splits, "probe", lambda file: results.pop())
    split = load_split("folder", touch(tmp_path / "videos", *(f"{k}.avi" for k in range(9))))
    with pytest.raises(IndexError):
        scan(split, tmp_path / "index.json")
    done = [str(tmp_path / "videos" / path) for path in split.paths[:4]]
    assert list(json.loads((tmp_path / "index.json").read_text())) == done


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    write_text(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.json", "new \ud800")
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_video_that_is_cut_off_is_named(tmp_path, capsys):
    start = dict(movflags="faststart")                          # the index lies at the start
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(60), muxer=start)
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    for _ in range(2):
        split = scan(load_split("folder", tmp_path), tmp_path / "index.json")
        assert split.shapes["whole.mp4"][0] == 60 > split.shapes["half.mp4"][0] > 0
        reason = "the file ends inside a frame"
        assert f"folder: 1 videos end early: half.mp4 ({reason})\n" in capsys.readouterr().err


def test_more_than_one_failed_video_in_twenty_is_an_error(tmp_path, monkeypatch):
    paths = [f"Run/{k:02d}.avi" for k in range(40)]
    results = {"01.avi": (0, 0, 0, "no moov"), "03.avi": (20, 8, 8, "Invalid data")}
    monkeypatch.setattr(
        splits, "probe", lambda file: results.get(Path(file).name, (99, 8, 8, "")))
    root = touch(ucf(tmp_path, paths), *paths[1:])
    index = tmp_path / "i.json"
    args = Namespace(dataset="ucf101", data=root, annotations=None, index=index, workers=0)
    split = load_and_scan(args, 1, "train")
    assert split.failed == {"Run/00.avi": "not found", "Run/01.avi": "no moov"}
    assert split.shapes["Run/03.avi"] == (20, 8, 8)             # the frames before the fault
    results["02.avi"] = results["01.avi"]
    os.utime(root / "Run/02.avi", ns=(0, 0))
    message = r"are missing or undecodable, more than 5%: Run/00.avi \(not found\), Run/01.avi \(no"
    with pytest.raises(UserError, match=f"3 of 40 videos in {root} {message}"):
        load_and_scan(args, 1, "train")
    assert (tmp_path / "i.failed.txt").read_text() == (
        f"{root}/Run/00.avi\tnot found\n{root}/Run/01.avi\tno moov\n{root}/Run/02.avi\tno moov\n")
    for path in paths[1:3]:
        (root / path).unlink()
    with pytest.raises(UserError, match=f"; {tmp_path}/i.failed.txt names all: mend or replace"):
        load_and_scan(args, 1, "train")


def test_failed_and_short_videos_are_left_out_of_training_and_named():
    shapes = {f"{k}.avi": (k, 8, 8) for k in range(10, 30)}
    split = splits.Split(
        "hmdb51 test split 3", Path("x"), ["gone.avi", *shapes, "bad.avi"], [], [], {}, shapes,
        {"gone.avi": "not found", "bad.avi": "no moov"})
    good, report = usable(split)
    assert good == [f"{k}.avi" for k in range(16, 30)]
    assert report == (
        "hmdb51 test split 3: 22 videos (published: 1530), 14 usable; "
        "2 failed: gone.avi (not found), bad.avi (no moov); 6 shorter than 16 frames: "
        "10.avi, 11.avi, 12.avi, 13.avi, 14.avi, 15.avi")
    good, report = usable(replace(split, title="own"), T=20)
    assert len(good) == 10 and report.startswith("own: 22 videos, 10 usable; ")
