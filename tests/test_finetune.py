"""finetune.py: all layers, the last epoch, resuming, several splits, predictions."""
import os
import shutil
import signal
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLASSES,
    CPU,
    SHARP,
    assert_same_training,
    drifting,
    evaluation_words,
    load_checkpoint,
    official,
    plain_training,
    read_rows,
    tune,
    warmup_and_cosine,
    write_video,
)

import finetune
from common import UserError
from common.evaluation import average_crops
from common.splits import load_split, scan
from data import Clips, collate, colour, epoch_order
from models import classifier, load_backbone, new_backbone

RUN = "finetune-ucf101-2x-1"
PREDICTIONS = "finetune-ucf101-2x-predictions.jsonl"


@pytest.fixture(scope="module")
def tuned(world, checkpoint, tmp_path_factory):
    """A fine-tuning on split 1 -> its folder, result; read-only."""
    out = tmp_path_factory.mktemp("tuned")
    return out, tune(world, checkpoint, out)


# ---- Training and testing ----

def test_a_run_equals_a_plain_loop_over_labelled_clips(world, checkpoint, tmp_path, used_rates):
    given = ("--epochs 3 --batch-size 10 --lr 2e-5 --weight-decay 1500 --warmup-epochs 1.5 "
             "--frames 5 --size 20 --seed 7 --step 3 --log-every 1").split()
    finetune.main(evaluation_words(world, checkpoint, tmp_path, *given))
    folder = tmp_path / "finetune-ucf101-3x-1"
    state = load_checkpoint(folder)["model"]

    split = scan(load_split("ucf101", world / "UCF-101"))
    clips, right = Clips(split, split.paths, 5, 20, 3, 7), []
    torch.manual_seed(7)
    layers = OrderedDict(backbone=load_backbone(checkpoint), fc=torch.nn.Linear(128, 3))
    network = torch.nn.Sequential(layers)

    def loss_of(step):
        epoch, half = divmod(step, 2)                       # of 24 videos, 4 are left over
        batch = collate([clips[epoch, place] for place in range(10 * half, 10 * half + 10)])
        logits = network(colour(batch["clips"], batch["colour"]))
        right.append((logits.argmax(1) == batch["label"]).float().mean().item())
        return F.cross_entropy(logits, batch["label"])
    rates = warmup_and_cosine(2e-5, 3, 6)
    values = plain_training(network, loss_of, rates, 1500.0)
    log = read_rows(folder / "log.jsonl")
    assert_same_training(log, used_rates, state, rates, values, network)
    assert [line["train_acc"] for line in log] == pytest.approx(right, rel=1e-5)
    assert [line["epoch"] for line in log] == [0.5, 1, 1.5, 2, 2.5, 3]


def test_videos_of_fewer_frames_than_a_clip_are_trained_on(world_copy, checkpoint, tmp_path):
    write_video(world_copy / "UCF-101" / official(1, "train")[0], drifting(3), **SHARP)
    tune(world_copy, checkpoint, tmp_path, "--epochs", 1, "--batch-size", 24)       # needs all
    assert load_checkpoint(tmp_path / RUN)["step"] == 1


def test_each_process_trains_on_its_own_part_of_a_batch(world, checkpoint, tmp_path, monkeypatch):
    def first_batch(*args):
        videos.extend(next(step_loader(*args))["video"].tolist())
        raise RuntimeError("enough")
    videos, step_loader = [], finetune.step_loader
    monkeypatch.setattr(finetune, "step_loader", first_batch)
    monkeypatch.setattr(finetune, "rank_and_world", lambda: (1, 2))
    with pytest.raises(RuntimeError, match="enough"):
        tune(world, checkpoint, tmp_path)                   # eight videos a batch
    assert videos == epoch_order(0, 0, 24)[4:8].tolist()


def test_the_test_uses_the_weights_of_the_last_epoch(world, tuned):
    out, result = tuned
    state = load_checkpoint(out / RUN)
    assert state["step"] == 2 * 3                           # 2 epochs of 24 videos in batches of 8
    net = classifier(new_backbone("r3d18_narrow"), 3)
    net.load_state_dict(state["model"])
    split = scan(load_split("ucf101", world / "UCF-101", part="test"))
    args = Namespace(frames=4, size=16, step=2, windows=2, crops="centre", workers=0, amp="off")
    expected, _ = average_crops(net.eval(), split, args, CPU, softmax=True)
    assert len(expected.unique()) > 9                       # not all 0 and 1
    for row, values in zip(read_rows(out / PREDICTIONS), expected, strict=True):
        probabilities = [row["probabilities"][name] for name in CLASSES]
        assert probabilities == pytest.approx(values.tolist(), abs=1e-4)    # four digits
    right = expected.argmax(1) == torch.tensor(split.labels)
    assert result["top1"]["checkpoint"] == right.double().mean()


def test_a_stopped_fine_tuning_resumes_to_the_same_numbers_bit_for_bit(
        world, checkpoint, tuned, tmp_path, at_step):
    at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="SIGTERM: saved step 4 of 6"):
        tune(world, checkpoint, tmp_path)
    assert tune(world, checkpoint, tmp_path)["splits"] == tuned[1]["splits"]
    resumed, whole = (load_checkpoint(out / RUN)["model"] for out in (tmp_path, tuned[0]))
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_finished_fine_tuning_is_tested_again_with_other_crops(
        world, checkpoint, tuned, tmp_path):
    shutil.copytree(tuned[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / RUN / "checkpoint.pt").read_bytes()
    other = tune(world, checkpoint, tmp_path, "--crops", "ten", "--windows", 3)
    assert other["protocol"]["crops"] == "ten" and other["protocol"]["windows"] == 3
    assert (tmp_path / RUN / "checkpoint.pt").read_bytes() == before


def test_fine_tuning_does_not_resume_from_another_checkpoint_of_the_same_name(
        world, checkpoint, tmp_path):
    path = shutil.copy(checkpoint, tmp_path / "backbone.pt")
    tune(world, path, tmp_path, "--epochs", 1)
    torch.save(torch.load(path, weights_only=True) | dict(note="another file"), path)
    with pytest.raises(UserError, match=r"is of another run \(checkpoint \w{64} -> \w{64}\)"):
        tune(world, path, tmp_path, "--epochs", 1)


def test_several_splits_are_averaged_and_finished_ones_are_kept(world, checkpoint, tuned, tmp_path):
    shutil.copytree(tuned[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / RUN / "checkpoint.pt").read_bytes()
    result = tune(world, checkpoint, tmp_path, "--split", 1, 2)
    assert (tmp_path / RUN / "checkpoint.pt").read_bytes() == before
    assert result["splits"][0] == tuned[1]["splits"][0]
    assert [(row["split"], row["path"]) for row in read_rows(tmp_path / PREDICTIONS)] == [
        (number, path) for number in (1, 2) for path in official(number, "test")]
    assert [split["split"] for split in result["splits"]] == [1, 2]
    assert [split["test"]["expected"] for split in result["splits"]] == [9, 12]
    top1 = [split["checkpoint"]["top1"] for split in result["splits"]]
    assert result["top1"]["checkpoint"] == np.mean(top1)


def test_fine_tuning_from_scratch_is_reported_as_randomly_initialised(world, tmp_path, capsys):
    result = tune(world, "random", tmp_path, "--arch", "r3d18_narrow", "--frames", 4, "--size", 16,
                  "--epochs", 1)
    assert set(result["top1"]) == {"random"} and result["checkpoint"]["sha256"] is None
    sentence = f"split 1: {result['top1']['random']:.1%} randomly initialised (chance: 33.3%)"
    assert sentence in capsys.readouterr().out


# ---- Predictions ----

def test_predict_classifies_a_folder_as_the_test_does_and_names_broken_videos(
        world, tuned, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "folder"
    for n, path in enumerate(official(1, "test")):          # class folders of its own
        (folder / str(n % 2)).mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "UCF-101" / path, folder / str(n % 2) / f"{n}.avi")
    (folder / "1" / "broken.avi").write_bytes(b"no video")
    (folder / "0" / "link.avi").symlink_to("nowhere")
    os.mkfifo(folder / "0" / "pipe.avi")                    # to open it would wait for ever
    finetune.main([str(word) for word in (                  # --frames, --size, --step: the file's
        "--predict", folder, "--checkpoint", tuned[0] / RUN / "checkpoint.pt", "--windows", 2,
        "--crops", "centre", "--amp", "off", "--workers", 0, "--out", tmp_path / "new")])
    rows = {row["path"]: row for row in read_rows(tmp_path / "new" / "predictions.jsonl")}
    assert len(rows) == 10
    for n, row in enumerate(read_rows(tuned[0] / PREDICTIONS)):
        predicted = rows[f"{n % 2}/{n}.avi"]
        assert predicted["probabilities"] == row["probabilities"]
        assert predicted["label"] == str(n % 2)
    broken = rows["1/broken.avi"]
    assert broken["predicted"] is None and broken["problem"].startswith("Invalid data")
    sentence = "9 of 10 videos scored; 1 could not be read and have no prediction: 1/broken.avi"
    printed = capsys.readouterr()
    assert sentence in printed.out
    assert "skipped 2 links or pipes: 0/link.avi, 0/pipe.avi" in printed.err
