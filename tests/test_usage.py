"""Wrong commands: each ends in one sentence that says what is wrong, where, and what to do."""
import re

import pytest
import torch
from conftest import CLASSES, drifting, fails, judging, listed, words, write_lists, write_video

import finetune
import linear_probe
import pretrain
import retrieval

SCRIPTS = dict(pretrain=pretrain, finetune=finetune, linear_probe=linear_probe, retrieval=retrieval)


def write(file, content):
    """A file with that content, in a folder that may have to be made -> its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
    return file


def tensors(file, value):
    torch.save(value, file)
    return file


def lists(here, **changed):
    """Lists of `world` that name its first video alone, for training and test, or have other lines -> their folder."""
    return write_lists(here / "lists", CLASSES, **dict(trainlist01=[listed(0)], testlist01=[listed(0)]) | changed)


def diving(here, content):
    write(here / "Diving48_V2_train.json", content)
    return "--dataset", "diving48", "--annotations", here


def hmdb(here, line):
    write(here / "wave_test_split1.txt", line)
    return "--dataset", "hmdb51", "--annotations", here


def unlabelled(here, frames=60):
    """Two videos without class folders."""
    for name in "ab":
        write_video(here / "plain" / f"{name}.avi", drifting(frames))
    return "--dataset", "folder", "--data", here / "plain"


def empty(here):
    (here / "empty").mkdir()
    return here / "empty"


WRONG = [                                                                       # script, flags (of a folder), sentence
    # flags
    ("pretrain", lambda here: ["--epoch", 3], "unrecognized arguments: --epoch 3"),
    ("pretrain", lambda here: ["--epochs", 0], "--epochs must be at least 1, but is 0"),
    ("pretrain", lambda here: ["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    ("pretrain", lambda here: ["--lr", 0], "--lr must be above 0, but is 0"),
    ("pretrain", lambda here: ["--lr", "nan"], "--lr must be above 0, but is nan"),
    ("pretrain", lambda here: ["--lam", -0.1], "--lam must be above 0, but is -0.1"),
    ("pretrain", lambda here: ["--lam", 1e-9], "step 1: similarities are not finite: .* lam=1e-09 is too small"),
    ("pretrain", lambda here: ["--weight-decay", -1], "--weight-decay must be at least 0, but is -1"),
    ("pretrain", lambda here: ["--weight-decay", "inf"], "--weight-decay must be at most .*, but is inf"),
    ("pretrain", lambda here: ["--warmup-epochs", "inf"], "--warmup-epochs must be at most .*, but is inf"),
    ("pretrain", lambda here: ["--warmup-epochs", "nan"], "--warmup-epochs must be at least 0, but is nan"),
    ("pretrain", lambda here: ["--losses", "inst", "revers"], "argument --losses: invalid choice: 'revers'"),
    ("pretrain", lambda here: ["--losses"], "argument --losses: expected at least one argument"),
    ("pretrain", lambda here: ["--speeds", 0, 1], "--speeds must lie between 1 and 1023"),
    ("pretrain", lambda here: ["--speeds", 30], "shorter than 91 frames.*too few to train on"),
    ("pretrain", lambda here: ["--equivariance", "spatial"], "--equivariance spatial .*--losses inst equi only"),
    ("pretrain", lambda here: ["--accumulate", 3], "--batch-size 8 does not split .* in 3 part.*a multiple of 6"),
    ("pretrain", lambda here: ["--knn-every", 1, *unlabelled(here)], "--knn-every needs labels"),
    ("pretrain", lambda here: ["--keep-every", -1], "--keep-every must be at least 0, but is -1"),
    ("pretrain", lambda here: ["--log-every", 0], "--log-every must be at least 1, but is 0"),
    ("pretrain", lambda here: ["--seed", -1], "--seed must be at least 0, but is -1"),
    ("pretrain", lambda here: ["--seed", 2 ** 64], f"--seed must be at most {2 ** 63 - 1}, but is {2 ** 64}"),
    ("linear_probe", lambda here: ["--C", "big"], "--C must be a number above 0, or auto"),
    ("linear_probe", lambda here: ["--C", "nan"], "--C must be a number above 0, or auto"),
    ("retrieval", lambda here: ["--k", 0], "--k must be at least 1, but is 0"),
    ("retrieval", lambda here: ["--k", 25], "--k 25 is larger than the gallery, ucf101 train split 1: 24 videos"),
    ("retrieval", lambda here: ["--features", "found.csv"], "--features must end in .npz, but is found.csv"),
    ("retrieval", lambda here: ["--windows", 0], "--windows must be at least 1, but is 0"),
    ("finetune", lambda here: ["--step", 0], "--step must be at least 1, but is 0"),
    ("finetune", lambda here: ["--test", "--batch-size", 8], "--test: .* holds no checkpoint: train f"),
    ("finetune", lambda here: ["--crops", "five"], "argument --crops: invalid choice: 'five'"),
    # sizes
    ("pretrain", lambda here: ["--frames", 1], "--frames must be at least 2, but is 1"),
    ("pretrain", lambda here: ["--frames", 61], "24 shorter than 61 frames.*too few to train on"),
    ("pretrain", lambda here: ["--size", 7], "--size must be at least 8, but is 7"),
    ("retrieval", lambda here: ["--size", 10 ** 9], "--size must be at most 1024, but is 1000000000"),
    ("pretrain", lambda here: ["--batch-size", 7], "--batch-size 7 does not split .*a multiple of 2"),
    ("pretrain", lambda here: ["--batch-size", 26], "--batch-size 26 is larger than the 24 usable videos"),
    ("pretrain", lambda here: ["--arch", "s3dg"], "--arch s3dg needs --frames above 4 and --size above 16, but they"),
    ("retrieval", lambda here: ["--checkpoint", "random", "--arch", "s3dg", "--frames", 4], "--arch s3dg needs --f"),
    ("finetune", lambda here: ["--batch-size", 1], "--batch-size 1 gives 1 process.* fewer than two videos each"),
    ("finetune", lambda here: ["--batch-size", 25], "--batch-size 25 is larger than the 24 usable videos"),
    ("pretrain", lambda here: unlabelled(here, 3), "2 shorter than 4 frames: a.avi, b.avi; too few to train on"),
    # paths
    ("pretrain", lambda here: ["--data", here / "none"], "the video folder .*none does not exist"),
    ("pretrain", lambda here: ["--data", write(here / "a.avi", "")], "the video folder .*a.avi is a file"),
    ("pretrain", lambda here: ["--dataset", "toy", "--data", empty(here)], "is not the toy set: say with --dataset"),
    ("pretrain", lambda here: ["--index", write(here / "list.txt", "a 1")], "list.txt is no index of a scan"),
    ("pretrain", lambda here: ["--index", write(here / "V2.json", '[{"vid_name": "a"}]')], "V2.json is no index of"),
    ("pretrain", lambda here: ["--dataset", "folder", "--data", empty(here)], "looked for videos in .*empty, found 0"),
    ("pretrain", lambda here: ["--out", write(here / "taken", "")], r"cannot write .*taken/.* \(--out\): File exists"),
    ("linear_probe", lambda here: ["--out", write(here / "taken", "")], r"cannot write .*taken.* \(--out\): File ex"),
    ("finetune", lambda here: ["--batch-size", 8, "--out", write(here / "taken", "")], r"taken.* \(--out\): Not a dir"),
    ("retrieval", lambda here: ["--features", write(here / "a", "").parent / "a/b.npz"], r"b.npz \(--features\): F"),
    ("pretrain", lambda here: ["--index", here], r"cannot write .*: Is a directory; give another --index"),
    ("retrieval", lambda here: ["--gallery", here / "none"], "there is no folder .*none; a gallery or query is"),
    ("retrieval", lambda here: ["--query", here], "looked for videos in .*, found 0"),
    ("retrieval", lambda here: ["--query", here, "--dataset", "toy"], "one is a folder, the other part of the toy set"),
    # lists
    ("pretrain", lambda here: ["--annotations", here / "none"],
     "no list trainlist01.txt in .*none.* \\(--annotations\\)"),
    ("pretrain", lambda here: ["--annotations", lists(here, classInd=["Down"])],
     "classInd.txt, line 1: 'Down' is not understood; expected is a number and"),
    ("pretrain", lambda here: ["--annotations", lists(here, trainlist01=[])], "the list .*trainlist01.txt is empty"),
    ("pretrain", lambda here: ["--annotations", lists(here, trainlist01=["Fly/a.avi"])], "is of class 'Fly', which"),
    ("pretrain", lambda here: ["--annotations", lists(here, trainlist01=["Down/none.avi"])],
     "looked for 1 listed videos in .*, found 0; the first missing: Down/none.avi"),
    ("finetune", lambda here: ["--annotations", lists(here, trainlist01=["../a.avi"])],
     "names '../a.avi', which lies outside"),
    ("pretrain", lambda here: ["--annotations", lists(here)], "1 videos.*, 1 usable; too few to train on"),
    ("linear_probe", lambda here: ["--annotations", lists(here)], "1 of 1 test videos are training videos too"),
    ("pretrain", lambda here: hmdb(here, "one.avi\n"), "wave_test_split1.txt, line 1: 'one.avi' is not understood"),
    ("pretrain", lambda here: diving(here, "[{"), "V2_train.json is not a list of objects with vid_name and label"),
    ("pretrain", lambda here: diving(here, '[{"vid_name": "a"}]'), "V2_train.json, entry 1: {'vid_name': 'a'}"),
    ("pretrain", lambda here: diving(here, "7"), "V2_train.json is not a list of .*, but 7"),
    ("pretrain", lambda here: diving(here, '[{"vid_name": "a", "label": 48}]'), "is of class '48', which the list of"),
    # splits
    ("pretrain", lambda here: ["--split", 4], "argument --split: invalid choice: 4"),
    ("pretrain", lambda here: ["--split", 2], "no list trainlist02.txt"),
    ("pretrain", lambda here: ["--dataset", "diving48", "--split", 2], "diving48 has one split, 1, but --split is 2"),
    ("finetune", lambda here: ["--split", 1, 3], "no list trainlist03.txt"),
    ("linear_probe", lambda here: unlabelled(here), "has no labels to learn"),
    # checkpoints
    ("finetune", lambda here: ["--checkpoint", here / "none.pt"], "there is no file .*none.pt"),
    ("retrieval", lambda here: ["--checkpoint", here], "is a folder: give a file in it, such as backbone.pt"),
    ("retrieval", lambda here: ["--checkpoint", write(here / "a.pt", "text")], "a.pt is not a file of tensors"),
    ("retrieval", lambda here: ["--arch", "s3dg"], "backbone.pt holds r3d18_narrow, but arch is s3dg"),
    ("retrieval", lambda here: ["--checkpoint", tensors(here / "a.pt", {3: torch.ones(1)})], "a.pt holds no state"),
    ("retrieval", lambda here: ["--checkpoint", tensors(here / "a.pt", dict(args=[1], backbone={"a": torch.ones(1)}))],
     "a.pt holds no state dict"),
    ("linear_probe", lambda here: ["--checkpoint", tensors(here / "a.pt", {"a": torch.ones(1)})],
     "does not say which network it holds: give arch, one of"),
    ("pretrain", lambda here: ["--out", tensors(here / "checkpoint.pt", {"a": torch.ones(1)}).parent],
     "checkpoint.pt is not a checkpoint of this script: give another --out"),
    # devices
    ("pretrain", lambda here: ["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
    ("pretrain", lambda here: ["--workers", -1], "--workers must be at least 0, but is -1"),
    pytest.param("pretrain", lambda here: ["--sync-bn"], "--sync-bn needs GPUs", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
]


@pytest.mark.parametrize("script, flags, said", WRONG)
def test_a_wrong_invocation_ends_in_one_sentence(world, whole, tmp_path, monkeypatch, capsys, script, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    more = flags(tmp_path / "here")
    argv = judging(script, world, whole, tmp_path / "out", *more)
    if script == "pretrain":
        argv = words(world, tmp_path / "out", *more)
    code = fails(SCRIPTS[script].main, argv)
    error = capsys.readouterr().err.splitlines()[-1] if code == "2" else code   # 2: argparse has said it
    assert ": error: " in error and re.search(said, error), error
