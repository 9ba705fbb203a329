"""The judging scripts from video files to result files: their numbers, and what must not change them."""
import hashlib
import itertools
import json
import random
import shutil
import subprocess
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, fails, write_lists
from PIL import Image
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import common
import data
import finetune
import linear_probe
import retrieval
from common import average_crops, views_of
from data import Split, Windows, decode, load_split, normalise, scan, sources, write_video
from models import TimeEquivariant, classifier, load_backbone, new_backbone, with_psi

CPU = torch.device("cpu")
CLASSES = ("Bend", "Climb", "Dive")
LISTS = {1: {"train": ("08", "09", "10"), "test": ("01",)}, 2: {"train": ("01", "09", "10"), "test": ("08",)}}
CLIPS = {"01": 3, "08": 2, "09": 2, "10": 2}                                    # 9 videos a class, of 4 groups


def drifting(seed, hue):
    """24 frames of a noisy texture that drifts; hue: which colour is somewhat brighter than it would be."""
    rng = np.random.default_rng(seed)
    texture, shift = rng.integers(0, 140, (32, 48, 3)) + rng.integers(0, 90, 3), rng.integers(1, 4)
    texture[..., hue] += 25                                                     # some are told right, some wrong
    return np.stack([np.roll(texture, shift * n, axis=1) for n in range(24)]).astype(np.uint8)


def official(number, part):
    """The names that the lists of `tiny` give."""
    return [f"{name}/v_{name}_g{group}_c{clip + 1:02d}.avi" for name in CLASSES for group in LISTS[number][part]
            for clip in range(CLIPS[group])]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """27 videos and two splits in UCF101's layout; to be read only."""
    root = tmp_path_factory.mktemp("tiny")
    write_lists(root / "ucfTrainTestlist", CLASSES, **{
        f"{part}list{number:02d}": official(number, part) for number in LISTS for part in ("train", "test")})
    for seed, path in enumerate(official(1, "train") + official(1, "test")):
        write_video(root / "UCF-101" / path, drifting(seed, CLASSES.index(path.split("/")[0])))
    return root


@pytest.fixture
def copy(tiny, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(tiny, tmp_path / "copy")


def save_backbone(path, seed):
    """What pretrain.py writes, with weights and BatchNorm statistics drawn at random."""
    torch.manual_seed(seed)
    net = new_backbone("r3d18_narrow")
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            value.mul_(1 + 0.2 * torch.rand_like(value))
    torch.save(dict(arch=net.arch, backbone=net.state_dict(), args=dict(frames=4, size=16, lr=1e-3)), path)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("checkpoint") / "backbone.pt", 5)


def words(root, checkpoint, out, *more):
    """A command line."""
    return [str(word) for word in ("--dataset", "ucf101", "--data", root / "UCF-101", "--checkpoint", checkpoint,
                                   "--windows", 2, "--step", 2, "--workers", 0, "--out", out, *more)]


def strict(file):
    """A result file; NaN and Infinity are no JSON."""
    return json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {file}"))


def probe(root, checkpoint, out, *more):
    linear_probe.main(words(root, checkpoint, out, *more))
    return strict(out / "linear_probe-ucf101.json")


def retrieve(root, checkpoint, out, *more):
    """-> result, the arrays of --features."""
    retrieval.main(words(root, checkpoint, out, "--features", out / "found.npz", "--k", 1, 5, 10, *more))
    return strict(next(out.glob("retrieval-*.json"))), dict(np.load(out / "found.npz"))


def tune(root, checkpoint, out, *more):
    finetune.main(words(root, checkpoint, out, "--epochs", 2, "--warmup-epochs", 0, "--batch-size", 6, "--lr", 1e-3,
                        "--crops", "centre", *more))
    return strict(out / "finetune-ucf101-2x.json")


@pytest.fixture(scope="session")
def found(tiny, checkpoint, tmp_path_factory):
    """Features and results of retrieval on split 1."""
    return retrieve(tiny, checkpoint, tmp_path_factory.mktemp("found"))


@pytest.fixture(scope="session")
def probed(tiny, checkpoint, tmp_path_factory):
    return probe(tiny, checkpoint, tmp_path_factory.mktemp("probed"))


def by_path(arrays):
    """{path: feature} of gallery and query."""
    return {path: x for side in ("gallery", "query") for path, x in zip(arrays[f"{side}_paths"].tolist(),
                                                                        arrays[f"{side}_features"])}


def by_hand(arrays, C=1e-3):
    """{test path: is the prediction right} of scikit-learn's linear SVM, called step by step on retrieval's arrays."""
    scaler = StandardScaler().fit(arrays["gallery_features"])
    svm = LinearSVC(C=C, random_state=0, max_iter=10000).fit(scaler.transform(arrays["gallery_features"]),
                                                             arrays["gallery_classes"])
    right = svm.predict(scaler.transform(arrays["query_features"])) == arrays["query_classes"]
    return dict(zip(arrays["query_paths"].tolist(), right.tolist()))


# ---------------------------------------------------------------------- search and R@k


def ids(classes, videos):
    return torch.tensor([classes, list(videos)])


def rows(*angles):
    """Unit vectors in the plane, by their angles in degrees."""
    angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_planted_neighbours_are_found_and_give_R_at_1_of_100_percent():
    rng = torch.Generator().manual_seed(0)
    gallery = torch.randn(500, 32, generator=rng)
    order = torch.randperm(500, generator=rng)
    query = gallery[order] + 0.05 * torch.randn(500, 32, generator=rng)
    ranks, nearest, _ = retrieval.search(*retrieval.standardise(gallery, query), ids(range(500), range(500)),
                                         torch.stack([order, order + 500]), 3)
    assert nearest[:, 0].equal(order) and retrieval.recall(ranks, 500, 1) == 1


def test_R_at_k_is_what_a_hand_computes():
    gallery, query = rows(0, 10, 20, 30, 90), rows(1, 19, 88)
    ranks, nearest, cosines = retrieval.search(gallery, query, ids([0, 1, 1, 0, 2], range(5)),
                                               ids([0, 0, 3], range(5, 8)), 5)
    assert nearest.tolist() == [[0, 1, 2, 3, 4], [2, 1, 3, 0, 4], [4, 3, 2, 1, 0]]
    assert ranks[:2].tolist() == [0, 2] and cosines[0, 1].item() == pytest.approx(np.cos(np.deg2rad(9)))
    assert [retrieval.recall(ranks, 3, k) for k in (1, 2, 3, 5)] == [1 / 3, 1 / 3, 2 / 3, 2 / 3]   # no video of class 3
    assert retrieval.recall(ranks, 4, 5) == 2 / 4                               # a fourth query that could not be read


@pytest.mark.parametrize("dim", [2, 128, 1000])
def test_of_equally_near_videos_the_earlier_one_is_nearer(dim):
    x, far = torch.nn.functional.normalize(torch.randn(2, dim, generator=torch.Generator().manual_seed(1)).double())
    gallery = torch.stack([far] + [x] * 40)
    for right, rank in ((1, 0), (7, 6), (40, 39)):
        classes = [int(k == right) for k in range(41)]
        ranks, nearest, _ = retrieval.search(gallery, x[None], ids(classes, range(41)), ids([1], [99]), 41)
        assert ranks.tolist() == [rank] and nearest.tolist() == [[*range(1, 41), 0]]


def test_a_query_is_no_neighbour_of_itself_but_its_duplicate_is():
    ranks, nearest, _ = retrieval.search(rows(0, 0, 50), rows(0), ids([0, 1, 0], [7, 8, 9]), ids([0], [7]), 3)
    assert nearest.tolist() == [[1, 2, -1]] and ranks.tolist() == [1]


@pytest.mark.parametrize("cosines", [1, 60, 137, 2 ** 24])
def test_search_in_chunks_equals_a_full_sort(cosines):
    rng = np.random.default_rng(0)
    gallery, query = rng.normal(size=(60, 8)), rng.normal(size=(23, 8))
    gallery[30:45] = gallery[:15]                                               # ties
    gallery, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (gallery, query))
    g_ids = np.stack([rng.integers(0, 9, 60), np.arange(60)])
    q_ids = np.stack([rng.integers(0, 12, 23), 50 + np.arange(23)])             # ten of the queries are in the gallery
    order = np.argsort(-(query @ gallery.T).round(9), axis=1, kind="stable")
    order = [[g for g in row if g_ids[1, g] != video] for row, video in zip(order, q_ids[1])]
    wanted = [[g_ids[0, g] == label for g in row] for row, label in zip(order, q_ids[0])]
    ranks, nearest, _ = retrieval.search(*map(torch.tensor, (gallery, query, g_ids, q_ids)), 10, cosines)
    assert nearest.tolist() == [row[:10] for row in order]
    assert [rank if rank < 60 else None for rank in ranks.tolist()] == [
        row.index(True) if True in row else None for row in wanted]


@pytest.mark.parametrize("own", [0, 1, 3])
def test_chance_recall_equals_brute_force_over_all_orders(own):
    g_ids = np.array([[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]])
    q_ids = np.array([[0, 1, 2, 3], [0, 2, 3, 9]]) if own == 3 else np.array([[0, 1, 2, 3], [0 if own else 8, 7, 6, 9]])
    for k in range(1, 6):
        hits = [[any(g_ids[0, g] == label for g in [g for g in order if g_ids[1, g] != video][:k])
                 for order in itertools.permutations(range(5))] for label, video in q_ids.T]
        assert retrieval.chance_recall(g_ids, q_ids, 4, k) == pytest.approx(np.mean(hits))
        assert retrieval.chance_recall(g_ids, q_ids, 8, k) == pytest.approx(np.mean(hits) / 2)  # four could not be read


def test_retrieval_is_standardised_by_the_gallery_alone():
    rng = torch.Generator().manual_seed(2)
    gallery, query = torch.randn(30, 6, generator=rng), torch.randn(5, 6, generator=rng)
    gallery[:, 2] = query[:, 2] = 0.3                                           # a dead feature
    g, q = retrieval.standardise(gallery, query)
    scaler = StandardScaler().fit(gallery.double())
    for got, x in ((g, gallery), (q, query)):
        x = torch.tensor(scaler.transform(x.double()))
        torch.testing.assert_close(got, x / x.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)
    query[0] += 1000
    g2, q2 = retrieval.standardise(gallery, query)
    assert g2.equal(g) and q2[1:].equal(q[1:])


# ---------------------------------------------------------------------- views and averages


def test_ten_crops_are_four_corners_and_the_centre_and_their_mirror_images():
    windows = torch.arange(2 * 3 * 3 * 20 * 28).view(2, 3, 3, 20, 28)
    crops = [windows[..., top:top + 16, left:left + 16] for top, left in ((0, 0), (0, 12), (4, 0), (4, 12), (2, 6))]
    mirrored = [crops[k].flip(-1) for k in (1, 0, 3, 2, 4)]                     # left corners become right ones
    assert views_of(windows, 16, "ten").equal(torch.cat(crops + mirrored))
    assert views_of(windows, 16, "centre").equal(torch.cat([crops[-1], crops[-1].flip(-1)]))


@pytest.mark.parametrize("crops, views", [("centre", 2), ("ten", 10)])
@pytest.mark.parametrize("softmax", [False, True])
def test_the_average_over_crops_equals_the_average_of_single_crops(tiny, crops, views, softmax):
    split = load_split("ucf101", tiny / "UCF-101", part="test")
    index = scan(split)
    windows = Windows(split, index, T=4, size=16, step=2, windows=3)
    torch.manual_seed(0)
    net = new_backbone("r3d18_narrow").eval()
    net = classifier(net, 5).eval() if softmax else net
    got, failed = average_crops(net, windows, 16, crops, CPU, softmax=softmax)
    assert not failed and got.shape == (9, 5 if softmax else 128)               # F(x) is averaged over T, H, W
    clip = 2 * np.arange(4)
    for v in (0, 8):
        single = []
        for start in (0, 8, 17):                                                # 24 frames: 0 ... 17, evenly
            clips = decode(split.found[split.paths[v]], (start + clip).tolist(), 18)
            for view in views_of(clips[None], 16, crops):
                with torch.no_grad():
                    out = net(normalise(view[None]))[0]
                single.append(out.softmax(0) if softmax else out)
        assert len(single) == 3 * views
        torch.testing.assert_close(got[v], torch.stack(single).mean(0), rtol=1e-5, atol=1e-6)


def test_all_windows_of_a_video_are_read_in_one_pass(tiny, checkpoint, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(data, "decode", lambda path, *a, **b: opened.append(path) or decode(path, *a, **b))
    probe(tiny, checkpoint, tmp_path)                                           # checkpoint and random, 2 windows
    assert len(opened) == len(set(opened)) == 27


def test_a_network_whose_output_is_not_finite_gives_no_number(tiny, tmp_path):
    net = new_backbone("r3d18_narrow")
    net.stem[0].weight.data.fill_(float("nan"))
    torch.save(dict(arch=net.arch, backbone=net.state_dict(), args={}), tmp_path / "nan.pt")
    assert "not finite" in fails(linear_probe.main, words(tiny, tmp_path / "nan.pt", tmp_path, "--frames", 4,
                                                          "--size", 16))


# ---------------------------------------------------------------------- the linear probe


def test_the_svm_equals_scikit_learns_on_the_same_features(probed, found):
    right = by_hand(found[1])
    assert probed["top1"]["checkpoint"] == np.mean([*right.values()])
    for name in CLASSES:
        assert probed["splits"][0]["checkpoint"]["per_class"][name] == np.mean(
            [ok for path, ok in right.items() if path.startswith(name)])
    assert probed["chance"] == 1 / 3


def features_as_parts(arrays):
    """What common.extract gives, from the arrays of retrieval."""
    parts = []
    for side in ("gallery", "query"):
        paths, names = arrays[f"{side}_paths"].tolist(), arrays[f"{side}_classes"].tolist()
        split = Split(side, None, paths, [CLASSES.index(name) for name in names], list(CLASSES), {}, [])
        parts.append((split, {"net": arrays[f"{side}_features"].copy()}, {}))
    return parts


@pytest.mark.parametrize("C", [1e-3, "auto"])
def test_the_test_set_changes_neither_statistics_nor_C_nor_other_predictions(found, C):
    args = Namespace(dataset="ucf101", C=C, seed=0, workers=0)
    train, test = features_as_parts(found[1])
    before = linear_probe.probe(train, test, "net", args)
    test[1]["net"][:3] *= 1e4                                                   # all three of the first class
    after = linear_probe.probe(train, test, "net", args)
    assert after["C"] == before["C"]
    assert [after["per_class"][name] for name in CLASSES[1:]] == [before["per_class"][name] for name in CLASSES[1:]]


def test_C_auto_is_chosen_on_the_training_set_with_groups_kept_together(found, monkeypatch):
    folds = []

    class Spy(linear_probe.StratifiedGroupKFold):
        def split(self, X, y=None, groups=None):
            folds.extend(super().split(X, y, groups))
            return iter(folds[-self.n_splits:])

    monkeypatch.setattr(linear_probe, "StratifiedGroupKFold", Spy)
    train, test = features_as_parts(found[1])
    result = linear_probe.probe(train, test, "net", Namespace(dataset="ucf101", C="auto", seed=0, workers=1))
    groups = np.array([path.rsplit("_", 1)[0] for path in train[0].paths])      # nine groups, two clips each
    assert len(folds) == 5 and sorted(np.concatenate([held for _, held in folds])) == list(range(18))
    assert not any(set(groups[kept]) & set(groups[held]) for kept, held in folds)
    mean = {C: cross_val_score(linear_probe.make_pipeline(StandardScaler(), LinearSVC(C=C, random_state=0)),
                               train[1]["net"], np.array(train[0].labels), cv=list(folds)).mean()
            for C in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}
    assert result["C"] == max(mean, key=mean.get)


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


# ---------------------------------------------------------------------- nothing random, cached, adapted or dropped


def same(one, other):
    """Bitwise equal features of the same videos, in the same order."""
    return list(one) == list(other) and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("more", [("--seed", 1), ("--workers", 2)])
def test_features_are_the_same_bit_for_bit_in_every_run(tiny, checkpoint, found, tmp_path, more):
    torch.rand(7)                                                               # another state of the generators
    result, arrays = retrieve(tiny, checkpoint, tmp_path, *more)
    assert same(by_path(arrays), by_path(found[1]))
    assert result["recall"]["checkpoint"] == found[0]["recall"]["checkpoint"]


def test_no_feature_comes_from_another_checkpoint_in_the_same_folder(tiny, tmp_path):
    one, two = save_backbone(tmp_path / "backbone.pt", 1), save_backbone(tmp_path / "other.pt", 2)
    first, second = retrieve(tiny, one, tmp_path), retrieve(tiny, two, tmp_path)
    shutil.copy(two, one)                                                       # and the same name, trained further
    third = retrieve(tiny, one, tmp_path)
    assert not np.allclose(first[1]["query_features"], second[1]["query_features"])
    assert same(by_path(second[1]), by_path(third[1]))
    assert first[0]["checkpoint"]["sha256"] != second[0]["checkpoint"]["sha256"] == third[0]["checkpoint"]["sha256"]


@pytest.mark.parametrize("script, run", [(linear_probe, probe), (retrieval, retrieve)])
def test_judging_changes_neither_weights_nor_batchnorm_statistics(tiny, checkpoint, tmp_path, monkeypatch, script, run):
    networks = []
    monkeypatch.setattr(script, "load_for_judging", lambda args: networks.append(common.load_for_judging(args))
                        or networks[-1])
    run(tiny, checkpoint, tmp_path)
    stored = torch.load(checkpoint, weights_only=True)["backbone"]
    assert all(value.equal(stored[name]) for name, value in networks[0].state_dict().items())
    assert not any(module.training for module in networks[0].modules())


def broken(copy, how):
    """Make the first test video unreadable; -> its path and what the scripts must say of it."""
    path = official(1, "test")[0]
    file = copy / "UCF-101" / path
    if how == "missing":
        file.unlink()
        return path, "not found"
    if how == "garbage":
        file.write_bytes(b"moov atom not found" * 50)
        return path, "Invalid data"
    split = load_split("ucf101", copy / "UCF-101", part="test")                 # fewer frames than were counted
    scan(split)
    index = data.default_index(split.root)
    entries = json.loads(index.read_text())
    entries[path][1] += 9
    index.write_text(json.dumps(entries))
    return path, "frame 32 was asked for, but only 24 frames decode"


@pytest.mark.parametrize("how", ["missing", "garbage", "shorter"])
def test_a_broken_test_video_is_wrong_and_named_and_changes_nothing_else(copy, checkpoint, found, tmp_path, monkeypatch,
                                                                         capsys, how):
    monkeypatch.setattr(data, "MAX_BAD", 0.2)                                   # 1 of 9 is more than 5 %
    path, reason = broken(copy, how)
    result, arrays = retrieve(copy, checkpoint, tmp_path / "out")
    assert f"8 of 9 videos scored; 1 could not be read and count as wrong: {path} ({reason}" in capsys.readouterr().out
    others = {name: x for name, x in by_path(found[1]).items() if name != path}
    assert same(by_path(arrays), others)
    query = result["splits"][0]["query"]
    assert query["expected"] == 9 and query["scored"] == 8 and list(query["failed"]) == [path]
    assert reason in query["failed"][path] and str(copy) not in query["failed"][path]
    first = found[1]["gallery_classes"][found[1]["nearest"][:, 0]] == found[1]["query_classes"]
    assert result["recall"]["checkpoint"]["R@1"] == first[1:].sum() / 9

    result = probe(copy, checkpoint, tmp_path / "out")
    assert result["top1"]["checkpoint"] == sum(ok for name, ok in by_hand(found[1]).items() if name != path) / 9
    assert list(result["splits"][0]["test"]["failed"]) == [path]
    assert f"count as wrong: {path} ({reason}" in capsys.readouterr().out

    result = tune(copy, checkpoint, tmp_path / "out")
    assert list(result["splits"][0]["test"]["failed"]) == [path] and result["splits"][0]["per_class"][CLASSES[0]] < 0.7
    assert f"count as wrong: {path} ({reason}" in capsys.readouterr().out


def test_a_broken_training_video_is_left_out_and_named(copy, checkpoint, tmp_path):
    path = official(1, "train")[3]
    (copy / "UCF-101" / path).write_bytes(b"")
    for result in (probe(copy, checkpoint, tmp_path / "a"), retrieve(copy, checkpoint, tmp_path / "b")[0]):
        part = result["splits"][0].get("train") or result["splits"][0]["gallery"]
        assert part["scored"] == 17 and list(part["failed"]) == [path]


def test_more_than_five_percent_missing_videos_stop_every_script(copy, checkpoint, tmp_path):
    broken(copy, "missing")
    for script in (linear_probe, retrieval, finetune):
        assert official(1, "test")[0] in fails(script.main, words(copy, checkpoint, tmp_path))


def test_another_test_video_changes_no_other_feature(copy, checkpoint, found, tmp_path):
    path = official(1, "test")[4]
    write_video(copy / "UCF-101" / path, drifting(999, 0))
    got, before = by_path(retrieve(copy, checkpoint, tmp_path / "out")[1]), by_path(found[1])
    assert not np.array_equal(got.pop(path), before.pop(path)) and same(got, before)


# ---------------------------------------------------------------------- several processes


ALL_THREE = """
import os, sys, torch
import torch.distributed as dist
sys.path.insert(0, {root!r})
import finetune, linear_probe, retrieval
dist.init_process_group("gloo")                                                 # one group for the three
dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
average = finetune.average_crops
def spy(*args, **kwargs):
    scores, failed = average(*args, **kwargs)
    torch.save(scores, {scores!r} + os.environ["RANK"])
    return scores, failed
finetune.average_crops = spy
for name, argv in {argv!r}.items():
    globals()[name].main(argv)
"""


def test_two_processes_give_the_numbers_of_one(tiny, checkpoint, found, probed, tmp_path, monkeypatch):
    argv = {name: words(tiny, checkpoint, tmp_path, *more) for name, more in (
        ("linear_probe", ()), ("retrieval", ("--features", tmp_path / "found.npz", "--k", 1, 5, 10)),
        ("finetune", ("--epochs", 1, "--warmup-epochs", 0, "--batch-size", 6, "--lr", 1e-3)))}
    script = tmp_path / "all.py"                                                # one start of Python for the three
    script.write_text(ALL_THREE.format(root=str(ROOT), scores=str(tmp_path / "scores"), argv=argv))
    done = subprocess.run([*TORCHRUN, "--standalone", "--nproc_per_node=2", script], capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("9 of 9 videos scored") == done.stdout.count("loaded r3d18_narrow") == 3   # one tells

    result = strict(tmp_path / "linear_probe-ucf101.json")
    assert result["top1"] == probed["top1"] and result["splits"] == probed["splits"]
    arrays = dict(np.load(tmp_path / "found.npz"))
    assert all(np.array_equal(arrays[name], found[1][name]) for name in arrays)
    assert strict(tmp_path / "retrieval-ucf101.json")["splits"] == found[0]["splits"]

    tuned, scores = strict(tmp_path / "finetune-ucf101-2x.json"), spied(monkeypatch)
    finetune.main(argv["finetune"] + ["--test"])                                # one process tests what two trained
    assert all(torch.load(tmp_path / f"scores{rank}").equal(scores[0]) for rank in (0, 1))
    assert len(scores[0].unique()) > 9                                          # not all 0 and 1
    assert strict(tmp_path / "finetune-ucf101-2x.json")["splits"] == tuned["splits"]


# ---------------------------------------------------------------------- fine-tuning


def spied(monkeypatch):
    """The predictions of the fine-tuning tests to come: a list that grows."""
    scores = []

    def spy(*args, **kwargs):
        result = average_crops(*args, **kwargs)
        scores.append(result[0])
        return result

    monkeypatch.setattr(finetune, "average_crops", spy)
    return scores


def test_fine_tuning_changes_every_layer_and_tests_the_last_epoch(tiny, checkpoint, tmp_path, monkeypatch, capsys):
    scores = spied(monkeypatch)
    result = tune(tiny, checkpoint, tmp_path)
    assert f"fine-tuned on ucf101, split 1: {result['top1']['checkpoint']:.1%} (" in capsys.readouterr().out
    state = torch.load(tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 * 3                                               # 18 videos in batches of 6, 2 epochs
    begun = torch.load(checkpoint, weights_only=True)["backbone"]
    assert not any(value.equal(state["model"][f"0.{name}"]) for name, value in begun.items() if value.numel() > 1)

    net = classifier(new_backbone("r3d18_narrow"), 3)                           # what is on disk is what was tested
    net.load_state_dict(state["model"])
    split = load_split("ucf101", tiny / "UCF-101", part="test")
    windows = Windows(split, scan(split), T=4, size=16, step=2, windows=2)
    wanted, _ = average_crops(net.eval(), windows, 16, "centre", CPU, softmax=True)
    assert len(scores) == 1 and scores[0].equal(wanted) and len(wanted.unique()) > 9
    assert result["top1"]["checkpoint"] == (wanted.argmax(1) == torch.tensor(split.labels)).double().mean()


def test_fine_tuning_that_was_stopped_goes_on_to_the_same_numbers_bit_for_bit(tiny, checkpoint, tmp_path, monkeypatch):
    scores, done = spied(monkeypatch), common.Progress.done
    tune(tiny, checkpoint, tmp_path / "whole")
    with monkeypatch.context() as patch:                                        # what SIGTERM does, after step 4 of 6
        patch.setattr(common.Progress, "done", lambda self, step, *a, **b: done(self, step, *a, **b) or
                      ("SIGTERM" if step == 4 else None))
        with pytest.raises(SystemExit, match="SIGTERM: saved step 4 of 6"):
            tune(tiny, checkpoint, tmp_path / "parts")
    tune(tiny, checkpoint, tmp_path / "parts")
    whole, parts = (torch.load(tmp_path / name / "finetune-ucf101-2x-1" / "checkpoint.pt", weights_only=True)["model"]
                    for name in ("whole", "parts"))
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert scores[0].equal(scores[1]) and len(scores[0].unique()) > 9


def test_only_testing_writes_the_result_again_and_trains_nothing(tiny, checkpoint, tmp_path):
    first = tune(tiny, checkpoint, tmp_path)
    weights = (tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt").read_bytes()
    (tmp_path / "finetune-ucf101-2x.json").unlink()
    again = tune(tiny, checkpoint, tmp_path, "--test")
    assert again["splits"] == first["splits"] and again["top1"] == first["top1"]
    assert tune(tiny, checkpoint, tmp_path, "--test", "--crops", "ten", "--windows", 3)["protocol"]["crops"] == "ten"
    assert weights == (tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt").read_bytes()
    assert "holds no checkpoint" in fails(finetune.main, words(tiny, checkpoint, tmp_path / "new", "--batch-size", 6,
                                                               "--test"))


def test_fine_tuning_does_not_go_on_from_another_checkpoint_of_the_same_name(tiny, tmp_path):
    path = save_backbone(tmp_path / "backbone.pt", 1)
    tune(tiny, path, tmp_path)
    save_backbone(path, 2)
    for more in ((), ("--test",)):
        with pytest.raises(ValueError, match="holds another run's checkpoint .checkpoint "):
            tune(tiny, path, tmp_path, *more)


def test_several_splits_are_averaged_and_go_on_from_those_that_were_run(tiny, checkpoint, tmp_path):
    begun = tune(tiny, checkpoint, tmp_path)
    weights = (tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt").read_bytes()
    tuned = tune(tiny, checkpoint, tmp_path, "--split", 1, 2)
    assert weights == (tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt").read_bytes()
    assert tuned["splits"][0] == begun["splits"][0]
    probed = probe(tiny, checkpoint, tmp_path, "--split", 1, 2)
    for result, figure in ((tuned, lambda split: split["top1"]), (probed, lambda split: split["checkpoint"]["top1"])):
        assert [split["split"] for split in result["splits"]] == [1, 2]
        assert result["splits"][1]["test"]["expected"] == 6                     # split 2 tests other videos
        assert result["top1"]["checkpoint"] == np.mean([figure(split) for split in result["splits"]])
    result, _ = retrieve(tiny, checkpoint, tmp_path, "--split", 1, 2)
    for name, k in itertools.product(("checkpoint", "random", "chance"), ("R@1", "R@5", "R@10")):
        assert result["recall"][name][k] == np.mean([split["recall"][name][k] for split in result["splits"]])


def test_the_randomly_initialised_row_stands_beside_if_it_was_run_with_the_same_protocol(tiny, checkpoint, tmp_path,
                                                                                        monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common_words = ["--arch", "r3d18_narrow", "--frames", "4", "--size", "16", "--epochs", "1", "--batch-size", "6",
                    "--warmup-epochs", "0"]

    def run(checkpoint, *more):
        argv = words(tiny, checkpoint, "x", *common_words, *more)
        del argv[argv.index("--out"):argv.index("--out") + 2]                   # the folders are the scripts'
        finetune.main(argv)

    own = tmp_path / "own" / "backbone.pt"
    own.parent.mkdir()
    shutil.copy(checkpoint, own)
    run(own)
    assert "randomly initialised: not run" in capsys.readouterr().out
    run("random")
    row = strict(tmp_path / "runs" / "random-r3d18_narrow" / "finetune-ucf101-2x.json")["top1"]["random"]
    run(own)
    assert strict(own.with_name("finetune-ucf101-2x.json"))["top1"]["random"] == row
    assert f"randomly initialised: {row:.1%}" in capsys.readouterr().out
    run(own, "--test", "--windows", "1")                                        # another protocol
    assert "random" not in strict(own.with_name("finetune-ucf101-2x.json"))["top1"]


# ---------------------------------------------------------------------- one's own videos


@pytest.fixture
def own(tiny, tmp_path):
    """A folder of six videos without classes."""
    for n, path in enumerate(official(1, "train")[::3]):
        (tmp_path / "own").mkdir(exist_ok=True)
        shutil.copy(tiny / "UCF-101" / path, tmp_path / "own" / f"video {n}.avi")
    return tmp_path / "own"


@pytest.mark.parametrize("link", [False, True])
def test_videos_without_classes_have_neighbours_other_than_themselves_and_no_recall(own, checkpoint, tmp_path, capsys,
                                                                                   monkeypatch, link):
    monkeypatch.setattr(common, "make_toy", pytest.fail)                        # which nobody asked for
    query = own
    if link:                                                                    # the same files by another way
        query = tmp_path / "linked"
        query.mkdir()
        for file in own.iterdir():
            (query / file.name).symlink_to(file)
    retrieval.main([str(word) for word in ("--checkpoint", checkpoint, "--gallery", own, "--query", query, "--k", 6,
                                           "--windows", 2, "--workers", 0, "--out", tmp_path / "out",
                                           "--features", tmp_path / "new" / "found.npz")])
    result = strict(tmp_path / "out" / "retrieval-folder.json")
    assert result["recall"] == {} and "no classes, so no R@k" in capsys.readouterr().out
    neighbours = result["splits"][0]["neighbours"]
    names = {f"video {n}.avi" for n in range(6)}
    assert set(neighbours) == names and all(set(near) == names - {name} for name, near in neighbours.items())
    assert all(list(near.values()) == sorted(near.values(), reverse=True) for near in neighbours.values())
    arrays = np.load(tmp_path / "new" / "found.npz")
    assert arrays["query_features"].shape == (6, 128) and set(arrays["query_classes"]) == {""}
    for name, row in zip(arrays["query_paths"], arrays["nearest"]):
        assert [arrays["gallery_paths"][g] for g in row if g >= 0] == list(neighbours[name]) and row[-1] == -1


def test_class_folders_of_ones_own_give_recall_and_neighbours(tiny, checkpoint, tmp_path):
    retrieval.main(words(tiny, checkpoint, tmp_path, "--query", tiny / "UCF-101" / ".", "--k", 1, 5))
    result = strict(tmp_path / "retrieval-ucf101.json")                         # all 27, of them 18 in the gallery
    assert set(result["recall"]["checkpoint"]) == {"R@1", "R@5"} and len(result["splits"][0]["neighbours"]) == 27
    assert result["recall"]["chance"]["R@1"] == pytest.approx((18 * 5 / 17 + 9 * 6 / 18) / 27)


def test_the_picture_tells_right_from_wrong_in_grey_too(tiny, checkpoint, tmp_path):
    video = retrieval.Video(official(1, "test")[0], str(tiny / "UCF-101" / official(1, "test")[0]), CLASSES[0])
    right, wrong = (retrieval.thumbnail(video, verdict).float().mean(0) for verdict in (True, False))
    assert (right[20:140, 20:140] != wrong[20:140, 20:140]).sum() > 200         # crossed out
    assert (right[160:] < 128).sum() != (wrong[160:] < 128).sum()               # + and -
    retrieve(tiny, checkpoint, tmp_path, "--picture", tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").size == (6 * 160, 9 * 180)    # a row for each of nine queries


# ---------------------------------------------------------------------- what a result says, and what ends in a sentence


def test_a_result_says_what_it_is(tiny, checkpoint, tmp_path, capsys):
    args = dict(frames=4, size=16, lr=1e-3)
    for script, standardised in ((probe, "training set"), (retrieve, "gallery"), (tune, "")):
        result = script(tiny, checkpoint, tmp_path)
        result = result[0] if script is retrieve else result
        protocol = result["protocol"]
        said = dict(dataset="ucf101", split=[1], windows=2, step=2, frames=4, size=16, seed=0, crops="centre")
        assert {name: protocol[name] for name in said} == said
        assert standardised in (protocol["standardised"] or "")
        assert result["checkpoint"]["trained_with"] == args and result["checkpoint"]["arch"] == "r3d18_narrow"
        assert result["checkpoint"]["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        assert set(result["versions"]) == {"python", "torch", "torchvision", "av", "numpy", "sklearn"}
        split = result["splits"][0]
        for part, expected in ((split.get("train") or split["gallery"], 18), (split.get("test") or split["query"], 9)):
            assert part["expected"] == part["scored"] == expected and part["failed"] == {}
        printed = capsys.readouterr().out
        assert "ucf101 train split 1: 18 of 18 videos scored" in printed
        assert "ucf101 test split 1: 9 of 9 videos scored" in printed and "chance: 33.3%" in printed


@pytest.mark.parametrize("script", [linear_probe, retrieval, finetune])
def test_a_checkpoint_that_does_not_fit_ends_in_one_sentence(tiny, checkpoint, tmp_path, script):
    text, part = tmp_path / "text.pt", tmp_path / "part.pt"
    text.write_text("no tensors")
    stored = torch.load(checkpoint, weights_only=True)
    del stored["backbone"]["layer3.1.conv1.0.weight"]
    torch.save(stored, part)
    for path, more, sentence in (
            (tmp_path / "none.pt", (), "there is no file"), (tmp_path, (), "is a folder: give a file in it"),
            (text, (), "is not a file of tensors"), (part, (), "1 missing (layer3.1.conv1.0.weight)"),
            (checkpoint, ("--arch", "r3d18"), "holds r3d18_narrow, but arch is r3d18")):
        assert sentence in fails(script.main, words(tiny, path, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_gallery_that_is_empty_or_smaller_than_k_ends_in_one_sentence(tiny, checkpoint, own, tmp_path):
    (tmp_path / "empty").mkdir()
    for more, sentence in ((("--gallery", tmp_path / "empty"), "found 0"),
                           (("--gallery", tmp_path / "none"), "there is no folder"),
                           (("--k", 1, 19), "--k 19 is larger than the gallery, ucf101 train split 1: 18 videos"),
                           (("--gallery", own), f"--k 20 is larger than the gallery, {own}: 6 videos")):
        assert sentence in fails(retrieval.main, words(tiny, checkpoint, tmp_path / "out", *more))
    (own / "video 0.avi").write_bytes(b"")
    assert "5 videos" in fails(retrieval.main, words(tiny, checkpoint, tmp_path / "out", "--gallery", own, "--k", 6))


@pytest.mark.parametrize("script", [linear_probe, finetune])
def test_videos_without_labels_or_an_own_test_set_end_in_one_sentence(tiny, own, checkpoint, tmp_path, script):
    assert "has no labels" in fails(script.main, ["--dataset", "folder", "--data", own, "--checkpoint", checkpoint])
    assert "27 of 27 test videos are training videos too" in fails(
        script.main, ["--dataset", "folder", "--data", tiny / "UCF-101", "--checkpoint", checkpoint])


# ---------------------------------------------------------------------- --psi


SPEEDS = [1, 2, 4]


def drawn(groups, seed):
    """Labels of groups of two of 20 videos, as data.Pairs has them."""
    rng, rows = random.Random(seed), []
    for _ in range(groups):
        pairs, labels = data.sample_pair([60, 70], 4, SPEEDS, rng)
        for video, pair in zip(rng.sample(range(20), 2), pairs):
            rows.append(labels | dict(video=video, start=[tau.start for tau in pair]))
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def planted(labels):
    """A ψ that is a function of the relative transformation alone, and near where that is near."""
    shift = (labels["start"][:, 1] - labels["start"][:, 0]) / 80
    parts = [2 * labels["direction"] - 1, labels["speed"] - 1, shift[:, None], torch.ones(len(shift), 1)]
    return torch.cat([part.float() for part in parts], dim=1)


def test_a_psi_that_is_the_transformation_gives_the_diagonal_and_falling_curves():
    labels = drawn(150, 0)
    found = retrieval.tell_apart(planted(labels), labels, SPEEDS, T=4)
    assert found["partner"]["share"] == 1 and found["partner"]["chance"] < 0.05
    for name, kinds in found["kinds"].items():
        assert kinds["share"] == 1 and kinds["chance"] < 0.6
        assert all(row is None or row[k] == 1 for k, row in enumerate(kinds["matrix"])), name
    for curve in found["curves"].values():
        cosines = [step["cosine"] for step in curve]
        assert len(cosines) > 2 and cosines == sorted(cosines, reverse=True) and cosines[0] > cosines[-1] + 0.05


def test_a_psi_that_knows_nothing_is_at_chance_and_its_curves_are_flat():
    labels = drawn(600, 1)
    found = retrieval.tell_apart(torch.randn(1200, 64, generator=torch.Generator().manual_seed(0)), labels, SPEEDS, T=4)
    for part in (found["partner"], *found["kinds"].values()):
        assert part["share"] == pytest.approx(part["chance"], abs=0.04)
    steps = [step for curve in found["curves"].values() for step in curve if step["pairs"] > 100]
    assert len(steps) > 10 and all(abs(step["cosine"]) < 0.05 for step in steps)


def test_what_psi_tells_apart_equals_a_double_loop():
    labels = drawn(40, 2)
    psi = planted(labels) + torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    rows = [{name: value[n].tolist() for name, value in labels.items()} for n in range(80)]
    unit = (psi / psi.norm(dim=1, keepdim=True)).double()
    steps, nearest, alike, total = {}, [], 0, 0
    for n, a in enumerate(rows):
        best = None
        for m, b in enumerate(rows):
            if a["video"] == b["video"]:
                continue
            cosine = float(unit[n] @ unit[m])
            best = m if best is None or cosine > float(unit[n] @ unit[best]) else best
            shift = abs(a["start"][1] - a["start"][0] - b["start"][1] + b["start"][0])
            speed = sum(abs(x - y) for x, y in zip(a["speed"], b["speed"]))     # classes of 1, 2, 4: octaves
            turned = sum(x != y for x, y in zip(a["direction"], b["direction"]))
            for name, value, same in (("shift", next(x for x in (0, 1, 2, 4, 8, 16, 32, 64, 128) if shift <= x),
                                       speed == turned == 0), ("speed", speed, shift <= 4 and turned == 0),
                                      ("direction", turned, shift <= 4 and speed == 0)):
                if same and n < m:
                    steps.setdefault((name, value), []).append(cosine)
        nearest.append(best)
        others = [b for b in rows if b["video"] != a["video"]]
        alike, total = alike + sum(b["pq"] == a["pq"] for b in others) / len(others), total + 1
    found = retrieval.tell_apart(psi, labels, SPEEDS, T=4)
    seen = {(name, step["up_to"]): step for name, curve in found["curves"].items() for step in curve}
    assert seen.keys() == steps.keys() and all(seen[key]["pairs"] == len(x) for key, x in steps.items())
    assert all(seen[key]["cosine"] == pytest.approx(np.mean(x), abs=1e-6) for key, x in steps.items())
    right = [rows[m]["pq"] == rows[n]["pq"] for n, m in enumerate(nearest)]
    assert found["partner"]["share"] == pytest.approx(np.mean(right))
    assert found["partner"]["chance"] == pytest.approx(alike / total)
    for name, kind in (("speed", lambda row: 3 * row["speed"][0] + row["speed"][1]),
                       ("direction", lambda row: 2 * row["direction"][0] + row["direction"][1]),
                       ("order", lambda row: row["order"])):
        for k, line in enumerate(found["kinds"][name]["matrix"]):
            of = [kind(rows[m]) for n, m in enumerate(nearest) if kind(rows[n]) == k]
            assert line == (pytest.approx([of.count(c) / len(of) for c in range(len(line))]) if of else None)


def save_checkpoint(path, **args):
    """What pretrain.py writes, as far as judging reads it."""
    torch.manual_seed(3)
    args = dict(arch="r3d18_narrow", losses=["inst", "equi"], speeds=[1, 2], frames=4, size=16) | args
    torch.save(dict(args=args, model=TimeEquivariant("r3d18_narrow", args["losses"]).state_dict()), path)
    return path


def test_the_picture_of_psi_is_drawn_and_the_result_holds_its_numbers(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(retrieval, "GROUPS", 30)
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt")
    found = []
    for out in ("a", "b"):
        retrieval.main(words(tiny, checkpoint, tmp_path / out, "--k", 1, "--psi", tmp_path / out / "new" / "psi.png"))
        found.append(strict(tmp_path / out / "retrieval-ucf101.json")["splits"][0]["psi"])
        assert np.asarray(Image.open(tmp_path / out / "new" / "psi.png")).std() > 10
    assert found[0] == found[1] and found[0]["videos"] == 9 and found[0]["pairs"] == 64 and found[0]["replaced"] == {}
    assert found[0]["checkpoint"]["partner"].keys() == found[0]["random"]["partner"].keys() == {"share", "chance"}
    assert found[0]["checkpoint"]["kinds"]["speed"]["words"] == ["1x 1x", "1x 2x", "2x 1x", "2x 2x"]
    assert found[0]["checkpoint"] != found[0]["random"]
    assert "the nearest psi of another video" in capsys.readouterr().out


def test_psi_is_the_networks_own_in_eval_mode(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt")
    stored = torch.load(checkpoint, weights_only=True)
    for name, value in stored["model"].items():
        if "heads" in name and "running_mean" in name:
            value.normal_()                                                     # no batch of clips has these
    torch.save(stored, checkpoint)
    whole = TimeEquivariant("r3d18_narrow", ["inst", "equi"]).eval()
    whole.load_state_dict(stored["model"])
    clips = torch.randn(4, 2, 3, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(with_psi(load_backbone(checkpoint), checkpoint)(clips)["psi"], whole(clips)["psi"])


def test_a_checkpoint_without_psi_ends_in_one_sentence(tiny, checkpoint, tmp_path):
    broken = save_checkpoint(tmp_path / "broken.pt")
    stored = torch.load(broken, weights_only=True)
    del stored["model"]["heads.psi.6.bias"]
    torch.save(stored, broken)
    for path, sentence in ((checkpoint, "backbone.pt has no psi: it is in checkpoint.pt of pretrain.py only"),
                           ("random", "random has no psi: it is in checkpoint.pt of pretrain.py only"),
                           (save_checkpoint(tmp_path / "inst.pt", losses=["inst"]), "the run that wrote it had no"),
                           (broken, "does not fit the psi of r3d18_narrow, which has 14 tensors: 1 missing (6.bias)")):
        assert sentence in fails(retrieval.main, words(tiny, path, tmp_path / "out", "--arch", "r3d18_narrow", "--psi",
                                                       tmp_path / "psi.png"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "psi.png").exists()
