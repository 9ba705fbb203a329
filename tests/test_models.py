"""Backbones against their publications, heads against Sec. 3.4, and weights from files."""
import hashlib

import pytest
import torch
from torch import nn
from torchvision.models import video

from common import UserError
from models import BACKBONES, LOSSES, Gate, TimeEquivariant, load_backbone, new_backbone

HEADS = dict(inst="phi", equi="psi", speed="speed", direction="direction", order="order",
             distinct="chi")
close = torch.testing.assert_close


def clip(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def randomise(net):
    """Shift BatchNorm's values away from 0 and 1, so that a lost one shows."""
    torch.manual_seed(3)
    for value in net.state_dict().values():
        if value.ndim == 1:
            value += 0.2 * torch.rand_like(value)
    return net.eval()


@pytest.fixture(scope="module")
def nets():
    """A new network of each backbone, in eval mode; tests that change weights make their own."""
    torch.manual_seed(0)
    return {arch: new_backbone(arch).eval() for arch in BACKBONES}


# ---- Backbones ----

@torch.no_grad()
def test_backbones_map_clips_to_dim_features(nets):
    dims = dict(r3d18=512, r3d18_tv=512, r2plus1d18=512, s3dg=1024, r3d18_narrow=128)
    assert {arch: net.dim for arch, net in nets.items()} == dims
    for net in nets.values():
        assert net(clip(2, 3, 5, 17, 20)).shape == (2, net.dim)     # the smallest clip s3dg accepts


@pytest.mark.parametrize("arch, parameters", [
    ("r3d18", 33_409_104),                      # Hara et al., type-B shortcuts: 33.4 M
    ("r3d18_tv", 33_371_472),                   # num_params of torchvision's R3D_18_Weights
    ("r2plus1d18", 31_505_325),                 # num_params of torchvision's R2Plus1D_18_Weights
    ("s3dg", 8_320_048 + 1_225_008)])           # num_params of torchvision's S3D_Weights, and gates
def test_parameters_with_a_400_way_layer(nets, arch, parameters):
    own = sum(p.numel() for p in nets[arch].parameters())
    assert own + nets[arch].dim * 400 + 400 == parameters


def test_narrow_is_a_quarter_of_r3d18_in_every_layer(nets):
    narrow, wide = nets["r3d18_narrow"].state_dict(), nets["r3d18"].state_dict()
    assert list(narrow) == list(wide)
    for key in wide:
        kept = 1, 3, 7                          # 3 colours; kernels of 1, 3, 7
        expected = [n if n in kept else n // 4 for n in wide[key].shape]
        assert list(narrow[key].shape) == expected, key


def test_r3d18_stem_is_that_of_hara(nets):
    conv, norm, relu, pool = nets["r3d18"].stem
    assert conv.weight.shape == (64, 3, 7, 7, 7) and conv.bias is None
    assert conv.stride == (1, 2, 2) and conv.padding == (3, 3, 3)
    assert isinstance(norm, nn.BatchNorm3d) and isinstance(relu, nn.ReLU)
    assert isinstance(pool, nn.MaxPool3d)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)


@pytest.mark.parametrize("arch, make", [
    ("r3d18_tv", video.r3d_18), ("r2plus1d18", video.r2plus1d_18)])
@torch.no_grad()
def test_torchvision_weights_give_torchvision_features_bit_for_bit(arch, make):
    theirs, ours = randomise(make()), new_backbone(arch).eval()
    theirs.fc = nn.Identity()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = clip(1, 3, 8, 32, 32)
    close(ours(x), theirs(x), rtol=0, atol=0)


def test_batchnorms_momentum_is_a_tenth_in_every_backbone(nets):
    for net in nets.values():
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm3d)]
        assert {norm.momentum for norm in norms} == {0.1}       # torchvision's S3D has 0.001


# ---- S3D-G ----

def gates(net):
    return [m for m in net.modules() if isinstance(m, Gate)]


def test_gate_is_sigmoid_of_a_linear_layer_on_the_average():
    gate, x = Gate(3), clip(2, 3, 4, 5, 6)
    average = x.flatten(2).sum(2) / (4 * 5 * 6)
    logits = average @ gate.fc.weight.T + gate.fc.bias
    close(gate(x).flatten(2), x.flatten(2) / (1 + torch.exp(-logits))[:, :, None])


def test_s3dg_has_one_gate_after_conv2d_2c_and_one_at_the_end_of_each_of_36_branches(nets):
    net = nets["s3dg"]
    blocks = [net.features[i] for i in (5, 6, 8, 9, 10, 11, 12, 14, 15)]
    last = [net.features[3][-1]] + [branch[-1] for block in blocks for branch in block.children()]
    assert gates(net) == last and len(last) == 1 + 9 * 4


@torch.no_grad()
def test_s3dg_with_open_gates_is_torchvision_s3d_with_global_pooling():
    torch.manual_seed(0)                        # train mode: in eval mode the signal fades to 0
    theirs, ours, x = video.s3d(), new_backbone("s3dg"), clip(2, 3, 16, 40, 40)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    for gate in gates(ours):
        gate.fc.weight.zero_()
        gate.fc.bias.fill_(100)                 # σ(100) = 1
    features = ours(x)
    assert features.std() > 0.1
    close(features, theirs.features(x).mean(dim=(2, 3, 4)))


# ---- Heads, and the network that is pre-trained ----

def layers(head):
    """What a head is made of; the width of linear layers, "no bias" where they have none."""
    for m in head:
        if isinstance(m, nn.Linear):
            yield f"{m.in_features} to {m.out_features}" + ", no bias" * (m.bias is None)
        else:
            yield type(m).__name__


def test_heads_have_the_depth_and_width_of_section_3_4():
    net = TimeEquivariant("r3d18_narrow", HEADS, speeds=5)      # D = 128
    hidden = ["BatchNorm1d", "ReLU", "128 to 128, no bias", "BatchNorm1d", "ReLU", "128 to 128"]
    assert {name: list(layers(head)) for name, head in net.heads.items()} == {
        "phi": ["128 to 128, no bias", *hidden],
        "psi": ["256 to 128, no bias", *hidden],
        "chi": ["128 to 128, no bias", *hidden],
        "speed": ["128 to 128", "ReLU", "128 to 5"],
        "direction": ["128 to 128", "ReLU", "128 to 2"],
        "order": ["256 to 128", "ReLU", "128 to 3"]}


@pytest.mark.parametrize("loss", HEADS)
def test_only_the_chosen_head_exists_and_every_parameter_gets_a_gradient(loss):
    torch.manual_seed(0)
    net = TimeEquivariant("r3d18_narrow", [loss])
    out = net(clip(3, 4 if loss == "distinct" else 2, 3, 16, 32, 32))
    assert list(net.heads) == list(out) == [HEADS[loss]]
    out[HEADS[loss]].square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("losses, n", [
    (LOSSES, 2),
    ((*LOSSES, "distinct"), 4)])                # p and q once more, under another σ
@torch.no_grad()
def test_each_output_is_its_head_on_its_own_clips(losses, n):
    net, clips = randomise(TimeEquivariant("r3d18_narrow", losses)), clip(3, n, 3, 8, 32, 32)
    out = net(clips)
    f = [net.backbone(x) for x in clips.unbind(1)]
    assert not torch.allclose(f[0], f[1])
    for name, head in net.heads.items():
        if name in ("psi", "order"):
            close(out[name], head(torch.cat(f[:2], dim=1)))
        else:
            some = f if name == "chi" else f[:2]
            close(out[name], torch.stack([head(x) for x in some], dim=1))


@torch.no_grad()
def test_batchnorm_in_backbone_and_phi_sees_the_clips_p_and_q_as_one_batch():
    net, clips = TimeEquivariant("r3d18_narrow", ["inst"]), clip(3, 2, 3, 8, 32, 32)
    phi = net(clips)["phi"]                     # in train mode
    close(phi.flatten(0, 1), net.heads["phi"](net.backbone(clips.flatten(0, 1))))


# ---- load_backbone ----

@pytest.fixture
def model():
    torch.manual_seed(1)
    return randomise(TimeEquivariant("r3d18_narrow"))


@pytest.mark.parametrize("around, inside", [    # the network; the backbone alone
    ("", ""), ("module._orig_mod.", ""), ("", "_orig_mod.module.")])
def test_backbone_is_loaded_whole_but_for_heads(around, inside, model, tmp_path, capsys):
    state = {around + name.replace("backbone.", f"backbone.{inside}"): x
             for name, x in model.state_dict().items()}
    path, args = tmp_path / "b.pt", dict(epochs=400, arch="r3d18_narrow")
    torch.save(dict(model=state, args=args), path)
    net, heads = load_backbone(path), len(model.heads.state_dict())
    said = f"loaded r3d18_narrow from {path}: 120 tensors; ignored: {heads} of heads\n"
    assert capsys.readouterr().out == said
    assert not net.training and (net.dim, net.arch, net.args) == (128, "r3d18_narrow", args)
    assert net.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    close(net.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)


def test_a_bare_state_dict_needs_arch_and_its_classifier_is_ignored(model, tmp_path, capsys):
    one = torch.ones(1)                         # torchvision's ResNets have fc, its S3D classifier
    more = {"fc.weight": one, "classifier.1.bias": one}
    path = tmp_path / "b.pt"
    torch.save(model.backbone.state_dict() | more, path)
    with pytest.raises(UserError, match="b.pt does not say which network it holds: .*, s3dg, "):
        load_backbone(path)
    net = load_backbone(path, "r3d18_narrow")
    assert capsys.readouterr().out.endswith("120 tensors; ignored: 2 of heads\n")
    assert net.args == {} and net.arch == "r3d18_narrow" and not net.training
    close(net.state_dict(), model.backbone.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("change, arch, said", [
    (lambda state: state, "r3d18", r"size mismatch for stem\.0\.weight"),   # not the file's arch
    (lambda state: state.pop("stem.1.running_var"), None, r"Missing .*1\.running_var"),
    (lambda state: state.update(extra=torch.zeros(1)), None, 'Unexpected .*"extra"')])
def test_weights_that_do_not_fit_in_every_tensor_are_refused_in_one_line(
        tmp_path, change, arch, said):
    state = new_backbone("r3d18_narrow").state_dict()
    change(state)
    torch.save(dict(arch="r3d18_narrow", backbone=state), tmp_path / "b.pt")
    with pytest.raises(UserError, match=rf"b\.pt does not fit: .*{said}.*$"):
        load_backbone(tmp_path / "b.pt", arch)
