"""linear_probe.py: its numbers are scikit-learn's, and the test set changes nothing."""
import json
from argparse import Namespace

import numpy as np
import pytest
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import linear_probe
from common.judging import Features
from common.splits import Split, load_split, sources
from conftest import ROOT, TINY_CLASSES, by_hand, judge_words, probe, run_python


def test_the_svm_equals_scikit_learns_on_the_same_features(probed, found):
    right = by_hand(found[1])
    assert probed["top1"]["checkpoint"] == np.mean([*right.values()])
    for name in TINY_CLASSES:
        assert probed["splits"][0]["checkpoint"]["per_class"][name] == np.mean(
            [ok for path, ok in right.items() if path.startswith(name)])
    assert probed["chance"] == 1 / 3


def features_as_parts(arrays):
    """What judging.extract gives, from the arrays of retrieval."""
    parts = []
    for side in ("gallery", "query"):
        paths, names = arrays[f"{side}_paths"].tolist(), arrays[f"{side}_classes"].tolist()
        split = Split(side, None, paths, [TINY_CLASSES.index(name) for name in names], list(TINY_CLASSES), {}, [])
        parts.append(Features(split, {"net": arrays[f"{side}_features"].copy()}, {}))
    return parts


@pytest.mark.parametrize("C", [1e-3, "auto"])
def test_the_test_set_changes_neither_statistics_nor_C_nor_other_predictions(found, C):
    args = Namespace(dataset="ucf101", C=C, seed=0, workers=0)
    train, test = features_as_parts(found[1])
    before, _ = linear_probe.probe(train, test, "net", args)
    test.x["net"][:3] *= 1e4                                                    # all three of the first class
    after, _ = linear_probe.probe(train, test, "net", args)
    assert after["C"] == before["C"]
    for name in TINY_CLASSES[1:]:
        assert after["per_class"][name] == before["per_class"][name]


def test_C_auto_is_chosen_on_the_training_set_with_groups_kept_together(found, monkeypatch):
    folds = []

    class Spy(linear_probe.StratifiedGroupKFold):
        def split(self, X, y=None, groups=None):
            folds.extend(super().split(X, y, groups))
            return iter(folds[-self.n_splits:])

    monkeypatch.setattr(linear_probe, "StratifiedGroupKFold", Spy)
    train, test = features_as_parts(found[1])
    result, _ = linear_probe.probe(train, test, "net", Namespace(dataset="ucf101", C="auto", seed=0, workers=1))
    groups = np.array([path.rsplit("_", 1)[0] for path in train.split.paths])   # nine groups, two clips each
    assert len(folds) == 5 and sorted(np.concatenate([held for _, held in folds])) == list(range(18))
    assert not any(set(groups[kept]) & set(groups[held]) for kept, held in folds)
    mean = {C: cross_val_score(linear_probe.make_pipeline(StandardScaler(), LinearSVC(C=C, random_state=0)),
                               train.x["net"], np.array(train.split.labels), cv=list(folds)).mean()
            for C in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
    assert result["C"] == pytest.approx(max(mean, key=mean.get))


def test_C_is_chosen_by_several_processes_and_the_command_ends_without_an_error(tiny, checkpoint, tmp_path):
    argv = judge_words(tiny, checkpoint, tmp_path, "--C", "auto", "--workers", 2)
    assert "linear SVM on ucf101" in run_python(ROOT / "linear_probe.py", *argv, cwd=tmp_path)


def test_sources_tell_the_clips_of_one_video_apart_from_others():
    for dataset, path, source in (
            ("ucf101", "PushUps/v_PushUps_g16_c03.avi", "PushUps/v_PushUps_g16"),
            ("toy", "Orbit/v_Orbit_g02_c01.avi", "Orbit/v_Orbit_g02"),
            ("hmdb51", "climb_stairs/April_09_climb_stairs_u_nm_np1_ba_goo_0.avi", "climb_stairs/April_09"),
            ("hmdb51", "turn/Torwarttraining_2_(_sterreich)_turn_f_cm_np1_le_goo_5.avi",
             "turn/Torwarttraining_2_(_sterreich)"),
            ("diving48", "-mgTBMZ9vaE_00012.mp4", "-mgTBMZ9vaE"), ("diving48v1", "a_b_00012.mp4", "a_b"),
            ("folder", "any/thing_g01_c01.avi", "any/thing_g01_c01.avi")):
        assert sources(dataset, [path]) == [source]


def test_the_official_lists_clips_have_sources_of_which_ucf101s_two_parts_share_none(shared, tmp_path):
    def listed(dataset, number, part="train"):
        return load_split(dataset, tmp_path, shared / "annotations" / dataset, number, part).paths

    for number in (1, 2, 3):
        train, test = (set(sources("ucf101", listed("ucf101", number, part))) for part in ("train", "test"))
        assert len(train) == 101 * 18 and len(test) == 101 * 7 and not train & test     # UCF101's 25 groups a class
        paths = listed("hmdb51", number)
        films = set(sources("hmdb51", paths))
        assert 500 < len(films) < 3000 and not films & set(paths)               # each of 3570 names was understood
    assert len(set(sources("diving48", listed("diving48", 1)))) < 1000          # of 15027


def test_each_test_video_has_a_line_with_its_class_and_the_svms_decision_values(tiny, checkpoint, found, tmp_path):
    probe(tiny, checkpoint, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "linear_probe-ucf101-predictions.jsonl").read_text().splitlines()]
    right = by_hand(found[1])
    assert {row["path"]: row["predicted"] == row["label"] for row in rows} == right
    for row in rows:
        values = list(row["decision values"].values())
        assert values == sorted(values, reverse=True) and next(iter(row["decision values"])) == row["predicted"]


@pytest.mark.parametrize("trained", [[0, 2], [0, 1, 2]])
def test_of_two_classes_too_each_has_a_value_and_one_without_training_videos_none(trained):
    rng = np.random.default_rng(0)
    labels = np.repeat(trained, 6)
    x = rng.normal(size=(len(labels), 4)) + labels[:, None]
    test_x = rng.normal(size=(9, 4)) + np.arange(9)[:, None] % 3
    train, test = (Features(Split("", None, [f"{n}.avi" for n in range(len(y))], list(y), list("abc"), {}, []),
                            {"net": features}, {}) for features, y in ((x, labels), (test_x, np.arange(9) % 3)))
    result, values = linear_probe.probe(train, test, "net", Namespace(dataset="folder", C=1e-3, seed=0, workers=0))
    svm = linear_probe.make_pipeline(StandardScaler(), LinearSVC(C=1e-3, random_state=0)).fit(x, labels)
    assert values.argmax(axis=1).tolist() == svm.predict(test_x).tolist() and len(set(values.argmax(axis=1))) > 1
    assert result["top1"] == svm.score(test_x, np.arange(9) % 3)
    assert [k for k in range(3) if np.isfinite(values[:, k]).all()] == trained
