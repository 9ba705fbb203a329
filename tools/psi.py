"""HEAD"""


def with_psi(backbone, path=None):
    """F and its ψ (Sec. 3.1) in eval mode -> TimeEquivariant that gives psi alone.

    backbone: F as load_backbone gives it; path: where it is from, and ψ too; None: ψ is freshly initialised.
    ValueError: the file has no ψ.
    """
    model = TimeEquivariant(backbone.arch, ["equi"])
    model.backbone = backbone
    if path:
        if "equi" not in backbone.args.get("losses", LOSSES):
            raise ValueError(f"{path} has no psi: the run that wrote it had no term equi (--losses of pretrain.py)")
        psi = {key.removeprefix("heads.psi."): x for key, x in backbone.heads.items() if key.startswith("heads.psi.")}
        if not psi or "speeds" not in backbone.args:
            raise ValueError(f"{path} has no psi: it is in checkpoint.pt of pretrain.py only (give that --checkpoint)")
        fill(model.heads["psi"], psi, path, f"the psi of {backbone.arch}")
    return model.eval()

GROUPS = 512                                                                    # of two videos, for --psi


@torch.no_grad()
def encode(models, pairs, args, device):
    """ψ of GROUPS groups (or what fills the last batch), as pre-training draws them: τ, crops, colours.

    models: {network: F with ψ} -> {network: psi (N, D)}, labels {name: (N, ...)} of data.Pairs, {file: problem}.
    """
    items, batches, failed = min(8, len(pairs)), [], {}                         # items: groups of a batch
    steps = -(-GROUPS // items)
    for batch in tqdm(step_loader(pairs, items, 0, steps, args.workers), "psi", steps, unit="batch"):
        failed.update(batch.pop("failed"))
        clips = augmented(batch | dict(clips=batch.pop("clips").to(device)))    # (B, 2, 3, T, H, W)
        with torch.autocast(device.type, AMP[args.amp], enabled=args.amp != "off"):
            batches.append(batch | {name: model(clips)["psi"].float().cpu() for name, model in models.items()})
    labels = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    psi = {name: labels.pop(name) for name in models}
    if not all(x.isfinite().all() for x in psi.values()):
        raise ValueError("--psi: what the network makes of some clips is not finite")
    return psi, labels, failed


def tell_apart(psi, labels, speeds, T):
    """What ψ tells apart (Sec. 3.1): cosines of ψ_i^pq and ψ_k^rs, and the nearest ψ_k^rs of each ψ_i^pq, k ≠ i.

    psi: (N, D); labels: video, pq, order (N,), start, speed, direction (N, 2) as data.Pairs has them; speeds: what the
    classes of speed mean; shifts that differ by up to T source frames count as alike.
    -> partner: how often the nearest has the same pq, and a random one (share, chance); curves: mean cosine against one
    difference where the others are alike, a dict a step of the curve; kinds: share and chance of the same for parts of
    pq and for order, and matrix, a row a kind of anchor: the shares of the kinds of its nearest (None: no anchor).
    """
    cosine = (x := F.normalize(psi.double(), dim=1)) @ x.T                      # (N, N)
    other = labels["video"][:, None] != labels["video"]                         # (N, N)  k ≠ i
    nearest = cosine.masked_fill(~other, -2).argmax(1, keepdim=True)            # (N, 1)
    shift = labels["start"][:, 1] - labels["start"][:, 0]                       # (N,)  from p to q, in source frames
    octave = torch.tensor(speeds).double().log2()[labels["speed"]]              # (N, 2)
    shift = (shift[:, None] - shift).abs()                                      # (N, N) each: the differences
    octaves = (octave[:, None] - octave).abs().sum(2)
    turned = (labels["direction"][:, None] != labels["direction"]).sum(2)
    doubled = torch.where(shift > 0, 2 ** shift.double().clamp(min=1).log2().ceil(), 0)     # 0, 1, 2, 3-4, 5-8, ...

    def curve(difference, alike):
        alike = alike & other.triu(1)                                           # each two rows once
        steps, step = difference[alike].unique(return_inverse=True)
        pairs = step.bincount()
        means = step.bincount(cosine[alike]) / pairs
        return [dict(up_to=int(d), cosine=c, pairs=n) for d, c, n in zip(*(x.tolist() for x in (steps, means, pairs)))]

    def hits(label):
        match = label[:, None] == label                                         # (N, N)
        return dict(share=match.gather(1, nearest).double().mean().item(),
                    chance=((match & other).sum(1) / other.sum(1)).double().mean().item())

    kinds = {}
    for name, label, words in (
            ("speed", labels["speed"] @ torch.tensor([len(speeds), 1]), [f"{p}x {q}x" for p in speeds for q in speeds]),
            ("direction", labels["direction"] @ torch.tensor([2, 1]), ["> >", "> <", "< >", "< <"]),
            ("order", labels["order"], ["before", "after", "overlap"])):
        anchor = F.one_hot(label, len(words)).double()                          # (N, K)
        rows = (anchor.T @ anchor[nearest[:, 0]]).tolist()                      # K x K  counts
        kinds[name] = dict(words=words, **hits(label),
                           matrix=[[n / sum(row) for n in row] if sum(row) else None for row in rows])
    return dict(partner=hits(labels["pq"]), kinds=kinds, curves=dict(
        shift=curve(doubled, (octaves < 1e-9) & (turned == 0)),
        speed=curve((octaves - 1e-9).ceil(), (shift <= T) & (turned == 0)),
        direction=curve(turned, (shift <= T) & (octaves < 1e-9))))

BLUE, GREY, PALE = (40, 90, 200), (150, 150, 150), (225, 225, 225)


def psi_picture(file, found, told):
    """What tell_apart found, {network: ...}, the checkpoint first: curves of all above the checkpoint's matrices."""
    first, *beside = found.values()
    cells = len(first["kinds"]["speed"]["words"])
    sheet = torch.full((3, 410 + 18 * max(cells, 16), 27 * max(cells, 16) + 550), 255, dtype=torch.uint8)
    axes = ("mean cosine of psi of two videos against one difference between their transformations, the others alike; "
            "blue: checkpoint, grey: randomly initialised")
    texts = [(10, 6, axes, (0, 0, 0)), (10, 22, told, (0, 0, 0))]
    for n, (name, axis) in enumerate((("shift", "difference in shift, up to ... source frames"),
                                      ("speed", "difference in speed, octaves of p + octaves of q"),
                                      ("direction", "clips that differ in direction"))):
        texts += plot(sheet, 45 + 320 * n, 60, axis, [x["curves"][name] for x in (*beside, first)], (GREY, BLUE))
    for name, left, top, width in (("speed", 65, 390, 27), ("direction", 160 + 27 * cells, 390, 50),
                                   ("order", 160 + 27 * cells, 550, 50)):
        texts += table(sheet, left, top, width, name, first["kinds"][name])
    x, y, words, tints = zip(*texts)
    boxes = torch.tensor([x, y, x, y]).T + torch.tensor([0, 0, 1, 1])           # (n, 4)  at the corner of each text
    sheet = draw_bounding_boxes(sheet, boxes, list(words), ["white"] * len(x), label_colors=list(tints))
    TF.to_pil_image(sheet).save(file)


def paint(sheet, x, y, width, height, tint):
    sheet[:, y:y + height, x:x + width] = torch.tensor(tint, dtype=torch.uint8)[:, None, None]


def plot(sheet, left, top, axis, curves, tints, width=260, height=200):
    """Curves of tell_apart, drawn on sheet (3, H, W) -> the texts that belong to it, [(x, y, text, tint)]."""
    low = min(-0.1, *(step["cosine"] for curve in curves for step in curve))
    across = np.linspace(left + 12, left + width - 12, len(curves[0])).round().astype(int).tolist()
    texts = [(x - 6, top + height + 4, str(step["up_to"]), (0, 0, 0)) for x, step in zip(across, curves[0])]
    for cosine in (0, 0.5, 1):
        y = top + round((1 - cosine) / (1 - low) * height)
        paint(sheet, left, y, width, 1, PALE)
        texts.append((left - 30, y - 8, f"{cosine:.1f}", (0, 0, 0)))
    for curve, tint in zip(curves, tints):
        ys = [top + round((1 - step["cosine"]) / (1 - low) * height) for step in curve]
        for x in np.arange(across[0], across[-1], 0.1):
            paint(sheet, round(x), round(np.interp(x, across, ys)), 2, 2, tint)
        for x, y in zip(across, ys):
            paint(sheet, x - 2, y - 2, 6, 6, tint)
    return [*texts, (left, top + height + 22, axis, (0, 0, 0))]


def table(sheet, left, top, width, name, kinds):
    """A matrix of tell_apart, in per cent, drawn on sheet (3, H, W) -> its texts, [(x, y, text, tint)]."""
    texts = [(left - 57, top - 56, f"{name} of p and q: rows the anchor's, columns its nearest's, %", (0, 0, 0)),
             (left - 57, top - 42, f"the same: {kinds['share']:.1%} (chance: {kinds['chance']:.1%})", (0, 0, 0))]
    for k, (word, row) in enumerate(zip(kinds["words"], kinds["matrix"])):
        texts.append((left - 57, top + 18 * k - 1, word, (0, 0, 0)))
        texts += [(left - 1 + width * k, top - 27 + 12 * n, part, (0, 0, 0)) for n, part in enumerate(word.split())]
        for m, share in enumerate(row or ()):
            x, y = left + width * m, top + 18 * k
            paint(sheet, x, y, width - 1, 17, [round(255 - share * (255 - c)) for c in BLUE])
            texts.append((x - 1, y - 1, f"{100 * share:.0f}", (0, 0, 0) if share < 0.5 else (255, 255, 255)))
    return texts
