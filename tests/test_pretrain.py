"""pretrain.py: a run equals a plain loop over the equations; what it learns, logs and writes."""
import shlex
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLASSES,
    SHARP,
    assert_same_training,
    drifting,
    load_checkpoint,
    log_lines,
    official,
    plain_training,
    train,
    warmup_and_cosine,
    write_lists,
    write_video,
)

import linear_probe
import pretrain
import retrieval
from common.splits import load_split, scan
from data import Pairs, augment, collate
from losses import loss_distinct, loss_equi, loss_inst
from models import LOSSES, TimeEquivariant, load_backbone

# ---- A run equals a plain loop (Sec. 3, Table 1, Fig. 5) ----

GIVEN = ("--epochs 3 --batch-size 10 --lr 2e-5 --weight-decay 1500 --warmup-epochs 1.5 --lam 0.3 "
         "--speeds 1 3 --frames 5 --size 20 --seed 7").split()      # all differ from the defaults
CASES = {                                                   # flags -> losses, equivariance, clips
    "": (LOSSES, "temporal", 2),
    "--losses equi inst --equivariance spatial": (("inst", "equi"), "spatial", 2),
    "--equivariance both": (LOSSES, "both", 2),
    "--losses inst distinct speed order": (("inst", "speed", "order", "distinct"), "temporal", 4)}


def sum_of_terms(out, batch):
    """Table 1's sum; rows are clips p of all videos, then clips q."""
    video, pq = batch["video"], batch["pq"]
    B, terms = len(video), []
    if "phi" in out:
        phi, p = out["phi"].transpose(0, 1).flatten(0, 1), torch.tensor([0, 1])
        terms.append(loss_inst(phi, video.repeat(2), p.repeat_interleave(B), lam=0.3))
    if "psi" in out:
        terms.append(loss_equi(out["psi"], video, pq, lam=0.3))
    if "chi" in out:                                        # p, q under σ_0, p, q under σ_1
        chi = out["chi"].transpose(0, 1).flatten(0, 1)
        p = torch.tensor([0, 1, 0, 1]).repeat_interleave(B)
        s = torch.tensor([0, 0, 1, 1]).repeat_interleave(B)
        terms.append(loss_distinct(chi, video.repeat(4), p, s, lam=0.3))
    for k, task in ((0, "speed"), (1, "speed"), (0, "direction"), (1, "direction")):
        if task in out:                                     # the mean over p and q
            terms.append(F.cross_entropy(out[task][:, k], batch[task][:, k]) / 2)
    if "order" in out:
        terms.append(F.cross_entropy(out["order"], batch["order"]))
    return sum(terms)


@pytest.mark.parametrize("flags", CASES)
def test_a_run_equals_a_plain_loop_over_the_equations(world, tmp_path, used_rates, flags):
    losses, equivariance, clips = CASES[flags]
    state = train(world, tmp_path, *GIVEN, *flags.split())["model"]

    split = scan(load_split("ucf101", world / "UCF-101"))
    pairs = Pairs(split, split.paths, 5, 20, [1, 3], 7, equivariance, clips)
    torch.manual_seed(7)
    network = TimeEquivariant("r3d18_narrow", losses, speeds=2)

    def loss_of(step):
        epoch, half = divmod(step, 2)                       # of 12 groups, 2 are left over
        batch = collate([pairs[epoch, group] for group in range(5 * half, 5 * half + 5)])
        return sum_of_terms(network(augment(batch["clips"], batch["colour"])), batch)
    rates = warmup_and_cosine(2e-5, 3, 6)
    values = plain_training(network, loss_of, rates, 1500.0)
    assert_same_training(log_lines(tmp_path), used_rates, state, rates, values, network)


# ---- What it learns ----

def ramp(rng, n=120, side=32):
    """A texture that brightens steadily -> uint8 (n, side, side, 3)

    Direction is the sign of the change, speed its size, order the brightness.
    """
    texture = rng.uniform(-30, 30, (1, side // 4, side // 4, 1)).repeat(4, 1).repeat(4, 2)
    frames = np.linspace(40, 215, n)[:, None, None, None] + texture
    return frames.clip(0, 255).astype(np.uint8).repeat(3, 3)


@pytest.mark.parametrize("shuffled", [False, True])
def test_speed_direction_and_order_are_learned_unless_frames_are_shuffled(tmp_path, shuffled):
    rng = np.random.default_rng(0)
    for k in range(48):
        frames = ramp(rng)
        frames = rng.permutation(frames) if shuffled else frames
        write_video(tmp_path / "videos" / f"{k}.avi", frames, **SHARP)
    train(tmp_path, tmp_path / "out", "--dataset", "folder", "--data", tmp_path / "videos",
          "--frames", 8, "--losses", "speed", "direction", "order", "--epochs", 30,
          "--batch-size", 12, "--lr", 5e-3, "--warmup-epochs", 2, "--save-every", 1000)
    log = log_lines(tmp_path / "out")[-50:]
    speed, direction, order, chance = (np.mean([line[name] for line in log]) for name in (
        "speed_acc", "direction_acc", "order_acc", "order_chance"))
    if shuffled:
        assert speed < 0.35 and direction < 0.6
    else:
        assert speed > 0.45 and direction > 0.9 and order > chance + 0.1


# ---- What it logs ----

def test_accuracies_and_chance_levels_equal_loops():
    torch.manual_seed(0)
    video, pq = torch.tensor([5, 2, 7, 9, 4, 3]), torch.tensor([1, 1, 0, 0, 1, 1])
    batch = dict(video=video, pq=pq, speed=torch.tensor([[0, 1], [0, 1]] * 3),
                 direction=torch.randint(2, (6, 2)), order=torch.tensor([2, 2, 0, 0, 2, 2]))
    out = dict(phi=torch.randn(6, 2, 3), psi=torch.randn(6, 3), speed=torch.randn(6, 2, 4),
               direction=torch.randn(6, 2, 2), order=torch.randn(6, 3))
    out["psi"][:, 0] += 3
    out["psi"][0] = torch.tensor([-1, 0, 0])                # negative cosines; nearest is no match
    out["psi"][2] = torch.tensor([0.1, 5, 0])
    logged = pretrain.scores(out, batch, batch | out)

    def accuracy(x, is_candidate, is_match):
        hits, chances = [], []
        for a in range(len(x)):
            candidates = [b for b in range(len(x)) if is_candidate(a, b)]
            cosine = F.cosine_similarity(x[a][None], x[candidates])
            hits.append(is_match(a, candidates[cosine.argmax()]))
            chances.append(np.mean([is_match(a, b) for b in candidates]))
        return np.mean(hits), np.mean(chances)

    phi = accuracy(out["phi"].flatten(0, 1), lambda a, b: a != b,       # clips 2i, 2i + 1 of i
                   lambda a, b: a // 2 == b // 2)
    psi = accuracy(out["psi"], lambda a, b: a != b, lambda a, b: (pq[a] == pq[b]).item())
    assert (logged["phi_nearest"], logged["phi_chance"]) == pytest.approx(phi)
    assert (logged["psi_nearest"], logged["psi_chance"]) == pytest.approx(psi)
    assert 0 < phi[0] < 1 and 0 < psi[0] < 1
    for task in ("speed", "direction", "order"):
        label = batch[task].flatten()
        right = out[task].flatten(0, -2).argmax(1) == label
        assert logged[f"{task}_acc"] == right.float().mean()
        frequency = torch.bincount(label, minlength=out[task].shape[-1]) / len(label)
        torch.testing.assert_close(logged[f"{task}_chance"], frequency)


@pytest.mark.parametrize("losses", [LOSSES, ("equi", "speed"), ("inst", "speed", "distinct")])
def test_the_log_has_the_chosen_terms_their_sum_accuracies_chance_and_costs(
        world, whole, tmp_path, losses):
    train(world, tmp_path, "--log-every", 2, "--losses", *losses)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]
    if losses == LOSSES:                                    # means since the line before
        each = [line["loss"] for line in log_lines(whole)]
        means = [np.mean(each[n - 2:n]) for n in (2, 4, 6, 8)] + each[8:]
        assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-5)
    assert [line["epoch"] for line in lines] == pytest.approx([n / 3 for n in (2, 4, 6, 8, 9)])
    line = lines[-1]
    assert line["loss"] == pytest.approx(sum(line[name] for name in losses), rel=1e-4)
    assert not ({*LOSSES, "distinct"} - set(losses)) & line.keys()
    assert ("phi_nearest" in line) == ("inst" in losses)
    assert ("psi_nearest" in line) == ("equi" in losses)
    if "inst" in losses:                                    # with four clips a video, too
        assert line["phi_chance"] == pytest.approx(1 / 15)  # one clip of 2 * 8 - 1
    for name in ("clips_per_s", "peak_memory_gb"):
        assert line[name] > 0
    assert 0 <= line["waiting_for_data"] <= 1 and line["left_s"] == 0
    assert {"overflow", "loss_scale"}.isdisjoint(line)


def test_tensorboard_gets_the_values_of_the_log(world, tmp_path, monkeypatch):
    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path), 1)

        def add_scalar(self, name, value, step):
            scalars[name, step] = value
    scalars, module = {}, type(sys)("tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(world, tmp_path, "--epochs", 1, "--tensorboard")
    logged = {(name, line["step"]): value for line in log_lines(tmp_path)
              for name, value in line.items() if name not in ("step", "epoch")}
    assert scalars == logged


# ---- Which videos, and which flags reach torch ----

def test_videos_of_just_enough_frames_for_the_slowest_clip_are_used(tmp_path, capsys):
    for k, length in enumerate([7, 6, 7, 9, 7]):            # --speeds 2 4, 4 frames: 2 * 3 + 1
        write_video(tmp_path / "videos" / f"{k}.avi", drifting(length, k))
    train(tmp_path, tmp_path / "out", "--dataset", "folder", "--data", tmp_path / "videos",
          "--epochs", 1, "--speeds", 4, 2, "--batch-size", 4)
    assert len(log_lines(tmp_path / "out")) == 1
    assert "5 videos, 4 usable; 1 shorter than 7 frames" in capsys.readouterr().err


def test_split_and_index_are_the_ones_that_were_given(world, tmp_path):
    lists = write_lists(tmp_path / "lists", CLASSES, trainlist02=official(1, "train")[:8])
    index = tmp_path / "index.json"
    train(world, tmp_path / "out", "--annotations", lists, "--split", 2, "--index", index)
    assert load_checkpoint(tmp_path / "out")["step"] == 3   # three epochs of one batch
    assert "v_Bend_g08_c01.avi" in index.read_text()


@pytest.mark.parametrize("flag, module, name", [
    ("--compile", torch, "compile"),
    ("--sync-bn", torch.nn.SyncBatchNorm, "convert_sync_batchnorm")])
def test_the_network_is_compiled_or_gets_synchronised_batchnorm(
        world, tmp_path, monkeypatch, flag, module, name):
    networks = []
    monkeypatch.setattr(module, name, lambda network: networks.append(network) or network)
    monkeypatch.setattr(pretrain, "try_flags", lambda *_: None)     # a GPU is not needed
    train(world, tmp_path, "--epochs", 1, flag)
    assert [type(network) for network in networks] == [TimeEquivariant]


def test_workers_reach_the_loader(world, tmp_path, monkeypatch):
    def spy(*args, **kwargs):
        counts.append(kwargs["num_workers"])
        return loader(*args, **kwargs)
    counts, loader = [], torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", spy)
    train(world, tmp_path, "--epochs", 1, "--workers", 1)
    assert counts == [1]


# ---- --accumulate ----

@pytest.mark.parametrize("parts", [2, 6])
def test_accumulated_parts_have_the_gradient_of_the_whole_batch(parts):
    torch.manual_seed(0)
    model = TimeEquivariant("r3d18_narrow").double().eval()         # BatchNorm would see the parts
    batch = dict(
        clips=torch.randn(6, 2, 3, 4, 16, 16).double(), video=torch.arange(6),
        pq=torch.arange(6) // 2, speed=torch.randint(4, (6, 2)),
        direction=torch.randint(2, (6, 2)), order=torch.randint(3, (6,)))
    args = Namespace(accumulate=parts, amp="off", lam=0.2)
    out = model(batch["clips"])
    whole = pretrain.objective(out, batch, batch | out, args.lam)
    expected = torch.autograd.grad(sum(whole.values()), [*model.parameters()])

    scaler = torch.amp.GradScaler("cpu", enabled=False)
    terms, accuracies = pretrain.accumulate(model, batch, args, scaler)
    torch.testing.assert_close(terms, {name: term.detach() for name, term in whole.items()})
    for weight, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=1e-12)
    right = pretrain.scores(out, batch, batch | out)
    for name in ("phi_nearest", "psi_nearest", "speed_acc"):
        assert accuracies[name] == pytest.approx(right[name])


def test_with_accumulate_the_running_statistics_see_each_part_once(world, tmp_path):
    model = train(world, tmp_path, "--epochs", 1, "--accumulate", 2)["model"]
    assert model["backbone.stem.1.num_batches_tracked"] == 3 * 2    # three steps of two parts


# ---- --init and backbone.pt ----

def test_backbone_pt_is_the_checkpoints_backbone_and_loads(whole):
    state, net = load_checkpoint(whole), load_backbone(whole / "backbone.pt")
    assert net.arch == "r3d18_narrow" and net.args["size"] == 16
    del state["args"]["names_and_frames"]
    assert state["args"] == net.args | dict(processes=1, videos=24)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state["model"][f"backbone.{name}"])


def test_init_gives_the_backbone_its_weights(world, whole, tmp_path):
    still = "--epochs", 1, "--lr", 1e-9, "--weight-decay", 0
    init = "--init", whole / "backbone.pt"
    train(world, tmp_path, *still, *init)
    before, after = (load_backbone(out / "backbone.pt") for out in (whole, tmp_path))
    for weight, expected in zip(after.parameters(), before.parameters()):
        torch.testing.assert_close(weight, expected)


# ---- The commands of the project ----

@pytest.mark.parametrize("flags, script, expected", [
    ("", linear_probe, dict(dataset="toy", data="toy-videos", checkpoint="out/backbone.pt")),
    ("--dataset ucf101 --data v --annotations 'a b' --split 3", linear_probe,
     dict(dataset="ucf101", data="v", annotations="a b", split=[3])),
    ("--dataset folder --data plain --index i.json", retrieval,
     dict(dataset="folder", gallery="./plain", query="./plain", index="i.json")),
    ("--dataset kinetics400 --data parts", linear_probe, dict(data="parts")),
    ("--dataset folder --data flat", retrieval, dict(gallery="./flat", query="./flat")),
    ("--dataset folder --data train", retrieval, dict(gallery="./train", query="./train"))])
def test_the_next_command_evaluates_this_run(tmp_path, monkeypatch, flags, script, expected):
    monkeypatch.chdir(tmp_path)
    for folder in ("plain/run", "plain/walk", "parts/train/run", "parts/train/walk",
                   "parts/val/walk", "flat/train", "flat/val", "train"):
        write_video(tmp_path / folder / "a.avi", drifting(1))
    args = pretrain.parse_args(["--out", "out", *shlex.split(flags)])
    python, file, *argv = shlex.split(pretrain.next_command(args))
    assert (python, file) == ("python", f"{script.__name__}.py")
    assert vars(script.parse_args(argv)).items() >= expected.items()


def test_the_command_trains_on_real_ucf101_files(shared, tmp_path):
    root = shared / "videos" / "ucf_original"
    lists = root / "ucfTrainTestlist"
    rows = (lists / "trainlist01.txt").read_text().splitlines()
    classes = (lists / "classInd.txt").read_text().splitlines()
    few = write_lists(tmp_path / "few", (), trainlist01=rows[::len(rows) // 24][:24],
                      classInd=classes)
    pretrain.main([str(word) for word in (
        "--dataset", "ucf101", "--data", root / "UCF-101", "--annotations", few, "--size", 32,
        "--frames", 8, "--epochs", 1, "--batch-size", 24, "--workers", 1, "--out", tmp_path)])
    assert np.isfinite(log_lines(tmp_path)[-1]["loss"])
    assert load_backbone(tmp_path / "backbone.pt").arch == "r3d18"
