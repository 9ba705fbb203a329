"""What the three evaluations have in common: crops, averages, features, counts, result files."""
import contextlib
import hashlib
import json
import shutil
from argparse import Namespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    CLASSES,
    CPU,
    by_hand,
    evaluation_words,
    fails,
    official,
    probe,
    read_json,
    read_rows,
    retrieve,
    together,
    tune,
    words,
)

import data
import finetune
import linear_probe
import pretrain
import retrieval
from common import evaluation, splits
from common.evaluation import average_crops, load_network, predictions, result_folder, views_of
from common.splits import Split, load_split, scan
from common.video import decode
from data import eval_windows, normalise
from models import classifier, new_backbone

# ---- Crops and averages (Sec. 3.4) ----

def test_ten_crops_are_four_corners_and_the_centre_and_their_mirror_images():
    windows = torch.arange(2 * 3 * 3 * 20 * 28).view(2, 3, 3, 20, 28)
    corners = (0, 0), (0, 12), (4, 0), (4, 12), (2, 6)                  # and the centre
    crops = [windows[..., top:top + 16, left:left + 16] for top, left in corners]
    mirrored = [crops[k].flip(-1) for k in (1, 0, 3, 2, 4)]             # left becomes right
    assert views_of(windows, 16, "ten").equal(torch.cat(crops + mirrored))
    assert views_of(windows, 16, "centre").equal(torch.cat([crops[-1], crops[-1].flip(-1)]))


@pytest.mark.parametrize("crops, views, softmax", [("centre", 2, False), ("ten", 10, True)])
def test_the_average_over_crops_equals_the_average_of_single_crops(world, crops, views, softmax):
    split = scan(load_split("ucf101", world / "UCF-101", part="test"))
    torch.manual_seed(0)
    net = new_backbone("r3d18_narrow")
    net = (classifier(net, 5) if softmax else net).eval()
    args = Namespace(frames=4, size=16, step=2, windows=3, crops=crops, workers=0, amp="off")
    averages, failed = average_crops(net, split, args, CPU, softmax)
    assert not failed and averages.shape == (9, 5 if softmax else 128)
    for v in (0, 7):
        single = []
        for start in (0, 12, 24):                                       # 31 frames: evenly, 0 to 24
            frames = [start + 2 * t for t in range(4)]
            clips = decode(split.files[split.paths[v]], frames, 18)
            for view in views_of(clips[None], 16, crops):
                with torch.no_grad():
                    output = net(normalise(view[None]))[0]
                single.append(output.softmax(0) if softmax else output)
        assert len(single) == 3 * views
        mean = torch.stack(single).mean(0)
        torch.testing.assert_close(averages[v], mean, rtol=1e-5, atol=1e-6)


class Stopped(Exception):
    """Raised before the first backward pass, which on CPUs gives NaN in bf16 now and then."""


@pytest.mark.parametrize("amp, dtype", [("off", None), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("script, more", [
    (pretrain, ("--epochs", 1)), (pretrain, ("--epochs", 1, "--accumulate", 2)),
    (finetune, ("--epochs", 1, "--batch-size", 24)), (linear_probe, ())])
def test_the_network_computes_in_the_precision_of_amp(
        world, checkpoint, tmp_path, monkeypatch, script, more, amp, dtype):
    def note_precision(module, _):
        if isinstance(module, torch.nn.Conv3d):
            enabled = torch.is_autocast_enabled("cpu")
            used.add(torch.get_autocast_dtype("cpu") if enabled else None)

    used, parse_args = set(), script.parse_args
    monkeypatch.setattr(                                                # a CPU refuses the flag
        script, "parse_args", lambda argv: Namespace(**vars(parse_args(argv)) | dict(amp=amp)))
    argv = evaluation_words(world, checkpoint, tmp_path, *more)
    if script is pretrain:
        argv = words(world, tmp_path, *more)
    monkeypatch.setattr(torch.Tensor, "backward", Mock(side_effect=Stopped))
    with torch.nn.modules.module.register_module_forward_pre_hook(note_precision):
        with contextlib.suppress(Stopped):
            script.main(argv)
    assert used == {dtype}


@pytest.mark.parametrize("script, videos", [(linear_probe, 33), (retrieval, 33), (finetune, 9)])
def test_the_flags_of_the_clips_reach_them_and_each_video_is_decoded_once(
        world, checkpoint, tmp_path, monkeypatch, script, videos):
    def decode_spy(path, frames, size, boxes=None):
        if boxes is None:                                               # not of training
            assert frames == sum(eval_windows(31, 5, 3, 4), []) and size == round(24 * 8 / 7)
            decoded.append(path)
        return decode(path, frames, size, boxes)

    def views_spy(windows, size, crops):
        assert (size, crops) == (24, "ten") and len(windows) == 4
        return views_of(windows, size, crops)

    decoded = []
    monkeypatch.setattr(data, "decode", decode_spy)
    monkeypatch.setattr(evaluation, "views_of", views_spy)
    more = ("--epochs", 1, "--batch-size", 24) if script is finetune else ()
    script.main(evaluation_words(
        world, checkpoint, tmp_path, "--frames", 5, "--size", 24, "--step", 3, "--windows", 4,
        "--crops", "ten", *more))
    assert len(decoded) == len(set(decoded)) == videos                  # for both networks, too


def test_clips_are_those_of_the_checkpoint_or_else_the_papers(checkpoint, tmp_path):
    state = torch.load(checkpoint, weights_only=True)["backbone"]
    torch.save(state, tmp_path / "plain.pt")                            # without arguments
    for path, more, expected in (
            (checkpoint, (), (4, 16)), (tmp_path / "plain.pt", (), (16, 128)),
            (checkpoint, ("--frames", "9", "--size", "20"), (9, 20))):
        args = linear_probe.parse_args([
            "--dataset", "ucf101", "--data", "videos", "--arch", "r3d18_narrow", "--checkpoint",
            str(path), *more])
        load_network(args)
        assert (args.frames, args.size) == expected


def test_a_network_whose_output_is_not_finite_gives_no_number(world, tmp_path):
    net = new_backbone("r3d18_narrow")
    net.stem[0].weight.data.fill_(float("nan"))
    torch.save(dict(arch=net.arch, backbone=net.state_dict(), args={}), tmp_path / "nan.pt")
    argv = evaluation_words(world, tmp_path / "nan.pt", tmp_path, "--frames", 4, "--size", 16)
    assert "output is finite for 0 of these" in fails(linear_probe.main, argv)


def by_path(arrays):
    """{path: feature} of gallery and query, from the arrays of --features."""
    return {path: x for side in ("gallery", "query")
            for path, x in zip(arrays[f"{side}_paths"].tolist(), arrays[f"{side}_features"])}


# ---- A feature depends on its video and the checkpoint alone ----

def same(one, other):
    """Whether two {path: feature} are bitwise equal, in the same order."""
    return list(one) == list(other) and all(np.array_equal(one[path], other[path]) for path in one)


def test_features_are_the_same_bit_for_bit_whatever_the_seed_and_the_workers(
        world, checkpoint, retrieved, tmp_path):
    _, arrays = retrieve(world, checkpoint, tmp_path, "--seed", 1, "--workers", 2)
    assert same(by_path(arrays), by_path(retrieved[1]))


def test_both_networks_are_evaluated_as_loaded_and_the_random_one_is_that_of_the_seed(
        world, checkpoint, tmp_path, monkeypatch):
    networks, load_networks = {}, evaluation.load_networks

    def spy(args, device):
        networks.update(load_networks(args, device))
        return networks

    monkeypatch.setattr(evaluation, "load_networks", spy)
    probe(world, checkpoint, tmp_path, "--seed", 3)
    torch.manual_seed(3)
    expected = dict(checkpoint=torch.load(checkpoint, weights_only=True)["backbone"],
                    random=new_backbone("r3d18_narrow").state_dict())
    for name in expected:
        state = networks[name].state_dict()
        assert all(value.equal(expected[name][key]) for key, value in state.items())
        assert not any(module.training for module in networks[name].modules())


# ---- Broken videos ----

def break_first_test_video(world_copy, how):
    """Make it missing, garbage, or shorter than the cached scan says -> its path, the reason."""
    path = official(1, "test")[0]
    file = world_copy / "UCF-101" / path
    if how == "missing":
        file.unlink()
        return path, "not found"
    if how == "garbage":
        file.write_bytes(b"moov atom not found" * 50)
        return path, "Invalid data"
    split = scan(load_split("ucf101", world_copy / "UCF-101", part="test"))
    index = splits.default_index(split.root)
    entries = json.loads(index.read_text())
    entries[str(file)][1] += 9
    index.write_text(json.dumps(entries))
    return path, "only 31 frames decode"


@pytest.mark.parametrize("how", ["missing", "garbage", "shorter"])
def test_a_broken_test_video_is_named_counts_as_an_error_and_changes_nothing_else(
        world_copy, checkpoint, retrieved, tmp_path, monkeypatch, capsys, how):
    monkeypatch.setattr(splits, "MAX_BAD", 0.2)                         # 1 of 9 is more than 5 %
    path, reason = break_first_test_video(world_copy, how)
    sentence = f"8 of 9 videos scored; 1 could not be read and count as errors: {path} ({reason}"

    result, arrays = retrieve(world_copy, checkpoint, tmp_path)
    assert sentence in capsys.readouterr().out
    others = {name: x for name, x in by_path(retrieved[1]).items() if name != path}
    assert same(by_path(arrays), others)
    query = result["splits"][0]["query"]
    assert query["expected"] == 9 and query["scored"] == 8 and list(query["failed"]) == [path]
    assert reason in query["failed"][path] and str(world_copy) not in query["failed"][path]
    nearest = retrieved[1]["gallery_classes"][retrieved[1]["nearest"][:, 0]]
    right = nearest == retrieved[1]["query_classes"]
    assert result["recall"]["checkpoint"]["R@1"] == right[1:].sum() / 9

    result = probe(world_copy, checkpoint, tmp_path)
    assert sentence in capsys.readouterr().out
    right = [ok for name, ok in by_hand(retrieved[1]).items() if name != path]
    assert result["top1"]["checkpoint"] == sum(right) / 9

    tuned = tune(world_copy, checkpoint, tmp_path)
    assert sentence in capsys.readouterr().out
    assert list(tuned["splits"][0]["test"]["failed"]) == [path]
    assert tuned["splits"][0]["checkpoint"]["per_class"][CLASSES[0]] < 0.7     # of three

    for name, result in (("linear_probe-ucf101", result), ("finetune-ucf101-2x", tuned)):
        rows = read_rows(tmp_path / f"{name}-predictions.jsonl")
        assert [row["path"] for row in rows if row["predicted"] is None] == [path]
        assert rows[0]["problem"].startswith(reason) and len(rows) == 9
        right = [row["predicted"] == row["label"] for row in rows]
        assert result["top1"]["checkpoint"] == np.mean(right)


def test_a_broken_training_video_is_left_out_and_named(world_copy, checkpoint, tmp_path, capsys):
    path = official(1, "train")[3]
    (world_copy / "UCF-101" / path).write_bytes(b"")
    for evaluate, part in ((probe, "train"), (retrieve, "gallery"), (tune, "train")):
        result = evaluate(world_copy, checkpoint, tmp_path)
        result = result[0] if evaluate is retrieve else result
        counts = result["splits"][0][part]
        assert counts["scored"] == 23 and list(counts["failed"]) == [path]
        printed = capsys.readouterr().out
        assert f"23 of 24 videos scored; 1 could not be read and are left out: {path}" in printed


# ---- Several processes ----

def test_two_processes_give_the_numbers_of_one(
        world, checkpoint, retrieved, probed, tmp_path, capsys):
    def by_two(main, *more, weights=checkpoint):
        argv = evaluation_words(world, weights, tmp_path, *more)
        assert together(2, main, argv) == [0, 0]

    by_two(linear_probe.main)
    assert capsys.readouterr().out.count("loaded r3d18_narrow") == 1    # only rank 0 prints
    result = read_json(tmp_path / "linear_probe-ucf101.json")
    assert result["top1"] == probed["top1"] and result["splits"] == probed["splits"]

    by_two(retrieval.main, "--features", tmp_path / "features.npz", "--k", 1, 5, 10)
    arrays = dict(np.load(tmp_path / "features.npz"))
    assert all(np.array_equal(arrays[name], x) for name, x in retrieved[1].items())
    assert read_json(tmp_path / "retrieval-ucf101.json")["splits"] == retrieved[0]["splits"]

    by_two(finetune.main, "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 8, "--lr", 1e-3)
    trained = tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt"
    folder = shutil.copytree(world / "UCF-101", tmp_path / "folder")
    for name in ("y.avi", "z.avi"):                                     # one for each process
        (folder / name).write_bytes(b"broken")
    by_two(finetune.main, "--predict", folder, weights=trained)
    rows = read_rows(tmp_path / "predictions.jsonl")
    finetune.main(evaluation_words(world, trained, tmp_path, "--predict", folder))      # by one
    assert rows == read_rows(tmp_path / "predictions.jsonl") and len(rows) == 35
    assert [row["path"] for row in rows if "problem" in row] == ["y.avi", "z.avi"]
    predicted = {row["path"]: row.get("probabilities") for row in rows}
    assert len({tuple(values.values()) for values in predicted.values() if values}) > 27
    for row in read_rows(tmp_path / "finetune-ucf101-2x-predictions.jsonl"):
        assert row["probabilities"] == predicted[row["path"]]           # the test ran on two, too


# ---- Result files, and errors of the user ----

def test_a_result_says_what_it_is(world, checkpoint, tmp_path, capsys):
    protocol = dict(dataset="ucf101", split=[1], windows=2, step=2, frames=4, size=16, seed=0,
                    crops="centre")
    for evaluate in (probe, retrieve, tune):
        result = evaluate(world, checkpoint, tmp_path)
        result = result[0] if evaluate is retrieve else result
        assert result["protocol"].items() >= protocol.items()
        sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        assert result["checkpoint"] == dict(
            path=str(checkpoint), sha256=sha256, arch="r3d18_narrow",
            trained_with=torch.load(checkpoint, weights_only=True)["args"])
        assert set(result["versions"]) == {
            "python", "torch", "torchvision", "av", "numpy", "sklearn"}
        split = result["splits"][0]
        names = ("gallery", "query") if evaluate is retrieve else ("train", "test")
        for name, part, videos in zip(names, ("train", "test"), (24, 9)):
            assert split[name] == dict(
                title=f"ucf101 {part} split 1", expected=videos, scored=videos, failed={})
        printed = capsys.readouterr().out
        assert "ucf101 train split 1: 24 of 24 videos scored" in printed
        assert "ucf101 test split 1: 9 of 9 videos scored" in printed
        assert "chance: 33.3%" in printed


def test_results_go_to_out_or_to_the_folder_of_the_checkpoint():
    def folder(out, checkpoint):
        return str(result_folder(Namespace(out=out, checkpoint=checkpoint), "r3d18"))

    assert folder("out", "run/backbone.pt") == folder("out", "random") == "out"
    assert folder(None, "run/backbone.pt") == "run"
    assert folder(None, "random") == "runs/random-r3d18"


def test_a_prediction_names_the_five_best_classes_best_first_or_why_there_is_none():
    classes, paths = list("abcdefg"), ["one", "two", "bad", "own"]
    split = Split("", None, paths, [6, 0, 1, None], classes, {})
    scores = np.array([
        [1, 7, 3, 6, 5, 2, 4],
        [-np.inf, 0.12345, 0.5, *[-np.inf] * 4],                        # -inf: cannot be predicted
        [np.nan] * 7,
        [0] * 7])                                                       # of equal ones the first
    failed = {"bad": "moov atom not found"}
    rows = predictions(split, scores, failed, classes, "values", split=2)
    assert [list(row.get("values", {}).items()) for row in rows] == [
        [("b", 7), ("d", 6), ("e", 5), ("g", 4), ("c", 3)],
        [("c", 0.5), ("b", 0.1235)],
        [],
        [("a", 0), ("b", 0), ("c", 0), ("d", 0), ("e", 0)]]
    assert [(row["path"], row["label"], row["predicted"], row["split"]) for row in rows] == [
        ("one", "g", "b", 2), ("two", "a", "c", 2), ("bad", "b", None, 2), ("own", None, "a", 2)]
    assert [row.get("problem") for row in rows] == [None, None, "moov atom not found", None]


@pytest.mark.parametrize("script", [linear_probe, finetune])
def test_videos_without_labels_or_a_test_set_of_their_own_end_in_one_sentence(
        world, own, checkpoint, script):
    argv = ["--dataset", "folder", "--checkpoint", checkpoint, "--data"]
    assert "has no labels" in fails(script.main, [*argv, own])
    sentence = "33 test videos are also training videos"
    assert sentence in fails(script.main, [*argv, world / "UCF-101"])
