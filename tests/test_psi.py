"""tools/psi.py: its statistics against planted ψ and a double loop, and the ψ of a checkpoint."""
import random

import numpy as np
import pytest
import torch
from conftest import fails, read_json
from PIL import Image

import data
from models import TimeEquivariant, load_backbone
from tools import psi

SPEEDS = [1, 2, 4]


def draw_labels(groups, seed):
    """Labels of groups of two of 20 videos, as data.Pairs has them."""
    rng, rows = random.Random(seed), []
    for _ in range(groups):
        pairs, labels = data.sample_pair([60, 70], 4, SPEEDS, rng)
        for video, pair in zip(rng.sample(range(20), 2), pairs):
            rows.append(labels | dict(video=video, start=[tau.start for tau in pair]))
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def planted(labels):
    """A ψ that is a smooth function of the relative transformation alone."""
    shift = (labels["start"][:, 1] - labels["start"][:, 0]) / 80
    ones = torch.ones(len(shift), 1)
    parts = [2 * labels["direction"] - 1, labels["speed"] - 1, shift[:, None], ones]
    return torch.cat([part.float() for part in parts], dim=1)


def noise(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


# ---- Statistics ----

def test_a_psi_that_is_the_transformation_gives_the_diagonal_and_falling_curves():
    labels = draw_labels(150, 0)
    result = psi.statistics(planted(labels), labels, SPEEDS, T=4)
    assert result["pq"]["accuracy"] == 1 and result["pq"]["chance"] < 0.05
    for kind in result["kinds"].values():
        assert kind["accuracy"] == 1 and kind["chance"] < 0.6
        assert all(row[k] == 1 or not any(row) for k, row in enumerate(kind["matrix"]))
    for curve in result["curves"].values():
        cosines = [step["cosine"] for step in curve]
        assert len(cosines) > 2 and cosines == sorted(cosines, reverse=True)
        assert cosines[0] > cosines[-1] + 0.05


def test_a_random_psi_is_at_chance_and_its_curves_are_flat():
    result = psi.statistics(noise(1200, 64), draw_labels(600, 1), SPEEDS, T=4)
    for part in (result["pq"], *result["kinds"].values()):
        assert part["accuracy"] == pytest.approx(part["chance"], abs=0.04)
    steps = [step for curve in result["curves"].values() for step in curve if step["pairs"] > 100]
    assert len(steps) > 10 and all(abs(step["cosine"]) < 0.05 for step in steps)


def steps_of(a, b):
    """{curve: step} to which two rows of labels, of different videos, contribute."""
    shift = abs(a["start"][1] - a["start"][0] - b["start"][1] + b["start"][0])
    octaves = sum(abs(x - y) for x, y in zip(a["speed"], b["speed"]))       # classes of 1, 2, 4
    turns = sum(x != y for x, y in zip(a["direction"], b["direction"]))
    steps = {}
    if octaves == turns == 0:
        steps["shift"] = next(x for x in (0, 1, 2, 4, 8, 16, 32, 64, 128) if shift <= x)
    if shift <= 4 and turns == 0:
        steps["speed"] = octaves
    if shift <= 4 and octaves == 0:
        steps["direction"] = turns
    return steps


def by_loops(unit, rows):
    """Cosines of each (curve, step), each anchor's nearest, and the chance of the same pq."""
    cosines, nearest, chances = {}, [], []
    for n, a in enumerate(rows):
        others = [m for m, b in enumerate(rows) if b["video"] != a["video"]]
        nearest.append(max(others, key=lambda m: float(unit[n] @ unit[m])))
        chances.append(np.mean([rows[m]["pq"] == a["pq"] for m in others]))
        for m in others:
            for step in steps_of(a, rows[m]).items():
                if n < m:
                    cosines.setdefault(step, []).append(float(unit[n] @ unit[m]))
    return cosines, nearest, np.mean(chances)


def test_the_statistics_equal_a_double_loop():
    labels = draw_labels(40, 2)
    x = planted(labels) + noise(80, 6)
    rows = [{name: value[n].tolist() for name, value in labels.items()} for n in range(80)]
    cosines, nearest, chance = by_loops((x / x.norm(dim=1, keepdim=True)).double(), rows)
    result = psi.statistics(x, labels, SPEEDS, T=4)

    steps = {(name, step["up_to"]): step for name, curve in result["curves"].items()
             for step in curve}
    assert steps.keys() == cosines.keys()
    for key, values in cosines.items():
        assert steps[key]["pairs"] == len(values)
        assert steps[key]["cosine"] == pytest.approx(np.mean(values), abs=1e-6)
    right = [rows[m]["pq"] == rows[n]["pq"] for n, m in enumerate(nearest)]
    assert result["pq"] == pytest.approx(dict(accuracy=np.mean(right), chance=chance))
    for name, kind in (("speed", lambda row: 3 * row["speed"][0] + row["speed"][1]),
                       ("direction", lambda row: 2 * row["direction"][0] + row["direction"][1]),
                       ("order", lambda row: row["order"])):
        matrix = np.zeros_like(result["kinds"][name]["matrix"])
        for n, m in enumerate(nearest):
            matrix[kind(rows[n]), kind(rows[m])] += 1
        matrix /= matrix.sum(1, keepdims=True).clip(1)
        assert np.allclose(result["kinds"][name]["matrix"], matrix)


# ---- ψ of a checkpoint ----

def save_checkpoint(path, **args):
    """Write what an evaluation reads of pretrain.py's checkpoint.pt -> path"""
    torch.manual_seed(3)
    args = dict(losses=["inst", "equi"], speeds=[1, 2], frames=4, size=16) | args
    model = TimeEquivariant("r3d18_narrow", args["losses"])
    for name, value in model.state_dict().items():
        if "heads" in name and "running_mean" in name:
            value.normal_()                                     # no batch of clips has these
    torch.save(dict(args=dict(arch="r3d18_narrow") | args, model=model.state_dict()), path)
    return path


def words(world, checkpoint, out):
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "videos", "--annotations", world, "--workers", 0,
        "--amp", "off", "--checkpoint", checkpoint, "--out", out)]


def test_the_picture_and_its_numbers_are_written_and_repeat(world, tmp_path, monkeypatch):
    monkeypatch.setattr(psi, "GROUPS", 30)
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt")
    results = []
    for folder in ("a", "b"):
        psi.main(words(world, checkpoint, tmp_path / folder / "psi.png"))
        results.append(read_json(tmp_path / folder / "psi.json"))
        assert np.asarray(Image.open(tmp_path / folder / "psi.png")).std() > 10
    assert results[0]["psi"] == results[1]["psi"]
    assert results[0]["psi"]["checkpoint"] != results[0]["psi"]["random"]
    assert (results[0]["videos"], results[0]["pairs"]) == (6, 60)
    names = results[0]["psi"]["checkpoint"]["kinds"]["speed"]["names"]
    assert names == ["1x 1x", "1x 2x", "2x 1x", "2x 2x"]


def test_psi_is_the_networks_own_in_eval_mode(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt")
    network = TimeEquivariant("r3d18_narrow", ["inst", "equi"]).eval()
    network.load_state_dict(torch.load(checkpoint)["model"])
    clips = torch.randn(4, 2, 3, 4, 16, 16)
    with torch.no_grad():
        x = psi.with_psi(load_backbone(checkpoint), checkpoint)(clips)["psi"]
        torch.testing.assert_close(x, network(clips)["psi"])


def test_a_checkpoint_without_psi_ends_in_one_sentence(world, whole, tmp_path):
    without = save_checkpoint(tmp_path / "inst.pt", losses=["inst"])
    for path in (whole / "backbone.pt", without):
        message = fails(psi.main, words(world, path, tmp_path / "psi.png"))
        assert f"{path} has no psi: give checkpoint.pt of a run with the term equi" in message
        assert not (tmp_path / "psi.png").exists()
