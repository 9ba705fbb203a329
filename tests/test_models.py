"""Run: python -m pytest tests/test_models.py"""
import itertools

import pytest
import torch
from torch import nn
from torchvision.models import video

import models
from models import BACKBONES, LOSSES, Gate, TimeEquivariant, classifier, load_backbone, new_backbone

DIMS = {"r3d18": 512, "r3d18_tv": 512, "r2plus1d18": 512, "s3dg": 1024, "r3d18_narrow": 128}
TORCHVISION = {"r3d18_tv": video.r3d_18, "r2plus1d18": video.r2plus1d_18}
TABLE_1 = {                                                                     # rows (e)-(n); (o) is (k)
    "e": "inst", "f": "equi", "g": "speed direction order", "h": "inst equi", "i": "inst speed direction order",
    "j": "equi speed direction order", "k": "inst equi speed direction order", "l": "inst equi speed",
    "m": "inst equi speed order", "n": "inst equi speed direction"}


def count(net):
    return sum(p.numel() for p in net.parameters())


def clip(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomise(net):
    """BatchNorm's parameters and statistics away from 0 and 1, where a lost one would not show; eval mode."""
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

@pytest.mark.parametrize("arch", BACKBONES)
@pytest.mark.parametrize("shape", [(16, 32, 32), (8, 48, 40)])
@torch.no_grad()
def test_backbone_maps_clips_of_any_size_to_dim_features(nets, arch, shape):
    assert nets[arch].dim == DIMS[arch] and type(nets[arch].dim) is int
    assert nets[arch](clip(2, 3, *shape)).shape == (2, DIMS[arch])


@pytest.mark.parametrize("arch", BACKBONES)
def test_docstring_says_what_the_backbone_equals(arch):
    assert any(word in BACKBONES[arch].__doc__ for word in ("CVPR 2018", "ECCV 2018", "no publication"))


@pytest.mark.parametrize("arch, parameters", [
    ("r3d18", 33_409_104),                  # Hara et al., type-B shortcuts: 33.4 M
    ("r3d18_tv", 33_371_472),               # num_params of torchvision's R3D_18_Weights
    ("r2plus1d18", 31_505_325),             # num_params of torchvision's R2Plus1D_18_Weights
    ("s3dg", 8_320_048 + 1_225_008)])       # num_params of torchvision's S3D_Weights, and the gates
def test_parameters_with_a_400_way_layer(nets, arch, parameters):
    assert count(nets[arch]) + nets[arch].dim * 400 + 400 == parameters


def test_narrow_is_a_quarter_of_r3d18_in_every_layer(nets):
    narrow, wide = nets["r3d18_narrow"].state_dict(), nets["r3d18"].state_dict()
    assert list(narrow) == list(wide)
    for key in wide:
        expected = [n if n in (1, 3, 7) else n // 4 for n in wide[key].shape]     # 3 colours; kernels of 1, 3, 7
        assert list(narrow[key].shape) == expected, key


@pytest.mark.parametrize("arch, before_pooling", [("r3d18", (1, 2, 2)), ("r3d18_tv", (2, 4, 4))])
@torch.no_grad()
def test_r3d18_halves_time_once_more_than_torchvision(nets, arch, before_pooling):
    shapes = []
    hook = nets[arch].layer4.register_forward_hook(lambda _, __, y: shapes.append(y.shape[2:]))
    nets[arch](clip(1, 3, 16, 64, 64))
    hook.remove()
    assert shapes == [before_pooling]


def test_r3d18_stem_is_that_of_hara(nets):
    conv, norm, relu, pool = nets["r3d18"].stem
    assert conv.weight.shape == (64, 3, 7, 7, 7) and conv.stride == (1, 2, 2) and conv.padding == (3, 3, 3)
    assert conv.bias is None and isinstance(norm, nn.BatchNorm3d) and isinstance(relu, nn.ReLU)
    assert isinstance(pool, nn.MaxPool3d) and (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 1)


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
    theirs, ours, back = randomise(TORCHVISION[arch]()), new_backbone(arch).eval(), TORCHVISION[arch]().eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert list(ours.state_dict()) == list(state)

    features = []
    for net in (theirs, back):
        net.avgpool.register_forward_hook(lambda _, __, y: features.append(y.flatten(1)))
    x = clip(1, 3, 8, 32, 32)
    theirs(x)
    ours.load_state_dict(state)
    torch.testing.assert_close(ours(x), features[0], rtol=0, atol=0)

    missing, unexpected = back.load_state_dict(ours.state_dict(), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    back(x)
    torch.testing.assert_close(features[1], features[0], rtol=0, atol=0)


@pytest.mark.parametrize("arch", BACKBONES)
def test_batchnorm_statistics_settle_within_tens_of_steps(nets, arch):
    assert {m.momentum for m in nets[arch].modules() if isinstance(m, nn.BatchNorm3d)} == {0.1}    # S3D's: 0.001


# ---- S3D-G ----

def gates(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, Gate)}


def test_gate_is_sigmoid_of_a_linear_layer_on_the_average():
    gate, x = Gate(3), clip(2, 3, 4, 5, 6)
    expected = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(3)):
        logit = gate.fc.bias[c] + sum(gate.fc.weight[c, k] * x[b, k].sum() / (4 * 5 * 6) for k in range(3))
        expected[b, c] = x[b, c] / (1 + torch.exp(-logit))
    torch.testing.assert_close(gate(x), expected)


def test_s3dg_has_one_gate_after_conv2d_2c_and_one_at_the_end_of_each_of_36_branches(nets):
    net = nets["s3dg"]
    last = [net.features[3][-1]] + [branch[-1] for i in (5, 6, 8, 9, 10, 11, 12, 14, 15)
                                    for branch in net.features[i].children()]
    assert list(gates(net).values()) == last and len(last) == 1 + 9 * 4
    assert sum(map(count, last)) == 1_225_008 == sum(g.fc.in_features ** 2 + g.fc.in_features for g in last)


def test_every_gate_of_s3dg_matters():
    torch.manual_seed(0)
    net = new_backbone("s3dg")
    net(clip(2, 3, 16, 32, 32)).square().sum().backward()
    for name, gate in gates(net).items():
        assert gate.fc.weight.grad.abs().max() > 0 and gate.fc.bias.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_closed_gate_silences_its_own_branch_only():
    torch.manual_seed(0)
    net, x = new_backbone("s3dg"), clip(2, 3, 16, 32, 32)
    widths = [384, 384, 128, 128]                                               # Mixed_5c
    before = net(x).split(widths, dim=1)
    for k, branch in enumerate(net.features[15].children()):
        bias = branch[-1].fc.bias.clone()
        branch[-1].fc.bias.fill_(-1e4)
        after = net(x).split(widths, dim=1)
        branch[-1].fc.bias.copy_(bias)
        for j in range(4):
            assert before[j].std() > 0.1
            torch.testing.assert_close(after[j], before[j] * (j != k), rtol=0, atol=0)


@torch.no_grad()
def test_s3dg_with_open_gates_is_torchvision_s3d_with_global_pooling():
    torch.manual_seed(0)                    # train mode, as above: in eval mode fresh layers fade the signal to 0
    theirs, ours, x = video.s3d(), new_backbone("s3dg"), clip(2, 3, 16, 40, 40)
    state = {k: v for k, v in theirs.state_dict().items() if k.startswith("features.")}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected and missing == [f"{g}.fc.{w}" for g in gates(ours) for w in ("weight", "bias")]
    for gate in gates(ours).values():
        gate.fc.weight.zero_()
        gate.fc.bias.fill_(100)                                                 # σ(100) = 1
    features = ours(x)
    assert features.std() > 0.1
    torch.testing.assert_close(features, theirs.features(x).mean(dim=(2, 3, 4)))


@pytest.mark.parametrize("frames, size", [(32, 64), (16, 64), (5, 17)])
@torch.no_grad()
def test_s3dg_takes_32_frames_and_small_clips(nets, frames, size):
    assert nets["s3dg"](clip(1, 3, frames, size, size)).shape == (1, 1024)


# ---- Heads and the pre-training network ----

def test_heads_have_the_depth_and_width_of_section_3_4():
    net = TimeEquivariant("r3d18_narrow", LOSSES, speeds=4)
    D = 128
    layers = {name: [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)]
              for name, head in net.heads.items()}
    assert layers == {"phi": [(D, D), (D, D), (D, D)], "psi": [(2 * D, D), (D, D), (D, D)],
                      "speed": [(D, D), (D, 4)], "direction": [(D, D), (D, 2)], "order": [(2 * D, D), (D, 3)]}
    kinds = {name: " ".join(type(m).__name__ for m in head) for name, head in net.heads.items()}
    assert kinds["phi"] == kinds["psi"] == "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear"
    assert kinds["speed"] == kinds["direction"] == kinds["order"] == "Linear ReLU Linear"
    assert all([m.bias is None for m in net.heads[name][::3]] == [True, True, False] for name in ("phi", "psi"))


@pytest.mark.parametrize("row", TABLE_1)
def test_only_the_chosen_heads_exist_and_every_parameter_gets_a_gradient(row):
    torch.manual_seed(0)
    losses, shapes = TABLE_1[row].split(), {"inst": ("phi", (4, 2, 128)), "equi": ("psi", (4, 128)),
                                            "speed": ("speed", (4, 2, 3)), "direction": ("direction", (4, 2, 2)),
                                            "order": ("order", (4, 3))}
    net = TimeEquivariant("r3d18_narrow", losses, speeds=3)
    out = net(clip(4, 2, 3, 16, 32, 32))
    assert {name: tuple(y.shape) for name, y in out.items()} == dict(shapes[loss] for loss in losses)
    assert set(net.heads) == set(out) and [name for name, _ in net.named_children()] == ["backbone", "heads"]
    sum(y.square().sum() for y in out.values()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_both_clips_go_through_the_backbone_in_one_call():
    net, batches = TimeEquivariant("r3d18_narrow"), []
    net.backbone.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    clips = clip(3, 2, 3, 8, 32, 32)
    net(clips)
    assert len(batches) == 1
    torch.testing.assert_close(batches[0], torch.stack([clips[i, c] for i in range(3) for c in range(2)]))


@torch.no_grad()
def test_each_output_is_its_head_on_its_own_clips():
    net, clips = randomise(TimeEquivariant("r3d18_narrow")), clip(3, 2, 3, 8, 32, 32)
    out = net(clips)
    f_p, f_q = net.backbone(clips[:, 0]), net.backbone(clips[:, 1])
    assert not torch.allclose(f_p, f_q)
    for name in ("phi", "speed", "direction"):
        torch.testing.assert_close(out[name], torch.stack([net.heads[name](f_p), net.heads[name](f_q)], dim=1))
    for name in ("psi", "order"):
        torch.testing.assert_close(out[name], net.heads[name](torch.cat([f_p, f_q], dim=1)))


@torch.no_grad()
def test_batchnorm_in_phi_sees_the_clips_p_and_q_as_one_batch():
    net, clips = TimeEquivariant("r3d18_narrow", ["inst"]), clip(3, 2, 3, 8, 32, 32)
    phi = net(clips)["phi"]
    torch.testing.assert_close(phi.flatten(0, 1), net.heads["phi"](net.backbone(clips.flatten(0, 1))))
    assert net.heads["phi"][1].num_features == 128 and net.heads["phi"][1].num_batches_tracked == 2


@pytest.mark.parametrize("losses", [[], ["inst", "revers"], "inst"])
def test_unknown_or_no_losses_are_refused_with_the_choices(losses):
    with pytest.raises(ValueError, match="must be one or more of inst, equi, speed, direction, order, distinct$"):
        TimeEquivariant("r3d18_narrow", losses)


def test_unknown_arch_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="^arch is 'r3d', but must be one of r3d18, r3d18_tv, .*, r3d18_narrow$"):
        TimeEquivariant("r3d")


@pytest.mark.parametrize("shape", [(2, 3, 16, 32, 32), (2, 3, 3, 16, 32, 32)])
def test_clips_that_are_no_pairs_are_refused(shape):
    with pytest.raises(ValueError, match=r"clips must be \(B, 2, 3, T, H, W\)"):
        TimeEquivariant("r3d18_narrow")(torch.zeros(shape))


@torch.no_grad()
def test_classifier_is_one_linear_layer_on_the_features(nets):
    net, x = classifier(nets["r3d18_narrow"], 7), clip(2, 3, 8, 32, 32)
    assert [type(m).__name__ for m in net] == ["NarrowResNet", "Linear"]
    torch.testing.assert_close(net(x), nets["r3d18_narrow"](x) @ net[1].weight.T + net[1].bias)


# ---- load_backbone ----

ARGS = {"arch": "r3d18_narrow", "epochs": 400}
N = 120                                                                         # tensors of r3d18_narrow


@pytest.fixture
def model():
    torch.manual_seed(1)
    return randomise(TimeEquivariant("r3d18_narrow"))


def wrapped(state, form):
    """The keys DDP and torch.compile give: around the whole model, around the backbone in it, or both."""
    return {{"ddp": f"module.{k}", "compiled": f"_orig_mod.{k}", "both": f"module._orig_mod.{k}", "plain": k,
             "inside": k.replace("backbone.", "backbone._orig_mod.module.")}[form]: v for k, v in state.items()}


def saved(path, obj):
    torch.save(obj, path)
    return path


def assert_loaded(net, model):
    assert not net.training and net.dim == 128 and net.arch == "r3d18_narrow"
    for key, value in model.backbone.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=0)
    with torch.no_grad():
        x = clip(1, 3, 8, 32, 32)
        torch.testing.assert_close(net(x), model.backbone(x), rtol=0, atol=0)


@pytest.mark.parametrize("arch", [None, "r3d18_narrow"])
@pytest.mark.parametrize("form", ["plain", "ddp", "compiled", "both"])
def test_backbone_file_is_loaded_whole(tmp_path, capsys, model, form, arch):
    path = saved(tmp_path / "backbone.pt", {"arch": "r3d18_narrow", "args": ARGS,
                                            "backbone": wrapped(model.backbone.state_dict(), form)})
    net = load_backbone(path, arch)
    assert_loaded(net, model)
    assert net.args == ARGS
    assert capsys.readouterr().out == f"loaded r3d18_narrow from {path}: {N} of {N} tensors\n"


@pytest.mark.parametrize("form", ["plain", "ddp", "compiled", "both", "inside"])
def test_checkpoint_is_loaded_and_its_heads_are_said_to_be_ignored(tmp_path, capsys, model, form):
    path = saved(tmp_path / "c.pt", {"model": wrapped(model.state_dict(), form), "args": ARGS, "epoch": 3})
    net = load_backbone(path)
    assert_loaded(net, model)
    assert net.args == ARGS
    said = f"{N} of {N} tensors; ignored: heads.* ({len(model.heads.state_dict())})\n"
    assert capsys.readouterr().out == f"loaded r3d18_narrow from {path}: {said}"


@pytest.mark.parametrize("form", ["plain", "ddp", "compiled", "inside"])
def test_fine_tuned_checkpoint_is_loaded_and_its_linear_layer_is_said_to_be_ignored(tmp_path, capsys, model, form):
    state = classifier(model.backbone, 7).state_dict()
    path = saved(tmp_path / "c.pt", {"model": wrapped(state, form), "args": ARGS})
    assert_loaded(load_backbone(path), model)
    assert capsys.readouterr().out == f"loaded r3d18_narrow from {path}: {N} of {N} tensors; ignored: fc.* (2)\n"


def test_torchvision_file_needs_arch_and_its_classifier_is_said_to_be_ignored(tmp_path, capsys):
    theirs = video.r3d_18()
    path = saved(tmp_path / "r3d_18.pth", theirs.state_dict())
    with pytest.raises(ValueError, match="r3d_18.pth does not say which network it holds: give arch, one of "):
        load_backbone(path)
    net = load_backbone(path, "r3d18_tv")
    assert capsys.readouterr().out == f"loaded r3d18_tv from {path}: {N} of {N} tensors; ignored: fc.* (2)\n"
    assert net.args == {} and net.arch == "r3d18_tv" and net.dim == 512 and not net.training
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in net.state_dict().items())


def test_random_is_a_fresh_initialisation_and_says_so(capsys):
    torch.manual_seed(5)
    net = load_backbone("random", "r3d18_narrow")
    torch.manual_seed(5)
    fresh = new_backbone("r3d18_narrow")
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in net.state_dict().items())
    assert not net.training and net.args == {} and net.arch == "r3d18_narrow"
    assert capsys.readouterr().out == "random initialisation of r3d18_narrow: no weights loaded\n"
    with pytest.raises(ValueError, match="^arch is None, but must be one of r3d18, "):
        load_backbone("random")


def test_torchvision_s3d_is_refused_for_want_of_gates(tmp_path):
    path = saved(tmp_path / "s3d.pth", video.s3d().state_dict())
    keys = "features.3.2.fc.weight, features.3.2.fc.bias, features.5.branch0.3.fc.weight, ..."
    with pytest.raises(ValueError, match=rf"does not fit s3dg, which has 536 tensors: 74 missing \({keys}\)$"):
        load_backbone(path, "s3dg")


def test_the_other_r3d18_is_refused_by_the_shape_of_its_stem(tmp_path):
    path = saved(tmp_path / "r3d_18.pth", video.r3d_18().state_dict())
    with pytest.raises(ValueError, match=r"does not fit r3d18, .* tensors: 1 of another shape \(stem.0.weight\)$"):
        load_backbone(path, "r3d18")


def test_missing_and_unexpected_keys_are_refused_and_the_first_three_named(tmp_path, model):
    state = {k: v for k, v in model.backbone.state_dict().items() if not k.startswith("stem.")}
    state["extra.weight"] = torch.zeros(1)
    path = saved(tmp_path / "b.pt", {"arch": "r3d18_narrow", "backbone": state, "args": ARGS})
    keys = "stem.0.weight, stem.1.weight, stem.1.bias, ..."
    with pytest.raises(ValueError, match=rf"120 tensors: 6 missing \({keys}\), 1 unexpected \(extra.weight\)$"):
        load_backbone(path)


@pytest.mark.parametrize("drop", ["backbone.layer4.1.conv2.1.running_var", "backbone.stem.1.num_batches_tracked"])
def test_even_one_missing_statistic_is_refused(tmp_path, model, drop):
    state = model.state_dict()
    del state[drop]
    path = saved(tmp_path / "c.pt", {"model": state, "args": ARGS})
    with pytest.raises(ValueError, match=rf"tensors: 1 missing \({drop.removeprefix('backbone.')}\)$"):
        load_backbone(path)


@pytest.mark.parametrize("stored", [{"arch": "r3d18_narrow", "args": ARGS}, {"args": ARGS}])
def test_arch_that_differs_from_the_stored_one_is_refused(tmp_path, model, stored):
    path = saved(tmp_path / "b.pt", {**stored, "backbone": model.backbone.state_dict()})
    with pytest.raises(ValueError, match="b.pt holds r3d18_narrow, but arch is r3d18$"):
        load_backbone(path, "r3d18")


@pytest.mark.parametrize("stored, arch", [({"arch": "resnet"}, None), ({}, "resnet")])
def test_unknown_arch_of_a_file_is_refused_with_the_choices(tmp_path, model, stored, arch):
    path = saved(tmp_path / "b.pt", {**stored, "backbone": model.backbone.state_dict()})
    with pytest.raises(ValueError, match="^arch is 'resnet', but must be one of r3d18, "):
        load_backbone(path, arch)


def test_no_such_file_is_said(tmp_path):
    for path, said in ((tmp_path / "none.pt", "^there is no file {}: run pretrain.py first"),
                       (tmp_path, "^{} is a folder: give a file in")):
        with pytest.raises(ValueError, match=said.format(path)):
            load_backbone(path, "r3d18_narrow")


@pytest.mark.parametrize("content", [b"", b"not a torch file", b"PK\x03\x04 half a zip file"])
def test_a_file_that_is_not_torchs_is_said(tmp_path, content):
    (tmp_path / "b.pt").write_bytes(content)
    with pytest.raises(ValueError, match="b.pt is not a file of tensors that torch.load"):
        load_backbone(tmp_path / "b.pt", "r3d18_narrow")


def test_a_file_with_code_in_it_is_not_run(tmp_path):
    path = saved(tmp_path / "b.pt", models.r3d18_narrow())                      # a whole pickled module
    with pytest.raises(ValueError, match="b.pt is not a file of tensors that torch.load"):
        load_backbone(path, "r3d18_narrow")


@pytest.mark.parametrize("stored", [{"state_dict": {"a": torch.zeros(1)}}, torch.zeros(1), {}, {"backbone": 3}])
def test_a_file_without_a_state_dict_is_said(tmp_path, stored):
    path = saved(tmp_path / "b.pt", stored)
    with pytest.raises(ValueError, match="b.pt holds no state dict"):
        load_backbone(path, "r3d18_narrow")
