"""Each script's defaults are the paper's; wrong commands end in one sentence."""
import os
import re
import shlex
import sys

import pytest
import torch
from conftest import drifting, evaluation_words, fails, words, write_lists, write_video

import finetune
import linear_probe
import pretrain
import retrieval
from common import UserError, evaluation, flags
from common.distributed import run
from models import BACKBONES, LOSSES

DATASETS = ("ucf101", "hmdb51", "diving48", "diving48v1", "kinetics400", "folder")


# ---- Defaults ----

PAPER = dict(epochs=400, batch_size=192, frames=16, size=128, lr=3e-4, warmup_epochs=10)
COMMON = dict(amp="off", seed=0, index=None, annotations=None)
TRAINING = COMMON | dict(weight_decay=1e-4, log_every=10, save_every=60)


@pytest.mark.parametrize("arch", BACKBONES)
@pytest.mark.parametrize("dataset", DATASETS)
def test_pretraining_takes_the_papers_values(dataset, arch):        # Sec. 3.4, 4.1, 4.2, Table 2
    expected = dict(PAPER)
    if dataset == "kinetics400":
        expected |= dict(epochs=200, batch_size=dict(s3dg=256, r2plus1d18=192).get(arch, 512))
    if arch == "r2plus1d18":
        expected |= dict(size=112)
    if arch == "s3dg":
        expected |= dict(frames=32)
    given = ["--dataset", dataset, "--data", "videos"]
    args = vars(pretrain.parse_args([*given, "--arch", arch]))
    assert args.items() >= (expected | TRAINING).items()
    assert args["out"] == f"runs/{dataset}-{arch}" and args["arch"] == arch
    default = "r2plus1d18" if dataset.startswith("diving48") else "r3d18"
    assert pretrain.parse_args(given).arch == default


def test_pretraining_is_row_k_of_table_1():
    args = vars(pretrain.parse_args([]))
    toy = dict(epochs=200, batch_size=32, frames=8, size=24, lr=2e-3, warmup_epochs=10)
    assert args.items() >= (toy | TRAINING | dict(
        dataset="toy", data="toy-videos", split=1, arch="r3d18_narrow", losses=[*LOSSES],
        equivariance="temporal", speeds=[1, 2, 4, 8], lam=0.1, init=None, accumulate=1,
        sync_bn=False, compile=False, tensorboard=False, keep_every=0)).items()


@pytest.mark.parametrize("dataset", ["toy", *DATASETS])
def test_fine_tuning_takes_the_papers_values(dataset):              # Sec. 3.4, 4.2
    expected = dict(epochs=100, batch_size=32, lr=1e-4, warmup_epochs=5)
    if dataset == "hmdb51":
        expected |= dict(epochs=200)
    if dataset == "toy":
        expected = dict(epochs=30, batch_size=16, lr=1e-3, warmup_epochs=1)
    args = vars(finetune.parse_args(["--dataset", dataset, "--data", "videos"]))
    expected |= dict(crops="ten", windows=10, split=[1], checkpoint=None, predict=None)
    assert args.items() >= (expected | TRAINING).items()


@pytest.mark.parametrize("script", [finetune, linear_probe, retrieval])
@pytest.mark.parametrize("dataset", ["toy", *DATASETS])
def test_evaluations_skip_three_frames_and_none_on_diving48(dataset, script):   # Sec. 3.4, 4.2
    step = 1 if dataset.startswith("diving48") else 4
    assert script.parse_args(["--dataset", dataset, "--data", "videos"]).step == step
    assert script.parse_args(["--dataset", dataset, "--data", "videos", "--step", "2"]).step == 2


def test_features_are_those_of_section_3_4():
    expected = COMMON | dict(
        crops="centre", windows=10, split=[1], checkpoint=None, out=None)
    probe, retrieve = (vars(script.parse_args([])) for script in (linear_probe, retrieval))
    assert probe.items() >= (expected | dict(C=1e-3)).items()
    more = dict(gallery="train", query="test", k=[1, 5, 10, 20], features=None)
    assert retrieve.items() >= (expected | more).items()
    assert retrieval.parse_args(["--k", "5", "1", "5"]).k == [1, 5]


def test_a_short_run_warms_up_for_a_tenth_of_its_epochs():
    data = ["--dataset", "ucf101", "--data", "videos", "--epochs"]
    for script, longest in ((pretrain, 10), (finetune, 5)):
        for epochs, warmup in ((1, 0.1), (20, 2), (40, min(4, longest)), (300, longest)):
            assert script.parse_args([*data, str(epochs)]).warmup_epochs == warmup


def test_a_zero_is_no_default():
    zeros = ["--warmup-epochs", "0", "--weight-decay", "0", "--save-every", "0", "--workers", "0"]
    for script in (pretrain, finetune):
        args = script.parse_args(zeros)
        assert {args.warmup_epochs, args.weight_decay, args.save_every, args.workers} == {0}


@pytest.mark.parametrize("cuda, processes, workers", [
    (False, 1, 11), (False, 4, 2), (False, 12, 1), (True, 1, 12), (True, 4, 3), (True, 24, 1)])
def test_workers_are_the_cores_of_a_process_less_one_that_trains(
        monkeypatch, cuda, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert flags.default_workers() == workers
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(900))
    assert flags.default_workers() == 16


# ---- Wrong commands ----

@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of files to give wrongly; the flags below name paths in it."""
    here = tmp_path_factory.mktemp("here")
    (here / "empty").mkdir()
    for name in ("a", "b"):                                 # without class folders
        write_video(here / "plain" / f"{name}.avi", drifting(60))
    write_lists(here / "ucf" / "ucfTrainTestlist", ["Run"])
    torch.save({"a": torch.ones(1)}, here / "tensors.pt")
    return here


WRONG = [                               # script, flags, regular expression of the sentence
    (pretrain, "--epoch 3", "unrecognized arguments: --epoch 3"),
    (pretrain, "--epochs 0", "argument --epochs: invalid positive_int value: '0'"),
    (pretrain, "--lr nan", "argument --lr: invalid positive_float value: 'nan'"),
    (pretrain, "--weight-decay -1", "--weight-decay: invalid non_negative_float value: '-1'"),
    (pretrain, "--seed -1", "argument --seed: invalid non_negative_int value: '-1'"),
    (pretrain, "--equivariance spatial", "--equivariance spatial .*--losses inst equi only"),
    (linear_probe, "--C big", "argument --C: invalid .* value: 'big'"),
    (pretrain, "--batch-size 7", "--batch-size 7 is not a multiple of 2 .*: give 6$"),
    (pretrain, "--batch-size 26", "--batch-size 26 is larger than the 24 usable videos: give 24$"),
    (pretrain, "--accumulate 3", "--batch-size 8 is not a multiple of 6 .*: give 6$"),
    (pretrain, "--accumulate 13", r"--batch-size 8 is less than 26 \(.*13 part\(s\)\)$"),
    (pretrain, "--batch-size 1", r"--batch-size 1 is less than 2 \(groups of 2 .*: give 2$"),
    (finetune, "--batch-size 1", "--batch-size 1 is less than 2 .*two videos each .*: give 2$"),
    (finetune, "--batch-size 25", "--batch-size 25 is larger than the 24 usable videos: give 24$"),
    (pretrain, "--warmup-epochs 3.5", "--warmup-epochs 3.5 is longer than --epochs 3"),
    (finetune, "--epochs 2 --warmup-epochs 3", "--warmup-epochs 3.0 is longer than --epochs 2"),
    (pretrain, "--dataset ucf101 --data none", "video folder none does not exist$"),
    (pretrain, "--dataset toy --data empty", "empty is not the toy set: say with --dataset"),
    (pretrain, "--dataset toy --data ucf", "ucf is not the toy set: say with --dataset"),
    (retrieval, "--gallery none", "the video folder none does not exist"),
    (retrieval, "--gallery plain --dataset toy", "--gallery and --query are a folder each, or"),
    (pretrain, "--annotations none", r"no list trainlist01.txt in none .*\(--annotations\)"),
    (pretrain, "--dataset diving48 --split 2", "diving48 has one split, 1, but --split is 2"),
    (finetune, "--checkpoint none.pt", "no such file: none.pt"),
    (finetune, "--predict plain --checkpoint tensors.pt", "tensors.pt names no classes"),
    (pretrain, "--init tensors.pt", "tensors.pt does not fit: .*Missing key"),
]


@pytest.mark.parametrize("script, flags, message", WRONG)
def test_a_wrong_command_ends_in_one_sentence(
        world, checkpoint, here, tmp_path, monkeypatch, script, flags, message):
    monkeypatch.chdir(here)
    more = shlex.split(flags)
    argv = evaluation_words(world, checkpoint, tmp_path / "out", *more)
    if script is pretrain:
        argv = words(world, tmp_path / "out", *more)
    sentence = fails(script.main, argv)
    assert ": error: " in sentence and re.search(message, sentence), sentence


@pytest.mark.parametrize("flags, sentence", [
    ("--init none.pt", "no such file: none.pt"),
    ("--sync-bn", "--sync-bn needs a GPU"),
    ("--tensorboard", "--tensorboard needs a package: pip install tensorboard"),
    ("--compile", "--compile fails here: .*No working C.. compiler")])
def test_what_a_flag_needs_is_tried_before_the_scan(
        world, tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setenv("PATH", "none")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tensorboard", None)       # as if it were not installed
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(pretrain, "load_and_scan", pytest.fail)
    assert re.search(sentence, fails(pretrain.main, words(world, tmp_path, *flags.split())))


@pytest.mark.parametrize("script", [linear_probe, retrieval, finetune])
def test_a_checkpoint_is_loaded_before_the_scan(world, tmp_path, monkeypatch, script):
    monkeypatch.setattr(evaluation, "load_and_scan", pytest.fail)
    argv = evaluation_words(world, "none.pt", tmp_path)
    assert "no such file: none.pt" in fails(script.main, argv)


def test_a_batch_for_fine_tuning_may_be_odd():
    flags.check_batch_size(25, 1, 2, "", 30)
    with pytest.raises(UserError, match="8 is larger than the 7 usable videos: give 6$"):
        flags.check_batch_size(8, 3, 6, "", 7)


def test_a_data_set_needs_its_folder_and_predict_its_checkpoint():
    for argv, sentence in (
            (["--dataset", "ucf101"], "--dataset ucf101 needs --data, the folder of its videos"),
            (["--predict", "videos"], "--predict needs --checkpoint, a checkpoint.pt of this")):
        assert sentence in fails(finetune.main, argv)


def test_an_error_that_is_not_the_users_keeps_its_traceback():
    def fail():
        raise ValueError("a mistake in the code")
    with pytest.raises(ValueError, match="a mistake in the code"):
        run(fail)
