"""pretrain.py from video files to checkpoint: what it learns and what it writes."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SHARP,
    TORCHRUN,
    fails,
    load_checkpoint,
    log_lines,
    train,
    words,
    write_lists,
    write_video,
)

import pretrain
from common.training import warmup_cosine
from common.video import decode
from models import LOSSES, TimeEquivariant, load_backbone


def ramp(rng, n=120, side=32):
    """A texture that brightens steadily -> uint8 (n, side, side, 3)

    Direction is the sign of the change, speed its size, order the brightness.
    """
    texture = rng.uniform(-30, 30, (1, side // 4, side // 4, 1)).repeat(4, 1).repeat(4, 2)
    frames = np.linspace(40, 215, n)[:, None, None, None] + texture
    return frames.clip(0, 255).astype(np.uint8).repeat(3, 3)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Two folders of videos: ramps, and the same with their frames in random order."""
    root, rng = tmp_path_factory.mktemp("ramps"), np.random.default_rng(0)
    for k in range(48):
        frames = ramp(rng)
        write_video(root / "ordered" / f"{k}.avi", frames, **SHARP)
        write_video(root / "shuffled" / f"{k}.avi", rng.permutation(frames), **SHARP)
    return root


def pretrain_on(data, out, *more):
    """Run pretrain.main in this process -> the lines of its log"""
    pretrain.main([
        "--dataset", "folder", "--data", str(data), "--out", str(out), "--arch", "r3d18_narrow",
        "--workers", "0", "--frames", "8", "--size", "16", "--batch-size", "12", *more])
    return log_lines(out)


# ---- What it learns ----

AUX = ("--losses", "speed", "direction", "order", "--epochs", "45", "--lr", "3e-3",
       "--warmup-epochs", "5")


def mean_of_last(log, count=5):
    return {name: np.mean([line[name] for line in log[-count:]]) for name in log[-1]}


def test_trivial_speed_direction_and_order_are_learned(ramps, tmp_path):
    score = mean_of_last(pretrain_on(ramps / "ordered", tmp_path, *AUX))
    assert score["speed_acc"] > 0.45 and score["direction_acc"] > 0.9
    assert score["order_acc"] > score["order_chance"] + 0.1


def test_shuffled_videos_bring_speed_and_direction_to_chance(ramps, tmp_path):
    score = mean_of_last(pretrain_on(ramps / "shuffled", tmp_path, *AUX))
    assert score["speed_acc"] < 0.35 and score["direction_acc"] < 0.6


def test_direction_is_learned_on_real_video_that_scrolls(shared, tmp_path):
    files = sorted((shared / "videos/ucf8_128").glob("**/*.avi"))[::22]     # 48, all eight classes
    for file in files:
        frames = decode(str(file), range(29), 64).permute(0, 2, 3, 1).numpy()
        frames = frames[:, :, :frames.shape[2] // 2 * 2]
        frames = [np.roll(frame, n, axis=0) for n, frame in enumerate(frames)]
        write_video(tmp_path / "scrolling" / file.name, frames)
    log = pretrain_on(tmp_path / "scrolling", tmp_path / "out", "--losses", "direction", "--size",
                      "32", "--epochs", "30", "--lr", "3e-3", "--warmup-epochs", "2")
    assert mean_of_last(log)["direction_acc"] > 0.8


# ---- What it sums and logs ----

def test_the_log_has_each_term_each_accuracy_with_chance_and_the_costs(ramps, tmp_path):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--log-every", "2")[-1]
    assert line["loss"] == pytest.approx(sum(line[name] for name in LOSSES), rel=1e-4)
    assert 0 <= line["phi_nearest"] <= 1 and 0 <= line["psi_nearest"] <= 1
    assert line["phi_chance"] == pytest.approx(1 / 23, rel=1e-3)        # one clip of 2 * 12 - 1
    assert line["psi_chance"] == pytest.approx(1 / 11, rel=0.2)         # one of 12 - 1, or more
    for task, classes in dict(speed=4, direction=2, order=3).items():
        assert 1 / classes <= line[f"{task}_chance"] <= 1 and 0 <= line[f"{task}_acc"] <= 1
    for name in ("step", "epoch", "lr", "clips_per_s", "peak_memory_gb"):
        assert line[name] > 0
    assert 0 <= line["waiting_for_data"] <= 1 and line["left_s"] == 0


@pytest.mark.parametrize("losses", [("equi", "speed"), ("inst", "speed", "distinct")])
def test_only_the_chosen_terms_are_summed(ramps, tmp_path, losses):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--losses", *losses)[-1]
    assert line["loss"] == pytest.approx(sum(line[name] for name in losses), rel=1e-4)
    assert not (set(LOSSES) - set(losses)) & line.keys()
    if "distinct" in losses:                            # four clips a video, L_inst sees p and q
        assert line["phi_chance"] == pytest.approx(1 / 23, rel=1e-3)


@pytest.mark.parametrize("more", [("spatial", "--losses", "inst", "equi"), ("both",)])
def test_spatial_equivariance_has_no_chance_positives(ramps, tmp_path, more):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--equivariance", *more)[-1]
    assert np.isfinite(line["equi"]) and line["psi_chance"] == pytest.approx(1 / 11, rel=1e-3)


def test_tensorboard_gets_the_values_of_the_log(ramps, tmp_path, monkeypatch):
    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path), 1)

        def add_scalar(self, name, value, step):
            scalars[name, step] = value
    scalars, module = {}, type(sys)("tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--tensorboard")[-1]
    step, _ = line.pop("step"), line.pop("epoch")
    assert scalars == {(name, step): value for name, value in line.items()}


# ---- Flags and schedule ----

@pytest.mark.parametrize("dataset, arch, expected", [   # Sec. 3.4, 4.1, 4.2, Table 2
    ("ucf101", "r3d18", dict(epochs=400, batch_size=192, frames=16, size=128, lr=3e-4)),
    ("kinetics400", "r3d18", dict(epochs=200, batch_size=512, frames=16, size=128)),
    ("kinetics400", "s3dg", dict(epochs=200, batch_size=256, frames=32, size=128)),
    ("kinetics400", "r2plus1d18", dict(epochs=200, batch_size=192, frames=16, size=112)),
    ("diving48", "r2plus1d18", dict(epochs=400, batch_size=192, frames=16, size=112))])
def test_flags_not_given_take_the_papers_values(dataset, arch, expected):
    args = pretrain.parse_args(["--dataset", dataset, "--arch", arch, "--data", "somewhere"])
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.lam == 0.1 and args.speeds == [1, 2, 4, 8] and args.weight_decay == 1e-4
    assert args.losses == ["inst", "equi", "speed", "direction", "order"]


def test_the_learning_rate_warms_up_linearly_and_then_follows_a_cosine_to_zero():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule, rates = warmup_cosine(optimizer, 10, 110), []
    for _ in range(110):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert np.allclose(np.diff(rates[:11]), 3e-4 / 11)  # linear, from above 0 ...
    assert max(rates) == rates[10] == pytest.approx(3e-4)           # ... to the peak
    assert np.allclose(rates[10:], 1.5e-4 * (1 + np.cos(np.pi * np.arange(100) / 100)))
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


# ---- --accumulate ----

def random_batch(B):
    """A batch on the CPU as `to_device` returns it, of B videos in pairs of one pq."""
    return dict(
        clips=torch.randn(B, 2, 3, 4, 16, 16).double(),
        video=torch.arange(B), pq=torch.arange(B) // 2,
        speed=torch.randint(4, (B, 2)), direction=torch.randint(2, (B, 2)),
        order=torch.randint(3, (B,)))


@pytest.mark.parametrize("parts", [2, 6])
def test_accumulated_parts_have_the_gradient_of_the_whole_batch(parts):
    torch.manual_seed(0)
    model = TimeEquivariant("r3d18_narrow").double().eval()         # BatchNorm would see the parts
    batch, args = random_batch(6), pretrain.parse_args(["--accumulate", str(parts)])
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
    model, net = load_checkpoint(whole)["model"], load_backbone(whole / "backbone.pt")
    assert net.arch == "r3d18_narrow" and net.args["size"] == 16
    assert all(torch.equal(x, model[f"backbone.{name}"]) for name, x in net.state_dict().items())


def test_init_gives_the_backbone_its_weights_and_belongs_to_the_run(world, whole, tmp_path):
    still = "--epochs", 1, "--lr", 1e-9, "--weight-decay", 0
    init = "--init", whole / "backbone.pt"
    train(world, tmp_path, *still, *init)
    before, after = (load_backbone(out / "backbone.pt") for out in (whole, tmp_path))
    for weight, expected in zip(after.parameters(), before.parameters()):
        torch.testing.assert_close(weight, expected)
    assert "(init " in fails(pretrain.main, words(world, tmp_path, *still))


def test_init_refuses_weights_that_lack_some_of_the_backbone(world, whole, tmp_path):
    stored = torch.load(whole / "backbone.pt", weights_only=True)
    del stored["backbone"]["layer3.1.conv1.0.weight"]
    torch.save(stored, tmp_path / "part.pt")
    with pytest.raises(pretrain.UserError, match="Missing key.*layer3.1.conv1.0.weight"):
        train(world, tmp_path / "out", "--init", tmp_path / "part.pt")


# ---- The commands of the project ----

@pytest.mark.parametrize("name, processes", [("ucf_original", 1), ("ucf8_128", 2)])
def test_the_command_trains_on_real_ucf101_files(shared, tmp_path, name, processes):
    root = shared / "videos" / name
    official = root / "ucfTrainTestlist"
    rows = (official / "trainlist01.txt").read_text().splitlines()
    classes = (official / "classInd.txt").read_text().splitlines()
    lists = write_lists(tmp_path / "lists", (), trainlist01=rows[::len(rows) // 40][:40],
                        classInd=classes)
    python = [sys.executable]
    if processes > 1:
        python = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([
        *python, ROOT / "pretrain.py", "--dataset", "ucf101", "--data", root / "UCF-101",
        "--annotations", lists, "--arch", "r3d18_narrow", "--size", "32", "--frames", "8",
        "--epochs", "1", "--batch-size", "40", "--workers", "1", "--out", tmp_path / "out"],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    line = log_lines(tmp_path / "out")[-1]
    assert line["epoch"] == 1 and np.isfinite(line["loss"])
    assert load_backbone(tmp_path / "out" / "backbone.pt").dim == 128
