"""Linear SVM on frozen features (Table 1, "Linear").

    python linear_probe.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python linear_probe.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE

Features are averaged over windows and crops and standardised with the training set's statistics (Sec. 3.4).
Writes OUT/linear_probe-DATASET.json. A test video that cannot be read counts as wrong and is named.
"""
import sys

import numpy as np
import torch.distributed as dist
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from common import (checked, extract, in_words, init_distributed, judged, load_for_judging, random_beside, run,
                    shared_parser, write_result)
from data import sources


def parse_args(argv=None):
    parser, _ = shared_parser(__doc__, sys.argv[1:] if argv is None else argv, judging="centre")
    parser.add_argument_group("classifier").add_argument(
        "--C", default="1e-3", help="the SVM's C, or auto: 5-fold cross-validation on the training set, with clips of "
        "one source video kept together (paper silent)")
    args = checked(parser, argv)
    if args.C != "auto":
        try:
            args.C = float(args.C)
        except ValueError:
            args.C = 0
        if not args.C > 0:
            parser.error("--C must be a number above 0, or auto")
    return args


def fit_svm(x, y, C=1e-3, groups=None, seed=0):
    """Standardise by the training set's mean and standard deviation (Sec. 3.4), then a linear SVM (Table 1).

    x: (N, D), y: (N,), groups: (N,) what must stay together where C is "auto" -> fitted scikit-learn pipeline.
    """
    svm = make_pipeline(StandardScaler(), LinearSVC(C=1e-3 if C == "auto" else C, random_state=seed, max_iter=10000))
    if C == "auto":
        folds = GroupKFold(min(5, len(set(groups))))
        svm = GridSearchCV(svm, {"linearsvc__C": 10.0 ** np.arange(-5, 2)}, cv=folds).fit(x, y, groups=groups)
        return svm.best_estimator_
    return svm.fit(x, y)


def probe(train, test, args):
    """Train and test one set of features; train: (x, y, paths), test: (x, y); x of a failed video is NaN -> dict."""
    (x, y, paths), (test_x, test_y) = train, test
    read = ~np.isnan(x[:, 0])
    groups = np.array(sources(args.dataset, paths))
    svm = fit_svm(x[read], y[read], args.C, groups[read], args.seed)
    right = np.zeros(len(test_y), bool)                                         # a failed video is wrong
    scored = ~np.isnan(test_x[:, 0])
    right[scored] = svm.predict(test_x[scored]) == test_y[scored]
    return dict(top1=right.mean(), C=svm[-1].C,
                per_class={int(k): right[test_y == k].mean() for k in np.unique(test_y)})


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    networks = {name: net.to(device) for name, net in random_beside(network, args).items()}
    parts = [(number, *(extract(networks, args, number, part, device) for part in ("train", "test")))
             for number in args.split]
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return

    results = []
    for number, (train, train_x, train_failed), (test, test_x, test_failed) in parts:
        if not train.classes:
            raise ValueError(f"{train.title} has no labels, which a linear probe needs")
        y, test_y = np.array(train.labels), np.array(test.labels)
        results.append(dict(
            split=number, train=judged(train, train_failed), test=judged(test, test_failed),
            chance=np.bincount(test_y).max() / len(test_y),                     # always the most frequent class
            **{name: probe((train_x[name], y, train.paths), (test_x[name], test_y), args) for name in networks}))
    top1 = {name: float(np.mean([result[name]["top1"] for result in results])) for name in networks}
    chance = float(np.mean([result["chance"] for result in results]))
    file = write_result(args, f"linear_probe-{args.dataset}", network, top1=top1, chance=chance, splits=results)
    print(f"linear SVM on {args.dataset}, split {' '.join(map(str, args.split))}: "
          f"{in_words(top1, chance)} ({file})")


if __name__ == "__main__":
    run(main)
