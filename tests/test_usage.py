"""Wrong commands end in one sentence that names what is wrong; errors of libraries keep theirs."""
import re
import shlex

import pytest
import torch
from conftest import (
    CLASSES,
    drifting,
    evaluation_words,
    fails,
    listed,
    words,
    write_lists,
    write_video,
)

import finetune
import linear_probe
import pretrain
import retrieval
from common.distributed import run

SCRIPTS = dict(pretrain=pretrain, finetune=finetune, linear_probe=linear_probe, retrieval=retrieval)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of files to give wrongly; the flags below name paths in it."""
    here = tmp_path_factory.mktemp("here")
    (here / "a.avi").touch()
    (here / "empty").mkdir()
    for name in ("a", "b"):             # without class folders
        write_video(here / "plain" / f"{name}.avi", drifting(60))
        write_video(here / "short" / f"{name}.avi", drifting(3))
    write_lists(here / "same", CLASSES, trainlist01=[listed(0)], testlist01=[listed(0)])
    write_lists(here / "missing", CLASSES, trainlist01=["Down/none.avi"], testlist01=[listed(0)])
    write_lists(here / "blank", CLASSES, trainlist01=[])
    torch.save({"a": torch.ones(1)}, here / "tensors.pt")
    return here


WRONG = [                               # script, flags, regular expression of the sentence
    # flags
    ("pretrain", "--epoch 3", "unrecognized arguments: --epoch 3"),
    ("pretrain", "--epochs 0", "argument --epochs: invalid positive_int value: '0'"),
    ("pretrain", "--epochs many", "argument --epochs: invalid positive_int value: 'many'"),
    ("pretrain", "--lr 0", "argument --lr: invalid positive_float value: '0'"),
    ("pretrain", "--lr nan", "argument --lr: invalid positive_float value: 'nan'"),
    ("pretrain", "--lam -0.1", "argument --lam: invalid positive_float value: '-0.1'"),
    ("pretrain", "--weight-decay -1", "--weight-decay: invalid non_negative_float value: '-1'"),
    ("pretrain", "--warmup-epochs inf", "--warmup-epochs: invalid non_negative_float value: 'inf'"),
    ("pretrain", "--keep-every -1", "--keep-every: invalid non_negative_int value: '-1'"),
    ("pretrain", "--seed -1", "argument --seed: invalid non_negative_int value: '-1'"),
    ("pretrain", "--losses inst revers", "argument --losses: invalid choice: 'revers'"),
    ("pretrain", "--losses", "argument --losses: expected at least one argument"),
    ("pretrain", "--speeds 0 1", "argument --speeds: invalid positive_int value: '0'"),
    ("pretrain", "--equivariance spatial", "--equivariance spatial .*--losses inst equi only"),
    ("pretrain", "--amp fp8", "argument --amp: invalid choice: 'fp8'"),
    ("linear_probe", "--C big", "argument --C: invalid .* value: 'big'"),
    ("retrieval", "--k 0", "argument --k: invalid positive_int value: '0'"),
    ("finetune", "--crops five", "argument --crops: invalid choice: 'five'"),
    # sizes
    ("pretrain", "--batch-size 7", "--batch-size 7 must be a multiple of 2 "),
    ("pretrain", "--batch-size 26", "--batch-size 26 must be .* at most 24, the usable videos"),
    ("pretrain", "--accumulate 3", "--batch-size 8 must be a multiple of 6 "),
    ("pretrain", "--frames 61", "--batch-size 8 must be .* at most 0, the usable videos"),
    ("pretrain", "--speeds 30", "--batch-size 8 must be .* at most 0, the usable videos"),
    ("pretrain", "--dataset folder --data short", "at most 0, the usable videos"),
    ("finetune", "--batch-size 1", "--batch-size 1 must be .* at least two videos each"),
    ("finetune", "--batch-size 25", "--batch-size 25 must be .* at most 24, the usable videos"),
    # videos and lists
    ("pretrain", "--data none", r"the video folder none does not exist \(--data\)"),
    ("pretrain", "--data a.avi", r"the video folder a.avi does not exist \(--data\)"),
    ("pretrain", "--dataset toy --data empty", "empty is not the toy set: say with --dataset"),
    ("pretrain", "--dataset folder --data empty", "folder: no videos in empty"),
    ("retrieval", "--gallery none", "the video folder none does not exist"),
    ("pretrain", "--annotations none", r"no list trainlist01.txt in none .*\(--annotations\)"),
    ("pretrain", "--annotations blank", "no videos in "),
    ("pretrain", "--annotations missing", r"1 of 1 videos .*: Down/none.avi \(not found\)"),
    ("linear_probe", "--annotations same", "1 test videos are also training videos"),
    ("linear_probe", "--dataset folder --data plain", "has no labels to learn"),
    # splits
    ("pretrain", "--split 4", "argument --split: invalid choice: 4"),
    ("pretrain", "--split 2", "no list trainlist02.txt"),
    ("pretrain", "--dataset diving48 --split 2", "diving48 has one split, 1, but --split is 2"),
    ("finetune", "--split 1 3", "no list trainlist03.txt"),
    # weights
    ("finetune", "--checkpoint none.pt", "no such file: none.pt"),
    ("finetune", "--predict plain --checkpoint tensors.pt", "tensors.pt names no classes"),
    ("retrieval", "--arch s3dg", "backbone.pt does not fit: .*Missing key"),
    ("linear_probe", "--checkpoint tensors.pt", "does not say which network it holds: give arch"),
    ("pretrain", "--init none.pt", "no such file: none.pt"),
]


@pytest.mark.parametrize("script, flags, message", WRONG)
def test_a_wrong_command_ends_in_one_sentence(
        world, whole, here, tmp_path, monkeypatch, capsys, script, flags, message):
    monkeypatch.chdir(here)
    more = shlex.split(flags)
    argv = evaluation_words(script, world, whole, tmp_path / "out", *more)
    if script == "pretrain":
        argv = words(world, tmp_path / "out", *more)
    sentence = fails(SCRIPTS[script].main, argv)
    if sentence == "2":                 # argparse printed it
        sentence = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in sentence and re.search(message, sentence), sentence


def test_an_error_that_is_not_the_users_keeps_its_traceback():
    def fail():
        raise ValueError("a mistake in the code")
    with pytest.raises(ValueError, match="a mistake in the code"):
        run(fail)
