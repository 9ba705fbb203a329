"""What a GPU would refuse or wait for in a step, without a GPU: tensors that have a device, a shape and a type alone.

Not seen: the backward pass (its engine needs a driver), memory formats (convolutions have no cuDNN to ask), NCCL.
"""
import contextlib

import pytest
import torch

import data
import pretrain
from common import colour, judging, precision
from models import LOSSES, TimeEquivariant, new_backbone

try:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    pytest.skip("this torch has no fake tensors under these names", allow_module_level=True)

B, T, SIZE = 4, 8, 32
SETTINGS = [(LOSSES, 1), (LOSSES, 2), (("inst", "distinct"), 1)]


class Seeds(list):
    """Numbers where a batch has a tensor on the CPU, which a fake tensor could not give back as numbers."""
    flatten = tolist = lambda self: self


class Copies(TorchDispatchMode):
    seen = 0                                                                    # between devices

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "copy" in str(function) and any(torch.is_tensor(x) and x.device != out.device for x in args):
            self.seen += 1
        return out


@contextlib.contextmanager
def fake_cuda(monkeypatch):
    drawn = [colour.draw_colour(seed) for seed in range(4 * B)]                 # real numbers, drawn before
    made = torch.tensor
    monkeypatch.setattr(colour, "draw_colour", lambda seed: drawn[seed])
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **rest: made(*args, **rest))
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    # without these two torch.autocast("cuda") turns itself off where there is no GPU
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies:
        yield copies


def fake_batch(n):
    """A batch as the loader gives it, on the device already."""
    shapes = dict(video=B, pq=B, order=B, speed=(B, 2), direction=(B, 2))
    batch = {name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}
    batch["clips"] = torch.empty(B, n, T, SIZE, SIZE, 3, dtype=torch.uint8).movedim(5, 3)
    return batch | dict(seed=Seeds(range(n * B)))


@pytest.mark.parametrize("amp", ("bf16", "fp16", "off"))
@pytest.mark.parametrize("losses, parts", SETTINGS)
def test_a_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing(monkeypatch, losses, parts, amp):
    cuda = torch.device("cuda")
    with fake_cuda(monkeypatch) as copies:
        with cuda:
            model = TimeEquivariant("r3d18_narrow", losses)
            types = set()
            model.backbone.layer4.register_forward_hook(lambda module, x, y: types.add(y.dtype))
            batch = pretrain.to_device(fake_batch(4 if "distinct" in losses else 2), cuda)
            scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
            autocast = precision.autocast(amp, cuda)
            values = pretrain.forward_backward(model, batch, parts, 0.1, autocast, scaler)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        values |= precision.step_scaled(scaler, optimizer, values["loss"])
    assert types == {torch.float32 if amp == "off" else precision.AMP[amp]}     # autocast was on
    assert {x.device.type for x in values.values()} == {"cuda"} and values["loss"].dtype == torch.float32
    assert copies.seen == 1                                                     # the numbers of `jitter`, pinned


@pytest.mark.parametrize("crops, views", (("centre", 2), ("ten", 10)))
def test_judging_on_a_gpu_mixes_no_devices(monkeypatch, crops, views):
    with fake_cuda(monkeypatch) as copies, torch.no_grad(), torch.device("cuda"):
        windows = torch.empty(3, T, 37, 48, 3, dtype=torch.uint8).movedim(4, 2)
        x = data.normalise(judging.views_of(windows, SIZE, crops))
        with torch.autocast("cuda", torch.bfloat16):
            out = new_backbone("r3d18_narrow").eval()(x)
    assert (out.shape, out.dtype, out.device.type, copies.seen) == ((3 * views, 128), torch.bfloat16, "cuda", 0)


def plant(monkeypatch, fault):
    """Break a step as one easily does."""
    nearest, objective = pretrain.nearest, pretrain.objective
    if fault == "waits for a value":
        monkeypatch.setattr(pretrain, "nearest", lambda *args: [value * nearest(*args)[0].item() for value in
                                                                nearest(*args)])
    if fault == "mixes devices":
        monkeypatch.setattr(pretrain, "nearest", lambda x, y, candidate, match: nearest(
            x, y, candidate & torch.ones(candidate.shape, dtype=torch.bool, device="cpu"), match))
    if fault == "looks whether all are finite":
        def looking(out, *rest):
            if not out["phi"].isfinite().all():
                raise ValueError
            return objective(out, *rest)
        monkeypatch.setattr(pretrain, "objective", looking)


@pytest.mark.parametrize("fault", ("waits for a value", "mixes devices", "looks whether all are finite"))
def test_planted_faults_are_caught(monkeypatch, fault):
    plant(monkeypatch, fault)
    with pytest.raises((RuntimeError, NotImplementedError)):
        test_a_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing(monkeypatch, LOSSES, 1, "bf16")
