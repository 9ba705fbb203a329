"""Mixed precision: which, where, and what the log tells of it."""
from functools import partial

import torch
from torch import nn

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.bfloat16}


def default_amp():
    """bf16 where a GPU has it, else fp16; on a CPU float32, since torch's bf16 kernels there are not to be trusted with
    every shape (see mend_bf16_on_cpus): there bf16 is for those who ask for it."""
    if not torch.cuda.is_available():
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def cpu_has_bf16():
    """Whether torch says that this processor multiplies bf16 by itself; before torch 2.10 it did not say."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)


def autocast(amp, device):
    """torch.autocast as --amp says."""
    return torch.autocast(device.type, AMP[amp], enabled=amp != "off")


def step_scaled(scaler, optimizer, loss):
    """One step of the optimiser -> what the log tells of fp16: the share of steps left out for overflow, the scale."""
    before = scaler.scale(torch.ones_like(loss))                                # get_scale() would wait for the device
    scaler.step(optimizer)                                                      # leaves out a step that overflows ...
    scaler.update()                                                             # ... and lowers the scale
    scale = scaler.scale(torch.ones_like(loss))
    return dict(overflow=scale < before, loss_scale=scale) if scaler.is_enabled() else {}


def on_device(network, device):
    """The network to be trained, on its device, channels last in memory, its bf16 mended where it is on a CPU."""
    network.to(device, memory_format=torch.channels_last_3d)
    return mend_bf16_on_cpus(network) if device.type == "cpu" else network


def mend_bf16_on_cpus(network):
    """Let 3D convolutions over very small clips run in float32 -> the network.

    On CPUs torch's bf16 gradient of their weights is wrong, up to 1e36, or ends the process (oneDNN, torch 2.14), where
    a kernel of 3 frames goes over 2, one of 7 over 2 to 7, or one with stride 2 over a single pixel: 16-frame clips
    meet it in layer3, 8-frame clips in layer2, 4-frame clips in the stem. It costs nothing that can be measured. Where
    float32 is as wrong (7 frames with stride 2, s3dg's first, over 5 to 7) training is refused: ValueError.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = partial(small_clips_in_float32, module.forward, module.kernel_size[0], module.stride[0])
    return network


def small_clips_in_float32(forward, kernel, stride, x):                         # (N, C, T, H, W)
    frames, height, width = x.shape[2:]
    if kernel == 7 and stride == 2 and 5 <= frames <= 7 and torch.is_grad_enabled():
        raise ValueError(f"torch's gradient of a convolution of 7 over {frames} frames is wrong on CPUs: give --frames "
                         "8 or more")
    if not 1 < frames <= kernel and min(height, width) > 1:
        return forward(x)
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float())
