"""What the three judges share: crops and averages, that nothing is random, cached or dropped, what a result says."""
import hashlib
import json
import shutil
import subprocess

import numpy as np
import pytest
import torch

import data
import finetune
import linear_probe
import retrieval
from common import judging, splits
from common.judging import average_crops, predictions, views_of
from common.splits import Split, load_split, scan
from common.video import decode
from conftest import (CPU, ROOT, SHARP, TINY_CLASSES, TORCHRUN, by_hand, by_path, fails, free_port, judge_words, noisy,
                      official, probe, retrieve, save_backbone, spied, strict, tune, write_video)
from data import Windows, normalise
from models import classifier, new_backbone


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
    assert "not finite" in fails(linear_probe.main, judge_words(tiny, tmp_path / "nan.pt", tmp_path, "--frames", 4,
                                                          "--size", 16))


# ---- nothing random, cached, adapted or dropped


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
    monkeypatch.setattr(script, "load_for_judging", lambda args: networks.append(judging.load_for_judging(args))
                        or networks[-1])
    run(tiny, checkpoint, tmp_path)
    stored = torch.load(checkpoint, weights_only=True)["backbone"]
    assert all(value.equal(stored[name]) for name, value in networks[0].state_dict().items())
    assert not any(module.training for module in networks[0].modules())


def broken(tiny_copy, how):
    """Make the first test video unreadable; -> its path and what the scripts must say of it."""
    path = official(1, "test")[0]
    file = tiny_copy / "UCF-101" / path
    if how == "missing":
        file.unlink()
        return path, "not found"
    if how == "garbage":
        file.write_bytes(b"moov atom not found" * 50)
        return path, "Invalid data"
    split = load_split("ucf101", tiny_copy / "UCF-101", part="test")            # fewer frames than were counted
    scan(split)
    index = splits.default_index(split.root)
    entries = json.loads(index.read_text())
    entries[path][1] += 9
    index.write_text(json.dumps(entries))
    return path, "frame 32 was asked for, but only 24 frames decode"


@pytest.mark.parametrize("how", ["missing", "garbage", "shorter"])
def test_a_broken_test_video_is_wrong_and_named_and_changes_nothing_else(tiny_copy, checkpoint, found, tmp_path,
                                                                         monkeypatch, capsys, how):
    monkeypatch.setattr(splits, "MAX_BAD", 0.2)                                 # 1 of 9 is more than 5 %
    path, reason = broken(tiny_copy, how)
    result, arrays = retrieve(tiny_copy, checkpoint, tmp_path / "out")
    assert f"8 of 9 videos scored; 1 could not be read and count as wrong: {path} ({reason}" in capsys.readouterr().out
    others = {name: x for name, x in by_path(found[1]).items() if name != path}
    assert same(by_path(arrays), others)
    query = result["splits"][0]["query"]
    assert query["expected"] == 9 and query["scored"] == 8 and list(query["failed"]) == [path]
    assert reason in query["failed"][path] and str(tiny_copy) not in query["failed"][path]
    first = found[1]["gallery_classes"][found[1]["nearest"][:, 0]] == found[1]["query_classes"]
    assert result["recall"]["checkpoint"]["R@1"] == first[1:].sum() / 9

    result = probe(tiny_copy, checkpoint, tmp_path / "out")
    assert result["top1"]["checkpoint"] == sum(ok for name, ok in by_hand(found[1]).items() if name != path) / 9
    assert list(result["splits"][0]["test"]["failed"]) == [path]
    assert f"count as wrong: {path} ({reason}" in capsys.readouterr().out

    result = tune(tiny_copy, checkpoint, tmp_path / "out")["splits"][0]
    assert list(result["test"]["failed"]) == [path] and result["per_class"][TINY_CLASSES[0]] < 0.7
    assert f"count as wrong: {path} ({reason}" in capsys.readouterr().out

    for name in ("linear_probe-ucf101", "finetune-ucf101-2x"):
        rows = [json.loads(line) for line in (tmp_path / "out" / f"{name}-predictions.jsonl").read_text().splitlines()]
        assert [row["path"] for row in rows if row["predicted"] is None] == [path]
        assert rows[0]["problem"].startswith(reason) and len(rows) == 9


def test_a_broken_training_video_is_left_out_and_named(tiny_copy, checkpoint, tmp_path):
    path = official(1, "train")[3]
    (tiny_copy / "UCF-101" / path).write_bytes(b"")
    for result in (probe(tiny_copy, checkpoint, tmp_path / "a"), retrieve(tiny_copy, checkpoint, tmp_path / "b")[0]):
        part = result["splits"][0].get("train") or result["splits"][0]["gallery"]
        assert part["scored"] == 17 and list(part["failed"]) == [path]


def test_more_than_five_percent_missing_videos_stop_every_script(tiny_copy, checkpoint, tmp_path):
    broken(tiny_copy, "missing")
    for script in (linear_probe, retrieval, finetune):
        assert official(1, "test")[0] in fails(script.main, judge_words(tiny_copy, checkpoint, tmp_path))


def test_another_test_video_changes_no_other_feature(tiny_copy, checkpoint, found, tmp_path):
    path = official(1, "test")[4]
    write_video(tiny_copy / "UCF-101" / path, noisy(999, 0), **SHARP)
    got, before = by_path(retrieve(tiny_copy, checkpoint, tmp_path / "out")[1]), by_path(found[1])
    assert not np.array_equal(got.pop(path), before.pop(path)) and same(got, before)


# ---- several processes


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
finetune.average_crops = average
finetune.main({predict!r})
"""


def test_two_processes_give_the_numbers_of_one(tiny, checkpoint, found, probed, tmp_path, monkeypatch):
    argv = {name: judge_words(tiny, checkpoint, tmp_path, *more) for name, more in (
        ("linear_probe", ()), ("retrieval", ("--features", tmp_path / "found.npz", "--k", 1, 5, 10)),
        ("finetune", ("--epochs", 1, "--warmup-epochs", 0, "--batch-size", 6, "--lr", 1e-3)))}
    predict = judge_words(tiny, tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt", tmp_path, "--predict", tiny)
    script = tmp_path / "all.py"                                                # one start of Python for the three
    script.write_text(ALL_THREE.format(root=str(ROOT), scores=str(tmp_path / "scores"), argv=argv, predict=predict))
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

    predicted = (tmp_path / "predictions.jsonl").read_text()
    finetune.main(predict)
    assert len(predicted.splitlines()) == 27 and (tmp_path / "predictions.jsonl").read_text() == predicted


@pytest.mark.parametrize("script, work", [(linear_probe, "probe"), (retrieval, "compare")])
def test_the_processes_part_before_the_first_one_works_alone(tiny, checkpoint, tmp_path, monkeypatch, script, work):
    class Alone(Exception):
        """The first process has begun to work alone."""

    def begin(*_):
        assert not torch.distributed.is_initialized()
        raise Alone

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", free_port())):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(script, work, begin)
    with pytest.raises(Alone):
        script.main(judge_words(tiny, checkpoint, tmp_path, "--k", 1) if script is retrieval
                    else judge_words(tiny, checkpoint, tmp_path))


# ---- what a result says, and what ends in a sentence


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


def test_a_prediction_names_the_five_best_classes_best_first_and_why_there_is_none():
    classes = list("abcdefg")
    split = Split("", None, ["one", "two", "bad", "own"], [6, 0, 1, None], classes, {}, [])
    scores = np.array([[1, 7, 3, 6, 5, 2, 4], [-np.inf, 0.12345, 0.5, *[-np.inf] * 4], [np.nan] * 7, [0] * 7])
    rows = predictions(split, scores, {"bad": "moov atom not found"}, classes, "values", split=2)
    assert [list(row.get("values", {}).items()) for row in rows] == [
        [("b", 7), ("d", 6), ("e", 5), ("g", 4), ("c", 3)], [("c", 0.5), ("b", 0.1235)], [],    # rounded; -inf: none
        [("a", 0), ("b", 0), ("c", 0), ("d", 0), ("e", 0)]]                     # of equal ones the first
    assert [(row["path"], row["label"], row["predicted"], row["split"]) for row in rows] == [
        ("one", "g", "b", 2), ("two", "a", "c", 2), ("bad", "b", None, 2), ("own", None, "a", 2)]
    assert [row.get("problem") for row in rows] == [None, None, "moov atom not found", None]


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
        assert sentence in fails(script.main, judge_words(tiny, path, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", [linear_probe, finetune])
def test_videos_without_labels_or_an_own_test_set_end_in_one_sentence(tiny, own, checkpoint, tmp_path, script):
    assert "has no labels" in fails(script.main, ["--dataset", "folder", "--data", own, "--checkpoint", checkpoint])
    assert "27 of 27 test videos are training videos too" in fails(
        script.main, ["--dataset", "folder", "--data", tiny / "UCF-101", "--checkpoint", checkpoint])
