"""bf16 on a CPU has the gradient of float32, also of the clips whose gradient torch gets wrong there."""
import pytest
import torch
from torch import nn

from common.precision import autocast, mend_bf16_on_cpus
from models import new_backbone

WRONG = [                                                                       # kernel, stride, (T, H, W): alone, bf16
    ((3, 3, 3), (1, 1, 1), (2, 4, 4)),                                          # is off by its own size, or 1e36
    ((3, 1, 1), (1, 1, 1), (2, 4, 4)),
    ((7, 7, 7), (1, 2, 2), (3, 16, 16)),
    ((7, 7, 7), (1, 2, 2), (4, 16, 16)),                                        # ends the process
    ((3, 3, 3), (2, 2, 2), (1, 1, 1)),
    ((1, 3, 3), (1, 2, 2), (8, 1, 1))]                                          # ends the process


def gradient(convolution, clip, amp):
    convolution.weight.grad = None
    with autocast(amp, torch.device("cpu")):
        out = convolution(clip)
    out.float().pow(2).sum().backward()
    return convolution.weight.grad


@pytest.mark.parametrize("kernel, stride, shape", WRONG)
def test_the_bf16_gradient_of_a_convolution_over_a_small_clip_is_that_of_float32(kernel, stride, shape):
    torch.manual_seed(0)
    convolution = nn.Conv3d(16, 16, kernel, stride, [k // 2 for k in kernel], bias=False)
    convolution = mend_bf16_on_cpus(convolution.to(memory_format=torch.channels_last_3d))
    clip = torch.randn(4, 16, *shape).to(memory_format=torch.channels_last_3d)
    exact = gradient(convolution, clip, "off")
    for _ in range(3):                                                          # what is wrong is memory that was freed
        torch.testing.assert_close(gradient(convolution, clip, "bf16"), exact, rtol=0.05, atol=0.02 * exact.abs().max())


@pytest.mark.parametrize("frames", [5, 6, 7])
def test_training_whose_float32_gradient_is_wrong_too_is_refused(frames):
    network = mend_bf16_on_cpus(new_backbone("s3dg"))
    clips = torch.randn(2, 3, frames, 32, 32)
    with pytest.raises(ValueError, match="give --frames 8 or more"):
        network(clips)
    with torch.no_grad():
        assert network(clips).shape == (2, 1024)


def test_convolutions_over_larger_clips_stay_in_bf16():
    convolution = mend_bf16_on_cpus(nn.Conv3d(3, 4, 3, padding=1))
    with autocast("bf16", torch.device("cpu")):
        assert convolution(torch.randn(2, 3, 4, 8, 8)).dtype == torch.bfloat16
        assert convolution(torch.randn(2, 3, 1, 2, 2)).dtype == torch.bfloat16
        assert convolution(torch.randn(2, 3, 2, 8, 8)).dtype == torch.float32
