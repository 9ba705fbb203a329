"""retrieval.py: exact search, R@k and its chance level, standardising, splits, own folders."""
import itertools
import shlex

import numpy as np
import pytest
import torch
from conftest import CLASSES, CPU, evaluation_words, read_json, retrieve
from sklearn.preprocessing import StandardScaler

import retrieval
from common import splits
from common.evaluation import average_crops
from models import load_backbone
from retrieval import Side, chance_recall, ids_of, recall, search, standardise
from tools import neighbours as neighbours_tool

NONE = torch.iinfo(torch.int64).max                         # the rank where there is no such video


def ids(classes, videos):
    return torch.tensor([classes, list(videos)])


def rows(*angles):
    """Unit vectors in the plane, at these angles in degrees."""
    angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


# ---- Search and R@k (Table 3) ----

def test_R_at_k_is_what_a_hand_computes():
    gallery, query = rows(0, 10, 20, 30, 90), rows(1, 19, 88)
    gallery_ids, query_ids = ids([0, 1, 1, 0, -1], range(5)), ids([0, 0, -1], range(5, 8))
    ranks, nearest, cosines = search(gallery, query, gallery_ids, query_ids, 5)
    assert nearest.tolist() == [[0, 1, 2, 3, 4], [2, 1, 3, 0, 4], [4, 3, 2, 1, 0]]
    assert ranks.tolist() == [0, 2, NONE]                   # -1: the third has no class
    assert cosines[0, 1].item() == pytest.approx(np.cos(np.deg2rad(9)))
    assert [recall(ranks, 3, k) for k in (1, 2, 3, 5)] == [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    assert recall(ranks, 4, 5) == 2 / 4                     # a fourth query could not be read


def test_of_equally_near_videos_the_earlier_one_is_nearer():
    rng = torch.Generator().manual_seed(1)
    x, far = torch.nn.functional.normalize(torch.randn(2, 128, generator=rng).double())
    gallery = torch.stack([far] + [x * (1 + n * 1e-15) for n in range(40)])     # rounding errors
    for right, rank in ((1, 0), (7, 6), (40, 39)):
        gallery_ids = ids([int(k == right) for k in range(41)], range(41))
        ranks, nearest, _ = search(gallery, x[None], gallery_ids, ids([1], [99]), 41)
        assert ranks.tolist() == [rank] and nearest.tolist() == [[*range(1, 41), 0]]


@pytest.mark.parametrize("cosines", [1, 137, 2 ** 24])
def test_search_in_chunks_equals_a_full_sort(cosines):
    rng = np.random.default_rng(0)
    gallery, query = rng.normal(size=(60, 8)), rng.normal(size=(23, 8))
    gallery[30:45] = gallery[:15]                           # ties
    gallery, query = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (gallery, query))
    g_ids = np.stack([rng.integers(0, 9, 60), np.arange(60)])
    q_ids = np.stack([rng.integers(0, 12, 23), 50 + np.arange(23)])     # ten are in the gallery
    order = np.argsort(-(query @ gallery.T).round(9), axis=1, kind="stable")
    order = [[g for g in row if g_ids[1, g] != video] for row, video in zip(order, q_ids[1])]
    right = [[g_ids[0, g] == label for g in row] for row, label in zip(order, q_ids[0])]
    ranks, nearest, _ = search(*map(torch.tensor, (gallery, query, g_ids, q_ids)), 10, cosines)
    assert nearest.tolist() == [row[:10] for row in order]
    assert ranks.tolist() == [row.index(True) if True in row else NONE for row in right]


@pytest.mark.parametrize("videos", [[8, 7, 6, 9], [0, 7, 6, 9], [0, 2, 3, 9]])
def test_chance_recall_equals_brute_force_over_all_orders(videos):
    gallery_ids = np.array([[0, 0, 1, 2, 2], [0, 1, 2, 3, 4]])
    query_ids = np.array([[0, 1, 2, 3], videos])            # 0, 1 and 3 of them are in the gallery
    orders = list(itertools.permutations(gallery_ids.T.tolist()))
    for k in range(1, 6):
        hits = []
        for label, video in query_ids.T.tolist():
            for order in orders:
                others = [g for g, other in order if other != video]
                hits.append(label in others[:k])
        assert chance_recall(gallery_ids, query_ids, 4, k) == pytest.approx(np.mean(hits))
        assert chance_recall(gallery_ids, query_ids, 8, k) == pytest.approx(np.mean(hits) / 2)


def test_features_are_standardised_by_the_gallery_alone():
    rng = torch.Generator().manual_seed(2)
    gallery, query = torch.randn(30, 6, generator=rng), torch.randn(5, 6, generator=rng)
    gallery[:, 2] = query[:, 2] = 0.3                       # a dead feature
    before = standardise(gallery, query)
    scaler = StandardScaler().fit(gallery.double())
    for result, x in zip(before, (gallery, query)):
        x = torch.tensor(scaler.transform(x.double()))
        expected = x / x.norm(dim=1, keepdim=True)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    query[0] += 1000
    after = standardise(gallery, query)
    assert after[0].equal(before[0]) and after[1][1:].equal(before[1][1:])
    assert standardise(gallery[:1], query)[0].tolist() == [[0] * 6]     # no 0 / 0


def test_classes_match_by_name_and_videos_by_file_and_without_all_classes_there_is_no_recall():
    x = {"net": np.eye(3, dtype=np.float32)}
    gallery = Side(["a", "b", "c"], ["/a", "/b", "/c"], ["run", "walk", "jump"], x)
    query = Side(["a", "b", "e"], ["/x/a", "/b", "/e"], ["jump", "walk", "sit"], x)
    (classes, files), (query_classes, query_files) = ids_of(gallery, query)
    assert query_classes[:2].tolist() == [classes[2], classes[1]]
    assert query_classes[2] not in classes
    assert (files[:, None] == query_files).sum() == (files[1] == query_files[1]) == 1
    recalls, _ = retrieval.retrieve(gallery, query, 3, [1], CPU)
    assert set(recalls) == {"net", "chance"}
    for sides in ((gallery, query._replace(classes=["jump", "", ""])),
                  (gallery._replace(classes=["run", "", ""]), query)):
        assert retrieval.retrieve(*sides, 3, [1], CPU)[0] == {}


# ---- Networks and splits ----

def test_each_network_is_scored_by_its_own_features(world, checkpoint, tmp_path):
    result, arrays = retrieve(world, checkpoint, tmp_path, "--seed", 3)
    torch.manual_seed(3)
    random = load_backbone("random", "r3d18_narrow")
    args = retrieval.parse_args(evaluation_words(
        world, checkpoint, "out", "--frames", 4, "--size", 16))
    sides = [splits.load_and_scan(args, 1, part) for part in ("train", "test")]
    side_ids = ids(sides[0].labels, range(24)), ids(sides[1].labels, range(24, 33))
    for name, net in dict(random=random, checkpoint=load_backbone(checkpoint)).items():
        x = [average_crops(net, side, args, CPU)[0] for side in sides]
        ranks, nearest, cosines = search(*standardise(*x), *side_ids, 10)
        assert result["recall"][name] == {f"R@{k}": recall(ranks, 9, k) for k in (1, 5, 10)}
    for side, features in zip(("gallery", "query"), x):     # the checkpoint's
        np.testing.assert_allclose(arrays[f"{side}_features"], features, rtol=1e-4, atol=1e-6)
    assert arrays["nearest"].tolist() == nearest.tolist()
    np.testing.assert_allclose(arrays["cosines"], cosines, rtol=1e-4, atol=1e-6)


def test_of_two_splits_recalls_are_averaged_and_the_features_of_the_first_are_saved(
        world, checkpoint, retrieved, tmp_path):
    result, arrays = retrieve(world, checkpoint, tmp_path, "--split", 1, 2, "--k", 10, 1, 5, 1)
    one, two = (split["recall"] for split in result["splits"])
    assert one == retrieved[0]["recall"] != two             # whatever the order of --k
    for name, k in itertools.product(("checkpoint", "random", "chance"), ("R@1", "R@5", "R@10")):
        assert result["recall"][name][k] == np.mean([one[name][k], two[name][k]])
    assert all(np.array_equal(arrays[name], x) for name, x in retrieved[1].items())


# ---- Own folders ----

@pytest.mark.parametrize("link", [False, True])
def test_videos_without_classes_have_neighbours_other_than_themselves_and_no_recall(
        own, checkpoint, tmp_path, capsys, monkeypatch, link):
    monkeypatch.setattr(splits, "make_toy", pytest.fail)    # no data set is needed
    monkeypatch.chdir(tmp_path)
    query = "own"
    if link:                                                # the same files under other paths
        query = tmp_path / "links"
        query.mkdir()
        for file in own.iterdir():
            (query / file.name).symlink_to(file)
    retrieval.main([str(word) for word in (
        "--checkpoint", checkpoint, "--gallery", "own", "--query", query, "--windows", 2,
        "--workers", 0, "--out", "out", "--features", "new/features.npz")])
    result = read_json(tmp_path / "out" / "retrieval-folder.json")
    assert result["recall"] == {}
    neighbours = result["splits"][0]["neighbours"]
    names = {f"video {n}.avi" for n in range(6)}
    assert set(neighbours) == names
    for name, near in neighbours.items():
        assert set(near) == names - {name}
        assert list(near.values()) == sorted(near.values(), reverse=True)

    arrays = np.load("new/features.npz")
    assert arrays["nearest"].shape == (6, 6)                # the gallery is smaller than --k
    assert arrays["query_features"].shape == (6, 128) and set(arrays["query_classes"]) == {""}
    assert arrays["gallery_files"].tolist() == [str(own / p) for p in arrays["gallery_paths"]]
    for name, row in zip(arrays["query_paths"], arrays["nearest"]):
        nearest = [arrays["gallery_paths"][g] for g in row if g >= 0]
        assert nearest == list(neighbours[name]) and row[-1] == -1


@pytest.mark.parametrize("dataset", ["folder", "kinetics400"])
def test_without_classes_the_nearest_of_three_queries_are_shown_and_how_to_draw_them(
        own, checkpoint, tmp_path, capsys, dataset):
    (own / "notes.txt").touch()
    videos = ["--gallery", own, "--query", own]
    if dataset == "kinetics400":
        videos = ["--dataset", dataset, "--data", own]
    retrieval.main([str(word) for word in (
        *videos, "--checkpoint", checkpoint, "--windows", 2, "--workers", 0, "--out",
        tmp_path / "a b")])
    printed = capsys.readouterr()
    scans = printed.err.count("skipped 1 without a video suffix: notes.txt")
    assert scans == (1 if dataset == "folder" else 2)       # one folder is scanned once
    file = tmp_path / "a b" / f"retrieval-{dataset}.json"
    neighbours = read_json(file)["splits"][0]["neighbours"]
    *_, head, reason, one, two, three, last = printed.out.splitlines()
    assert head == f"retrieval on {dataset}, split 1 ({file})" and "no classes, so no R" in reason
    for line, (query, near) in zip((one, two, three), neighbours.items()):
        nearest = ", ".join(f"{path} {cosine:.2f}" for path, cosine in [*near.items()][:3])
        assert line == f"  {query}: {nearest}"
    *words, folder_script, features, _, _ = shlex.split(last)
    assert (*words, folder_script) == ("next:", "python", "tools/neighbours.py")
    neighbours_tool.main([features, "--out", str(tmp_path / "neighbours.png")])
    assert (tmp_path / "neighbours.png").exists()


def test_own_class_folders_give_recall_by_name_and_neighbours(world, checkpoint, tmp_path):
    folder = tmp_path / "query"                             # 16 of its 22 are in the gallery
    folder.mkdir()
    for name in CLASSES[1:]:                                # so their numbers are not the gallery's
        (folder / name).symlink_to(world / "UCF-101" / name)
    retrieval.main(evaluation_words(world, checkpoint, tmp_path, "--query", folder))
    result = read_json(tmp_path / "retrieval-ucf101.json")
    assert list(result["recall"]["checkpoint"]) == ["R@1", "R@5", "R@10", "R@20"]
    assert len(result["splits"][0]["neighbours"]) == 22
    chance = (16 * 7 / 23 + 6 * 8 / 24) / 22
    assert result["recall"]["chance"]["R@1"] == pytest.approx(chance)
