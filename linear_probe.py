"""Linear SVM on frozen features (Table 1, "Linear").

    python linear_probe.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python linear_probe.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE

Features are averaged over windows and crops and standardised with the training set's statistics (Sec. 3.4).
Writes OUT/linear_probe-DATASET.json. A test video that cannot be read counts as wrong and is named.
"""
import sys

import numpy as np
import torch.distributed as dist
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from common.files import check_writable
from common.flags import judging_parser, parse_and_check
from common.judging import (default_out, extract, in_words, judged, load_for_judging, most_frequent, random_beside,
                            told, write_result)
from common.processes import init_distributed, on_first, run
from common.splits import check_parts, list_and_scan, sources


def parse_args(argv=None):
    parser = judging_parser(__doc__, sys.argv[1:] if argv is None else argv)
    parser.add_argument_group("classifier").add_argument(
        "--C", default="1e-3", help="the SVM's C (paper silent), or auto: the best of 1e-5 ... 1e-1 in 5-fold "
        "cross-validation on the training set, with clips of one source video kept together")
    args = parse_and_check(parser, argv)
    if args.C != "auto":
        try:
            args.C = float(args.C)
        except ValueError:
            args.C = 0
        if not 0 < args.C < float("inf"):
            parser.error("--C must be a number above 0, or auto")
    return args


def fit_svm(x, y, C=1e-3, groups=None, seed=0, jobs=1):
    """Standardise by the training set's mean and standard deviation (Sec. 3.4), then a linear SVM (Table 1).

    x: (N, D), y: (N,), groups: (N,) what must stay together where C is "auto" -> fitted scikit-learn pipeline.
    """
    svm = make_pipeline(StandardScaler(), LinearSVC(C=1e-3 if C == "auto" else C, dual="auto", random_state=seed,
                                                    max_iter=10000))
    if C == "auto":
        folds = StratifiedGroupKFold(min(5, len(set(groups))))
        svm = GridSearchCV(svm, {"linearsvc__C": 10.0 ** np.arange(-5, 0)}, cv=folds, n_jobs=jobs)
        return svm.fit(x, y, groups=groups).best_estimator_
    return svm.fit(x, y)


def probe(train, test, name, args):
    """Train on one part's features from the network `name` and test on the other's; train, test: see common.extract.

    -> dict: top1, per_class {class name: share right}, C. A test video that failed is wrong.
    """
    (x, y, read), (test_x, test_y, test_read) = (
        (x[name], np.array(split.labels), np.array([path not in failed for path in split.paths]))
        for split, x, failed in (train, test))
    groups = np.array(sources(args.dataset, train[0].paths))
    svm = fit_svm(x[read], y[read], args.C, groups[read], args.seed, max(1, args.workers))
    right = np.zeros(len(test_y), bool)
    right[test_read] = svm.predict(test_x[test_read]) == test_y[test_read]
    return dict(top1=float(right.mean()), C=float(svm[-1].C),
                per_class={test[0].classes[k]: float(right[test_y == k].mean()) for k in np.unique(test_y)})


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    print(f"{device.type}: {vars(args)}")
    networks = random_beside(network, args, device)
    if rank == 0:
        check_writable(out=default_out(args, args.checkpoint, args.arch) / "linear_probe.json")
    splits = [[on_first(list_and_scan, args, number, part) for part in ("train", "test")] for number in args.split]
    for (train, _), (test, _) in splits:
        check_parts(train, test)
    splits = [[extract(networks, args, *part, device) for part in parts] for parts in splits]
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return

    results = []
    for number, (train, test) in zip(args.split, splits):
        results.append(dict(split=number, train=judged(*train), test=judged(*test), chance=most_frequent(test[0]),
                            **{name: probe(train, test, name, args) for name in networks}))
    top1 = {name: float(np.mean([result[name]["top1"] for result in results])) for name in networks}
    chance = float(np.mean([result["chance"] for result in results]))
    file = write_result(args, f"linear_probe-{args.dataset}", network,
                        "mean and standard deviation of the training set", top1=top1, chance=chance, splits=results)
    for result in results:
        print(told(result["train"], "left out"), told(result["test"], "count as wrong"), sep="\n")
    print(f"linear SVM on {args.dataset}, split {' '.join(map(str, args.split))}: "
          f"{in_words(top1, chance)} ({file})")


if __name__ == "__main__":
    run(main)
