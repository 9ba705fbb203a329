"""Networks of Jenni & Jin, "Time-Equivariant Contrastive Video Representation Learning", ICCV 2021.

F is the backbone. F(x), "the output of the global pooling layer" (Sec. 3.4), is the representation
that pre-training learns.
Shapes: B videos, 2 clips p and q of each, 3 colours, T = 16 frames, H = W = 128 pixels, D features.
"""
import hashlib
import io
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchvision.models.video import r2plus1d_18, r3d_18
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet
from torchvision.models.video.s3d import S3D, SepInceptionBlock3D

from common import UserError

# ---- Backbones F (Sec. 3.4: "3D-ResNets [28], R(2+1)D [57], S3D-G [67]") ----

def pooled(net, dim):
    """Sec. 3.4: remove a VideoResNet's classifier, so that it returns F(x), the pooled features."""
    net.fc = nn.Identity()
    net.dim = dim
    return net


def hara_stem(width=64):
    """Stem of Hara et al. [28]: 7x7x7 convolution with stride 1 in T, max-pool over T, H, W."""
    return nn.Sequential(                                       # (B, 3, T, H, W)
        nn.Conv3d(3, width, 7, stride=(1, 2, 2), padding=3, bias=False),
        nn.BatchNorm3d(width),                                  # (B, 64, T, H/2, W/2)
        nn.ReLU(inplace=True),
        nn.MaxPool3d(3, stride=2, padding=1))                   # (B, 64, T/2, H/4, W/4)


def r3d18():
    """3D-ResNet-18 of Hara et al. (CVPR 2018), which the paper cites as [28]; D = 512.

    Equals models/resnet.py of kenshohara/3D-ResNets-PyTorch for 16-frame clips: stem, default
    shortcuts (type B: 1x1x1 convolution and BatchNorm) and initialisation. Parameter names are
    torchvision's.
    """
    # paper silent: which "3D-ResNet". It cites [28], whose released ResNet-18 has shortcuts of
    # type A, without weights. In most other papers R3D-18 is r3d18_tv.
    return pooled(VideoResNet(BasicBlock, [Conv3DSimple] * 4, [2, 2, 2, 2], hara_stem), dim=512)


def r3d18_tv():
    """R3D-18 of Tran et al. (CVPR 2018): torchvision's r3d_18; D = 512.

    Weights are interchangeable with torchvision's. The stem is 3x7x7 without a max-pool: each block
    sees eight times as many positions as in r3d18, at five times the compute.
    """
    return pooled(r3d_18(), dim=512)


def r2plus1d18():
    """R(2+1)D-18 of Tran et al. (CVPR 2018) [57]: torchvision's r2plus1d_18; D = 512.

    Weights are interchangeable with torchvision's. Tran et al. set the number of mid-planes
    (between the 2D and the 1D half) per convolution, torchvision per block: the second convolution
    of layer2.0, layer3.0 and layer4.0 has fewer than the original.
    """
    return pooled(r2plus1d_18(), dim=512)


class Gate(nn.Module):
    """Feature gating of S3D-G [67]: σ(W avgpool(x) + b) ⊙ x, one gate per clip and channel."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):                                       # (B, C, T, H, W)
        gate = self.fc(x.mean(dim=(2, 3, 4))).sigmoid()         # (B, C)
        return x * gate[:, :, None, None, None]                 # (B, C, T, H, W)


def s3dg():
    """S3D-G of Xie et al. (ECCV 2018) [67]: torchvision's s3d plus 37 gates; D = 1024.

    Needs T > 4 and H, W > 16.
    Same as torchvision's s3d: convolutions (separable, including the 7x7x7 stem), BatchNorm
    (eps 0.001) and ReLU after both halves of each, max-pools, PyTorch's default initialisation,
    parameter names.
    Different from torchvision's s3d: gates after Conv2d_2c and on the four branches of all nine
    Inception blocks, before concatenation; an average over all of T, H, W (torchvision's 2x7x7
    window needs 224 pixels); no classifier; the BatchNorm momentum.
    Different from the authors' nets/s3dg.py (tensorflow/models), where the stem is not separable,
    temporal kernels are initialised as the identity, gates have no b, and padding is TensorFlow's
    "SAME".
    """
    # paper silent: BatchNorm momentum 0.1, as in the ResNets; s3d's 0.001 needs thousands of steps
    net = S3D(norm_layer=partial(nn.BatchNorm3d, eps=0.001, momentum=0.1))
    gated = [net.features[3]]                                   # Conv2d_2c
    for block in net.features:
        if isinstance(block, SepInceptionBlock3D):
            gated += block.children()                           # branch0, branch1, branch2, branch3
    for layers in gated:
        norms = [m for m in layers.modules() if isinstance(m, nn.BatchNorm3d)]
        layers.append(Gate(norms[-1].num_features))
    # S3D.forward ends with a mean over T, H, W: without its head, that is F(x)
    net.avgpool = net.classifier = nn.Identity()
    net.dim = 1024
    return net


class NarrowResNet(VideoResNet):
    """A VideoResNet with a quarter of the channels: 16, 32, 64, 128."""

    def _make_layer(self, block, conv_builder, planes, blocks, stride=1):
        if planes == 64:
            self.inplanes = 16                                  # layer1 follows a stem of width 16
        return super()._make_layer(block, conv_builder, planes // 4, blocks, stride)


def r3d18_narrow():
    """r3d18 at a quarter of its width, for CPUs and tests; not a published network; D = 128."""
    stem = partial(hara_stem, 16)
    return pooled(NarrowResNet(BasicBlock, [Conv3DSimple] * 4, [2, 2, 2, 2], stem), dim=128)


# To add a backbone, add a function: () -> module (B, 3, T, H, W) -> (B, D) with `.dim` = D
BACKBONES = {"r3d18": r3d18, "r3d18_tv": r3d18_tv, "r2plus1d18": r2plus1d18, "s3dg": s3dg,
             "r3d18_narrow": r3d18_narrow}


def new_backbone(arch: str) -> nn.Module:
    """Initialise F, with `.dim`, `.arch` (its name) and `.args` (training arguments: none yet)."""
    net = BACKBONES[arch]()
    net.arch, net.args = arch, {}
    return net


# ---- Heads, and the network for pre-training ----

LOSSES = ("inst", "equi", "speed", "direction", "order")        # Table 1, rows (e)-(o): any subset
TERMS = (*LOSSES, "distinct")                                   # and the baseline of Fig. 5


def mlp(d_in: int, d: int) -> nn.Module:
    """Sec. 3.4: φ, ψ "have two hidden layers and preserve the original feature dimension".

    (N, d_in) -> (N, d)
    """
    # paper silent: hidden width d, and BatchNorm (its shift replaces the bias of the layer before)
    return nn.Sequential(
        nn.Linear(d_in, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True),
        nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True),
        nn.Linear(d, d))


def aux_head(d_in: int, d: int, classes: int) -> nn.Module:
    """Sec. 3.4: the heads of the auxiliary tasks "have a single hidden layer".

    (N, d_in) -> logits (N, classes)
    """
    # paper silent: hidden width d
    return nn.Sequential(nn.Linear(d_in, d), nn.ReLU(inplace=True), nn.Linear(d, classes))


class TimeEquivariant(nn.Module):
    """Fig. 3 and 4: F and the heads of the chosen losses.

    No other head is built, so every parameter gets a gradient.
    clips: (B, 2, 3, T, H, W), τ_p(x) and τ_q(x) of each video
    -> dict with the inputs of the chosen losses:
       inst: phi (B, 2, D) | equi: psi (B, D)
       logits: speed (B, 2, speeds), direction (B, 2, 2), order (B, 3)
       distinct: chi (B, 4, D), for clips (B, 4, 3, T, H, W): p, q, and p, q under another σ
    """

    def __init__(self, arch="r3d18", losses=LOSSES, speeds=4):
        super().__init__()
        self.backbone = new_backbone(arch)
        d = self.backbone.dim
        self.heads = nn.ModuleDict()
        if "inst" in losses:
            self.heads["phi"] = mlp(d, d)                       # Sec. 3.3
        if "equi" in losses:
            self.heads["psi"] = mlp(2 * d, d)                   # Sec. 3.1
        if "speed" in losses:
            self.heads["speed"] = aux_head(d, d, speeds)        # Sec. 3.2: 1x, 2x, 4x, 8x
        if "direction" in losses:
            self.heads["direction"] = aux_head(d, d, 2)         # Sec. 3.2: forward, backward
        if "order" in losses:
            self.heads["order"] = aux_head(2 * d, d, 3)         # Sec. 3.2: before, after, overlap
        if "distinct" in losses:
            self.heads["chi"] = mlp(d, d)                       # Fig. 5: in place of ψ

    def forward(self, clips: torch.Tensor) -> dict:
        B, n = clips.shape[:2]
        f_all = self.backbone(clips.flatten(0, 1))              # (nB, D)   F(x), one batch
        f = f_all.unflatten(0, (B, n))[:, :2].flatten(0, 1)     # (2B, D)   of p, q, p, q, ...
        f_pq = f.reshape(B, -1)                                 # (B, 2D)   [F(τ_p(x)), F(τ_q(x))]
        out = {}
        for name, head in self.heads.items():
            if name in ("psi", "order"):
                out[name] = head(f_pq)                          # (B, ·)
            elif name == "chi":
                out[name] = head(f_all).unflatten(0, (B, n))    # (B, 4, D)
            else:                                               # BatchNorm sees all 2B clips
                out[name] = head(f).unflatten(0, (B, 2))        # (B, 2, ·)
        return out


def classifier(backbone: nn.Module, classes: int) -> nn.Module:
    """Sec. 4, fine-tuning: F and a new linear layer on F(x).

    (B, 3, T, H, W) -> logits (B, classes)
    """
    fc = nn.Linear(backbone.dim, classes)
    # paper silent: no dropout
    return nn.Sequential(OrderedDict(backbone=backbone, fc=fc))


# ---- Weights from a file ----

def load_backbone(path, arch: str | None = None) -> nn.Module:
    """Load all weights of F from `path`, in eval mode, and print what was loaded.

    path: our backbone.pt {"arch", "backbone", "args"}, our checkpoint.pt {"model", "args", ...},
          a torchvision state dict (needs `arch`), or "random" for a fresh `arch`. Prefixes of DDP
          and torch.compile are removed; heads and classifiers are ignored.
    -> module (B, 3, T, H, W) -> (B, D) with `.dim`, `.arch`, `.sha256` of the file (None: random)
       and `.args`, the stored training arguments or {}.
    UserError: the file does not exist, or its weights do not fit `arch`.
    """
    if str(path) == "random":
        net = new_backbone(arch)
        net.sha256 = None
        print(f"random initialisation of {arch}: no weights loaded")
        return net.eval()

    stored, state, sha256 = read_weights(path)
    args = stored.get("args", {})
    arch = arch or stored.get("arch") or args.get("arch")
    if arch is None:
        raise UserError(f"{path} does not say which network it holds: "
                        f"give arch, one of {', '.join(BACKBONES)}")
    net = new_backbone(arch)
    net.args, net.sha256 = args, sha256
    heads = {key for key in state if key.split(".")[0] in ("heads", "fc", "classifier")}
    backbone = {key.removeprefix("backbone."): state[key] for key in state if key not in heads}
    fill(net, backbone, path)
    print(f"loaded {arch} from {path}: {len(backbone)} tensors; ignored: {len(heads)} of heads")
    return net.eval()


def read_weights(path):
    """Read a file of weights -> its whole content, its state dict, its SHA-256.

    The keys of the state dict have no prefixes of DDP and torch.compile.
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path} (has pretrain.py been run?)")
    content = Path(path).read_bytes()                           # one read: the file may change
    stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    state = stored.get("backbone", stored.get("model", stored))
    plain = {key.replace("module.", "").replace("_orig_mod.", ""): value
             for key, value in state.items()}
    return stored, plain, hashlib.sha256(content).hexdigest()


def fill(net, state, path):
    """Load all weights of a network. UserError: torch's list of missing and unexpected keys."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit: {' '.join(str(error).split())}") from None
