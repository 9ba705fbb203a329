"""What a run does with videos that break, numbers that are not finite, and files that mean harm."""
import ast
import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, drifting, fails, forkserver, judging, lines, listed, stored, train, words,
                      write_video)

import data
import finetune
import pretrain
import retrieval
from common import precision, progress
from common.checkpoints import load_checkpoint
from common.video import VideoError, decode
from models import load_backbone, r3d18_narrow
from tools import soak

# ---- Broken videos ----

def test_mutated_files_give_frames_or_a_video_error_and_neither_hang_nor_crash(tmp_path):
    jobs = soak.mutations(soak.originals(tmp_path)[:3], 60)                     # the slow part: tools/soak.py
    assert {job.what for job in jobs} == {"cut", "flip 1", "flip 16", "flip 256", "head 16"}
    with forkserver():
        outcomes = soak.verdicts(jobs)
    kinds = {outcome.verdict for outcome in outcomes}
    assert len(outcomes) == 60 and kinds == {"all frames", "some frames, then VideoError", "VideoError"}, outcomes


def test_a_video_stream_without_a_decoder_is_a_video_error(tmp_path):
    path = tmp_path / "unknown.mp4"
    soak.write_h264(path, drifting(6, side=48), options={})
    assert b"avc1" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"avc1", b"none"))               # a codec that nobody knows
    with pytest.raises(VideoError, match="unknown.mp4: no decoder"):
        decode(path, [0])


def breaks_after_the_scan(monkeypatch, *damage):
    """When the videos have been counted, each damage(file) happens to one of them."""
    step_loader = pretrain.step_loader

    def damage_and_load(pairs, *args):
        for k, happens in enumerate(damage):
            happens(Path(os.fsdecode(pairs.files[5 * k % 24])))
        return step_loader(pairs, *args)
    monkeypatch.setattr(pretrain, "step_loader", damage_and_load)


def shorten(file):
    write_video(file, drifting(3))


def garble(file):
    file.write_bytes(b"garbage" * 100)


def become_a_folder(file):
    file.unlink()
    file.mkdir()


def test_videos_that_vanish_turn_unreadable_or_end_early_are_replaced_alike_and_named_once(world, tmp_path,
                                                                                           monkeypatch):
    monkeypatch.setattr(progress, "MAX_BAD", 0.2)
    breaks_after_the_scan(monkeypatch, Path.unlink, garble, shorten, become_a_folder)
    weights = []
    for n, workers in enumerate((0, 2)):
        out = tmp_path / f"out{n}"
        run = train(shutil.copytree(world, tmp_path / f"world{n}"), out, "--workers", workers)
        weights.append(run["model"])
        named = lines(out, "unreadable")
        assert len(named) == len({line["unreadable"] for line in named}) == lines(out)[-1]["replaced"] == 4
        problems = " | ".join(line["problem"] for line in named)
        for reason in ("No such file", "Invalid data", "only 3 frames decode", "Is a directory"):
            assert reason in problems
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_more_than_the_stated_share_of_bad_videos_stops_the_run_and_says_so(copy_of_world, tmp_path, monkeypatch):
    breaks_after_the_scan(monkeypatch, Path.unlink, garble)                     # 2 of 24 are more than 5 %
    with pytest.raises(ValueError, match="^2 of 24 videos turned out to be unreadable, more than 5%: .*log.jsonl"):
        train(copy_of_world, tmp_path / "out")


def test_an_error_of_a_loaders_process_is_one_sentence(copy_of_world, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "MAX_BAD", 1)
    breaks_after_the_scan(monkeypatch, *[Path.unlink] * 24)
    said = fails(pretrain.main, words(copy_of_world, tmp_path / "out", "--workers", 1))
    assert re.fullmatch(r"\S+: error: 10 videos in a row are unreadable, the last: .*: No such file or directory", said)


# ---- Numbers that are not finite ----

@pytest.fixture
def network(monkeypatch):
    """network[0]: the model that pretrain.main or finetune.main trains."""
    made, build, head = [], pretrain.TimeEquivariant, finetune.classifier
    monkeypatch.setattr(pretrain, "TimeEquivariant", lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(finetune, "classifier", lambda *args: made.append(head(*args)) or made[-1])
    return made


def spoil(weight, value="nan"):
    torch.nn.init.constant_(weight, float(value))


@pytest.mark.parametrize("name, said", [
    ("speed", r"the loss is not finite: loss nan, inst [\d.]+, equi [\d.]+, speed nan, di"),
    ("psi", "similarities are not finite: a feature is NaN")])
def test_a_loss_that_is_not_finite_stops_with_step_terms_and_videos_and_keeps_the_checkpoint(
        world, tmp_path, network, at_step, name, said):
    at_step(4, lambda: spoil(network[0].heads[name][-1].weight))
    with pytest.raises(ValueError, match=f"^step 5: {said}") as caught:
        train(world, tmp_path)
    assert len(set(re.findall(r"v_\w+\.avi", str(caught.value)))) == 8 and "is from before" in str(caught.value)
    assert stored(tmp_path)["step"] == 3


@pytest.mark.parametrize("terms", [("inst", "speed"), ("speed",)])              # step 6 raises an error, or is done
def test_the_first_step_that_was_not_finite_is_named_when_others_followed_it(world, tmp_path, network, at_step, terms):
    at_step(4, lambda: spoil(network[0].heads["speed"][-1].weight))
    said = r"^step 5: the loss is not finite: loss nan, (inst [\d.]+, )?speed nan "
    with pytest.raises(ValueError, match=said) as caught:
        train(world, tmp_path, "--log-every", 1000, "--losses", *terms)
    paths = [listed(v) for v in data.epoch_order(0, 1, 24)[8:16]]               # epoch 1, second batch
    assert sorted(re.findall(r"\w+/v_\w+\.avi", str(caught.value))) == sorted(paths)
    assert stored(tmp_path)["step"] == 3


def test_fine_tuning_stops_at_a_loss_that_is_not_finite_too(world, whole, tmp_path, network, at_step):
    at_step(2, lambda: spoil(network[0][-1].weight, "inf"))
    with pytest.raises(ValueError, match=r"^step 3: the loss is not finite: loss nan \(.*the videos: ") as caught:
        finetune.main(judging("finetune", world, whole, tmp_path, "--batch-size", 8, "--epochs", 2))
    assert len(set(re.findall(r"v_\w+\.avi", str(caught.value)))) == 8


def test_weights_and_statistics_that_are_not_finite_are_never_saved(world, tmp_path, network, at_step):
    at_step(3, lambda: spoil(network[0].backbone.stem[1].running_var, "inf"))   # training does not use it
    with pytest.raises(ValueError, match="^step 3: 1 weights are not finite, the first backbone.stem.1.running_var"):
        train(world, tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "backbone.pt").exists()


def test_an_fp16_step_that_overflows_is_left_out_and_logged(world, tmp_path, monkeypatch):
    monkeypatch.setitem(precision.AMP, "fp16", torch.bfloat16)                  # fp16 is very slow on CPUs
    train(world, tmp_path, "--amp", "fp16", "--epochs", 1)
    assert [(line["overflow"], line["loss_scale"]) for line in lines(tmp_path)] == [(0, 65536)] * 3
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, expected in ((float("inf"), dict(overflow=1, loss_scale=1)), (1, dict(overflow=0, loss_scale=1))):
        before = weight.item()
        scaler.scale((weight * factor).sum()).backward()
        assert precision.step_scaled(scaler, optimizer, weight.sum()) == expected
        assert (weight.item() == before) == (expected["overflow"] == 1)
        optimizer.zero_grad()
    off = torch.amp.GradScaler("cpu", enabled=False)
    assert precision.step_scaled(off, optimizer, weight.sum()) == {}


# ---- Files that mean harm ----

def calls(tree):
    """(name of a called function as written, {keyword: value}) of every call in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}


SHELLS = re.compile(r"os\.(system|popen|exec|spawn)|subprocess|pickle|joblib|eval$|exec$|yaml")
RISKY = {"pickle", "subprocess", "marshal", "shelve", "joblib", "yaml"}


def test_files_are_loaded_without_running_what_is_in_them():
    loads = 0
    for file in [*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/*.py")]:
        for name, keywords in calls(ast.parse(file.read_text())):
            assert name != "torch.load" or keywords["weights_only"] == "True", file
            assert name not in ("np.load", "numpy.load") or keywords.get("allow_pickle", "False") == "False", file
            loads += name in ("torch.load", "np.load")
    assert loads > 2


@pytest.mark.parametrize("file", [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")], ids=lambda file: file.name)
def test_nothing_goes_through_a_shell_or_a_format_that_holds_code(file):
    tree = ast.parse(file.read_text())
    for name, keywords in calls(tree):
        assert not SHELLS.match(name) and "shell" not in keywords
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not RISKY & {alias.name.split(".")[0] for node in imports for alias in node.names}


class Payload:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


def hostile(path, form, payload):
    """A file with code in it: among tensors, a bare pickle, or a whole module as older projects save it."""
    if form == "legacy":
        path.write_bytes(pickle.dumps(payload))
    elif form == "module":
        network = r3d18_narrow()
        network.payload = payload
        torch.save(network, path)
    else:
        torch.save(dict(step=1, model=payload), path)


@pytest.mark.parametrize("form", ["tensors", "legacy", "module"])
def test_code_in_a_checkpoint_is_not_run(world, tmp_path, capsys, form):
    out = tmp_path / "out"
    out.mkdir()
    hostile(out / "checkpoint.pt", form, Payload(tmp_path / "ran"))
    assert load_checkpoint(out / "checkpoint.pt") is None
    assert re.search(r"checkpoint.pt is damaged \(\w+Error\) and passed over", capsys.readouterr().err)
    with pytest.raises(ValueError, match="checkpoint.pt is not a file of tensors that torch.load"):
        load_backbone(out / "checkpoint.pt", "r3d18_narrow")
    argv = judging("retrieval", world, tmp_path, out, "--checkpoint", out / "checkpoint.pt")
    assert "is not a file of tensors" in fails(retrieval.main, argv)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(RuntimeError):
        torch.load(out / "checkpoint.pt", weights_only=False)                   # it is a payload
    assert (tmp_path / "ran").exists()


def test_file_names_of_any_bytes_are_trained_on_and_retrieved(world, whole, tmp_path):
    root = tmp_path / "names"
    names = [b"caf\xe9", b"[a] (b) {c}; $(touch x) & '\"`", b"-i", b"concat:x", b"%03d*?", b"new\nline", b"\xff\xfe",
             b" blank "]
    some = sorted((world / "videos").rglob("*.avi"))
    for n, name in enumerate(names):
        folder = root / os.fsdecode((b"-class \xe9", b"[other]")[n % 2])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(some[n], folder / os.fsdecode(name + b".avi"))
    train(world, tmp_path / "out", "--dataset", "folder", "--data", root, "--epochs", 1)
    retrieval.main(judging("retrieval", world, whole, tmp_path, "--gallery", root, "--query", root, "--k", 1,
                           "--features", tmp_path / "x.npz"))
    found = json.loads((tmp_path / "retrieval-folder.json").read_text())["splits"][0]["neighbours"]
    assert {os.path.basename(os.fsencode(path)) for path in found} == {name + b".avi" for name in names}
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert {os.fsencode(str(path)) for path in arrays["query_paths"]} == {os.fsencode(path) for path in found}
