"""HEAD"""

COLUMNS, CELL = 6, 160                                                          # of a contact sheet; pixels


def picture(file, gallery, query, nearest, rows=10):
    """A contact sheet: a row a query, its middle frame first, then those of its nearest videos.

    gallery, query: lists of Video; nearest: (Q, k). A right neighbour has a plain green frame and a "+" before its
    class, a wrong one a red frame, crossed out, and a "-": colour alone says nothing.
    """
    sheet = []
    for q in np.unique(np.linspace(0, len(query) - 1, min(rows, len(query))).round().astype(int)):
        row = [thumbnail(query[q], "query")]
        for video in (gallery[g] for g in nearest[q][:COLUMNS - 1].tolist() if g >= 0):
            row.append(thumbnail(video, None if None in (video.name, query[q].name) else video.name == query[q].name))
        blank = torch.full_like(row[0], 255)
        sheet.append(torch.cat(row + [blank] * (COLUMNS - len(row)), dim=2))
    TF.to_pil_image(torch.cat(sheet, dim=1)).save(file)


def thumbnail(video, verdict):
    """The middle frame of a video with its frame and its class, without one its name -> uint8 (3, CELL + 20, CELL)."""
    try:
        image = TF.center_crop(decode(video.file, [count_frames(video.file)[0] // 2], CELL)[0], CELL)
    except VideoError:
        image = torch.zeros(3, CELL, CELL, dtype=torch.uint8)
    colour = {"query": (60, 60, 200), True: (0, 140, 60), False: (200, 40, 40), None: (120, 120, 120)}[verdict]
    if verdict is False:                                                        # crossed out
        step = torch.arange(CELL)
        for shift in (-1, 0, 1):
            image[:, step, (step + shift).clamp(0, CELL - 1)] = torch.tensor(colour, dtype=torch.uint8)[:, None]
    image = TF.pad(image, [0, 0, 0, 20], fill=255)
    image = draw_bounding_boxes(image, torch.tensor([[0, 0, CELL - 1, CELL - 1]]), colors=[colour], width=5)
    text = {"query": "? ", True: "+ ", False: "- ", None: ""}[verdict] + (video.name or Path(video.path).stem)
    return draw_bounding_boxes(image, torch.tensor([[0, CELL, CELL - 1, CELL + 19]]), [text], fill=True,
                               colors=[(255, 255, 255)], label_colors=[colour])
