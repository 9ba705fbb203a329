"""retrieval.py: exact search, R@k and its chance level, standardising, and own folders."""
import itertools
import shutil

import numpy as np
import pytest
import torch
from conftest import fails, official, read_json, tiny_words
from sklearn.preprocessing import StandardScaler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retrieval
from common import splits
from retrieval import chance_recall, recall, search, standardise


def ids(classes, videos):
    return torch.tensor([classes, list(videos)])


def rows(*angles):
    """Unit vectors in the plane, at these angles in degrees."""
    angles = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


# ---- Search and R@k (Table 3) ----

def test_planted_neighbours_are_found_and_give_R_at_1_of_100_percent():
    rng = torch.Generator().manual_seed(0)
    gallery = torch.randn(500, 32, generator=rng)
    order = torch.randperm(500, generator=rng)
    query = gallery[order] + 0.05 * torch.randn(500, 32, generator=rng)
    gallery_ids, query_ids = ids(range(500), range(500)), torch.stack([order, order + 500])
    ranks, nearest, _ = search(*standardise(gallery, query), gallery_ids, query_ids, 3)
    assert nearest[:, 0].equal(order) and recall(ranks, 500, 1) == 1


def test_R_at_k_is_what_a_hand_computes():
    gallery, query = rows(0, 10, 20, 30, 90), rows(1, 19, 88)
    gallery_ids, query_ids = ids([0, 1, 1, 0, 2], range(5)), ids([0, 0, 3], range(5, 8))
    ranks, nearest, cosines = search(gallery, query, gallery_ids, query_ids, 5)
    assert nearest.tolist() == [[0, 1, 2, 3, 4], [2, 1, 3, 0, 4], [4, 3, 2, 1, 0]]
    assert ranks[:2].tolist() == [0, 2]                     # the third query's class has no video
    assert cosines[0, 1].item() == pytest.approx(np.cos(np.deg2rad(9)))
    assert [recall(ranks, 3, k) for k in (1, 2, 3, 5)] == [1 / 3, 1 / 3, 2 / 3, 2 / 3]
    assert recall(ranks, 4, 5) == 2 / 4                     # a fourth query could not be read


@pytest.mark.parametrize("dim", [2, 128, 1000])
def test_of_equally_near_videos_the_earlier_one_is_nearer(dim):
    rng = torch.Generator().manual_seed(1)
    x, far = torch.nn.functional.normalize(torch.randn(2, dim, generator=rng).double())
    gallery = torch.stack([far] + [x * (1 + n * 1e-15) for n in range(40)])     # rounding errors
    for right, rank in ((1, 0), (7, 6), (40, 39)):
        gallery_ids = ids([int(k == right) for k in range(41)], range(41))
        ranks, nearest, _ = search(gallery, x[None], gallery_ids, ids([1], [99]), 41)
        assert ranks.tolist() == [rank] and nearest.tolist() == [[*range(1, 41), 0]]


def test_a_query_is_no_neighbour_of_itself_but_its_duplicate_is():
    gallery_ids, query_ids = ids([0, 1, 0], [7, 8, 9]), ids([0], [7])
    ranks, nearest, _ = search(rows(0, 0, 50), rows(0), gallery_ids, query_ids, 3)
    assert nearest.tolist() == [[1, 2, -1]] and ranks.tolist() == [1]


@pytest.mark.parametrize("cosines", [1, 60, 137, 2 ** 24])
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
    tensors = map(torch.tensor, (gallery, query, g_ids, q_ids))
    ranks, nearest, _ = search(*tensors, 10, cosines)
    assert nearest.tolist() == [row[:10] for row in order]
    expected = [row.index(True) if True in row else None for row in right]
    assert [rank if rank < 60 else None for rank in ranks.tolist()] == expected


class LiveBytes(TorchDispatchMode):
    """Record the peak of the bytes of live tensors; inputs do not count."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        live = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.storages = live
        self.peak = max(self.peak, sum(size for _, size in live.values()))
        return output


def test_memory_of_a_search_does_not_grow_with_the_product_of_queries_and_gallery():
    peak = {}
    for queries in (10, 300):
        gallery, query = torch.randn(1000, 8).double(), torch.randn(queries, 8).double()
        gallery_ids, query_ids = ids([0] * 1000, range(1000)), ids([0] * queries, range(queries))
        with LiveBytes() as live:
            search(gallery, query, gallery_ids, query_ids, 1, 4000)
        peak[queries] = live.peak
    assert peak[300] < peak[10] + 300 * 1000                # bytes; a cosine has eight


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


# ---- Own folders ----

@pytest.mark.parametrize("link", [False, True])
def test_videos_without_classes_have_neighbours_other_than_themselves_and_no_recall(
        own, checkpoint, tmp_path, capsys, monkeypatch, link):
    monkeypatch.setattr(splits, "make_toy", pytest.fail)    # no data set is needed
    query = own
    if link:                                                # the same files under other paths
        query = tmp_path / "links"
        query.mkdir()
        for file in own.iterdir():
            (query / file.name).symlink_to(file)
    features = tmp_path / "new" / "features.npz"
    retrieval.main([str(word) for word in (
        "--checkpoint", checkpoint, "--gallery", own, "--query", query, "--windows", 2,
        "--workers", 0, "--out", tmp_path / "out", "--features", features)])
    result = read_json(tmp_path / "out" / "retrieval-folder.json")
    assert result["recall"] == {} and "no classes, so no R@k" in capsys.readouterr().out

    neighbours = result["splits"][0]["neighbours"]
    names = {f"video {n}.avi" for n in range(6)}
    assert set(neighbours) == names
    for name, near in neighbours.items():
        assert set(near) == names - {name}
        assert list(near.values()) == sorted(near.values(), reverse=True)

    arrays = np.load(features)
    assert arrays["nearest"].shape == (6, 6)                # the gallery is smaller than --k
    assert arrays["query_features"].shape == (6, 128) and set(arrays["query_classes"]) == {""}
    for name, row in zip(arrays["query_paths"], arrays["nearest"]):
        nearest = [arrays["gallery_paths"][g] for g in row if g >= 0]
        assert nearest == list(neighbours[name]) and row[-1] == -1


def test_features_give_the_absolute_path_of_each_video(own, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(own.parent)
    retrieval.main([
        "--checkpoint", str(checkpoint), "--gallery", own.name, "--query", own.name, "--k", "1",
        "--windows", "1", "--workers", "0", "--out", "out", "--features", "features.npz"])
    arrays = np.load("features.npz")
    for side in ("gallery", "query"):
        files = [str(own / path) for path in arrays[f"{side}_paths"]]
        assert arrays[f"{side}_files"].tolist() == files


def test_own_class_folders_give_recall_and_neighbours(tiny, checkpoint, tmp_path):
    folder = tiny / "UCF-101" / "."                         # all 27; 18 of them are in the gallery
    retrieval.main(tiny_words(tiny, checkpoint, tmp_path, "--query", folder, "--k", 1, 5))
    result = read_json(tmp_path / "retrieval-ucf101.json")
    assert set(result["recall"]["checkpoint"]) == {"R@1", "R@5"}
    assert len(result["splits"][0]["neighbours"]) == 27
    chance = (18 * 5 / 17 + 9 * 6 / 18) / 27
    assert result["recall"]["chance"]["R@1"] == pytest.approx(chance)


def test_own_train_and_val_folders_give_the_numbers_of_the_same_official_lists(
        tiny, checkpoint, retrieved, tmp_path):
    for part, folder in (("train", "train"), ("test", "val")):
        for path in official(1, part):
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / "UCF-101" / path, tmp_path / folder / path)
    retrieval.main(tiny_words(tiny, checkpoint, tmp_path / "out", "--dataset", "folder", "--data",
                              tmp_path, "--k", 1, 5, 10))
    result = read_json(tmp_path / "out" / "retrieval-folder.json")
    assert result["recall"] == retrieved[0]["recall"]


@pytest.mark.parametrize("folder, sentence", [
    ("empty", "no videos in"), ("none", "does not exist")])
def test_an_empty_or_missing_gallery_ends_in_one_sentence(
        tiny, checkpoint, tmp_path, folder, sentence):
    (tmp_path / "empty").mkdir()
    argv = tiny_words(tiny, checkpoint, tmp_path / "out", "--gallery", tmp_path / folder)
    assert sentence in fails(retrieval.main, argv)
