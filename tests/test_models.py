"""Backbones against their publications, heads against Sec. 3.4, and weights from files."""
import hashlib
import itertools
import pickle

import pytest
import torch
from torch import nn
from torchvision.models import video

from common import UserError
from models import BACKBONES, LOSSES, Gate, TimeEquivariant, classifier, load_backbone, new_backbone

DIMS = {"r3d18": 512, "r3d18_tv": 512, "r2plus1d18": 512, "s3dg": 1024, "r3d18_narrow": 128}
TORCHVISION = {"r3d18_tv": video.r3d_18, "r2plus1d18": video.r2plus1d_18}
TABLE_1 = {                                     # rows (e)-(n); (o) is (k); Fig. 5
    "e": "inst", "f": "equi", "g": "speed direction order", "h": "inst equi",
    "i": "inst speed direction order", "j": "equi speed direction order",
    "k": "inst equi speed direction order", "l": "inst equi speed", "m": "inst equi speed order",
    "n": "inst equi speed direction", "Fig. 5": "inst distinct"}
close = torch.testing.assert_close


def count(net):
    return sum(p.numel() for p in net.parameters())


def clip(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def randomise(net):
    """BatchNorm's parameters and statistics away from 0 and 1, where a lost one would not show."""
    torch.manual_seed(3)
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm3d)):
            for value in (m.weight.data, m.running_var):
                value.uniform_(0.5, 1.5)
            for value in (m.bias.data, m.running_mean):
                value.uniform_(-0.1, 0.1)
    return net.eval()


@pytest.fixture(scope="module")
def nets():
    """One of each backbone, in eval mode; tests that change weights make their own."""
    torch.manual_seed(0)
    return {arch: new_backbone(arch).eval() for arch in BACKBONES}


# ---- Backbones ----

@pytest.mark.parametrize("arch, shape", [
    *itertools.product(BACKBONES, [(16, 32, 32), (8, 48, 40)]),
    *itertools.product(["s3dg"], [(32, 64, 64), (5, 17, 17)])])
@torch.no_grad()
def test_backbone_maps_clips_of_any_size_to_dim_features(nets, arch, shape):
    assert nets[arch].dim == DIMS[arch]
    assert nets[arch](clip(2, 3, *shape)).shape == (2, DIMS[arch])


@pytest.mark.parametrize("arch, parameters", [
    ("r3d18", 33_409_104),                      # Hara et al., type-B shortcuts: 33.4 M
    ("r3d18_tv", 33_371_472),                   # num_params of torchvision's R3D_18_Weights
    ("r2plus1d18", 31_505_325),                 # num_params of torchvision's R2Plus1D_18_Weights
    ("s3dg", 8_320_048 + 1_225_008)])           # num_params of torchvision's S3D_Weights, and gates
def test_parameters_with_a_400_way_layer(nets, arch, parameters):
    assert count(nets[arch]) + nets[arch].dim * 400 + 400 == parameters


def test_narrow_is_a_quarter_of_r3d18_in_every_layer(nets):
    narrow, wide = nets["r3d18_narrow"].state_dict(), nets["r3d18"].state_dict()
    assert list(narrow) == list(wide)
    for key in wide:
        kept = 1, 3, 7                          # 3 colours; kernels of 1, 3, 7
        expected = [n if n in kept else n // 4 for n in wide[key].shape]
        assert list(narrow[key].shape) == expected, key


@pytest.mark.parametrize("arch, before_pooling", [("r3d18", (1, 2, 2)), ("r3d18_tv", (2, 4, 4))])
@torch.no_grad()
def test_r3d18_halves_time_once_more_than_torchvision(nets, arch, before_pooling):
    shapes = []
    layer = nets[arch].layer4
    hook = layer.register_forward_hook(lambda _, __, y: shapes.append(y.shape[2:]))
    nets[arch](clip(1, 3, 16, 64, 64))
    hook.remove()
    assert shapes == [before_pooling]


def test_r3d18_stem_is_that_of_hara(nets):
    conv, norm, relu, pool = nets["r3d18"].stem
    assert conv.weight.shape == (64, 3, 7, 7, 7) and conv.bias is None
    assert conv.stride == (1, 2, 2) and conv.padding == (3, 3, 3)
    assert isinstance(norm, nn.BatchNorm3d) and isinstance(relu, nn.ReLU)
    assert isinstance(pool, nn.MaxPool3d)
    assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)


@pytest.mark.parametrize("arch", ["r3d18", "r3d18_narrow"])
def test_r3d18_begins_with_kaiming_weights_in_every_convolution(arch):
    torch.manual_seed(0)
    for m in new_backbone(arch).modules():
        if isinstance(m, nn.Conv3d):
            fan_out = m.weight.shape[0] * m.weight[0, 0].numel()
            assert m.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize("arch", TORCHVISION)
@torch.no_grad()
def test_torchvision_weights_go_both_ways_and_give_torchvision_features(arch):
    theirs, back = randomise(TORCHVISION[arch]()), TORCHVISION[arch]().eval()
    ours = new_backbone(arch).eval()
    state = {key: x for key, x in theirs.state_dict().items() if not key.startswith("fc.")}
    assert list(ours.state_dict()) == list(state)

    features = []
    for net in (theirs, back):
        net.avgpool.register_forward_hook(lambda _, __, y: features.append(y.flatten(1)))
    x = clip(1, 3, 8, 32, 32)
    theirs(x)
    ours.load_state_dict(state)
    close(ours(x), features[0], rtol=0, atol=0)

    missing, unexpected = back.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    back(x)
    close(features[1], features[0], rtol=0, atol=0)


@pytest.mark.parametrize("arch", BACKBONES)
def test_batchnorm_statistics_settle_within_tens_of_steps(nets, arch):
    norms = [m for m in nets[arch].modules() if isinstance(m, nn.BatchNorm3d)]
    assert {norm.momentum for norm in norms} == {0.1}           # torchvision's S3D has 0.001


# ---- S3D-G ----

def gates(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, Gate)}


def test_gate_is_sigmoid_of_a_linear_layer_on_the_average():
    gate, x = Gate(3), clip(2, 3, 4, 5, 6)
    expected = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(3)):
        means = [x[b, k].sum() / (4 * 5 * 6) for k in range(3)]
        logit = gate.fc.bias[c] + sum(gate.fc.weight[c, k] * means[k] for k in range(3))
        expected[b, c] = x[b, c] / (1 + torch.exp(-logit))
    close(gate(x), expected)


def test_s3dg_has_one_gate_after_conv2d_2c_and_one_at_the_end_of_each_of_36_branches(nets):
    net = nets["s3dg"]
    blocks = [net.features[i] for i in (5, 6, 8, 9, 10, 11, 12, 14, 15)]
    last = [net.features[3][-1]] + [branch[-1] for block in blocks for branch in block.children()]
    assert list(gates(net).values()) == last and len(last) == 1 + 9 * 4
    assert sum(map(count, last)) == 1_225_008


def test_every_gate_of_s3dg_matters():
    torch.manual_seed(0)
    net = new_backbone("s3dg")
    net(clip(2, 3, 16, 32, 32)).square().sum().backward()
    for name, gate in gates(net).items():
        assert gate.fc.weight.grad.abs().max() > 0 and gate.fc.bias.grad.abs().max() > 0, name


@torch.no_grad()
def test_s3dg_with_open_gates_is_torchvision_s3d_with_global_pooling():
    torch.manual_seed(0)                        # train mode: in eval mode the signal fades to 0
    theirs, ours, x = video.s3d(), new_backbone("s3dg"), clip(2, 3, 16, 40, 40)
    state = {key: w for key, w in theirs.state_dict().items() if key.startswith("features.")}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert missing == [f"{gate}.fc.{w}" for gate in gates(ours) for w in ("weight", "bias")]
    assert not unexpected
    for gate in gates(ours).values():
        gate.fc.weight.zero_()
        gate.fc.bias.fill_(100)                 # σ(100) = 1
    features = ours(x)
    assert features.std() > 0.1
    close(features, theirs.features(x).mean(dim=(2, 3, 4)))


# ---- Heads, and the network that is pre-trained ----

def test_heads_have_the_depth_and_width_of_section_3_4():
    net = TimeEquivariant("r3d18_narrow", LOSSES, speeds=4)
    D = 128
    layers = {name: [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]
              for name, head in net.heads.items()}
    assert layers == {
        "phi": [(D, D), (D, D), (D, D)], "psi": [(2 * D, D), (D, D), (D, D)],
        "speed": [(D, D), (D, 4)], "direction": [(D, D), (D, 2)], "order": [(2 * D, D), (D, 3)]}
    kinds = {name: " ".join(type(m).__name__ for m in head) for name, head in net.heads.items()}
    mlp = "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear"
    assert kinds["phi"] == kinds["psi"] == mlp
    assert kinds["speed"] == kinds["direction"] == kinds["order"] == "Linear ReLU Linear"
    for name in ("phi", "psi"):                 # BatchNorm has the bias
        assert [m.bias is None for m in net.heads[name][::3]] == [True, True, False]


@pytest.mark.parametrize("row", TABLE_1)
def test_only_the_chosen_heads_exist_and_every_parameter_gets_a_gradient(row):
    torch.manual_seed(0)
    losses, clips = TABLE_1[row].split(), 4 if row == "Fig. 5" else 2
    shapes = {
        "inst": ("phi", (4, 2, 128)), "equi": ("psi", (4, 128)), "distinct": ("chi", (4, 4, 128)),
        "speed": ("speed", (4, 2, 3)), "direction": ("direction", (4, 2, 2)),
        "order": ("order", (4, 3))}
    net = TimeEquivariant("r3d18_narrow", losses, speeds=3)
    out = net(clip(4, clips, 3, 16, 32, 32))
    assert {name: tuple(y.shape) for name, y in out.items()} == dict(shapes[x] for x in losses)
    assert set(net.heads) == set(out)
    assert [name for name, _ in net.named_children()] == ["backbone", "heads"]
    sum(y.square().sum() for y in out.values()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


@pytest.mark.parametrize("n", [2, 4])           # 4: p and q once more, under another σ
@torch.no_grad()
def test_each_output_is_its_head_on_its_own_clips(n):
    losses = LOSSES if n == 2 else (*LOSSES, "distinct")
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
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm3d))]
    assert {norm.num_batches_tracked.item() for norm in norms} == {2}


@torch.no_grad()
def test_classifier_is_one_linear_layer_on_the_features(nets):
    net, x = classifier(nets["r3d18_narrow"], 7), clip(2, 3, 8, 32, 32)
    assert [type(m).__name__ for m in net] == ["NarrowResNet", "Linear"]
    close(net(x), nets["r3d18_narrow"](x) @ net[1].weight.T + net[1].bias)


# ---- load_backbone ----

ARGS = {"arch": "r3d18_narrow", "epochs": 400}
N = 120                                         # tensors of r3d18_narrow


@pytest.fixture
def model():
    torch.manual_seed(1)
    return randomise(TimeEquivariant("r3d18_narrow"))


def saved(path, obj):
    torch.save(obj, path)
    return path


@pytest.mark.parametrize("kind", ["backbone", "checkpoint", "fine-tuned"])
@pytest.mark.parametrize("around, inside", [    # the network; the backbone alone
    ("", ""), ("module.", ""), ("_orig_mod.", ""), ("module._orig_mod.", ""),
    ("", "_orig_mod.module.")])
def test_backbone_is_loaded_whole_but_for_heads(kind, around, inside, model, tmp_path, capsys):
    state, ignored, key = {
        "backbone": (model.backbone.state_dict(), 0, "backbone"),
        "checkpoint": (model.state_dict(), len(model.heads.state_dict()), "model"),
        "fine-tuned": (classifier(model.backbone, 7).state_dict(), 2, "model")}[kind]
    state = {around + name.replace("backbone.", f"backbone.{inside}"): x
             for name, x in state.items()}
    path = saved(tmp_path / "b.pt", {"arch": "r3d18_narrow", "args": ARGS, key: state})
    net = load_backbone(path)
    said = f"loaded r3d18_narrow from {path}: {N} tensors; ignored: {ignored} of heads\n"
    assert capsys.readouterr().out == said
    assert not net.training and (net.dim, net.arch, net.args) == (128, "r3d18_narrow", ARGS)
    assert net.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert net.state_dict().keys() == model.backbone.state_dict().keys()
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(net.state_dict()[name], value)


def test_torchvision_file_needs_arch_and_its_classifier_is_ignored(tmp_path, capsys):
    theirs = video.r3d_18()
    path = saved(tmp_path / "r3d_18.pth", theirs.state_dict())
    with pytest.raises(UserError, match="r3d_18.pth does not say which network it holds"):
        load_backbone(path)
    net = load_backbone(path, "r3d18_tv")
    assert capsys.readouterr().out.endswith("ignored: 2 of heads\n")
    assert net.args == {} and net.arch == "r3d18_tv" and not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])


def test_random_is_a_fresh_initialisation_and_is_named_so(capsys):
    torch.manual_seed(5)
    net = load_backbone("random", "r3d18_narrow")
    torch.manual_seed(5)
    fresh = new_backbone("r3d18_narrow").state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in net.state_dict().items())
    assert not net.training and net.args == {} and net.sha256 is None
    said = "random initialisation of r3d18_narrow: no weights loaded\n"
    assert capsys.readouterr().out == said


def narrow_without(*names, **extra):
    state = new_backbone("r3d18_narrow").state_dict()
    return {name: x for name, x in state.items() if name not in names} | extra


@pytest.mark.parametrize("state, arch, said", [
    (lambda: video.s3d().state_dict(), "s3dg", r"Missing .*features\.3\.2\.fc"),  # gates
    (lambda: video.r3d_18().state_dict(), "r3d18", r"size mismatch for stem\.0\.weight"),
    (lambda: narrow_without(), "r3d18", r"size mismatch for stem\.0\.weight"),
    (lambda: narrow_without("stem.1.running_var"), "r3d18_narrow", r"Missing .*1\.running_var"),
    (lambda: narrow_without(extra=torch.zeros(1)), "r3d18_narrow", 'Unexpected .*"extra"')])
def test_weights_that_do_not_fit_in_every_tensor_are_refused_by_name(tmp_path, state, arch, said):
    path = saved(tmp_path / "b.pt", state())
    with pytest.raises(UserError, match=rf"b\.pt does not fit: (.|\n)*{said}"):
        load_backbone(path, arch)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(UserError, match=f"no such file: {path} "):
            load_backbone(path, "r3d18_narrow")


def test_code_in_a_file_is_not_run(tmp_path):
    path = saved(tmp_path / "b.pt", new_backbone("r3d18_narrow"))           # a whole pickled module
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_backbone(path, "r3d18_narrow")
