"""tools/psi.py: what ψ tells apart, against planted ψ and a double loop, and the ψ that a checkpoint holds."""
import json
import random

import numpy as np
import pytest
import torch
from conftest import fails
from PIL import Image

import data
from models import TimeEquivariant, load_backbone
from tools import psi

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
    found = psi.tell_apart(planted(labels), labels, SPEEDS, T=4)
    assert found["partner"]["share"] == 1 and found["partner"]["chance"] < 0.05
    for name, kinds in found["kinds"].items():
        assert kinds["share"] == 1 and kinds["chance"] < 0.6
        assert all(row is None or row[k] == 1 for k, row in enumerate(kinds["matrix"])), name
    for curve in found["curves"].values():
        cosines = [step["cosine"] for step in curve]
        assert len(cosines) > 2 and cosines == sorted(cosines, reverse=True) and cosines[0] > cosines[-1] + 0.05


def test_a_psi_that_knows_nothing_is_at_chance_and_its_curves_are_flat():
    labels = drawn(600, 1)
    found = psi.tell_apart(torch.randn(1200, 64, generator=torch.Generator().manual_seed(0)), labels, SPEEDS, T=4)
    for part in (found["partner"], *found["kinds"].values()):
        assert part["share"] == pytest.approx(part["chance"], abs=0.04)
    steps = [step for curve in found["curves"].values() for step in curve if step["pairs"] > 100]
    assert len(steps) > 10 and all(abs(step["cosine"]) < 0.05 for step in steps)


def similar(a, b):
    """{curve: step} to which two rows of labels, of different videos, contribute."""
    shift = abs(a["start"][1] - a["start"][0] - b["start"][1] + b["start"][0])
    speed = sum(abs(x - y) for x, y in zip(a["speed"], b["speed"]))             # classes of 1, 2, 4: octaves
    turned = sum(x != y for x, y in zip(a["direction"], b["direction"]))
    steps = {}
    if speed == turned == 0:
        steps["shift"] = next(x for x in (0, 1, 2, 4, 8, 16, 32, 64, 128) if shift <= x)
    if shift <= 4 and turned == 0:
        steps["speed"] = speed
    if shift <= 4 and speed == 0:
        steps["direction"] = turned
    return steps


def by_loops(unit, rows):
    """Cosines of each (curve, step), each anchor's nearest, and how often a random other video's has the same pq."""
    steps, nearest, chances = {}, [], []
    for n, a in enumerate(rows):
        others = [m for m, b in enumerate(rows) if b["video"] != a["video"]]
        nearest.append(max(others, key=lambda m: float(unit[n] @ unit[m])))
        chances.append(np.mean([rows[m]["pq"] == a["pq"] for m in others]))
        for m in others:
            for step in similar(a, rows[m]).items():
                if n < m:
                    steps.setdefault(step, []).append(float(unit[n] @ unit[m]))
    return steps, nearest, np.mean(chances)


def test_what_psi_tells_apart_equals_a_double_loop():
    labels = drawn(40, 2)
    x = planted(labels) + torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    rows = [{name: value[n].tolist() for name, value in labels.items()} for n in range(80)]
    steps, nearest, chance = by_loops((x / x.norm(dim=1, keepdim=True)).double(), rows)
    found = psi.tell_apart(x, labels, SPEEDS, T=4)
    seen = {(name, step["up_to"]): step for name, curve in found["curves"].items() for step in curve}
    assert seen.keys() == steps.keys() and all(seen[key]["pairs"] == len(x) for key, x in steps.items())
    assert all(seen[key]["cosine"] == pytest.approx(np.mean(x), abs=1e-6) for key, x in steps.items())
    right = [rows[m]["pq"] == rows[n]["pq"] for n, m in enumerate(nearest)]
    assert found["partner"] == pytest.approx(dict(share=np.mean(right), chance=chance))
    for name, kind in (("speed", lambda row: 3 * row["speed"][0] + row["speed"][1]),
                       ("direction", lambda row: 2 * row["direction"][0] + row["direction"][1]),
                       ("order", lambda row: row["order"])):
        for k, line in enumerate(found["kinds"][name]["matrix"]):
            of = [kind(rows[m]) for n, m in enumerate(nearest) if kind(rows[n]) == k]
            assert line == (pytest.approx([of.count(c) / len(of) for c in range(len(line))]) if of else None)


# ---- ψ of a checkpoint ----

def save_checkpoint(path, **args):
    """What pretrain.py writes, as far as judging reads it."""
    torch.manual_seed(3)
    args = dict(arch="r3d18_narrow", losses=["inst", "equi"], speeds=[1, 2], frames=4, size=16) | args
    torch.save(dict(args=args, model=TimeEquivariant("r3d18_narrow", args["losses"]).state_dict()), path)
    return path


def words(world, checkpoint, out, *more):
    return [str(word) for word in (
        "--dataset", "ucf101", "--data", world / "videos", "--annotations", world, "--workers", 0, "--amp", "off",
        "--checkpoint", checkpoint, "--out", out, *more)]


def strict(file):
    """A result file; NaN and Infinity are no JSON."""
    return json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {file}"))


def test_the_picture_is_drawn_and_its_numbers_stand_beside_it_the_same_each_time(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(psi, "GROUPS", 30)
    checkpoint = save_checkpoint(tmp_path / "checkpoint.pt")
    found = []
    for folder in ("a", "b"):
        psi.main(words(world, checkpoint, tmp_path / folder / "new" / "psi.png"))
        found.append(strict(tmp_path / folder / "new" / "psi.json"))
        assert np.asarray(Image.open(tmp_path / folder / "new" / "psi.png")).std() > 10
    assert found[0]["psi"] == found[1]["psi"] and found[0]["psi"]["checkpoint"] != found[0]["psi"]["random"]
    assert found[0]["videos"] == 6 and found[0]["pairs"] == 60 and found[0]["replaced"] == {}
    assert found[0]["checkpoint"]["path"] == str(checkpoint) and len(found[0]["checkpoint"]["sha256"]) == 64
    assert found[0]["psi"]["checkpoint"]["partner"].keys() == {"share", "chance"}
    assert found[0]["psi"]["checkpoint"]["kinds"]["speed"]["words"] == ["1x 1x", "1x 2x", "2x 1x", "2x 2x"]
    said = capsys.readouterr().out
    assert "The nearest ψ of another video" in said and "ucf101 test split 1: 6 videos" in said


def test_a_drawn_curve_is_the_one_that_was_found_and_a_matrix_says_its_numbers():
    labels = drawn(40, 2)
    noise = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    found = dict(checkpoint=psi.tell_apart(planted(labels) + noise, labels, SPEEDS, T=4),
                 random=psi.tell_apart(noise, labels, SPEEDS, T=4))
    figure = psi.draw(found, "title")
    axes = {place.get_xlabel().split()[2 if "difference" in place.get_xlabel() else 0]: place for place in figure.axes}
    for number, network in enumerate(found):
        line = axes["shift,"].lines[number]
        assert line.get_ydata().tolist() == [step["cosine"] for step in found[network]["curves"]["shift"]]
    looks = {(line.get_marker(), line.get_linestyle()) for line in axes["shift,"].lines[:2]}
    assert len(looks) == 2                                                      # told apart without colour, too
    shares = [100 * share for row in found["checkpoint"]["kinds"]["order"]["matrix"] for share in row]
    assert [text.get_text() for text in axes["order"].texts] == [f"{share:.0f}" for share in shares if share >= 0.5]


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
        found = psi.with_psi(load_backbone(checkpoint), checkpoint)(clips)["psi"]
        torch.testing.assert_close(found, whole(clips)["psi"])


def test_a_checkpoint_without_psi_ends_in_one_sentence(world, whole, tmp_path):
    broken = save_checkpoint(tmp_path / "broken.pt")
    stored = torch.load(broken, weights_only=True)
    del stored["model"]["heads.psi.6.bias"]
    torch.save(stored, broken)
    for path, sentence in (
            (whole / "backbone.pt", "backbone.pt has no psi: it is in checkpoint.pt of pretrain.py only"),
            ("random", "random has no psi: it is in checkpoint.pt of pretrain.py only"),
            (save_checkpoint(tmp_path / "inst.pt", losses=["inst"]), "the run that wrote it had no"),
            (broken, "does not fit the psi of r3d18_narrow, which has 14 tensors: 1 missing (6.bias)")):
        out = tmp_path / "psi.png"
        assert sentence in fails(psi.main, words(world, path, out, "--arch", "r3d18_narrow"))
        assert not out.exists() and not out.with_suffix(".json").exists()
