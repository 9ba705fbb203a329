"""The losses equal loops over the equations of the paper, in value and gradient."""
import inspect
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import contrast, d, loss_distinct, loss_equi, loss_inst
from pretrain import gather_keys, objective

EQUI = torch.tensor([
    [3, 1, 4, 0, 5, 9, 2, 6, 3, 3, 8, 7],       # i: video 3 comes three times
    [7, 7, 2, 2, 7, 7, 5, 5, 7, 2, 1, 1]])      # pq: two groups drew 7 by chance
INST = torch.tensor([
    [0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4],       # i: two or three clips of a video
    [0, 1, 0, 1, 2, 0, 1, 5, 4, 2, 1, 0]])      # p
DISTINCT = torch.tensor([
    [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2],       # i
    [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0],       # p: which τ of the video
    [0, 1, 0, 1, 0, 1, 2, 0, 1, 2, 1, 0]])      # s: which of two or three σ of the clip
every = pytest.mark.parametrize(
    "loss, ids", [(loss_equi, EQUI), (loss_inst, INST), (loss_distinct, DISTINCT)],
    ids=["equi", "inst", "distinct"])


def features(n=12, dim=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    return x.to(dtype).requires_grad_()


def value_and_gradient(loss, x, *args, **kwargs):
    value = loss(x, *args, **kwargs)
    return value, torch.autograd.grad(value, x)[0]


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---- The equations, letter by letter ----

def eq2(x, y, lam):
    y = y.detach()                                              # stopgrad(y)
    dot = sum(a * b for a, b in zip(x, y))
    norms = sum(a * a for a in x).sqrt() * sum(b * b for b in y).sqrt()
    return torch.exp(1 / lam * dot / norms)


def eq1(psi, video, pq, lam):
    over_i = []
    for i in range(len(psi)):
        over_j = []
        for j in range(len(psi)):
            if pq[j] == pq[i] and video[j] != video[i]:         # ψ_j^pq, j ≠ i
                above = eq2(psi[i], psi[j], lam)
                below = above
                for k in range(len(psi)):
                    if pq[k] != pq[i]:                          # rs ≠ pq
                        below = below + eq2(psi[i], psi[k], lam)
                over_j.append(-torch.log(above / below))
        over_i.append(sum(over_j) / len(over_j))
    return sum(over_i) / len(over_i)


def eq3(phi, video, clip, lam):
    over_i = []
    for i in range(len(phi)):
        over_q = []
        for q in range(len(phi)):
            if video[q] == video[i] and clip[q] != clip[i]:     # φ_i^q, q ≠ p
                above = eq2(phi[i], phi[q], lam)
                below = above
                for j in range(len(phi)):
                    if video[j] != video[i]:                    # j ≠ i
                        below = below + eq2(phi[i], phi[j], lam)
                over_q.append(-torch.log(above / below))
        over_i.append(sum(over_q) / len(over_q))
    return sum(over_i) / len(over_i)


def fig5(chi, video, clip, view, lam):
    rows, over_i = range(len(chi)), []
    for i in rows:
        others = [j for j in rows if video[j] != video[i] or clip[j] != clip[i]]
        over_t = []
        for t in rows:
            if t not in others and view[t] != view[i]:          # the same clip, another σ
                above = eq2(chi[i], chi[t], lam)
                below = above + sum(eq2(chi[i], chi[j], lam) for j in others)
                over_t.append(-torch.log(above / below))
        over_i.append(sum(over_t) / len(over_t))
    return sum(over_i) / len(over_i)


LOOPS = {loss_equi: eq1, loss_inst: eq3, loss_distinct: fig5}


@every
@pytest.mark.parametrize("lam", [0.1, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradient_equal_those_of_loops_over_i_j_k(loss, ids, lam, dtype, tolerance):
    value, gradient = value_and_gradient(loss, features(dtype=dtype), *ids, lam=lam)
    expected = value_and_gradient(LOOPS[loss], features(), *ids.tolist(), lam)
    assert value.dtype == gradient.dtype == dtype and value.ndim == 0
    close(value, expected[0].to(dtype), tolerance)
    close(gradient, expected[1].to(dtype), tolerance)


def test_objective_takes_eq_1_of_pairs_eq_3_of_clips_and_fig_5_of_views():
    videos, pq = [5, 2, 7, 9], [1, 0, 0, 1]
    out = dict(
        psi=features(4),
        phi=features(8).unflatten(0, (4, 2)),
        chi=features(16).unflatten(0, (4, 4)))                  # p, q under σ_0, p, q under σ_1
    batch = dict(video=torch.tensor(videos), pq=torch.tensor(pq))
    terms = objective(out, batch, gather_keys(out, batch), lam=0.3)
    phi, chi = (torch.cat(out[name].unbind(1)) for name in ("phi", "chi"))
    close(terms["equi"], eq1(out["psi"], videos, pq, 0.3))
    close(terms["inst"], eq3(phi, videos * 2, [0] * 4 + [1] * 4, 0.3))
    p, s = ([0] * 4 + [1] * 4) * 2, [0] * 8 + [1] * 8
    close(terms["distinct"], fig5(chi, videos * 4, p, s, 0.3))


# ---- Closed forms ----

def test_d_is_the_exponential_of_the_cosine_over_lam():
    x, y = features(3), features(5, seed=1)
    close(d(x, y, 0.3), torch.exp(F.cosine_similarity(x[:, None], y, dim=2) / 0.3))
    assert torch.equal(d(x, y), d(x, y, 0.1))


@pytest.mark.parametrize("loss", [loss_equi, loss_inst])
def test_with_one_positive_it_is_the_cross_entropy_of_infonce(loss):
    row = torch.arange(8)                                       # 0 1, 2 3, 4 5, 6 7 belong together
    x = features(8)
    y = F.normalize(x, dim=1)
    logits = (y @ y.detach().T / 0.1).masked_fill(torch.eye(8, dtype=torch.bool), -math.inf)
    value = loss(x, row, row // 2) if loss is loss_equi else loss(x, row // 2, row % 2)
    close(value, F.cross_entropy(logits, row ^ 1))


@pytest.mark.parametrize("loss, ids, negatives", [
    (loss_equi, ([0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]), 4),   # videos of all other groups
    (loss_equi, ([0, 1, 0, 1], [0, 0, 1, 1]), 2),               # other transformations of i, too
    (loss_equi, ([0, 1, 2, 3], [0, 0, 0, 0]), 0),
    (loss_inst, ([0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]), 4),   # both clips of all other videos
    (loss_inst, ([0, 0, 1, 1], [0, 1, 2, 3]), 2),               # whatever their p
    (loss_inst, ([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]), 3),   # never the video's own clips
    (loss_inst, ([0, 0, 0, 0], [0, 1, 2, 3]), 0),
    (loss_distinct, ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]), 2)])        # other clips of i, too
def test_equal_features_give_the_log_of_one_plus_the_negatives(loss, ids, negatives):
    value = loss(torch.ones(len(ids[0]), 5, dtype=torch.float64), *map(torch.tensor, ids))
    assert value.item() == pytest.approx(math.log(1 + negatives), abs=1e-14)


@pytest.mark.parametrize("loss", [loss_equi, loss_inst])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("cosine", [-1, 0, 0.6])
@pytest.mark.parametrize("lam", [0.1, 0.5])
def test_aligned_positives_and_n_negatives_at_one_cosine(loss, n, cosine, lam):
    side = torch.arange(2).repeat_interleave(n)                 # two transformations, or two videos
    number = torch.arange(2 * n)
    pair = torch.tensor([[1, 0], [cosine, math.sqrt(1 - cosine ** 2)]], dtype=torch.float64)
    ids = (number, side) if loss is loss_equi else (side, number)
    expected = math.log1p(n * math.exp((cosine - 1) / lam))     # n e^-20 and more
    assert loss(pair[side], *ids, lam=lam).item() == pytest.approx(expected, abs=1e-14)


def test_transformations_equal_by_chance_are_positives_never_negatives():
    a, b = torch.eye(2, dtype=torch.float64)
    psi, pq = torch.stack([a, a, b, b, -a, -a]), torch.tensor([0, 0, 1, 1, 0, 0])
    partner = math.log1p(2 * math.exp(-10))                     # two negatives, b and b
    chance = math.log1p(2 * math.exp(10))
    expected = (4 * (partner + 2 * chance) / 3 + 2 * math.log1p(4 * math.exp(-10))) / 6
    assert loss_equi(psi, torch.arange(6), pq).item() == pytest.approx(expected)


def test_in_eq_1_the_same_video_and_transformation_is_neither_positive_nor_negative():
    i, pq = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 0, 1, 1, 0])
    one, other = features(5), features(5)
    other.data[[0, 4]] = features(2, seed=1).data               # the anchor, and its video again
    anchor = one[:1], i[:1], pq[:1]
    close(loss_equi(*anchor, (one, i, pq)), loss_equi(*anchor, (other, i, pq)))


# ---- Gradient and precision ----

def test_no_gradient_reaches_y_in_d():
    x, y = features(4), features(5, seed=1)
    d(x, y).sum().backward()
    assert y.grad is None and x.grad.abs().min() > 0
    z = features(4)
    close(*(torch.autograd.grad(d(z, key).sum(), z)[0] for key in (z, z.detach())))


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_that_of_the_rounded_features_in_float32(loss, ids, dtype):
    x = features(dtype=dtype)
    with torch.autocast("cpu", dtype):
        value = loss(x, *ids)
        assert (x @ x.T).dtype == dtype                         # autocast is at work here
    assert value.dtype == torch.float32 and torch.equal(value, loss(x.float(), *ids))


@every
def test_an_anchor_without_a_positive_or_a_feature_that_is_not_finite_gives_nan(loss, ids):
    alone = ids.clone()
    alone[:, -1] = 99
    assert loss(features(), *alone).isnan()
    for bad in (math.nan, math.inf):
        broken = features()
        broken.data[5, 2] = bad
        assert loss(broken, *ids).isnan()
        assert loss(features(), *ids, keys=(broken, *ids)).isnan()


# ---- Keys: the batch of all processes ----

@every
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_the_mean_over_parts_with_all_keys_in_any_order_is_the_loss_of_the_whole(loss, ids, parts):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def mean_of_parts(x):
        keys = x[order], *ids[:, order]                         # their gradient is stopped
        pairs = zip(x.chunk(parts), ids.chunk(parts, dim=1))
        return sum(loss(part, *part_ids, keys=keys) for part, part_ids in pairs) / parts

    close(value_and_gradient(mean_of_parts, features()), value_and_gradient(loss, features(), *ids))


# ---- To be copied into other projects ----

def test_losses_py_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(losses.__file__, tmp_path)
    code = """
import sys, torch, losses
i, x = torch.arange(8), torch.randn(8, 5)
losses.loss_equi(x, i, i // 2), losses.loss_inst(x, i // 2, i % 2)
assert not {'common', 'data', 'models', 'pretrain', 'torchvision'} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@every
def test_each_loss_works_cut_out_together_with_d_and_contrast(loss, ids):
    elsewhere = {"torch": torch, "F": F}
    for function in (d, contrast, loss):
        exec(inspect.getsource(function), elsewhere)
    assert torch.equal(elsewhere[loss.__name__](features(), *ids), loss(features(), *ids))
