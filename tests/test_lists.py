"""What the official lists say, as they circulate, and the folders of one's own videos."""
import json
import re
import shutil
from collections import Counter

import pytest
from conftest import LENGTHS, forbid, judging, touch, ucf

import finetune
import linear_probe
import retrieval
from common import splits
from common.splits import check_parts, load_split

OFFICIAL = {("ucf101", 1): (9537, 3783), ("ucf101", 2): (9586, 3734), ("ucf101", 3): (9624, 3696),
            ("hmdb51", 1): (3570, 1530), ("hmdb51", 2): (3570, 1530), ("hmdb51", 3): (3570, 1530),
            ("diving48", 1): (15027, 1970)}


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


# ---- Lists as they circulate ----

PATHS = ["Run/my run 2.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]


@pytest.mark.parametrize("end", ["\n", "\r\n", " \r\n"])
@pytest.mark.parametrize("label", ["", " 1"])
def test_list_lines_may_carry_labels_and_either_line_end(tmp_path, label, end):
    paths = ["Run/v_Run_g01_c01.avi", "Run/my run 2.avi", "HandstandPushups/v_HandStandPushups_g01_c01.avi"]
    split = load_split("ucf101", ucf(tmp_path, [path + label for path in paths] + [""], end=end))
    assert split.paths == paths and split.labels == [0, 0, 1] and split.classes == ["Run", "HandstandPushups"]


@pytest.mark.parametrize("written", [
    "{} 1\n", "{}\t1\n", "{},1\n", "{}, 1  \n\n", "{} 1\r\n", "{} 1\r", "\ufeff{} 1\r\n", "./{} 1\n", "UCF-101/{} 1\n",
    "data/UCF-101/{} 1\n", "../UCF-101/{} 1\n", "/home/me/UCF-101/{} 1\n", "C:\\data\\UCF-101\\{} 1\r\n"])
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51"])
def test_lists_are_read_with_whatever_stands_around_the_paths(tmp_path, dataset, written):
    root = touch(ucf(tmp_path, []), *PATHS)
    lines = [written.format(path.replace("/", "\\") if "\\" in written else path) for path in PATHS]
    if dataset == "ucf101":
        lines = [lines[0], lines[1].removeprefix("\ufeff")]
        touch(tmp_path, "ucfTrainTestlist/trainlist01.txt", text="".join(lines))
    else:
        for line, name in zip(lines, ("Run", "HandstandPushups")):
            touch(tmp_path, f"{name}_test_split1.txt", text=line)
    split = load_split(dataset, root, tmp_path)
    assert sorted(split.paths) == sorted(PATHS) and not split.missing
    assert [split.classes[k] for k in split.labels] == [path.split("/")[0] for path in split.paths]


def test_hmdb51_names_may_hold_blanks_commas_and_digits_at_the_end(tmp_path):
    names = ["a b;c, 2.avi", "#(2) 1.avi", "x.avi, 1.avi"]
    touch(tmp_path, *(f"Run/{name}" for name in names))
    touch(tmp_path, "Run_test_split1.txt", text="".join(f"{name} 1 \n" for name in names) + "y.avi 0 \nz.avi 2 \n")
    touch(tmp_path, "._Run_test_split1.txt", text="what macOS adds")
    split = load_split("hmdb51", tmp_path)
    assert split.paths == [f"Run/{name}" for name in names] and not split.missing and split.classes == ["Run"]


V2 = "Diving48_V2_train.json"
ODD_LINES = [                                                                   # data set, list, its text, what is said
    ("ucf101", "trainlist01.txt", "Run/a.avi 1\n\na.avi 1", "line 3: 'a.avi 1' .*expected is CLASS/FILE.avi"),
    ("ucf101", "trainlist01.txt", "Run/v_Run_g01_c01 120 1", "line 1: 'Run/v_Run_g01_c01 120 1' .*expected is CLASS/F"),
    ("ucf101", "trainlist01.txt", "path,label\nRun/a.avi,1", "line 1: 'path,label' .*expected is CLASS/FILE.avi"),
    ("ucf101", "trainlist01.txt", "Run/a.avi 1\nJump/b.avi 2", "line 2: 'Jump/b.avi' is of class 'Jump'.*lacks"),
    ("ucf101", "trainlist01.txt", " \n", " is empty; expected are lines of CLASS/FILE.avi"),
    ("ucf101", "classInd.txt", "1 Run\nWalk", "line 2: 'Walk' .*expected is a number and the name of a class"),
    ("ucf101", "classInd.txt", "", " is empty; expected are lines of a number and the name of a class"),
    ("hmdb51", "Run_test_split1.txt", "a.avi 1\nb.avi 3", "line 2: 'b.avi 3' .*expected is FILE.avi and a number: 0"),
    ("hmdb51", "Run_test_split1.txt", "", " is empty; expected are lines of FILE.avi and a number"),
    ("diving48", V2, '[{"vid_name": "a", "label": 1}, {"label": 2}]', "entry 2: {'label': 2} .*expected are objects"),
    ("diving48", V2, '[{"vid_name": "a", "label": 48}]', "entry 1: 'a.mp4' is of class '48', which .*lacks"),
    ("diving48", V2, "[]", " is not a list of objects with vid_name and label, but []"),
    ("diving48", V2, "[{", " is not a list of objects with vid_name and label: Expecting property name")]


@pytest.mark.parametrize("dataset, file, content, said", ODD_LINES)
def test_a_line_that_is_not_understood_is_shown_with_its_place_and_what_is_expected(tmp_path, dataset, file, content,
                                                                                  said):
    root = ucf(tmp_path, ["Run/a.avi"])
    lists = touch(tmp_path / "ucfTrainTestlist", file, text=content)
    said = said.replace("[]", r"\[\]")
    with pytest.raises(ValueError, match=f"{lists}/{file}.*{said}"):
        load_split(dataset, root, lists)


def test_where_the_lists_cannot_be_read_is_said_with_the_reason(tmp_path, monkeypatch):
    root = ucf(tmp_path, ["Run/a.avi"])
    lists = tmp_path / "ucfTrainTestlist"
    with pytest.raises(ValueError, match=r"no list trainlist01.txt in .*trainlist01.txt \(Not a directory\) or"):
        load_split("ucf101", root, lists / "trainlist01.txt")
    (lists / "classInd.txt").unlink()
    with pytest.raises(ValueError, match=r"cannot read the list .*classInd.txt: No such file or directory \(--annot"):
        load_split("ucf101", root)
    forbid(monkeypatch, "listdir", lists)
    with pytest.raises(ValueError, match=rf"no list trainlist01.txt in .*{lists} \(Permission denied\)"):
        load_split("ucf101", root)


@pytest.mark.parametrize("path", ["../Run/a.avi", "Run/../../a.avi", "/etc/passwd"])
def test_a_list_cannot_name_files_outside_the_data_set(tmp_path, path):
    with pytest.raises(ValueError, match=re.escape(path)):
        load_split("ucf101", ucf(tmp_path, ["Run/b.avi 1", f"{path} 1"]))
    touch(tmp_path, "Diving48_V2_train.json", text=json.dumps([dict(vid_name=path, label=3)]))
    with pytest.raises(ValueError, match=re.escape(path)):
        load_split("diving48", tmp_path)


# ---- Folders of one's own ----

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


def own(root, test="val"):
    """run and walk in root/train, walk alone, in other letters, in root/TEST -> root."""
    touch(root, "train/run/a.mp4", "train/walk/b.mp4", "train/walk/more/c.mp4", "readme.txt", f"{test}/Walk/d.mp4")
    return root


@pytest.mark.parametrize("dataset", ["kinetics400", "folder"])
def test_of_train_val_and_test_folders_train_is_taken_and_that_is_said(tmp_path, dataset):
    root = touch(own(tmp_path), "test/e.mp4")
    split = load_split(dataset, root)
    assert split.paths == ["train/run/a.mp4", "train/walk/b.mp4", "train/walk/more/c.mp4"] and not split.missing
    assert split.labels == [0, 1, 1] and split.classes == ["run", "walk"] and split.title == f"{dataset} train"
    assert split.notes == (f"of {root} the videos in train alone are taken",)


@pytest.mark.parametrize("test", ["val", "test"])
def test_own_test_videos_are_labelled_by_the_training_videos_classes(tmp_path, test):
    own(tmp_path, test)
    if test == "val":
        touch(tmp_path, "test/run/e.mp4")
    split = load_split("folder", tmp_path, part="test")
    assert (split.paths, split.labels, split.classes) == ([f"{test}/Walk/d.mp4"], [1], ["run", "walk"])
    assert split.title == f"folder {test}"
    check_parts(load_split("folder", tmp_path), split)


@pytest.mark.parametrize("more, said", [
    ("val/jump/e.mp4", "val: 'val/jump/e.mp4' is of class 'jump', which the folder .*/train lacks"),
    ("val/e.mp4", "val: 'val/e.mp4' lies in no class folder, as the videos of the folder .*/train do"),
    ("train/e.mp4", r"folder train has no labels .*no labels, since videos lie in no class folder: 1 \(train/e.mp4\)")])
def test_own_test_videos_without_a_class_of_training_are_refused(tmp_path, more, said):
    root = touch(own(tmp_path), more)
    with pytest.raises(ValueError, match=said):
        check_parts(load_split("folder", root), load_split("folder", root, part="test"))


def test_own_training_videos_without_test_videos_are_no_test(tmp_path):
    own(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(ValueError, match=f"{tmp_path} has a folder train, but neither val nor test"):
        load_split("folder", tmp_path, part="test")


@pytest.mark.parametrize("script", [linear_probe, finetune, retrieval])
def test_own_labelled_videos_are_judged(videos, tmp_path, capsys, script):
    for n, path in enumerate(LENGTHS):
        part = "train" if n < 9 else "val"
        (tmp_path / part / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / path, tmp_path / part / path)
    name = script.__name__
    flags = {"finetune": ["--epochs", 1, "--batch-size", 4], "retrieval": ["--k", 1]}.get(name, [])
    script.main(judging(name, tmp_path, tmp_path, tmp_path / "out", "--dataset", "folder", "--data", tmp_path, "--arch",
                        "r3d18_narrow", "--checkpoint", "random", "--frames", 4, "--size", 16, *flags))
    (file,) = (tmp_path / "out").glob("*.json")
    (split,) = json.loads(file.read_text())["splits"]
    counts = [part for part in split.values() if isinstance(part, dict) and "expected" in part]
    assert sorted((part["title"], part["scored"]) for part in counts) == [("folder train", 9), ("folder val", 4)]
    assert f"folder val: of {tmp_path} the videos in val alone are taken" in capsys.readouterr().err
