"""What L_equi asks for: Eq. 1 of a psi that knows only a part of pq, without any network.

    python tools/floor.py --batch-size 192                                  # of the toy set
    python tools/floor.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist
    python tools/floor.py --dataset kinetics400 --length 250                # 10 s at 25 frames/s

Takes the flags of pretrain.py, with its defaults. Draws batches as it does, from the lengths of its
training videos or from videos of --length frames. Prints, for each part, the loss that is left, in
nats, and how often the nearest psi has the same pq. L_aux teaches speeds, directions and order;
what they leave is what L_equi can teach beyond it: more in a larger batch.
"""
import random
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import pretrain
from common import UserError
from common.distributed import run
from common.flags import Parser, check_batch_size, positive_int
from data import order_of, sample_pair
from losses import loss_equi

BATCHES = 100
SHIFT = 32                                                      # frames: the nearest multiple


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--length", type=positive_int, help="frames of each video; reads none")
    own, others = parser.parse_known_args(argv)
    if own.length:
        others = ["--data", "none", *others]
    args = pretrain.parse_args(others)
    args.length = own.length
    if args.equivariance != "temporal":
        parser.error("the floor is that of --equivariance temporal")
    return args


def lengths_of(args):
    """Frames of each video to draw from. UserError: no batch or no clip can be drawn."""
    if not args.length:
        return pretrain.prepare(args).shapes[:, 0].tolist()
    needed = args.speeds[0] * (args.frames - 1) + 1                         # of the slowest clip
    if args.length < needed:
        raise UserError(f"--length {args.length} is too short for a clip: give {needed} or more")
    check_batch_size(args.batch_size, 2, 4, "two groups of 2 videos", args.batch_size)
    return [args.length] * args.batch_size


def draw_batch(lengths, args, rng):
    """Draw the groups of a batch -> pq of each, and its parts"""
    chosen = rng.sample(lengths, args.batch_size)
    pairs = zip(chosen[::2], chosen[1::2])
    groups = [sample_pair(pair, args.frames, args.speeds, rng) for pair in pairs]
    known = [parts(*taus[0], args.frames) for taus, _ in groups]
    return [labels["pq"] for _, labels in groups], known


def parts(p, q, T):
    """Parts of what pq is, each more than the one before -> {name: value}"""
    motion = p.speed, q.speed, p.reverse, q.reverse
    order = *motion, order_of(p, q, T)
    return {
        "nothing": (),
        "speeds, directions": motion,
        "+ order": order,
        "+ shift within 16": (*order, round((q.start - p.start) / SHIFT))}


def floor(pq, known, lam=0.1):
    """Eq. 1 of a psi whose cosine is 1 where the known part of pq is equal, and 0 elsewhere.

    pq: (G,) ids of the groups of a batch; known: G values
    -> loss, and how often one of the nearest psi, drawn at random, has the same pq
    """
    ids = [known.index(value) for value in known]
    psi = torch.eye(len(pq), dtype=torch.float64)[ids].repeat_interleave(2, 0)      # (B, G)
    pq = torch.as_tensor(pq).repeat_interleave(2)                                   # (B,)
    i = torch.arange(len(pq))
    nearest = (psi @ psi.T > 0) & (i[:, None] != i)                                 # (B, B)
    same_pq = pq[:, None] == pq
    hits = (nearest & same_pq).sum(1) / nearest.sum(1)
    return loss_equi(psi, i, pq, lam=lam).item(), hits.mean().item()


def main(argv=None):
    args = parse_args(argv)
    lengths, rng, results = lengths_of(args), random.Random(args.seed), defaultdict(list)
    for _ in range(BATCHES):
        pq, known = draw_batch(lengths, args, rng)
        for name in known[0]:
            results[name].append(floor(pq, [group[name] for group in known], args.lam))
    print(f"psi knows, of {args.batch_size} videos | Eq. 1, nats | nearest has the same pq")
    for name, pairs in results.items():
        loss, hits = torch.tensor(pairs).mean(0).tolist()
        print(f"{name:18} | {loss:.2f} | {100 * hits:.0f}%")


if __name__ == "__main__":
    run(main)
