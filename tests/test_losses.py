"""The losses equal loops over the equations of the paper, in value and gradient."""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

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


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---- The equations, letter by letter ----

def eq2(x, y, lam):
    y = y.detach()                                              # stopgrad(y)
    dot = sum(a * b for a, b in zip(x, y))
    norms = sum(a * a for a in x).sqrt() * sum(b * b for b in y).sqrt()
    return torch.exp(1 / lam * dot / norms)


def loop(x, positive, negative, lam):
    """E -log[d / (d + Σ d)] over anchors i and their positives j, with Σ over the negatives k"""
    over_i = []
    for i in range(len(x)):
        over_j = []
        for j in range(len(x)):
            if positive(i, j):
                above = eq2(x[i], x[j], lam)
                below = above
                for k in range(len(x)):
                    if negative(i, k):
                        below = below + eq2(x[i], x[k], lam)
                over_j.append(-torch.log(above / below))
        over_i.append(sum(over_j) / len(over_j))
    return sum(over_i) / len(over_i)


def eq1(psi, video, pq, lam):
    return loop(
        psi, lambda i, j: pq[j] == pq[i] and video[j] != video[i],      # ψ_j^pq, j ≠ i
        lambda i, k: pq[k] != pq[i], lam)                               # rs ≠ pq


def eq3(phi, video, clip, lam):
    return loop(
        phi, lambda i, q: video[q] == video[i] and clip[q] != clip[i],  # φ_i^q, q ≠ p
        lambda i, j: video[j] != video[i], lam)                         # j ≠ i


def fig5(chi, video, clip, view, lam):
    def same_clip(i, j):
        return video[j] == video[i] and clip[j] == clip[i]

    return loop(
        chi, lambda i, t: same_clip(i, t) and view[t] != view[i],       # the same clip, another σ
        lambda i, j: not same_clip(i, j), lam)


LOOPS = {loss_equi: eq1, loss_inst: eq3, loss_distinct: fig5}


@every
@pytest.mark.parametrize("more", [{}, dict(lam=0.7)])
def test_loss_and_gradient_equal_those_of_loops_over_i_j_k(loss, ids, more):
    lam = more.get("lam", 0.1)                                  # Sec. 3.4
    actual = value_and_gradient(loss, features(), *ids, **more)
    close(actual, value_and_gradient(LOOPS[loss], features(), *ids.tolist(), lam))


def test_d_is_eq_2_of_all_pairs():
    x, y = features(3), features(5, seed=1)
    close(d(x, y), torch.stack([eq2(a, b, 0.1) for a in x for b in y]).view(3, 5))


def test_objective_takes_the_cross_entropy_of_each_clip_or_pair_in_float32():
    x = features(12, 3, torch.bfloat16)
    out = dict(speed=x[:8].unflatten(0, (4, 2)), order=x[8:])
    batch = dict(video=torch.arange(4), pq=torch.arange(4), order=torch.tensor([0, 2, 1, 0]),
                 speed=torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]]))
    terms = objective(out, batch, gather_keys(out, batch), lam=0.1)
    for task, logits in out.items():
        probability = logits.float().softmax(-1).gather(-1, batch[task][..., None])
        torch.testing.assert_close(terms[task], -probability.log().mean())


# ---- Precision ----

@every
def test_under_autocast_the_loss_is_that_of_the_rounded_features_in_float32(loss, ids):
    x = features(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, *ids)
        assert (x @ x.T).dtype == torch.bfloat16                # autocast is at work here
    assert value.dtype == torch.float32 and torch.equal(value, loss(x.float(), *ids))


@every
def test_an_anchor_without_a_positive_or_a_feature_that_is_not_finite_gives_nan(loss, ids):
    alone = ids.clone()
    alone[:, -1] = 99
    assert loss(features(), *alone).isnan()
    for bad in (math.nan, math.inf):
        broken = features()
        broken.data[5, 2] = bad
        assert loss(features(), *ids, keys=(broken, *ids)).isnan()


# ---- Keys: the batch of all processes ----

@every
@pytest.mark.parametrize("parts", [2, 6])
def test_the_mean_over_parts_with_all_keys_in_any_order_is_the_loss_of_the_whole(loss, ids, parts):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def mean_of_parts(x):
        keys = x[order], *ids[:, order]                         # their gradient is stopped
        pairs = zip(x.chunk(parts), ids.chunk(parts, dim=1))
        return sum(loss(part, *part_ids, keys=keys) for part, part_ids in pairs) / parts

    close(value_and_gradient(mean_of_parts, features()), value_and_gradient(loss, features(), *ids))


# ---- To be copied into other projects ----

@every
def test_each_loss_works_cut_out_together_with_d_and_contrast(loss, ids):
    elsewhere = {"torch": torch, "F": F}
    for function in (d, contrast, loss):
        exec(inspect.getsource(function), elsewhere)
    assert torch.equal(elsewhere[loss.__name__](features(), *ids), loss(features(), *ids))
