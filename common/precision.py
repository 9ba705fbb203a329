"""Mixed precision: which, where, and what the log tells of it."""
from functools import partial

import torch
from torch import nn

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.bfloat16}


def default_amp():
    """The precision that is faster here: bf16 where the hardware has it; else fp16 on a GPU, float32 on a CPU."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_has_bf16() else "off"


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


def mend_bf16_on_cpus(network):
    """Let 3D convolutions over two frames run in float32 -> the network.

    On CPUs torch's bf16 gradient of their weights is wrong, up to 1e36 (oneDNN, torch 2.14, kernels of 3x3x3): 16-frame
    clips meet it in layer3, 8-frame clips in layer2. It costs nothing that can be measured.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = partial(two_frames_in_float32, module.forward)
    return network


def two_frames_in_float32(forward, x):                                          # (N, C, T, H, W)
    if x.shape[2] != 2:
        return forward(x)
    with torch.autocast(x.device.type, enabled=False):
        return forward(x.float())
