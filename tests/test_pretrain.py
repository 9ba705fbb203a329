"""pretrain.py from video files to checkpoint: what it learns, and what it writes."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARP, TORCHRUN, lines, write_lists, write_video

import pretrain
from common.checkpoints import warmup_cosine
from common.video import decode
from models import TimeEquivariant, load_backbone


def ramp(rng, n=120, side=32):
    """A texture that brightens steadily: direction is the sign of the change, speed its size, order the brightness."""
    texture = rng.uniform(-30, 30, (1, side // 4, side // 4, 1)).repeat(4, 1).repeat(4, 2)
    return (np.linspace(40, 215, n)[:, None, None, None] + texture).clip(0, 255).astype(np.uint8).repeat(3, 3)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """Two folders of videos: ramps, and the same with their frames in random order."""
    root, rng = tmp_path_factory.mktemp("ramps"), np.random.default_rng(0)
    for k in range(48):
        frames = ramp(rng)
        write_video(root / "ordered" / f"{k}.avi", frames, **SHARP)
        write_video(root / "shuffled" / f"{k}.avi", rng.permutation(frames), **SHARP)
    return root


def pretrain_on(data, out, *flags):
    """Run pretrain.main in this process -> the lines of its log that report on steps."""
    pretrain.main(["--dataset", "folder", "--data", str(data), "--out", str(out), "--arch", "r3d18_narrow", "--workers",
                   "0", "--frames", "8", "--size", "16", "--batch-size", "12", "--amp", "off", *flags])
    return lines(out)


AUX = ("--losses", "speed", "direction", "order", "--epochs", "45", "--lr", "3e-3", "--warmup-epochs", "5")


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
    files = sorted((shared / "videos/ucf8_128").glob("**/*.avi"))[::22]         # 48 of all eight classes
    for file in files:
        frames = decode(str(file), range(29), 64).permute(0, 2, 3, 1).numpy()   # as many as the shortest has
        frames = frames[:, :, :frames.shape[2] // 2 * 2]
        write_video(tmp_path / "scrolling" / file.name, [np.roll(frame, n, axis=0) for n, frame in enumerate(frames)])
    score = mean_of_last(pretrain_on(tmp_path / "scrolling", tmp_path / "out", "--losses", "direction", "--size", "32",
                                     "--epochs", "30", "--lr", "3e-3", "--warmup-epochs", "2"))
    assert score["direction_acc"] > 0.8


def test_the_log_has_each_term_each_accuracy_beside_chance_and_the_costs(ramps, tmp_path):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--log-every", "2")[-1]
    terms = [line[name] for name in ("inst", "equi", "speed", "direction", "order")]
    assert line["loss"] == pytest.approx(sum(terms), rel=1e-4)                  # Table 1: plain sums
    for name in ("phi_nearest", "psi_nearest"):
        assert 0 <= line[name] <= 1
    assert line["phi_chance"] == pytest.approx(1 / 23, rel=1e-3)                # one other clip among 2 * 12 - 1
    assert line["psi_chance"] == pytest.approx(1 / 11, rel=0.2)                 # one partner among 12 - 1; or more
    for task, classes in dict(speed=4, direction=2, order=3).items():
        assert 1 / classes <= line[f"{task}_chance"] <= 1 and 0 <= line[f"{task}_acc"] <= 1
    for name in ("step", "epoch", "lr", "clips_per_s", "peak_memory_gb"):
        assert line[name] > 0
    assert 0 <= line["waiting_for_data"] <= 1 and line["left_s"] == 0 and line["replaced"] == 0


def test_only_the_chosen_terms_are_summed(ramps, tmp_path):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--losses", "equi", "speed")[-1]
    assert line["loss"] == pytest.approx(line["equi"] + line["speed"], rel=1e-4)
    assert not {"inst", "direction", "order", "phi_nearest"} & line.keys()


def test_the_baseline_of_figure_5_trains_on_four_clips_a_video(ramps, tmp_path):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--losses", "inst", "distinct", "speed")[-1]
    assert line["loss"] == pytest.approx(line["inst"] + line["distinct"] + line["speed"], rel=1e-4)
    assert line["phi_chance"] == pytest.approx(1 / 23, rel=1e-3)                # L_inst still sees p and q alone


@pytest.mark.parametrize("flags", [("spatial", "--losses", "inst", "equi"), ("both",)])
def test_spatial_equivariance_trains(ramps, tmp_path, flags):
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--equivariance", *flags)[-1]
    assert np.isfinite(line["equi"]) and line["psi_chance"] == pytest.approx(1 / 11, rel=1e-3)      # no chance partners


def test_backbone_pt_is_the_checkpoints_backbone_and_loads(ramps, tmp_path):
    pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1")
    model = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    net = load_backbone(tmp_path / "backbone.pt")
    assert net.arch == "r3d18_narrow" and net.args["size"] == 16
    assert all(torch.equal(value, model[f"backbone.{name}"]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("dataset, arch, expected", [                           # Sec. 3.4, 4.1, 4.2, Table 2
    ("ucf101", "r3d18", dict(epochs=400, batch_size=192, frames=16, size=128, lr=3e-4, weight_decay=1e-4)),
    ("kinetics400", "r3d18", dict(epochs=200, batch_size=512, frames=16, size=128)),
    ("kinetics400", "s3dg", dict(epochs=200, batch_size=256, frames=32, size=128)),
    ("kinetics400", "r2plus1d18", dict(epochs=200, batch_size=192, frames=16, size=112)),
    ("diving48", "r2plus1d18", dict(epochs=400, batch_size=192, frames=16, size=112))])
def test_flags_not_given_take_the_papers_values(dataset, arch, expected):
    args = pretrain.parse_args(["--dataset", dataset, "--arch", arch, "--data", "somewhere"])
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.lam == 0.1 and args.speeds == [1, 2, 4, 8]
    assert args.losses == ["inst", "equi", "speed", "direction", "order"]


def test_the_learning_rate_warms_up_linearly_and_then_follows_a_cosine_to_zero():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule, rates = warmup_cosine(optimizer, 10, 110), []
    for _ in range(110):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert np.allclose(np.diff(rates[:11]), 3e-4 / 11)                          # linear, from above 0 ...
    assert max(rates) == rates[10] == pytest.approx(3e-4)                       # ... to the peak
    assert np.allclose(rates[10:], 1.5e-4 * (1 + np.cos(np.pi * np.arange(100) / 100)))
    assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_the_knn_check_reports_accuracy_beside_chance_and_changes_no_training(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(24):                                                         # class 0 is dark, class 1 is bright
        texture = rng.integers(0, 40, (1, 32, 32, 3)) + 150 * (k % 2)
        write_video(tmp_path / "videos" / f"class{k % 2}" / f"{k}.avi", texture.repeat(30, 0).astype(np.uint8), **SHARP)
    losses = {}
    for knn_every in ("0", "1"):
        out = tmp_path / knn_every
        log = pretrain_on(tmp_path / "videos", out, "--epochs", "2", "--log-every", "1", "--knn-every", knn_every)
        losses[knn_every] = [line["loss"] for line in log]
    checks = lines(out, "knn")
    assert [line["epoch"] for line in checks] == [1, 2]
    assert all(line["knn"] > 0.9 and line["knn_chance"] == 0.5 for line in checks)
    assert losses["0"] == losses["1"]                                           # BatchNorm's statistics too


def test_tensorboard_is_asked_for_by_name_where_it_is_missing(ramps, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)           # as if it were not installed
    with pytest.raises(ValueError, match="pip install tensorboard"):
        pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--tensorboard")


def test_tensorboard_gets_what_the_log_gets(ramps, tmp_path, monkeypatch):
    seen = {}

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path)

        def add_scalar(self, name, value, step):
            seen[name, step] = value
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type(sys)("tensorboard"))
    sys.modules["torch.utils.tensorboard"].SummaryWriter = SummaryWriter
    line = pretrain_on(ramps / "ordered", tmp_path, "--epochs", "1", "--tensorboard")[-1]
    assert seen["loss", line["step"]] == pytest.approx(line["loss"], rel=1e-5)
    assert {name for name, _ in seen} >= {"inst", "equi", "speed_acc", "psi_nearest", "lr", "clips_per_s"}


@pytest.mark.parametrize("parts", [2, 6])
def test_accumulated_parts_have_the_gradient_of_the_whole_batch(parts):
    torch.manual_seed(0)
    model, B = TimeEquivariant("r3d18_narrow").double(), 6
    for module in model.modules():                                              # a part's own statistics would differ
        if "BatchNorm" in type(module).__name__:
            module.eval()
    batch = dict(clips=torch.randn(B, 2, 3, 4, 16, 16).double(), video=torch.arange(B), pq=torch.arange(B) // 2,
                 speed=torch.randint(0, 4, (B, 2)), direction=torch.randint(0, 2, (B, 2)),
                 order=torch.randint(0, 3, (B,)))

    def gradient(n):
        model.zero_grad()
        pretrain.forward_backward(model, batch, n, 0.1)
        return [weight.grad.clone() for weight in model.parameters()]
    for whole, accumulated in zip(gradient(1), gradient(parts)):
        assert torch.allclose(whole, accumulated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which, processes", [("ucf_original", 1), ("ucf8_128", 2)])
def test_the_command_line_trains_on_real_ucf101_files(shared, tmp_path, which, processes):
    root = shared / "videos" / which
    official = root / "ucfTrainTestlist"
    listed = (official / "trainlist01.txt").read_text().splitlines()
    classes = (official / "classInd.txt").read_text().splitlines()
    lists = write_lists(tmp_path / "lists", (), trainlist01=listed[::len(listed) // 40][:40], classInd=classes)
    start = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    done = subprocess.run(start + [
        str(ROOT / "pretrain.py"), "--dataset", "ucf101", "--data", str(root / "UCF-101"), "--annotations", str(lists),
        "--arch", "r3d18_narrow", "--size", "32", "--frames", "8", "--epochs", "1", "--batch-size", "40",
        "--workers", "1", "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    line = lines(tmp_path / "out")[-1]
    assert line["epoch"] == 1 and np.isfinite(line["loss"])
    assert load_backbone(tmp_path / "out" / "backbone.pt").dim == 128
