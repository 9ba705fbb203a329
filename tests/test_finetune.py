"""finetune.py: all layers, the last epoch, stopped and gone on with, several splits, predictions."""
import itertools
import json
import os
import shutil
import signal
from argparse import Namespace

import numpy as np
import pytest
import torch

import finetune
from common import splits
from common.judging import average_crops
from common.splits import load_split, scan
from conftest import (CPU, TINY_CLASSES, fails, judge_words, official, probe, retrieve, save_backbone, spied, strict,
                      tune)
from data import Windows
from models import classifier, load_backbone, new_backbone


def test_fine_tuning_changes_every_layer_and_tests_the_last_epoch(tiny, checkpoint, tmp_path, monkeypatch, capsys):
    scores = spied(monkeypatch)
    result = tune(tiny, checkpoint, tmp_path)
    assert f"fine-tuned on ucf101, split 1: {result['top1']['checkpoint']:.1%} (" in capsys.readouterr().out
    state = torch.load(tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 * 3                                               # 18 videos in batches of 6, 2 epochs
    begun = torch.load(checkpoint, weights_only=True)["backbone"]
    ended = {name: state["model"][f"backbone.{name}"] for name in begun}
    assert not any(value.equal(ended[name]) for name, value in begun.items() if value.numel() > 1)

    net = classifier(new_backbone("r3d18_narrow"), 3).to(memory_format=torch.channels_last_3d)
    net.load_state_dict(state["model"])                                         # what is on disk is what was tested
    split = load_split("ucf101", tiny / "UCF-101", part="test")
    windows = Windows(split, scan(split), T=4, size=16, step=2, windows=2)
    wanted, _ = average_crops(net.eval(), windows, 16, "centre", CPU, softmax=True)
    assert len(scores) == 1 and scores[0].equal(wanted) and len(wanted.unique()) > 9
    assert result["top1"]["checkpoint"] == (wanted.argmax(1) == torch.tensor(split.labels)).double().mean()


def test_fine_tuning_that_was_stopped_goes_on_to_the_same_numbers_bit_for_bit(tiny, checkpoint, tmp_path, monkeypatch,
                                                                             at_step):
    scores = spied(monkeypatch)
    tune(tiny, checkpoint, tmp_path / "whole")
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
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
    untrained = judge_words(tiny, checkpoint, tmp_path / "new", "--batch-size", 6, "--test")
    assert "holds no checkpoint" in fails(finetune.main, untrained)


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
        argv = judge_words(tiny, checkpoint, "x", *common_words, *more)
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


# ---- Predictions ----


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_test_video_has_a_line_with_the_class_of_highest_probability(tiny, checkpoint, tmp_path, monkeypatch):
    scores = spied(monkeypatch)
    result = tune(tiny, checkpoint, tmp_path)
    rows = lines(tmp_path / "finetune-ucf101-2x-predictions.jsonl")
    assert [row["path"] for row in rows] == official(1, "test")
    for row, score in zip(rows, scores[0].numpy()):
        assert row["label"] == row["path"].split("/")[0] and row["predicted"] == TINY_CLASSES[score.argmax()]
        assert list(row["probabilities"]) == [TINY_CLASSES[k] for k in np.argsort(-score)]
        assert list(row["probabilities"].values()) == pytest.approx(np.sort(score)[::-1].tolist(), abs=1e-4)
    assert np.mean([row["predicted"] == row["label"] for row in rows]) == result["top1"]["checkpoint"]


def test_a_folder_of_videos_is_classified_as_in_the_test_and_broken_ones_are_named(tiny, own, checkpoint, tmp_path,
                                                                                   capsys):
    tune(tiny, checkpoint, tmp_path / "out")
    trained = tmp_path / "out" / "finetune-ucf101-2x-1" / "checkpoint.pt"
    folder = tmp_path / "mine" / "below"
    folder.mkdir(parents=True)
    for n, path in enumerate(official(1, "test")):
        shutil.copy(tiny / "UCF-101" / path, folder / f"{n}.avi")
    (folder / "broken.avi").write_bytes(b"no video")
    finetune.main(["--predict", str(folder.parent), "--checkpoint", str(trained), "--windows", "2", "--crops", "centre",
                   "--amp", "off", "--workers", "0", "--out", str(tmp_path / "new")])
    rows = {row["path"]: row for row in lines(tmp_path / "new" / "predictions.jsonl")}      # clips as in training
    tested = lines(tmp_path / "out" / "finetune-ucf101-2x-predictions.jsonl")
    for n, row in enumerate(tested):
        assert rows[f"below/{n}.avi"]["probabilities"] == row["probabilities"]
    assert rows["below/broken.avi"]["predicted"] is None and len(rows) == 10
    assert rows["below/broken.avi"]["problem"].startswith("Invalid data")
    assert "9 of 10 videos scored; 1 could not be read" in capsys.readouterr().out


def test_what_predict_cannot_use_ends_in_one_sentence(tiny, own, checkpoint, tmp_path):
    assert "names no classes" in fails(finetune.main, ["--predict", own, "--checkpoint", checkpoint])
    tune(tiny, checkpoint, tmp_path / "out")
    trained = tmp_path / "out" / "finetune-ucf101-2x-1" / "checkpoint.pt"
    (tmp_path / "empty").mkdir()
    for folder, sentence in ((tmp_path / "none", "there is no folder"), (tmp_path / "empty", "found 0")):
        assert sentence in fails(finetune.main, ["--predict", folder, "--checkpoint", trained, "--out", tmp_path])
    assert not (tmp_path / "predictions.jsonl").exists()


def test_a_folder_that_cannot_be_read_is_named_before_the_others_are_classified(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(splits, "unread", lambda root, bad: [f"the folder {root}/x cannot be read: Permission denied"])
    split, index = splits.scan_folder(str(tiny / "UCF-101"), Namespace(index=None, workers=0))
    assert len(split.paths) == len(index) == 27 and split.labels == [None] * 27
    assert "x cannot be read: Permission denied" in capsys.readouterr().err


def test_a_fine_tuned_checkpoint_is_a_backbone_for_the_other_judges(tiny, checkpoint, tmp_path):
    tune(tiny, checkpoint, tmp_path)
    trained = tmp_path / "finetune-ucf101-2x-1" / "checkpoint.pt"
    state = torch.load(trained, weights_only=True)["model"]
    network = load_backbone(trained)
    assert all(value.equal(state[f"backbone.{name}"]) for name, value in network.state_dict().items())
    assert probe(tiny, trained, tmp_path / "probe")["checkpoint"]["arch"] == "r3d18_narrow"
