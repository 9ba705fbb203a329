"""retrieval.py: exact search, R@k and its chance, standardising; folders of one's own videos."""
import itertools

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import retrieval
from common import splits
from conftest import fails, judge_words, strict


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


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most at any moment; inputs do not count."""

    def __init__(self):
        super().__init__()
        self.storages, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.storages.values()))
        return output


def test_memory_of_a_search_does_not_grow_with_the_product_of_queries_and_gallery():
    most = {}
    for queries in (10, 300):
        gallery, query = torch.randn(1000, 8).double(), torch.randn(queries, 8).double()
        with Alive() as alive:
            retrieval.search(gallery, query, ids([0] * 1000, range(1000)), ids([0] * queries, range(queries)), 1, 4000)
        most[queries] = alive.most
    assert most[300] < most[10] + 300 * 1000                                    # bytes; a cosine has eight


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


# ---- one's own videos


@pytest.mark.parametrize("link", [False, True])
def test_videos_without_classes_have_neighbours_other_than_themselves_and_no_recall(own, checkpoint, tmp_path, capsys,
                                                                                   monkeypatch, link):
    monkeypatch.setattr(splits, "make_toy", pytest.fail)                        # which nobody asked for
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


def test_the_features_say_where_each_video_is_wherever_one_stood(own, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(own.parent)
    retrieval.main(["--checkpoint", str(checkpoint), "--gallery", own.name, "--query", own.name, "--k", "1",
                    "--windows", "1", "--workers", "0", "--out", "out", "--features", "f.npz"])
    arrays = np.load("f.npz")
    for side in ("gallery", "query"):
        assert arrays[f"{side}_files"].tolist() == [str(own / path) for path in arrays[f"{side}_paths"]]


def test_class_folders_of_ones_own_give_recall_and_neighbours(tiny, checkpoint, tmp_path):
    retrieval.main(judge_words(tiny, checkpoint, tmp_path, "--query", tiny / "UCF-101" / ".", "--k", 1, 5))
    result = strict(tmp_path / "retrieval-ucf101.json")                         # all 27, of them 18 in the gallery
    assert set(result["recall"]["checkpoint"]) == {"R@1", "R@5"} and len(result["splits"][0]["neighbours"]) == 27
    assert result["recall"]["chance"]["R@1"] == pytest.approx((18 * 5 / 17 + 9 * 6 / 18) / 27)


def test_a_gallery_that_is_empty_or_smaller_than_k_ends_in_one_sentence(tiny, checkpoint, own, tmp_path):
    (tmp_path / "empty").mkdir()
    for more, sentence in ((("--gallery", tmp_path / "empty"), "found 0"),
                           (("--gallery", tmp_path / "none"), "there is no folder"),
                           (("--k", 1, 19), "--k 19 is larger than the gallery, ucf101 train split 1: 18 videos"),
                           (("--gallery", own), f"--k 20 is larger than the gallery, {own}: 6 videos")):
        assert sentence in fails(retrieval.main, judge_words(tiny, checkpoint, tmp_path / "out", *more))
    (own / "video 0.avi").write_bytes(b"")
    too_many = judge_words(tiny, checkpoint, tmp_path / "out", "--gallery", own, "--k", 6)
    assert "5 videos" in fails(retrieval.main, too_many)
