"""Networks of Jenni & Jin, "Time-Equivariant Contrastive Video Representation Learning" (ICCV 2021).

F is the backbone; F(x), "the output of the global pooling layer" (Sec. 3.4), is the representation to be learned.
Shapes: B videos, 2 clips p and q of each, 3 colours, T = 16 frames, H = W = 128 pixels, D features.
"""
import os
from collections import Counter, OrderedDict
from functools import partial

import torch
from torch import nn
from torchvision.models.video import r2plus1d_18, r3d_18
from torchvision.models.video.resnet import BasicBlock, Conv3DSimple, VideoResNet
from torchvision.models.video.s3d import S3D, SepInceptionBlock3D


# ---- Backbones F (Sec. 3.4: "3D-ResNets [28], R(2+1)D [57], S3D-G [67]") ----

def pooled(net, dim):
    """Sec. 3.4: a VideoResNet without its classifier, so that it ends with F(x), the global average pooling."""
    net.fc = nn.Identity()
    net.dim = dim
    return net


def hara_stem(width=64):
    """Hara et al.'s [28] first layers: a 7x7x7 convolution that keeps every frame, then a max-pool over T too."""
    return nn.Sequential(                                                   # (B, 3, T, H, W)
        nn.Conv3d(3, width, 7, stride=(1, 2, 2), padding=3, bias=False),    # (B, 64, T, H/2, W/2)
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(3, stride=2, padding=1))                               # (B, 64, T/2, H/4, W/4)


def r3d18():
    """3D-ResNet-18 of Hara et al. (CVPR 2018), which the paper cites [28]; D = 512.

    Equals models/resnet.py of kenshohara/3D-ResNets-PyTorch for 16-frame clips: its stem, its default shortcuts
    (type B: 1x1x1 convolution and BatchNorm), its initialisation. The parameter names are torchvision's.
    """
    # paper silent: which "3D-ResNet"; it cites this one (the ResNet-18 that [28] released has shortcuts of type A,
    # without weights), most peers mean r3d18_tv by R3D-18
    return pooled(VideoResNet(BasicBlock, [Conv3DSimple] * 4, [2, 2, 2, 2], hara_stem), dim=512)


def r3d18_tv():
    """R3D-18 of Tran et al. (CVPR 2018): torchvision's r3d_18, weights go both ways; D = 512.

    3x7x7 stem and no max-pool: each block sees eight times the positions, for five times the compute of r3d18.
    """
    return pooled(r3d_18(), dim=512)


def r2plus1d18():
    """R(2+1)D-18 of Tran et al. (CVPR 2018) [57]: torchvision's r2plus1d_18, weights go both ways; D = 512.

    Tran et al. choose the mid-planes (between the 2D and the 1D half) for each convolution, torchvision for each
    block: the second convolution of layer2.0, layer3.0 and layer4.0 has fewer than the original's.
    """
    return pooled(r2plus1d_18(), dim=512)


class Gate(nn.Module):
    """Feature gating of S3D-G [67]: σ(W avgpool(x) + b) ⊙ x, one number in (0, 1) for each clip and channel."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):                                                   # (B, C, T, H, W)
        gate = self.fc(x.mean(dim=(2, 3, 4))).sigmoid()                     # (B, C)
        return x * gate[:, :, None, None, None]                             # (B, C, T, H, W)


def s3dg():
    """S3D-G of Xie et al. (ECCV 2018) [67]: torchvision's s3d and 37 gates; D = 1024. Needs T > 4 and H, W > 16.

    Same as torchvision's s3d: the convolutions (separable, even the 7x7x7 stem), BatchNorm (eps 0.001) and ReLU
    after both halves of each, max-pools, PyTorch's default initialisation, parameter names. Not the same: gates
    after Conv2d_2c and on the four branches of all nine Inception blocks, before they are concatenated; an average
    over all of T, H, W (torchvision's 2x7x7 window needs 224 pixels); no classifier; the momentum of BatchNorm.
    Differences from the authors' nets/s3dg.py (tensorflow/models): its stem is not separable, its temporal kernels
    start as the identity, its gates have no b, and it pads as TensorFlow's "SAME".
    """
    # paper silent: BatchNorm momentum 0.1, as in the ResNets; s3d's 0.001 takes thousands of steps to settle
    net = S3D(norm_layer=partial(nn.BatchNorm3d, eps=0.001, momentum=0.1))
    gated = [net.features[3]]                                               # Conv2d_2c
    for block in net.features:
        if isinstance(block, SepInceptionBlock3D):
            gated += block.children()                                       # branch0, branch1, branch2, branch3
    for layers in gated:
        norms = [m for m in layers.modules() if isinstance(m, nn.BatchNorm3d)]
        layers.append(Gate(norms[-1].num_features))
    net.avgpool = net.classifier = nn.Identity()            # S3D.forward ends with a mean over T, H, W, now of F
    net.dim = 1024
    return net


class NarrowResNet(VideoResNet):
    """A VideoResNet with a quarter of the channels: 16, 32, 64, 128."""

    def _make_layer(self, block, conv_builder, planes, blocks, stride=1):
        if planes == 64:
            self.inplanes = 16                                              # layer1 follows a stem of width 16
        return super()._make_layer(block, conv_builder, planes // 4, blocks, stride)


def r3d18_narrow():
    """r3d18 with a quarter of the width, for CPUs and tests; equals no publication; D = 128."""
    return pooled(NarrowResNet(BasicBlock, [Conv3DSimple] * 4, [2, 2, 2, 2], partial(hara_stem, 16)), dim=128)


# A new backbone is one more function here: () -> module with `.dim` = D that maps (B, 3, T, H, W) to (B, D)
BACKBONES = {"r3d18": r3d18, "r3d18_tv": r3d18_tv, "r2plus1d18": r2plus1d18, "s3dg": s3dg,
             "r3d18_narrow": r3d18_narrow}


def new_backbone(arch: str) -> nn.Module:
    """F, freshly initialised, with `.dim`, its name `.arch` and `.args`, the training arguments, still empty."""
    if arch not in BACKBONES:
        raise ValueError(f"arch is {arch!r}, but must be one of {', '.join(BACKBONES)}")
    net = BACKBONES[arch]()
    net.arch, net.args = arch, {}
    return net


# ---- Heads, and the network that is pre-trained ----

LOSSES = ("inst", "equi", "speed", "direction", "order")                    # Table 1, rows (e)-(o): any subset
TERMS = (*LOSSES, "distinct")                                               # and the baseline of Fig. 5


def mlp(d_in: int, d: int) -> nn.Module:
    """Sec. 3.4: φ, ψ "have two hidden layers and preserve the original feature dimension". (N, d_in) -> (N, d)"""
    # paper silent: the hidden width d, and BatchNorm (its shift replaces the bias of the layer before it)
    return nn.Sequential(
        nn.Linear(d_in, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True),
        nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(inplace=True),
        nn.Linear(d, d))


def aux_head(d_in: int, d: int, classes: int) -> nn.Module:
    """Sec. 3.4: the heads of the auxiliary tasks "have a single hidden layer". (N, d_in) -> logits (N, classes)"""
    return nn.Sequential(nn.Linear(d_in, d), nn.ReLU(inplace=True), nn.Linear(d, classes))  # paper silent: width d


class TimeEquivariant(nn.Module):
    """Fig. 3 and 4: F and the heads of the chosen losses. No other head is built: each parameter gets a gradient.

    clips: (B, 2, 3, T, H, W), τ_p(x) and τ_q(x) of each video -> a dict with what the chosen losses need:
    inst: phi (B, 2, D) | equi: psi (B, D) | logits speed (B, 2, speeds), direction (B, 2, 2), order (B, 3)
    distinct: chi (B, 4, D), for clips (B, 4, 3, T, H, W): p and q once more, under another σ
    """

    def __init__(self, arch="r3d18", losses=LOSSES, speeds=4):
        super().__init__()
        if not losses or not set(losses) <= set(TERMS):
            raise ValueError(f"losses is {losses!r}, but must be one or more of {', '.join(TERMS)}")
        self.backbone = new_backbone(arch)
        d = self.backbone.dim
        self.heads = nn.ModuleDict()
        if "inst" in losses:
            self.heads["phi"] = mlp(d, d)                                   # Sec. 3.3
        if "equi" in losses:
            self.heads["psi"] = mlp(2 * d, d)                               # Sec. 3.1
        if "speed" in losses:
            self.heads["speed"] = aux_head(d, d, speeds)                    # Sec. 3.2: 1x, 2x, 4x, 8x
        if "direction" in losses:
            self.heads["direction"] = aux_head(d, d, 2)                     # Sec. 3.2: forward, backward
        if "order" in losses:
            self.heads["order"] = aux_head(2 * d, d, 3)                     # Sec. 3.2: before, after, overlap
        if "distinct" in losses:
            self.heads["chi"] = mlp(d, d)                                   # Fig. 5: in the place of ψ

    def forward(self, clips: torch.Tensor) -> dict:
        n = 4 if "chi" in self.heads else 2
        if clips.ndim != 6 or clips.shape[1] != n:
            raise ValueError(f"clips must be (B, {n}, 3, T, H, W), but is {tuple(clips.shape)}")
        f_all = self.backbone(clips.flatten(0, 1))                          # (nB, D)    F(x), all clips in one batch
        f = f_all.unflatten(0, (-1, n))[:, :2].flatten(0, 1)                # (2B, D)    rows p, q, p, q, ...
        f_pq = f.unflatten(0, (-1, 2)).flatten(1)                           # (B, 2D)    [F(τ_p(x)), F(τ_q(x))]
        out = {}
        for name, head in self.heads.items():
            if name in ("psi", "order"):                                    # of the pair
                out[name] = head(f_pq)                                      # (B, ·)
            elif name == "chi":
                out[name] = head(f_all).unflatten(0, (-1, n))               # (B, 4, D)
            else:                                                           # of each clip; BatchNorm over all 2B
                out[name] = head(f).unflatten(0, (-1, 2))                   # (B, 2, ·)
        return out


def check_clips(args):
    """models.s3dg halves T twice and a picture's sides five times. ValueError: nothing would be left."""
    if args.arch == "s3dg" and (args.frames <= 4 or args.size <= 16):
        raise ValueError(f"--arch s3dg needs --frames above 4 and --size above 16, but they are {args.frames} and "
                         f"{args.size}")


def classifier(backbone: nn.Module, classes: int) -> nn.Module:
    """Sec. 4, fine-tuning: F and a new linear layer on F(x). (B, 3, T, H, W) -> logits (B, classes)"""
    fc = nn.Linear(backbone.dim, classes)
    return nn.Sequential(OrderedDict(backbone=backbone, fc=fc))             # paper silent: no dropout


# ---- Weights from a file ----

def load_backbone(path, arch: str | None = None) -> nn.Module:
    """F in eval mode with the weights in `path`: all of them, or a ValueError naming the keys. Prints what it did.

    path: our backbone.pt {"arch", "backbone", "args"}, our checkpoint.pt {"model", "args", ...}, a torchvision
          state dict (`arch` says of which network), or "random" for a fresh `arch`. The prefixes of DDP and
          torch.compile do not matter; heads and classifiers in the file are ignored.
    -> module (B, 3, T, H, W) -> (B, D) with `.dim`, `.arch` and `.args`, the stored training arguments or {}
    """
    if str(path) == "random":
        net = new_backbone(arch)
        print(f"random initialisation of {arch}: no weights loaded")
        return net.eval()

    state, args, stored_arch = read_weights(path)
    if not arch and not stored_arch:
        raise ValueError(f"{path} does not say which network it holds: give arch, one of {', '.join(BACKBONES)}")
    if arch and stored_arch and arch != stored_arch:
        raise ValueError(f"{path} holds {stored_arch}, but arch is {arch}")
    net = new_backbone(arch or stored_arch)

    found, ignored = {}, Counter()
    for key, value in state.items():
        key = plain_key(key)
        first = key.split(".")[0]
        if first in ("heads", "fc", "classifier"):
            ignored[first] += 1
        else:
            found[key.removeprefix("backbone.")] = value

    fill(net, found, path, net.arch)
    net.args = args
    print(f"loaded {net.arch} from {path}: {len(found)} of {len(found)} tensors"
          + ("; ignored: " if ignored else "") + ", ".join(f"{name}.* ({n})" for name, n in ignored.items()))
    return net.eval()


def read_weights(path):
    """What a file of weights holds -> {key: tensor}, training arguments or {}, name of the network or None."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is a folder: give a file in it, such as backbone.pt" if os.path.isdir(path) else
                         f"there is no file {path}: run pretrain.py first, or name another file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:              # torch.load raises whatever it met, from EOFError to UnpicklingError
        raise ValueError(f"{path} is not a file of tensors that torch.load(weights_only=True) reads") from error
    stored = stored if isinstance(stored, dict) else {}
    state = stored.get("backbone", stored.get("model", stored))
    args = stored.get("args") or {}
    if (not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values()))
            or not all(isinstance(key, str) for key in state) or not isinstance(args, dict)):
        raise ValueError(f'{path} holds no state dict, neither as "backbone" or "model" nor as the file itself')
    return state, args, stored.get("arch") or args.get("arch")


def plain_key(key):
    """A weight's name without what DDP and torch.compile put into it."""
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def fill(net, found, path, name):
    """Load all the weights of a network, {key: tensor} of the file `path`, or a ValueError naming the keys."""
    wanted = net.state_dict()
    problems = {"missing": [k for k in wanted if k not in found],
                "unexpected": [k for k in found if k not in wanted],
                "of another shape": [k for k in wanted if k in found and wanted[k].shape != found[k].shape]}
    sentences = []
    for what, keys in problems.items():
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            sentences.append(f"{len(keys)} {what} ({', '.join(keys[:3])}{more})")
    if sentences:
        raise ValueError(f"{path} does not fit {name}, which has {len(wanted)} tensors: {', '.join(sentences)}")
    net.load_state_dict(found)
