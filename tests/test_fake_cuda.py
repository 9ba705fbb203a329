"""What a GPU would refuse or wait for in a step, without a GPU: tensors that have a device, a shape and a type alone.

Not seen: the backward pass (its engine needs a driver), memory formats (convolutions have no cuDNN to ask), NCCL.
"""
import contextlib
from pathlib import Path

import pytest
import torch
from conftest import judging as judge_words, train
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import finetune
import pretrain
from common import colour, judging, precision, progress
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


@pytest.fixture
def rehearsal(monkeypatch):
    """fake_cuda, where this torch can: private names differ between its versions."""
    try:
        with fake_cuda(monkeypatch), torch.device("cuda"), torch.autocast("cuda", torch.bfloat16):
            product = torch.empty(2, 2) @ torch.empty(2, 2)
    except Exception as error:
        pytest.skip(f"no rehearsal with this torch: {error!r}")
    if (product.dtype, product.device.type) != (torch.bfloat16, "cuda"):
        pytest.skip("no rehearsal with this torch: autocast is off where there is no GPU")
    monkeypatch.undo()


def rehearse_a_step(monkeypatch, losses, parts, amp):
    """A step of pretrain.py, all but the backward pass, and what is to be true of it."""
    cuda = torch.device("cuda")
    with fake_cuda(monkeypatch) as copies:
        with cuda:                                                              # not around the step: what that makes
            model = TimeEquivariant("r3d18_narrow", losses)                     # must say itself where
            batch = fake_batch(4 if "distinct" in losses else 2)
        copies.seen = 0                                                         # of the step alone
        types = set()
        model.backbone.layer4.register_forward_hook(lambda module, x, y: types.add(y.dtype))
        batch = pretrain.to_device(batch, cuda)
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


@pytest.mark.usefixtures("rehearsal")
@pytest.mark.parametrize("amp", ("bf16", "fp16", "off"))
@pytest.mark.parametrize("losses, parts", SETTINGS)
def test_a_step_on_a_gpu_mixes_no_devices_and_waits_for_nothing(monkeypatch, losses, parts, amp):
    rehearse_a_step(monkeypatch, losses, parts, amp)


@pytest.mark.usefixtures("rehearsal")
@pytest.mark.parametrize("crops, views", (("centre", 2), ("ten", 10)))
def test_judging_on_a_gpu_mixes_no_devices(monkeypatch, crops, views):
    with fake_cuda(monkeypatch) as copies, torch.no_grad():
        with torch.device("cuda"):
            windows = torch.empty(3, T, 37, 48, 3, dtype=torch.uint8).movedim(4, 2)
            network = new_backbone("r3d18_narrow").eval()
        copies.seen = 0
        x = data.normalise(judging.views_of(windows, SIZE, crops))
        with torch.autocast("cuda", torch.bfloat16):
            out = network(x)
    assert (out.shape, out.dtype, out.device.type, copies.seen) == ((3 * views, 128), torch.bfloat16, "cuda", 0)


# Ways to break a step: each takes pretrain.objective and does what it does, but for one thing

def waiting(objective, out, *args):
    out["phi"].sum().item()
    return objective(out, *args)


def looking(objective, out, *args):
    if not out["phi"].isfinite().all():
        raise ValueError
    return objective(out, *args)


def mixing(objective, out, *args):
    phi = out["phi"] * torch.ones(out["phi"].shape, device="cpu")
    return objective(out | dict(phi=phi), *args)


def copying(objective, out, *args):
    phi = out["phi"].cpu().to("cuda")
    return objective(out | dict(phi=phi), *args)


def rounding(objective, *args):
    terms, scores = objective(*args)
    return {name: term.bfloat16() for name, term in terms.items()}, scores


@pytest.mark.usefixtures("rehearsal")
@pytest.mark.parametrize("fault, error", [(waiting, RuntimeError), (looking, RuntimeError), (mixing, RuntimeError),
                                          (copying, AssertionError), (rounding, AssertionError)])
def test_planted_faults_are_caught(monkeypatch, fault, error):
    objective = pretrain.objective
    monkeypatch.setattr(pretrain, "objective", lambda *args: fault(objective, *args))
    with pytest.raises(error):
        rehearse_a_step(monkeypatch, LOSSES, 1, "bf16")


# ---- Whole runs, on a device without values ----

class NoBlockingCopies(torch.overrides.TorchFunctionMode):
    """Refuses copies to the device that are waited for: not non_blocking, or made there of Python's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.to, torch.Tensor.new_tensor) and result.is_meta:
            there = function is torch.Tensor.to and (args[0].is_meta or kwargs.get("non_blocking"))
            assert there, f"{function} copies and waits"
        return result


@pytest.mark.parametrize("script, flags", [
    ("pretrain", ()), ("pretrain", ("--accumulate", 2)), ("pretrain", ("--losses", "inst", "distinct", "speed")),
    ("finetune", ())])
def test_steps_between_log_lines_do_not_wait_for_the_device(world, whole, tmp_path, monkeypatch, script, flags):
    """A tensor on torch's device "meta" has no value: what needs one, and so would wait, raises NotImplementedError."""
    module, modes, steps = dict(pretrain=pretrain, finetune=finetune)[script], contextlib.ExitStack(), []
    step_loader = module.step_loader

    def watch_and_load(*args):
        modes.enter_context(NoBlockingCopies())                                 # the model is there by now
        return step_loader(*args)
    monkeypatch.setattr(module, "init_distributed", lambda: (0, 1, torch.device("meta")))
    monkeypatch.setattr(module, "step_loader", watch_and_load)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())    # there is none for meta
    modes.callback(register_optimizer_step_post_hook(lambda *_: steps.append(None)).remove)
    with modes, pytest.raises(NotImplementedError, match="meta") as caught:
        if script == "pretrain":
            train(world, tmp_path, "--log-every", 2, *flags)
        else:
            finetune.main(judge_words(script, world, whole, tmp_path, "--batch-size", 8, "--log-every", 2))
    assert len(steps) == 2                                                      # the line of the log is due
    assert Path(progress.__file__) in [entry.path for entry in caught.traceback]


class NoValues(TorchDispatchMode):
    """Refuses what makes a number of Python's of a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits"
        return function(*args, **(kwargs or {}))


def test_what_the_log_says_of_fp16_is_not_waited_for():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.AdamW([weight], fused=True), torch.amp.GradScaler("cpu")    # fused: as on a GPU
    scaler.scale(weight.sum()).backward()
    with NoValues():
        values = precision.step_scaled(scaler, optimizer, weight.sum())
    assert values == dict(overflow=0, loss_scale=65536) and weight.item() < 1
