"""The tools that draw: their pictures and numbers are those of the data."""
import itertools
import math
import os
import re
from argparse import Namespace
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from conftest import CPU, LENGTHS, fails, load_checkpoint

from common.splits import load_split, scan
from data import MEAN, STD, Pairs, Tau, augment, collate
from models import TimeEquivariant, load_backbone
from tools import floor, neighbours, preview, psi


@pytest.fixture(scope="module")
def pairs(videos):
    """Clips of 4 frames of thirteen videos whose frames show their number."""
    split = scan(load_split("folder", videos))
    return Pairs(split, split.paths, 4, 16)


def texts(labels):
    return [label.get_text() for label in labels]


def test_the_preview_shows_the_frames_that_the_network_gets_and_where_they_lie(pairs):
    group = collate([pairs[0, 1]])
    figure = preview.draw(pairs, group)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    clips = augment(group["clips"], group["colour"]) * std + mean           # (2, 2, 3, T, H, W)
    for n, (line, *strips) in enumerate((figure.axes[:3], figure.axes[3:])):
        for k, strip in enumerate(strips):
            start, speed = group["start"][n, k].item(), pairs.speeds[group["speed"][n, k]]
            frames = [start + speed * t for t in range(pairs.T)]
            frames = frames[::-1] if group["direction"][n, k] else frames
            assert line.lines[2 * k].get_xdata().tolist() == frames
            assert texts(strip.get_xticklabels()) == [str(frame) for frame in frames]
            image = torch.tensor(strip.images[0].get_array()) / 255         # (16, 4 * 17, 3)
            shown = image.unflatten(1, (4, 17))[:, :, :16]
            wanted = clips[n, k].permute(2, 1, 3, 0)                        # (H, T, W, 3)
            torch.testing.assert_close(shown, wanted, atol=0.01, rtol=0)


def test_neighbours_have_a_cosine_a_sign_and_a_border_that_tell_right_from_wrong(pairs):
    files = ["gone.avi", *map(os.fsdecode, pairs.files[1:])]    # run/02.avi ... walk/11.avi
    classes = [path.split("/")[0] for path in sorted(LENGTHS)]
    figure = neighbours.draw(queries=10, neighbours=3, arrays=dict(
        query_files=files[:2], query_classes=classes[:2], gallery_files=files,
        gallery_classes=classes, nearest=np.array([[1, 12, -1], [0, 2, 12]]),
        cosines=np.array([[0.9, 0.2, 0], [0.8, 0.7, 0.1]])))
    shown = [(axes.get_xlabel(), axes.spines["top"].get_linestyle()) for axes in figure.axes]
    assert shown[:3] == [("run", "-"), ("+ run\ncosine 0.90", "-"), ("× walk\ncosine 0.20", "--")]
    assert not figure.axes[3].axison                            # no third neighbour
    assert texts(figure.axes[5].texts) == ["cannot be read"]
    frame = figure.axes[6].images[0].get_array()                # cropped to the middle six bits
    bits = [int(part.mean() > 127) for part in np.array_split(frame[:, :, 0], 6, axis=1)]
    assert bits == [0, 0, 1, 0, 0, 0]                           # of 16, in the middle of 32 frames


@pytest.fixture(scope="module")
def encoded(pairs):
    """84 random ψ, similar within a group -> their labels, cosines and statistics"""
    labels = collate([pairs[epoch, group] for epoch in range(7) for group in range(6)])
    x = torch.randn(42, 2, 6, generator=torch.Generator().manual_seed(0))
    x[:, 1] += x[:, 0]
    x = x.flatten(0, 1)
    names = "video", "start", "pq", "speed", "direction", "order"
    rows = [dict(zip(names, values)) for values in zip(*(labels[name].tolist() for name in names))]
    cosines = torch.cosine_similarity(x[:, None].double(), x.double(), dim=2).tolist()
    return rows, cosines, psi.statistics(x, labels, pairs.speeds, pairs.T)


def test_accuracy_chance_and_confusion_of_the_nearest_psi_equal_a_double_loop(encoded):
    rows, cosines, result = encoded
    chances, counts = Counter(), Counter()
    kinds = [dict(
        pq=row["pq"], speed=" ".join(f"{2 ** k}x" for k in row["speed"]),
        direction=" ".join("→←"[k] for k in row["direction"]),
        order=("before", "after", "overlap")[row["order"]]) for row in rows]
    for n, a in enumerate(rows):
        others = [m for m, b in enumerate(rows) if b["video"] != a["video"]]
        nearest = max(others, key=lambda m: cosines[n][m])
        for kind, name in kinds[n].items():
            counts[kind, name, kinds[nearest][kind]] += 1
            chances[kind] += np.mean([kinds[m][kind] == name for m in others]) / len(rows)
    for kind, scores in dict(result["kinds"], pq=result["pq"]).items():
        right = sum(count for (k, a, b), count in counts.items() if k == kind and a == b)
        assert scores["accuracy"] == pytest.approx(right / len(rows))
        assert scores["chance"] == pytest.approx(chances[kind])
    for kind, scores in result["kinds"].items():
        for a, row in zip(scores["names"], scores["matrix"], strict=True):
            wanted = np.array([counts[kind, a, b] for b in scores["names"]])
            assert row == pytest.approx(wanted / max(1, wanted.sum()))


def steps_of(a, b):
    """The (curve, step)s to which two rows of labels, of different videos, contribute."""
    shift = abs(a["start"][1] - a["start"][0] - b["start"][1] + b["start"][0])
    octaves = sum(abs(x - y) for x, y in zip(a["speed"], b["speed"]))       # classes of 1, 2, 4, 8
    turns = sum(x != y for x, y in zip(a["direction"], b["direction"]))
    doubled = next(x for x in (0, 1, 2, 4, 8, 16, 32, 64, 128) if shift <= x)
    steps = {
        ("shift", doubled): octaves == turns == 0,
        ("speed", octaves): shift <= 4 and turns == 0,
        ("direction", turns): shift <= 4 and octaves == 0}
    return [step for step, equal in steps.items() if equal]


def test_the_curves_of_psi_equal_a_double_loop(encoded):
    rows, cosines, result = encoded
    wanted = defaultdict(list)
    for n, m in itertools.combinations(range(len(rows)), 2):
        if rows[n]["video"] != rows[m]["video"]:
            for step in steps_of(rows[n], rows[m]):
                wanted[step].append(cosines[n][m])
    steps = {(name, step["up_to"]): (step["pairs"], step["cosine"])
             for name, curve in result["curves"].items() for step in curve}
    assert steps == {
        key: pytest.approx((len(values), np.mean(values))) for key, values in wanted.items()}


def test_psi_is_the_networks_own_in_eval_mode(whole, pairs, monkeypatch):
    monkeypatch.setattr(psi, "GROUPS", 6)
    state, file = load_checkpoint(whole), whole / "checkpoint.pt"
    network = TimeEquivariant("r3d18_narrow", state["args"]["losses"])
    network.load_state_dict(state["model"])
    models = dict(a=network, b=psi.with_psi(load_backbone(file), file))
    x = psi.encode(models, pairs, Namespace(workers=0, amp="off"), CPU)
    torch.testing.assert_close(x["a"], x["b"])
    assert not any(model.training for model in models.values())


def test_the_floor_of_eq_1_for_a_psi_that_knows_a_part_of_pq():
    e = math.exp(-10)                                           # d of orthogonal, over d of equal
    pq = 1, 2, 3, 3                                             # two videos each
    # an anchor of 1 or 2 has one positive and six negatives, one of 3 has three and four
    for known, of_1_and_2, of_3, hits in (
            ("aaaa", 1 + 6, 1 + 4, (1 / 7 + 3 / 7) / 2),
            ("aabb", 1 + 2 + 4 * e, 1 + 4 * e, (1 / 3 + 1) / 2),
            ("abcc", 1 + 6 * e, 1 + 4 * e, 1)):
        loss = (math.log(of_1_and_2) + math.log(of_3)) / 2
        assert floor.floor(pq, known) == pytest.approx((loss, hits))


def test_the_parts_of_pq_are_motion_then_order_then_a_coarse_shift():
    p, q = Tau(100, 1, False), Tau(140, 2, True)                # 8 frames each, 40 frames later
    motion, before, steps = (1, 2, False, True), 0, 1           # of 32 frames
    parts = (), motion, (*motion, before), (*motion, before, steps)
    assert tuple(floor.parts(p, q, 8).values()) == parts


@pytest.mark.parametrize("words, sentence", [
    ("--length 5", "--length 5 is too short for a clip: give 8 or more"),
    ("--length 9 --batch-size 5", "--batch-size 5 is not a multiple of 2 .*: give 4"),
    ("--equivariance both", "the floor is that of --equivariance temporal")])
def test_a_floor_that_cannot_be_computed_ends_in_one_sentence(words, sentence):
    assert re.search(sentence, fails(floor.main, words.split()))


def test_the_floor_falls_with_what_psi_knows_and_grows_with_the_batch(capsys):
    tables = []
    for words in ("--length 128 --batch-size 8", "--length 128 --batch-size 48"):
        floor.main(words.split())
        lines = capsys.readouterr().out.splitlines()[1:]
        tables.append([float(line.split("|")[1]) for line in lines])
    for small, large in zip(*tables):
        assert small < large
    assert all(table == sorted(table, reverse=True) for table in tables)
