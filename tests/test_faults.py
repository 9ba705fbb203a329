"""Runs meet numbers that are not finite, files with code in them, and names of any bytes."""
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import evaluation_words, load_checkpoint, read_json, read_rows, train

import pretrain
import retrieval
from common import UserError, write_json
from common.distributed import run
from common.training import check_finite, step_scaled
from models import load_backbone, r3d18_narrow

# ---- Numbers that are not finite ----


@pytest.mark.parametrize("value, log_every, message", [
    ("nan", 1, r"not finite in the 1 steps up to 5: loss nan, inst [\d.]+, .*, speed nan, "),
    ("inf", 1, r"not finite in the 1 steps up to 5: loss inf, inst [\d.]+, .*, speed inf, "),
    ("nan", 1000, "step 5: backbone.* is not finite")])
def test_a_loss_that_is_not_finite_is_named_and_the_checkpoint_before_it_stays(
        world, tmp_path, monkeypatch, value, log_every, message):
    def broken_objective(*args):
        steps.append(objective(*args))
        if len(steps) == 5:
            steps[-1]["speed"] = steps[-1]["speed"] * float(value)
        return steps[-1]
    steps, objective = [], pretrain.objective
    monkeypatch.setattr(pretrain, "objective", broken_objective)
    with pytest.raises(UserError, match=f"{message}.*, if there, (is|are) from before"):
        train(world, tmp_path, "--log-every", log_every)
    assert load_checkpoint(tmp_path)["step"] == 4


def test_statistics_that_are_not_finite_are_an_error():
    network = r3d18_narrow()
    network.stem[1].running_var[0] = float("inf")           # training does not use it
    with pytest.raises(UserError, match="step 3: stem.1.running_var is not finite"):
        check_finite(network, 3)


def test_an_fp16_step_that_overflows_is_skipped_and_logged():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], 0.1), torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, overflow in ((float("inf"), 1), (1, 0)):
        before = weight.item()
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        logged = step_scaled(scaler, optimizer, weight.sum())
        assert logged == dict(overflow=overflow, loss_scale=1)
        assert (weight.item() == before) == bool(overflow)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert step_scaled(disabled, optimizer, weight.sum()) == {}


# ---- Files ----

class Payload:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_checkpoint_is_not_run(world, tmp_path):
    torch.save(dict(step=1, model=Payload(tmp_path / "ran")), tmp_path / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        train(world, tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        load_backbone(tmp_path / "checkpoint.pt", "r3d18_narrow")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "checkpoint.pt", weights_only=False)          # the payload works
    assert (tmp_path / "ran").exists()


def test_names_in_json_stand_as_they_are_and_other_bytes_as_escapes(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xbc")                # Latin-1, UTF-8
    write_json(tmp_path / "a.jsonl", {name: 1}, "日本")
    assert (tmp_path / "a.jsonl").read_bytes() == '{"caf\\udce9 ü": 1}\n"日本"\n'.encode()
    assert read_rows(tmp_path / "a.jsonl") == [{name: 1}, "日本"]


def test_names_of_any_bytes_are_printed_as_they_are(capfdbinary):
    run(lambda: print(os.fsdecode(b"caf\xe9")))
    assert capfdbinary.readouterr().out == b"caf\xe9\n"


def test_file_names_of_any_bytes_are_trained_on_and_retrieved(world, checkpoint, tmp_path):
    root = tmp_path / "names"
    names = [b"caf\xe9", b"[a] (b) {c}; $(touch x) & '\"`", b"-i", b"concat:x", b"%03d*?",
             b"new\nline", b"\xff\xfe", b" blank "]
    for n, (name, file) in enumerate(zip(names, sorted((world / "UCF-101").rglob("*.avi")))):
        folder = root / os.fsdecode((b"-class \xe9", b"[other]")[n % 2])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / os.fsdecode(name + b".avi"))
    train(world, tmp_path / "out", "--dataset", "folder", "--data", root, "--epochs", 1)
    retrieval.main(evaluation_words(
        world, checkpoint, tmp_path, "--gallery", root, "--query", root, "--k", 1,
        "--features", tmp_path / "x.npz"))
    neighbours = read_json(tmp_path / "retrieval-folder.json")["splits"][0]["neighbours"]
    names_found = {os.path.basename(os.fsencode(path)) for path in neighbours}
    assert names_found == {name + b".avi" for name in names}
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert {*arrays["query_paths"].tolist()} == {*neighbours}
