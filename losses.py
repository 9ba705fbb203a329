"""Losses of Jenni & Jin, "Time-Equivariant Contrastive Video Representation Learning", ICCV 2021.

Pure functions on tensors: copy any of them into another project together with `d` and `contrast`.
i, j, k are videos; p, q, r, s their clips; ψ_i^pq encodes the transformation from clip p to clip q.
Ids are global: across processes, different videos or transformations must have different ids.
"""
import torch
import torch.nn.functional as F


def d(x: torch.Tensor, y: torch.Tensor, lam: float = 0.1) -> torch.Tensor:
    """Eq. 2 for all pairs: d(x, y) = exp(x · stopgrad(y) / (λ ‖x‖ ‖stopgrad(y)‖))

    x: (N, D), y: (M, D) -> (N, M), float32 even under autocast (float64 if x is).
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = F.normalize(x.to(dtype), dim=1)                 # (N, D)  x / ‖x‖
        y = F.normalize(y.detach().to(dtype), dim=1)        # (M, D)  stopgrad(y) / ‖stopgrad(y)‖
        return torch.exp(x @ y.T / lam)                     # (N, M)  e^±10 at λ = 0.1: no overflow


def contrast(sim: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The fraction of Eq. 1 and 3: E -log[d / (d + Σ d)], d of a positive, Σ over the negatives.

    sim: (N, M) of `d`; positive, negative: (N, M) bool.
    -> scalar: the mean over an anchor's positives, each with its own denominator, then over
       anchors. NaN if an anchor has no positive.
    """
    neg = (sim * negative).sum(dim=1, keepdim=True)         # (N, 1)  Σ d
    term = torch.log(sim + neg) - torch.log(sim)            # (N, M)  -log[d / (d + Σ d)]
    return ((term * positive).sum(dim=1) / positive.sum(dim=1)).mean()


def loss_equi(psi, i, pq, keys: tuple | None = None, lam: float = 0.1) -> torch.Tensor:
    """Eq. 1: L_equi = -E log[d(ψ_i^pq, ψ_j^pq) / (d(ψ_i^pq, ψ_j^pq) + Σ_{rs≠pq} d(ψ_i^pq, ψ_k^rs))]

    psi: (N, D) anchors ψ_i^pq;  i: (N,) video ids;  pq: (N,) ids of the relative transformations.
    keys: the same triple gathered over all processes; None: the anchors themselves. Eq. 2 stops the
          gradient at the keys, so gathering without gradient is exact.
    -> scalar (see `contrast`)
    """
    psi_k, k, rs = keys or (psi, i, pq)
    same_i = i[:, None] == k                                # (N, M)  k = i
    same_pq = pq[:, None] == rs                             # (N, M)  rs = pq
    return contrast(d(psi, psi_k, lam), positive=same_pq & ~same_i, negative=~same_pq)


def loss_inst(phi, i, p, keys: tuple | None = None, lam: float = 0.1) -> torch.Tensor:
    """Eq. 3: L_inst = -E log[d(φ_i^p, φ_i^q) / (d(φ_i^p, φ_i^q) + Σ_{j≠i} d(φ_i^p, φ_j^r))]

    phi: (N, D) anchors φ_i^p;  i: (N,) video ids;  p: (N,) ids of the clips of a video.
    keys: the same triple gathered over all processes (see `loss_equi`)
    -> scalar (see `contrast`)
    """
    phi_j, j, r = keys or (phi, i, p)
    same_i = i[:, None] == j                                # (N, M)  j = i
    same_p = p[:, None] == r                                # (N, M)  r = p
    return contrast(d(phi, phi_j, lam), positive=same_i & ~same_p, negative=~same_i)


def loss_distinct(chi, i, p, s, keys: tuple | None = None, lam: float = 0.1) -> torch.Tensor:
    """Fig. 5's "distinctiveness", in place of L_equi and L_aux.

    # paper silent: no equation; we read it as
    L = -E log[d(χ_i^ps, χ_i^pt) / (d(χ_i^ps, χ_i^pt) + Σ_{(j,r)≠(i,p)} d(χ_i^ps, χ_j^ru))]:
    two augmentations σ_s, σ_t of one clip τ_p(x_i) attract; other clips and other videos repel.

    chi: (N, D) anchors χ_i^ps;  i: (N,) video ids;  p: (N,) ids of τ;  s: (N,) ids of σ.
    keys: the same four tensors gathered over all processes (see `loss_equi`)
    -> scalar (see `contrast`)
    """
    chi_j, j, r, u = keys or (chi, i, p, s)
    same_ip = (i[:, None] == j) & (p[:, None] == r)         # (N, M)  (j, r) = (i, p)
    same_s = s[:, None] == u                                # (N, M)  u = s
    return contrast(d(chi, chi_j, lam), positive=same_ip & ~same_s, negative=~same_ip)
