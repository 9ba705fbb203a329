"""The losses of Jenni & Jin, "Time-Equivariant Contrastive Video Representation Learning" (ICCV 2021).

Pure functions on tensors: any of them, pasted into another project together with `d`, works there as it is.
i, j, k are videos; p, q, r, s their clips; ψ_i^pq encodes the relative transformation from clip p to clip q.

ValueError, from each: shapes that do not fit, an anchor without any positive, similarities (or their sums over the
keys) that are not finite. The last two on a CPU alone: a GPU, where to look at values is to wait, gives a loss that is
not finite.
"""
import torch
import torch.nn.functional as F


def d(x: torch.Tensor, y: torch.Tensor, lam: float = 0.1) -> torch.Tensor:
    """Eq. 2 for all pairs: d(x, y) = exp(x · stopgrad(y) / (λ ‖x‖ ‖stopgrad(y)‖)).

    x: (N, D), y: (M, D), floating point -> (N, M), float32 even under autocast (float64 if x is).
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"d needs x (N, D) and y (M, D), but x is {tuple(x.shape)} and y is {tuple(y.shape)}")
    if not lam > 0:
        raise ValueError(f"the temperature lam must be above 0, but is {lam}")
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)     # at least float32, whatever the network's precision
        x = F.normalize(x.to(dtype), dim=1)                     # (N, D)  x / ‖x‖
        y = F.normalize(y.detach().to(dtype), dim=1)            # (M, D)  stopgrad(y) / ‖stopgrad(y)‖
        sim = torch.exp(x @ y.T / lam)                          # (N, M)  within e^±10 at λ = 0.1: no max-shift needed
    if x.device.type == "cpu" and not sim.sum(dim=1).isfinite().all():      # the sums over keys (Eq. 1, Eq. 3) fit too
        raise ValueError(f"similarities are not finite: a feature is NaN or infinite, or lam={lam} is too small")
    return sim


def loss_equi(psi: torch.Tensor, i: torch.Tensor, pq: torch.Tensor, keys: tuple | None = None,
              lam: float = 0.1) -> torch.Tensor:
    """Eq. 1: L_equi = -E log[ d(ψ_i^pq, ψ_j^pq) / (d(ψ_i^pq, ψ_j^pq) + Σ_{rs≠pq} d(ψ_i^pq, ψ_k^rs)) ].

    psi: (N, D) anchors ψ_i^pq;  i: (N,) video ids;  pq: (N,) ids, equal exactly where the relative transformations are.
          Both over all processes: no two processes may give one id to different videos or transformations.
    keys: the same triple gathered over all processes, (M, D), (M,), (M,); the anchors themselves if None.
          Eq. 2 stops the gradient at the keys, so a gather without gradient is exact.
    -> scalar: for each anchor the mean over its positives j, each with its own denominator; then the mean over anchors.
    """
    psi_k, k, rs = (psi, i, pq) if keys is None else keys
    sim = d(psi, psi_k, lam)                                    # (N, M)  d(ψ_i^pq, ψ_k^rs)
    if not (i.shape == pq.shape == psi.shape[:1] and k.shape == rs.shape == psi_k.shape[:1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (psi, i, pq, psi_k, k, rs))
        raise ValueError(f"loss_equi needs psi (N, D), i, pq (N,), and the same of the keys, but got {shapes}")
    same_i = i[:, None] == k                                    # (N, M)  k = i
    same_pq = pq[:, None] == rs                                 # (N, M)  rs = pq
    positive = same_pq & ~same_i                                # (N, M)  ψ_j^pq, j ≠ i
    if len(psi) == 0 or psi.device.type == "cpu" and not positive.any(dim=1).all():
        raise ValueError("loss_equi: an anchor has no positive, that is, no other video in the batch has its pq "
                         "(Eq. 1 needs two videos with the same relative transformation)")
    neg = (sim * ~same_pq).sum(dim=1, keepdim=True)             # (N, 1)  Σ_{rs≠pq} d(ψ_i^pq, ψ_k^rs)
    term = torch.log(sim + neg) - torch.log(sim)                # (N, M)  -log[ d / (d + Σ) ]
    return ((term * positive).sum(dim=1) / positive.sum(dim=1)).mean()      # E over j, then over i


def loss_inst(phi: torch.Tensor, i: torch.Tensor, p: torch.Tensor, keys: tuple | None = None,
              lam: float = 0.1) -> torch.Tensor:
    """Eq. 3: L_inst = -E log[ d(φ_i^p, φ_i^q) / (d(φ_i^p, φ_i^q) + Σ_{j≠i} d(φ_i^p, φ_j^r)) ].

    phi: (N, D) anchors φ_i^p;  i: (N,) video ids, over all processes (Eq. 1);  p: (N,) which of the video's clips.
    keys: the same triple gathered over all processes, (M, D), (M,), (M,); the anchors themselves if None (see Eq. 1).
    -> scalar: for each anchor the mean over its positives q, each with its own denominator; then the mean over anchors.
    """
    phi_j, j, r = (phi, i, p) if keys is None else keys
    sim = d(phi, phi_j, lam)                                    # (N, M)  d(φ_i^p, φ_j^r)
    if not (i.shape == p.shape == phi.shape[:1] and j.shape == r.shape == phi_j.shape[:1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (phi, i, p, phi_j, j, r))
        raise ValueError(f"loss_inst needs phi (N, D), i, p (N,), and the same of the keys, but got {shapes}")
    same_i = i[:, None] == j                                    # (N, M)  j = i
    same_p = p[:, None] == r                                    # (N, M)  r = p
    positive = same_i & ~same_p                                 # (N, M)  φ_i^q, q ≠ p
    if len(phi) == 0 or phi.device.type == "cpu" and not positive.any(dim=1).all():
        raise ValueError("loss_inst: an anchor has no positive, that is, the batch holds no other clip of its video "
                         "(Eq. 3 needs two clips p ≠ q of each video)")
    neg = (sim * ~same_i).sum(dim=1, keepdim=True)              # (N, 1)  Σ_{j≠i} d(φ_i^p, φ_j^r)
    term = torch.log(sim + neg) - torch.log(sim)                # (N, M)  -log[ d / (d + Σ) ]
    return ((term * positive).sum(dim=1) / positive.sum(dim=1)).mean()      # E over q, then over i


def loss_distinct(chi: torch.Tensor, i: torch.Tensor, p: torch.Tensor, s: torch.Tensor, keys: tuple | None = None,
                  lam: float = 0.1) -> torch.Tensor:
    """Fig. 5, "distinctiveness", which takes the place of L_equi there. # paper silent: no equation; we read it as

    L = -E log[ d(χ_i^ps, χ_i^pt) / (d(χ_i^ps, χ_i^pt) + Σ_{(j,r)≠(i,p)} d(χ_i^ps, χ_j^ru)) ]:
    positives are two augmentations σ_s, σ_t of one clip τ_p(x_i), negatives other videos and other clips of the video.

    chi: (N, D) anchors χ_i^ps;  i: (N,) video ids, over all processes;  p: (N,) which τ of the video;  s: (N,) which σ
          of the clip.
    keys: the same four gathered over all processes; the anchors themselves if None (see Eq. 1).
    -> scalar: for each anchor the mean over its positives t, each with its own denominator; then the mean over anchors.
    """
    chi_j, j, r, u = (chi, i, p, s) if keys is None else keys
    sim = d(chi, chi_j, lam)                                    # (N, M)  d(χ_i^ps, χ_j^ru)
    if not (i.shape == p.shape == s.shape == chi.shape[:1] and j.shape == r.shape == u.shape == chi_j.shape[:1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (chi, i, p, s, chi_j, j, r, u))
        raise ValueError(f"loss_distinct needs chi (N, D), i, p, s (N,), and the same of the keys, but got {shapes}")
    same_ip = (i[:, None] == j) & (p[:, None] == r)             # (N, M)  (j, r) = (i, p)
    same_s = s[:, None] == u                                    # (N, M)  u = s
    positive = same_ip & ~same_s                                # (N, M)  χ_i^pt, t ≠ s
    if len(chi) == 0 or chi.device.type == "cpu" and not positive.any(dim=1).all():
        raise ValueError("loss_distinct: an anchor has no positive, that is, the batch holds no other augmentation of "
                         "its clip (two σ of each τ(x) are needed)")
    neg = (sim * ~same_ip).sum(dim=1, keepdim=True)             # (N, 1)  Σ_{(j,r)≠(i,p)} d(χ_i^ps, χ_j^ru)
    term = torch.log(sim + neg) - torch.log(sim)                # (N, M)  -log[ d / (d + Σ) ]
    return ((term * positive).sum(dim=1) / positive.sum(dim=1)).mean()      # E over t, then over i, p, s
