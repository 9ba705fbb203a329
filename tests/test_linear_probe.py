"""linear_probe.py: its numbers are scikit-learn's, its choices are made on the training set."""
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from conftest import (
    CLASSES,
    by_hand,
    evaluation_words,
    fails,
    official,
    probe,
    read_rows,
    write_lists,
)
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import linear_probe
from common import evaluation
from common.evaluation import Features
from common.splits import Split, sources


def new_svm(C=1e-3, seed=0):
    svm = LinearSVC(C=C, dual="auto", random_state=seed, max_iter=10000)
    return make_pipeline(StandardScaler(), svm)


def new_features(x, labels, classes, paths=None, failed=()):
    """Features x of the network "net", as `extract` returns them; failed: unreadable videos."""
    paths = paths or [f"{n}.avi" for n in range(len(labels))]
    x[list(failed)] = np.nan
    split = Split("", None, paths, list(labels), list(classes), {})
    return Features(split, {"another": -x, "net": x}, {paths[n]: "a reason" for n in failed})


# ---- The classifier ----

def test_figures_and_lines_are_those_of_scikit_learn(world, checkpoint, retrieved, tmp_path):
    result, right = probe(world, checkpoint, tmp_path), by_hand(retrieved[1])
    assert result["top1"]["checkpoint"] == np.mean([*right.values()])
    for name in CLASSES:
        accuracy = np.mean([ok for path, ok in right.items() if path.startswith(name)])
        assert result["splits"][0]["checkpoint"]["per_class"][name] == accuracy
    rows = read_rows(tmp_path / "linear_probe-ucf101-predictions.jsonl")
    assert {row["path"]: row["predicted"] == row["label"] for row in rows} == right
    assert all(next(iter(row["decision values"])) == row["predicted"] for row in rows)


@pytest.mark.parametrize("trained", [[0, 2], [0, 1, 2]])
def test_two_or_more_classes_have_values_and_one_without_training_videos_has_none(trained):
    rng = np.random.default_rng(0)

    def draw(labels):                                       # needs over 1,000 iterations
        x = rng.normal(size=(len(labels), 1)) + 0.05 * rng.normal(size=(len(labels), 40))
        return x + labels[:, None] / 100

    y, test_y = np.repeat(trained, 6), np.arange(12) % 3
    x, test_x = draw(y), draw(test_y)
    train = new_features(x, y, "abc", failed=[4])
    test = new_features(test_x, test_y, "abc", failed=[0, 1])
    args = Namespace(dataset="folder", C=1, seed=3, workers=0)
    result, values = linear_probe.fit_and_test(train, test, "net", args)
    svm = new_svm(C=1, seed=3).fit(np.delete(x, 4, axis=0), np.delete(y, 4))
    expected = svm.decision_function(test_x[2:])
    if len(trained) == 2:
        expected = np.stack([-expected, expected], axis=1)
    assert np.array_equal(values[2:, trained], expected) and np.isnan(values[:2]).all()
    assert np.all(np.delete(values[2:], trained, axis=1) == -np.inf)
    assert result["top1"] == (svm.predict(test_x[2:]) == test_y[2:]).sum() / 12


def test_splits_are_averaged_and_chance_is_the_most_frequent_class_of_the_test_set(
        world, checkpoint, tmp_path):
    lists = {f"{part}list{number:02d}": official(number, part)
             for number in (1, 2) for part in ("train", "test")}
    lists["testlist01"] = lists["testlist01"][:4]           # three of one class, one of another
    result = probe(world, checkpoint, tmp_path, "--split", 1, 2, "--annotations",
                   write_lists(tmp_path / "lists", CLASSES, **lists))
    one, two = result["splits"]
    assert (one["chance"], two["chance"], result["chance"]) == (3 / 4, 1 / 3, (3 / 4 + 1 / 3) / 2)
    for name in ("checkpoint", "random"):
        assert result["top1"][name] == (one[name]["top1"] + two[name]["top1"]) / 2
    rows = read_rows(tmp_path / "linear_probe-ucf101-predictions.jsonl")
    assert [row["split"] for row in rows] == [1] * 4 + [2] * 12


# ---- --C auto ----

@pytest.mark.parametrize("videos, failed, number", [
    (range(24), [2], 3),                                    # of three classes with three
    ([4, 5, 6, 7, 12, 13, 14, 15], [], 2)])                 # of two classes with two groups each
def test_C_auto_is_chosen_on_the_training_set_with_groups_kept_together(
        retrieved, monkeypatch, videos, failed, number):
    split, folds = linear_probe.StratifiedGroupKFold.split, []

    def spy(*args, **kwargs):
        folds.extend(split(*args, **kwargs))
        return iter(folds)

    monkeypatch.setattr(linear_probe.StratifiedGroupKFold, "split", spy)
    x = retrieved[1]["gallery_features"][videos]
    paths = retrieved[1]["gallery_paths"][videos].tolist()
    labels = np.array([CLASSES.index(path.split("/")[0]) for path in paths])
    if number == 2:                                         # features that need the largest C
        z = np.random.default_rng(0).normal(size=8)
        x = np.stack([z, z + labels / 2], axis=1)
    train = new_features(x, labels, CLASSES, paths, failed)
    args = Namespace(dataset="ucf101", C="auto", seed=0, workers=0)
    result, _ = linear_probe.fit_and_test(train, train, "net", args)
    read = np.delete(np.arange(len(paths)), failed)
    groups = np.array([path.rsplit("_", 1)[0] for path in paths])[read]
    assert len(folds) == number and sum(len(held) for _, held in folds) == len(read)
    assert not any(set(groups[trained]) & set(groups[held]) for trained, held in folds)
    accuracy = {C: cross_val_score(new_svm(C), x[read], labels[read], cv=folds).mean()
                for C in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
    assert result["C"] == pytest.approx(max(accuracy, key=accuracy.get))


def test_C_auto_takes_five_folds_or_what_the_smallest_class_allows(
        world, checkpoint, tmp_path, monkeypatch):
    assert linear_probe.count_folds([0] * 7 + [1] * 6, range(13)) == 5
    assert linear_probe.count_folds([0] * 7 + [1] * 4, range(11)) == 4
    lists = dict(trainlist01=official(1, "train")[:9], testlist01=official(1, "test"))
    lists = write_lists(tmp_path / "lists", CLASSES, **lists)       # one video of the second class
    monkeypatch.setattr(evaluation, "extract", pytest.fail)
    argv = evaluation_words(world, checkpoint, tmp_path, "--C", "auto", "--annotations", lists)
    assert "--C auto needs two source videos per class" in fails(linear_probe.main, argv)


def test_C_auto_with_workers_ends_without_an_error(world, checkpoint, tmp_path):
    argv = evaluation_words(world, checkpoint, tmp_path, "--C", "auto", "--workers", 2)
    done = subprocess.run([sys.executable, linear_probe.__file__, *argv], timeout=240,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "linear SVM on ucf101" in done.stdout, done.stderr


# ---- Sources: clips cut from one recording ----

@pytest.mark.parametrize("dataset, path, source", [
    ("ucf101", "PushUps/v_PushUps_g16_c03.avi", "PushUps/v_PushUps_g16"),
    ("toy", "Orbit/v_Orbit_g02_c01.avi", "Orbit/v_Orbit_g02"),
    ("hmdb51", "climb_stairs/April_09_climb_stairs_u_nm_np1_ba_goo_0.avi", "climb_stairs/April_09"),
    ("hmdb51", "turn/Torwarttraining_2_(_sterreich)_turn_f_cm_np1_le_goo_5.avi",
     "turn/Torwarttraining_2_(_sterreich)"),
    ("diving48", "-mgTBMZ9vaE_00012.mp4", "-mgTBMZ9vaE"),
    ("diving48v1", "a_b_00012.mp4", "a_b"),
    ("folder", "any/thing_g01_c01.avi", "any/thing_g01_c01.avi")])
def test_a_path_names_its_source(dataset, path, source):
    assert sources(dataset, [path]) == [source]
