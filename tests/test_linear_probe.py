"""linear_probe.py: its numbers are scikit-learn's, and the test set changes none of its choices."""
from argparse import Namespace

import numpy as np
import pytest
from conftest import ROOT, TINY_CLASSES, by_hand, probe, read_rows, run_python, tiny_words
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import linear_probe
from common.evaluation import Features
from common.splits import LISTS, Split, sources


def new_svm(C=1e-3):
    return make_pipeline(StandardScaler(), LinearSVC(C=C, random_state=0))


def new_features(x, labels, classes, paths=None):
    """Features of readable videos, as `extract` returns them for one network."""
    paths = paths or [f"{n}.avi" for n in range(len(labels))]
    return Features(Split("", None, paths, list(labels), list(classes), {}), {"net": x}, {})


def train_and_test(arrays):
    """The arrays of retrieval as Features of the training and the test set."""
    for side in ("gallery", "query"):
        labels = [TINY_CLASSES.index(name) for name in arrays[f"{side}_classes"]]
        x, paths = arrays[f"{side}_features"].copy(), arrays[f"{side}_paths"].tolist()
        yield new_features(x, labels, TINY_CLASSES, paths)


# ---- The classifier ----

def test_the_svm_equals_scikit_learns_on_the_same_features(probed, retrieved):
    right = by_hand(retrieved[1])
    assert probed["top1"]["checkpoint"] == np.mean([*right.values()])
    for name in TINY_CLASSES:
        accuracy = np.mean([ok for path, ok in right.items() if path.startswith(name)])
        assert probed["splits"][0]["checkpoint"]["per_class"][name] == accuracy
    assert probed["chance"] == 1 / 3


@pytest.mark.parametrize("trained", [[0, 2], [0, 1, 2]])
def test_two_or_more_classes_have_values_and_one_without_training_videos_has_none(trained):
    rng = np.random.default_rng(0)
    y, test_y = np.repeat(trained, 6), np.arange(9) % 3
    x = rng.normal(size=(len(y), 4)) + y[:, None]
    test_x = rng.normal(size=(9, 4)) + test_y[:, None]
    args = Namespace(dataset="folder", C=1e-3, seed=0, workers=0)
    train, test = new_features(x, y, "abc"), new_features(test_x, test_y, "abc")
    result, values = linear_probe.fit_and_test(train, test, "net", args)
    svm = new_svm().fit(x, y)
    predicted = values.argmax(axis=1).tolist()
    assert predicted == svm.predict(test_x).tolist() and len(set(predicted)) > 1
    assert result["top1"] == svm.score(test_x, test_y)
    assert [k for k in range(3) if np.isfinite(values[:, k]).all()] == trained


def test_each_test_video_has_a_line_with_its_decision_values_best_first(
        tiny, checkpoint, retrieved, tmp_path):
    probe(tiny, checkpoint, tmp_path)
    rows = read_rows(tmp_path / "linear_probe-ucf101-predictions.jsonl")
    right = {row["path"]: row["predicted"] == row["label"] for row in rows}
    assert right == by_hand(retrieved[1])
    for row in rows:
        values = list(row["decision values"].values())
        assert values == sorted(values, reverse=True)
        assert next(iter(row["decision values"])) == row["predicted"]


# ---- Choices made on the training set ----

@pytest.mark.parametrize("C", [1e-3, "auto"])
def test_the_test_set_changes_neither_statistics_nor_C_nor_other_predictions(retrieved, C):
    args = Namespace(dataset="ucf101", C=C, seed=0, workers=0)
    train, test = train_and_test(retrieved[1])
    before, _ = linear_probe.fit_and_test(train, test, "net", args)
    test.x["net"][:3] *= 1e4                                # all three of the first class
    after, _ = linear_probe.fit_and_test(train, test, "net", args)
    assert after["C"] == before["C"]
    for name in TINY_CLASSES[1:]:
        assert after["per_class"][name] == before["per_class"][name]


def test_C_auto_is_chosen_on_the_training_set_with_groups_kept_together(retrieved, monkeypatch):
    folds = []

    class Spy(linear_probe.StratifiedGroupKFold):
        def split(self, X, y=None, groups=None):
            folds.extend(super().split(X, y, groups))
            return iter(folds[-self.n_splits:])

    monkeypatch.setattr(linear_probe, "StratifiedGroupKFold", Spy)
    train, test = train_and_test(retrieved[1])
    args = Namespace(dataset="ucf101", C="auto", seed=0, workers=1)
    result, _ = linear_probe.fit_and_test(train, test, "net", args)
    groups = np.array([path.rsplit("_", 1)[0] for path in train.split.paths])   # nine of two clips
    held_out = np.concatenate([held for _, held in folds])
    assert len(folds) == 5 and sorted(held_out) == list(range(18))
    assert not any(set(groups[kept]) & set(groups[held]) for kept, held in folds)
    accuracy = {C: cross_val_score(new_svm(C), train.x["net"], train.split.labels, cv=folds).mean()
                for C in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
    assert result["C"] == pytest.approx(max(accuracy, key=accuracy.get))


def test_C_is_chosen_by_several_processes_and_the_command_ends_without_an_error(
        tiny, checkpoint, tmp_path):
    argv = tiny_words(tiny, checkpoint, tmp_path, "--C", "auto", "--workers", 2)
    assert "linear SVM on ucf101" in run_python(ROOT / "linear_probe.py", *argv, cwd=tmp_path)


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


def official_paths(annotations, dataset, number, part="train"):
    rows, _ = LISTS[dataset](annotations, annotations / dataset, number, part)
    return [path for path, _ in rows]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ucf101_has_25_sources_a_class_and_none_in_both_training_and_test_set(shared, number):
    train, test = (set(sources("ucf101", official_paths(
        shared / "annotations", "ucf101", number, part))) for part in ("train", "test"))
    assert len(train) == 101 * 18 and len(test) == 101 * 7 and not train & test


@pytest.mark.parametrize("dataset, least, most", [("hmdb51", 500, 3000), ("diving48", 50, 100)])
def test_every_official_path_names_its_source(shared, dataset, least, most):
    paths = official_paths(shared / "annotations", dataset, 1)
    films = set(sources(dataset, paths))
    assert least < len(films) < most and not films & set(paths)         # of 3570 and 15027 videos
