"""Training steps never wait for a GPU, shown without one: device "meta" has shapes but no values.

On it, whatever needs a value, and so would wait, raises an error. Not seen: the backward pass,
matrix products of tensors on two devices, NCCL; tests/test_cuda.py sees them where there is a GPU.
"""
import contextlib

import pytest
import torch
from conftest import evaluation_words, words

import finetune
import pretrain


class NoBlockingCopies(torch.overrides.TorchFunctionMode):
    """Fail at copies to the device that wait: without non_blocking, or of Python's numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert not result.is_meta, f"{function} copies and waits"
        if function is torch.Tensor.to and result.is_meta:
            assert args[0].is_meta or kwargs.get("non_blocking"), "a copy waits"
        return result


@pytest.mark.parametrize("script, more", [
    (pretrain, ()), (pretrain, ("--accumulate", 2)),
    (pretrain, ("--losses", "inst", "distinct", "speed")), (finetune, ("--batch-size", 8))])
def test_steps_between_log_lines_do_not_wait(
        world, checkpoint, tmp_path, monkeypatch, at_step, script, more):
    def watched_loader(*args):
        modes.enter_context(NoBlockingCopies())         # the model is on the device by now
        return step_loader(*args)
    modes, steps, step_loader = contextlib.ExitStack(), [], script.step_loader
    monkeypatch.setattr(script, "init_distributed", lambda: (0, torch.device("meta")))
    monkeypatch.setattr(script, "step_loader", watched_loader)
    # torch has no autocast for meta
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    argv = words(world, tmp_path, "--log-every", 2, "--save-every", 1000, *more)
    if script is finetune:
        argv = evaluation_words(world, checkpoint, tmp_path, "--log-every", 2, *more)
    for n in (1, 2):
        at_step(n, lambda: steps.append(None))
    with modes, pytest.raises((RuntimeError, AssertionError)):
        script.main(argv)
    assert len(steps) == 2                              # then the line of the log is due
