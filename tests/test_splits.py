"""Which of the listed videos are there, what a scan finds in them, and what is said of the others."""
import contextlib
import errno
import os
import pwd
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CLASSES, LENGTHS, fails, forbid, judging, listed, touch, ucf, write_lists

import retrieval
from common import splits
from common.splits import Split, check_parts, load_split, scan, sources, usable
from common.tree import list_tree

# ---- Finding files ----

def test_letter_case_is_ignored_where_that_finds_a_file(tmp_path):
    listed = ["HandStandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups/v_HandstandPushups_g01_c02.avi"]
    there = ["HandstandPushups/v_HandStandPushups_g01_c01.avi", "HandstandPushups/v_HandStandPushups_g01_c02.avi"]
    root = touch(ucf(tmp_path, listed), *there)
    split = load_split("ucf101", root)
    assert split.found == {path: root / file for path, file in zip(listed, there)} and split.labels == [1, 1]


@pytest.mark.parametrize("listed, there", [
    (b"Run/caf\xe9.avi", "Run/caf\xe9.avi".encode()), ("Run/caf\xe9.avi".encode(), b"Run/caf\xe9.avi"),
    ("Run/caf\xe9.avi".encode(), "Run/cafe\u0301.avi".encode()), (b"run/A.AVI", b"Run/a.avi")])
def test_a_file_is_found_whose_name_a_list_spells_in_another_way(tmp_path, listed, there):
    """In Latin-1, with accents as macOS writes them, in other letters."""
    root = touch(ucf(tmp_path, ["Run/x.avi"]), os.fsdecode(there))
    (tmp_path / "ucfTrainTestlist/trainlist01.txt").write_bytes(listed)
    split = load_split("ucf101", root)
    assert split.found == {os.fsdecode(listed): root / os.fsdecode(there)} and split.labels == [0]


def test_a_file_that_a_list_names_twice_counts_once_and_that_is_said(tmp_path):
    listed = ["Run/a.avi", "Run/b.avi", "RUN/A.avi", "Run/b.avi", "Run/link.avi", "Run/gone.avi", "run/gone.avi"]
    root = touch(ucf(tmp_path, listed), *listed[:2])
    (root / "Run/link.avi").symlink_to("b.avi")
    split = load_split("ucf101", root)
    assert split.paths == ["Run/a.avi", "Run/b.avi", "Run/gone.avi"] and split.labels == [0, 0, 0]
    assert split.found == {path: root / path for path in listed[:2]} and split.missing == ["Run/gone.avi"]
    assert split.notes == ("videos that are named twice count once: 4 (RUN/A.avi, Run/b.avi, Run/link.avi, ...)",)


def test_links_that_make_a_folders_videos_count_twice_are_said(tmp_path):
    root = touch(tmp_path, "run/a.avi", "walk/b.avi")
    (root / "all").symlink_to("run")
    split = load_split("folder", root)
    assert split.paths == ["all/a.avi", "run/a.avi", "walk/b.avi"]
    assert split.notes == ("links lead to videos that lie there already, which count twice: 1 (run/a.avi)",)


def test_lists_of_training_and_test_videos_that_share_files_are_refused_whatever_names_lead_to_them(tmp_path):
    root = touch(ucf(tmp_path, ["Run/a.avi", "Run/b.avi"]), "Run/a.avi", "Run/b.avi", "Run/c.avi")
    (root / "Run/other.avi").symlink_to("b.avi")
    for line, both in (("RUN/a.avi", True), ("Run/other.avi", True), ("Run/c.avi", False)):
        touch(tmp_path, "ucfTrainTestlist/testlist01.txt", text=line)
        train, test = (load_split("ucf101", root, part=part) for part in ("train", "test"))
        refused = pytest.raises(ValueError, match="1 of 1 test videos are training videos too, the first: .*avi")
        with refused if both else contextlib.nullcontext():
            check_parts(train, test)


def test_retrieval_refuses_such_lists_too(tmp_path, world):
    lists = write_lists(tmp_path / "lists", CLASSES, trainlist01=[listed(0), listed(1)], testlist01=[listed(1)])
    argv = judging("retrieval", world, tmp_path, tmp_path, "--checkpoint", "random", "--annotations", lists, "--k", 1)
    assert "1 of 1 test videos are training videos too" in fails(retrieval.main, argv)
    retrieval.main([*argv, "--frames", "4", "--size", "16", "--arch", "r3d18_narrow", "--query", "train"])


def test_class_folders_that_are_links_in_other_letters_are_found(tmp_path):
    listed = ["HandStandPushups/v_HandStandPushups_g01_c01.avi", "Run/a.avi"]
    root = touch(ucf(tmp_path, listed), "Run/a.avi")
    touch(tmp_path, "disk/v_HandstandPushups_g01_c01.avi")
    (root / "HandstandPushups").symlink_to(tmp_path / "disk")
    split = load_split("ucf101", root)
    assert split.found[listed[0]] == root / "HandstandPushups/v_HandstandPushups_g01_c01.avi" and not split.missing


def test_folders_pipes_and_links_to_nothing_are_no_videos(tmp_path):
    listed = ["Run/a.avi", "Run/b.avi", "Run/c.avi", "Run/d.avi"]
    root = touch(ucf(tmp_path, listed), "Run/a.avi", "Run/b.avi/readme.txt")
    os.mkfifo(root / "Run/c.avi")
    (root / "Run/d.avi").symlink_to("nowhere")
    assert load_split("ucf101", root).missing == listed[1:]
    assert load_split("folder", root).missing == listed[2:]


def test_a_walk_follows_links_and_ends_where_they_lead_back(tmp_path):
    root = touch(tmp_path / "root", "a/1.avi", "b/2.avi", "shrink.jsonl", ".shrinking/3.avi")
    touch(tmp_path, "outside/4.avi")
    links = {"a/to_b": "../b", "b/to_a": "../a", "a/self": ".", "a/up": "../..", "out": "../outside", "lost": "nowhere"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    folders, files, bad = list_tree(root)
    assert files == ["a/1.avi", "a/to_b/2.avi", "b/2.avi", "b/to_a/1.avi", "lost", "out/4.avi"]
    assert folders == [".", "a", "a/to_b", "b", "b/to_a", "out"] and bad == {}


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = touch(ucf(tmp_path, ["Run/a.avi", "HandstandPushups/b.avi"]), "Run/a.avi")
    forbid(monkeypatch, "scandir", root / "HandstandPushups")
    (root / "HandstandPushups").mkdir()
    note = f"the folder {root}/HandstandPushups cannot be read: Permission denied"
    assert load_split("folder", root).notes == (note,)
    with pytest.raises(ValueError, match=f"found 1; the first missing: HandstandPushups/b.avi; {note}"):
        scan(load_split("ucf101", root))


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


def test_scan_counts_frames_and_remembers_them(videos, tmp_path, counted, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


def test_without_a_home_folder_the_index_has_no_place_and_that_is_said(videos, monkeypatch, tmp_path):
    """As in a container that was started with --user: no HOME, no entry in /etc/passwd."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)                        # KeyError
    with pytest.raises(ValueError, match="no home folder to keep the index in: give a file, --index"):
        scan(load_split("folder", videos))
    assert len(scan(load_split("folder", videos), tmp_path / "index.json")) == 13


def test_an_index_that_may_not_be_read_is_not_written_over(videos, tmp_path, monkeypatch):
    index = tmp_path / "index.json"
    index.write_text("{}")

    def refuse(self, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ValueError, match="cannot read .*index.json: Permission denied; give another --index"):
        scan(load_split("folder", videos), index)


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


def test_the_report_has_the_published_number_of_videos():
    split, index = planned(100)
    for title, number in (("hmdb51 test split 3", "1530"), ("kinetics400 train", "around 240000")):
        _, report = usable(replace(split, title=title), index)
        assert report == f"{title}: 100 videos (published: {number}), 100 usable"


def test_more_than_one_bad_video_in_twenty_is_an_error():
    for bad in (dict(missing=6), dict(unreadable=6), dict(missing=3, unreadable=3), dict(short=99)):
        with pytest.raises(ValueError, match="100 videos"):
            usable(*planned(100, **bad))
