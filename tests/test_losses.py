"""losses.py is the equations of the paper, as loops over i, j, k write them, in value and gradient."""
import contextlib
import inspect
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import losses
from losses import d, loss_distinct, loss_equi, loss_inst
from pretrain import gather_keys, objective

EQUI = torch.tensor([[3, 1, 4, 0, 5, 9, 2, 6, 3, 3, 8, 7],                      # i: video 3 comes three times
                     [7, 7, 2, 2, 7, 7, 5, 5, 7, 2, 1, 1]])                     # pq: two groups drew 7 by chance
INST = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4],                      # i: two or three clips of a video
                     [0, 1, 0, 1, 2, 0, 1, 5, 4, 2, 1, 0]])                     # p
DISTINCT = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2],                  # i
                         [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0],                  # p: which τ of the video
                         [0, 1, 0, 1, 0, 1, 2, 0, 1, 2, 1, 0]])                 # s: which of two or three σ of the clip
every = pytest.mark.parametrize("loss, ids", [(loss_equi, EQUI), (loss_inst, INST), (loss_distinct, DISTINCT)],
                                ids=["equi", "inst", "distinct"])
both = pytest.mark.parametrize("loss, ids", [(loss_equi, EQUI), (loss_inst, INST)], ids=["equi", "inst"])


def features(n=12, dim=6, dtype=torch.float64, seed=0):
    x = torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def value_and_gradient(loss, x, *args, **kwargs):
    value = loss(x, *args, **kwargs)
    return value, torch.autograd.grad(value, x)[0]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- The equations, letter by letter ----

def eq2(x, y, lam):
    y = y.detach()                                                              # stopgrad(y)
    dot = sum(a * b for a, b in zip(x, y))
    norms = sum(a * a for a in x).sqrt() * sum(b * b for b in y).sqrt()
    return torch.exp(1 / lam * dot / norms)


def eq1(psi, video, pq, lam):
    over_i = []
    for i in range(len(psi)):
        over_j = []
        for j in range(len(psi)):
            if pq[j] == pq[i] and video[j] != video[i]:                         # ψ_j^pq, j ≠ i
                above = eq2(psi[i], psi[j], lam)
                below = above
                for k in range(len(psi)):
                    if pq[k] != pq[i]:                                          # rs ≠ pq
                        below = below + eq2(psi[i], psi[k], lam)
                over_j.append(-torch.log(above / below))
        over_i.append(sum(over_j) / len(over_j))
    return sum(over_i) / len(over_i)


def eq3(phi, video, clip, lam):
    over_i = []
    for i in range(len(phi)):
        over_q = []
        for q in range(len(phi)):
            if video[q] == video[i] and clip[q] != clip[i]:                     # φ_i^q, q ≠ p
                above = eq2(phi[i], phi[q], lam)
                below = above
                for j in range(len(phi)):
                    if video[j] != video[i]:                                    # j ≠ i
                        below = below + eq2(phi[i], phi[j], lam)
                over_q.append(-torch.log(above / below))
        over_i.append(sum(over_q) / len(over_q))
    return sum(over_i) / len(over_i)


def fig5(chi, video, clip, view, lam):
    rows, over_i = range(len(chi)), []
    for i in rows:
        over_t = []
        for t in rows:
            if video[t] == video[i] and clip[t] == clip[i] and view[t] != view[i]:      # the same clip, another σ
                above = eq2(chi[i], chi[t], lam)
                others = [j for j in rows if video[j] != video[i] or clip[j] != clip[i]]
                over_t.append(-torch.log(above / (above + sum(eq2(chi[i], chi[j], lam) for j in others))))
        over_i.append(sum(over_t) / len(over_t))
    return sum(over_i) / len(over_i)


@pytest.mark.parametrize("loss, equation, ids", [(loss_equi, eq1, EQUI), (loss_inst, eq3, INST),
                                                 (loss_distinct, fig5, DISTINCT)], ids=["equi", "inst", "distinct"])
@pytest.mark.parametrize("lam", [0.1, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_its_gradient_are_those_of_loops_over_i_j_k(loss, equation, ids, lam, dtype, tolerance):
    value, gradient = value_and_gradient(loss, features(dtype=dtype), *ids, lam=lam)
    expected_value, expected_gradient = value_and_gradient(equation, features(), *ids.tolist(), lam)
    assert value.dtype == gradient.dtype == dtype and value.ndim == 0
    close(value, expected_value.to(dtype), tolerance)
    close(gradient, expected_gradient.to(dtype), tolerance)


@both
def test_with_one_positive_it_is_the_cross_entropy_of_infonce(loss, ids):
    row = torch.arange(8)                                                       # 0 1, 2 3, 4 5, 6 7 belong together
    x = features(8)
    y = F.normalize(x, dim=1)
    logits = (y @ y.detach().T / 0.1).masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
    value = loss(x, row, row // 2) if loss is loss_equi else loss(x, row // 2, row % 2)
    close(value, F.cross_entropy(logits, row ^ 1))


def test_d_is_the_exponential_of_the_cosine_over_lam():
    x, y = features(3), features(5, seed=1)
    close(d(x, y, 0.3), torch.exp(F.cosine_similarity(x[:, None], y, dim=2) / 0.3))
    assert torch.equal(d(x, y), d(x, y, 0.1))


# ---- Closed forms ----

@pytest.mark.parametrize("videos", [4, 6, 24])
def test_equal_features_give_the_log_of_one_plus_the_negatives(videos):
    group, i, p = torch.arange(videos) // 2, torch.arange(videos).repeat_interleave(2), torch.arange(2).repeat(videos)
    equi = loss_equi(torch.ones(videos, 5), torch.arange(videos), group)
    inst = loss_inst(torch.ones(2 * videos, 5), i, p)
    assert equi.item() == pytest.approx(math.log(1 + videos - 2))               # every video outside the group of two
    assert inst.item() == pytest.approx(math.log(1 + 2 * (videos - 1)))         # both clips of every other video


@both
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("cosine", [-1, 0, 0.6])
@pytest.mark.parametrize("lam", [0.1, 0.5])
def test_aligned_positives_and_n_negatives_at_one_cosine(loss, ids, n, cosine, lam):
    side, number = torch.arange(2).repeat_interleave(n), torch.arange(2 * n)    # two transformations, or two videos
    x = torch.tensor([[1, 0], [cosine, math.sqrt(1 - cosine ** 2)]], dtype=torch.float64)[side]
    value = loss(x, *((number, side) if loss is loss_equi else (side, number)), lam=lam)
    assert value.item() == pytest.approx(math.log1p(n * math.exp((cosine - 1) / lam)), abs=1e-14)    # n e^-20 and more


def test_without_negatives_the_loss_is_zero():
    assert loss_equi(features(4), torch.arange(4), torch.zeros(4)).item() == pytest.approx(0, abs=1e-14)
    assert loss_inst(features(4), torch.zeros(4), torch.arange(4)).item() == pytest.approx(0, abs=1e-14)


# ---- Who is a positive, who a negative ----

def test_transformations_equal_by_chance_are_positives_never_negatives():
    a, b = torch.eye(2, dtype=torch.float64)
    psi, pq = torch.stack([a, a, b, b, -a, -a]), torch.tensor([0, 0, 1, 1, 0, 0])
    partner, chance = math.log1p(2 * math.exp(-10)), math.log1p(2 * math.exp(10))         # two negatives, b and b
    expected = (4 * (partner + 2 * chance) / 3 + 2 * math.log1p(4 * math.exp(-10))) / 6
    assert loss_equi(psi, torch.arange(6), pq).item() == pytest.approx(expected)


def test_in_eq_1_the_same_video_and_transformation_is_neither_positive_nor_negative():
    i, pq = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 1, 1, 0])
    one, other = features(5), features(5)
    other.data[[0, 4]] = features(2, seed=1).data                               # the anchor itself, and its video again
    close(loss_equi(one[:1], i[:1], pq[:1], (one, i, pq)), loss_equi(one[:1], i[:1], pq[:1], (other, i, pq)))


def test_in_eq_1_another_transformation_of_the_same_video_is_a_negative():
    i, pq = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1])
    assert loss_equi(torch.ones(4, 5), i, pq).item() == pytest.approx(math.log(1 + 2))


def test_in_eq_3_clips_of_the_same_video_are_never_negatives():
    i, p = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    assert loss_inst(torch.ones(12, 5), i, p).item() == pytest.approx(math.log(1 + 3 * (4 - 1)))


def test_in_eq_3_negatives_are_clips_of_other_videos_whatever_their_p():
    for p in ([0, 1, 0, 1], [0, 1, 2, 3]):
        value = loss_inst(torch.ones(4, 5), torch.tensor([0, 0, 1, 1]), torch.tensor(p))
        assert value.item() == pytest.approx(math.log(1 + 2))


# ---- Gradient and precision ----

def test_no_gradient_reaches_y_in_d():
    x, y = features(4), features(5, seed=1)
    d(x, y).sum().backward()
    assert y.grad is None and x.grad.abs().min() > 0
    z = features(4)
    close(*(torch.autograd.grad(d(z, key).sum(), z)[0] for key in (z, z.detach())))


@every
def test_no_gradient_reaches_the_keys(loss, ids):
    x, keys = features(), features()
    loss(x, *ids, keys=(keys, *ids)).backward()
    assert keys.grad is None and x.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_d_under_autocast_is_the_float32_one(dtype):
    x, y = features(dtype=torch.float32), features(dtype=torch.float32, seed=1)
    with torch.autocast("cpu", dtype):
        inside = d(x, y)
        assert (x @ y.T).dtype == dtype                                         # autocast is at work here
    assert inside.dtype == torch.float32 and torch.equal(inside, d(x, y))


@every
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 3e-3)])
def test_half_precision_features_under_autocast_give_the_float32_loss(loss, ids, dtype, tolerance):
    with torch.autocast("cpu", dtype):
        value, gradient = value_and_gradient(loss, features(dtype=dtype), *ids)
    expected_value, expected_gradient = value_and_gradient(loss, features(dtype=torch.float32), *ids)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, loss(features(dtype=dtype).float(), *ids))        # only the features are rounded
    close(value, expected_value, tolerance)
    close(gradient.float(), expected_gradient, tolerance)


# ---- Keys: the batch of all processes ----

@every
def test_the_keys_are_the_anchors_unless_given(loss, ids):
    alone = value_and_gradient(loss, features(), *ids)
    given = value_and_gradient(loss, features(), *ids, keys=(features(), *ids))
    assert all(map(torch.equal, alone, given))


@every
def test_the_order_of_the_keys_does_not_matter(loss, ids):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = value_and_gradient(loss, features(), *ids, keys=(features()[order], *ids[:, order]))
    close(shuffled, value_and_gradient(loss, features(), *ids))


@every
@pytest.mark.parametrize("shards", [2, 3, 6])
def test_the_mean_over_shards_with_all_keys_is_the_loss_of_the_whole(loss, ids, shards):
    def mean_of_shards(x):
        parts = zip(x.chunk(shards), ids.chunk(shards, dim=1))
        return sum(loss(part, *part_ids, keys=(x.detach(), *ids)) for part, part_ids in parts) / shards

    close(value_and_gradient(mean_of_shards, features()), value_and_gradient(loss, features(), *ids))


# ---- Errors ----

POSITIVES = dict(loss_equi="no other video in the batch has its pq", loss_inst="no other clip of its video",
                 loss_distinct="no other augmentation of its clip")


@every
@pytest.mark.parametrize("alone", [12, 1])                                      # of the twelve anchors
def test_an_anchor_without_any_positive_is_refused(loss, ids, alone):
    ids = ids.clone()
    ids[:, -alone:] = 99 + torch.arange(alone)                                  # ids of their own
    with pytest.raises(ValueError, match=f"{loss.__name__}: an anchor has no positive, .*{POSITIVES[loss.__name__]}"):
        loss(features(), *ids)


@every
def test_a_batch_without_anchors_is_refused(loss, ids):
    with pytest.raises(ValueError, match=f"{loss.__name__}: an anchor has no positive"):
        loss(features(0), *ids[:, :0])


@every
def test_a_clip_is_no_positive_of_itself(loss, ids):
    with pytest.raises(ValueError, match=f"{loss.__name__}: an anchor has no positive"):
        loss(features(4), *torch.zeros(len(ids), 4))


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_are_refused(loss, ids, bad):
    broken = features()
    broken.data[5, 2] = bad
    for x, y in ((broken, features()), (features(), broken)):
        with pytest.raises(ValueError, match="not finite: a feature is NaN or infinite"):
            loss(x, *ids, keys=(y, *ids))


@pytest.fixture(scope="module")
def on_gpu():
    """losses.py as it runs on a GPU, which is not waited for: the looks at values left out."""
    source, code = (ROOT / "losses.py").read_text(), {}
    assert source.count('.device.type == "cpu" and ') == 4
    exec(source.replace('.device.type == "cpu" and ', '.device.type == "none" and '), code)
    return code


@every
def test_on_a_gpu_what_a_cpu_refuses_gives_a_loss_that_is_not_finite_and_all_else_the_same(loss, ids, on_gpu):
    there, alone = on_gpu[loss.__name__], ids.clone()
    assert torch.equal(there(features(), *ids), loss(features(), *ids))
    alone[:, -1] = 99                                                           # an anchor without any positive
    assert not there(features(), *alone).isfinite()
    for lam in (0.0112, 0.005):                                                 # e^(1/λ) leaves float32 at λ = 0.01127
        assert not there(torch.ones(12, 3), *ids, lam=lam).isfinite()
    for bad in (math.nan, math.inf, -math.inf):
        broken = features().detach()
        broken[5, 2] = bad
        for x, y in ((broken, features()), (features(), broken)):
            assert not there(x, *ids, keys=(y, *ids)).isfinite()


@every
def test_on_other_devices_than_the_cpu_the_losses_look_at_no_value(loss, ids, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())    # there is none for meta
    assert loss(features().to("meta"), *ids.to("meta")).shape == ()             # where a look raises an error


@every
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[..., None], lambda x: x[0]],
                         ids=["a row less", "a dimension more", "a dimension less"])
def test_shapes_that_do_not_fit_are_refused_by_name(loss, ids, change):
    for argument in range(2 * len(ids) + 2):                                    # features, their ids; then the keys'
        args = [features(), *ids, features(), *ids]
        args[argument] = change(args[argument])
        with pytest.raises(ValueError, match=r"(loss_\w+|d) needs .* (is|got) \(\d+"):
            loss(*args[:len(ids) + 1], keys=args[len(ids) + 1:])


@every
def test_keys_of_another_dimension_are_refused(loss, ids):
    with pytest.raises(ValueError, match=r"d needs x \(N, D\) and y \(M, D\), but x is \(12, 6\) and y is \(12, 7\)"):
        loss(features(), *ids, keys=(features(dim=7), *ids))


@every
@pytest.mark.parametrize("lam", [0, -0.1, math.nan])
def test_a_temperature_not_above_zero_is_refused(loss, ids, lam):
    with pytest.raises(ValueError, match=f"lam must be above 0, but is {lam}"):
        loss(features(), *ids, lam=lam)


@every
def test_every_temperature_gives_a_finite_loss_and_gradient_or_an_error(loss, ids):
    refused = []
    for lam in torch.linspace(0.010, 0.014, 81).tolist():                       # e^(1/λ) leaves float32 at λ = 0.01127
        for x in (torch.ones(12, 3), torch.tensor([[1., 0, 0], [-1, 0, 0]]).repeat(6, 1)):
            try:
                value, gradient = value_and_gradient(loss, x.requires_grad_(), *ids, lam=lam)
                assert value.isfinite() and gradient.isfinite().all(), lam
            except ValueError as error:
                refused.append(lam)
                assert f"lam={lam} is too small" in str(error)
    assert 0.0112 < max(refused) < 0.013


# ---- To be copied into other projects ----

def test_losses_py_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(losses.__file__, tmp_path)
    code = ("import sys, torch, losses; i = torch.arange(8); x = torch.randn(8, 5)\n"
            "print(losses.loss_equi(x, i, i // 2) + losses.loss_inst(x, i // 2, i % 2))\n"
            "assert not {'common', 'data', 'models', 'pretrain', 'torchvision'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@every
def test_each_function_works_cut_out_together_with_d(loss, ids):
    elsewhere = {"torch": torch, "F": F}
    exec(inspect.getsource(d), elsewhere)
    assert torch.equal(elsewhere["d"](features(), features()), d(features(), features()))
    exec(inspect.getsource(loss), elsewhere)
    assert torch.equal(elsewhere[loss.__name__](features(), *ids), loss(features(), *ids))


# ---- The objective of pretrain.py ----

def test_the_objective_takes_eq_1_of_the_pairs_and_eq_3_of_the_clips():
    out = {"psi": features(4), "phi": features(8).unflatten(0, (4, 2))}
    batch = {"video": torch.tensor([5, 2, 7, 9]), "pq": torch.tensor([1, 0, 0, 1])}
    terms, _ = objective(out, batch, gather_keys(out, batch), lam=0.3)
    close(terms["equi"], eq1(out["psi"], [5, 2, 7, 9], [1, 0, 0, 1], 0.3))
    close(terms["inst"], eq3([*out["phi"][:, 0], *out["phi"][:, 1]], [5, 2, 7, 9] * 2, [0] * 4 + [1] * 4, 0.3))
