"""HEAD"""


def preview(argv):
    """Figure 2 from a user's own videos: a group of two as the network gets them, what was drawn written beside."""
    from common import checked, list_and_scan, shared_parser                    # here, since common imports this module
    parser, _ = shared_parser(preview.__doc__, argv)
    parser.prog = "data.py preview"
    parser.set_defaults(out="figure2.png")
    parser.add_argument("--group", type=int, default=0, help="which group of two videos of the first epoch")
    args = checked(parser, argv)
    if not args.out.lower().endswith((".png", ".jpg")):
        parser.error(f"--out must end in .png or .jpg, but is {args.out}")
    split, index = list_and_scan(args, args.split, "train")
    paths, report = usable(split, index, args.frames)
    pairs = Pairs(split, paths, index, args.frames, args.size, seed=args.seed)
    if not 0 <= args.group < len(pairs):
        raise ValueError(f"--group must lie between 0 and {len(pairs) - 1}, but is {args.group}")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    TF.to_pil_image(figure2(pairs, collate([pairs[0, args.group]]))).save(args.out)
    print(f"{report}\n{args.out}: group {args.group}")


def figure2(pairs, group, cell=96):
    """uint8 (3, height, width): for each video of a group its time line with clips p and q, and their frames below."""
    T, speeds = pairs.T, pairs.speeds
    width, clips = T * (cell + 2), colour(group["clips"].flatten(0, 1), group["seed"].flatten().tolist())
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (MEAN, STD))
    clips = ((clips * std + mean).clamp(0, 1) * 255).to(torch.uint8).transpose(1, 2).unflatten(0, (2, 2))
    order = ("p before q", "p after q", "p and q overlap")[group["order"][0]]
    shift = (group["start"][0, 1] - group["start"][0, 0]).item()
    rows = [caption(width, f"one relative transformation pq: shift from p to q {shift:+d} frames, {order}")]
    for n in range(2):
        v = group["video"][n].item()
        length = int(pairs.shapes[v, 0])
        line = torch.full((3, 34, width), 235, dtype=torch.uint8)               # the time line of the whole video
        taus = [Tau(start, speeds[speed], bool(direction)) for start, speed, direction in
                zip(*(group[name][n].tolist() for name in ("start", "speed", "direction")))]
        strips = []
        for k, (tau, name, tint) in enumerate(zip(taus, "pq", ((40, 90, 200), (220, 150, 0)))):
            left, right = (round(x / length * (width - 1)) for x in (tau.start, tau.end(T) + 1))
            line[:, 4 + 14 * k:16 + 14 * k, left:right + 1] = torch.tensor(tint, dtype=torch.uint8)[:, None, None]
            way = "<- backward" if tau.reverse else "forward ->"
            told = f"{name}: {tau.speed}x, {way}, source frames {tau.start} to {tau.end(T)}"
            strips.append(caption(width, told, tint))
            frames = TF.resize(clips[n, k], [cell, cell], InterpolationMode.NEAREST)            # (T, 3, cell, cell)
            strips.append(torch.cat([TF.pad(frame, [1, 1], fill=list(tint)) for frame in frames], dim=2))
        name = os.fsdecode(os.path.basename(pairs.files[v]))
        rows += [caption(width, f"{name}, {length} frames"), line, *strips, caption(width, "")]
    return torch.cat(rows, dim=1)


def caption(width, text, tint=(0, 0, 0), height=20):
    """A line of text on white -> uint8 (3, height, width)."""
    blank = torch.full((3, height, width), 255, dtype=torch.uint8)
    return draw_bounding_boxes(blank, torch.tensor([[0, 0, 1, 1]]), [text], ["white"], label_colors=[tint])
