"""A GPU computes what a CPU computes, and training never waits for it.

    python -m pytest tests/test_cuda.py         # by itself: the other tests hide the GPU
"""
import copy
import subprocess

import pytest
import torch
from conftest import CPU, ROOT, STEPS, TORCHRUN, drifting, load_checkpoint, log_lines, train, words

import pretrain
from common.colour import draw_colour
from common.training import autocast
from losses import loss_distinct, loss_equi, loss_inst
from models import BACKBONES, TimeEquivariant
from pretrain import gather_keys, objective, to_device

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden: run this "
                                "file by itself")


def error(x, reference):
    """‖x - reference‖ / ‖reference‖"""
    x, reference = x.detach().double().cpu(), reference.detach().double().cpu()
    return ((x - reference).norm() / reference.norm()).item()


def example_batch():
    """A batch of the loader, of four videos in pairs of one pq."""
    clips = [torch.tensor(drifting(8, n, n % 2, 48)) for n in range(8)]
    colours = [draw_colour(seed) for seed in range(8)]
    return dict(
        clips=torch.stack(clips).unflatten(0, (4, 2)),
        colour=torch.stack(colours).unflatten(0, (4, 2)),
        video=torch.arange(4), pq=torch.arange(4) // 2, order=torch.arange(4) % 3,
        speed=torch.arange(8).view(4, 2) % 4, direction=torch.arange(8).view(4, 2) % 2)


# ---- Numbers ----

ROW = torch.arange(16)


@pytest.mark.parametrize("loss, ids", [
    (loss_equi, (ROW, ROW // 4)), (loss_inst, (ROW // 4, ROW // 2 % 2)),
    (loss_distinct, (ROW // 4, ROW // 2 % 2, ROW % 2))])
@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_losses_equal_the_cpus_in_float64(loss, ids, dtype, most, amp):
    results = []
    x = torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for device, features in ((CPU, x), (DEVICE, x.to(DEVICE, dtype))):
        features.requires_grad_()
        with autocast(amp, device):
            value = loss(features, *(row.to(device) for row in ids))
        results.append((value, *torch.autograd.grad(value, features)))
    for here, there in zip(*results):
        assert error(there, here) < most


def loss_and_gradient(model, batch, device, dtype):
    """Forward and backward of a step -> loss, the gradient as one vector"""
    model = copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last_3d)
    batch = to_device(dict(batch), device)
    out = model(batch["clips"].to(dtype))
    loss = sum(objective(out, batch, gather_keys(out, batch), lam=0.1).values())
    gradient = torch.autograd.grad(loss, [*model.parameters()])
    return loss, torch.cat([x.flatten() for x in gradient])


@pytest.mark.parametrize("arch", BACKBONES)
def test_a_step_is_as_close_to_float64_as_the_cpus_in_float32(arch):
    torch.manual_seed(0)
    model, batch = TimeEquivariant(arch), example_batch()
    reference = loss_and_gradient(model, batch, CPU, torch.float64)
    on_cpu = loss_and_gradient(model, batch, CPU, torch.float32)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_gpu = loss_and_gradient(model, batch, DEVICE, torch.float32)
    for there, here, expected in zip(on_gpu, on_cpu, reference):
        assert error(there, expected) < 5 * error(here, expected) + 1e-5


# ---- Runs ----

def test_bf16_and_fp16_train_near_float32_with_finite_weights(world, tmp_path):
    losses = {}
    for amp in ("off", "bf16", "fp16"):
        assert train(world, tmp_path / amp, "--amp", amp)["step"] == STEPS      # saved: all finite
        losses[amp] = [line["loss"] for line in log_lines(tmp_path / amp)]
    for amp in ("bf16", "fp16"):
        assert losses[amp][0] == pytest.approx(losses["off"][0], rel=0.05)
        assert losses[amp] == pytest.approx(losses["off"], rel=0.2)


@pytest.mark.parametrize("more", [
    ("--amp", "off"), ("--amp", "bf16", "--accumulate", 2),
    ("--amp", "fp16", "--losses", "inst", "distinct", "speed")])
def test_steps_between_log_lines_do_not_wait(world, tmp_path, monkeypatch, more):
    def watched_loader(*args):
        for n, batch in enumerate(step_loader(*args), 1):
            # the first steps choose kernels, the last one logs and saves
            torch.cuda.set_sync_debug_mode("error" if 3 <= n < STEPS else "default")
            steps.append(n)
            yield batch
    steps, step_loader = [], pretrain.step_loader
    monkeypatch.setattr(pretrain, "step_loader", watched_loader)
    try:
        train(world, tmp_path, "--log-every", 1000, "--save-every", 1000, *more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == [*range(1, STEPS + 1)]


def test_one_process_trains_under_nccl(world, tmp_path):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=1", ROOT / "pretrain.py"]
    done = subprocess.run([*command, *words(world, tmp_path, "--sync-bn", "--amp", "bf16")],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on 1 cuda process(es)" in done.stderr and load_checkpoint(tmp_path)["step"] == STEPS
