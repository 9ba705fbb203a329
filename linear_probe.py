"""Linear SVM on frozen features (Table 1, "Linear").

    python linear_probe.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python linear_probe.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist --checkpoint BACKBONE

Features are averaged over windows and crops and standardised with the training set's statistics (Sec. 3.4).
Writes OUT/linear_probe-DATASET.json and, a line a test video, OUT/linear_probe-DATASET-predictions.jsonl. A test video
that cannot be read counts as wrong and is named.
"""
import sys

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from common.files import check_writable
from common.flags import judging_parser, parse_and_check
from common.judging import (count_videos, extract_parts, load_for_judging, most_frequent, per_class, predictions,
                            random_beside, result_folder, scan_parts, write_accuracy)
from common.processes import init_distributed, run
from common.splits import check_parts, sources


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
    """Train on one part's features from the network `name`, test on the other's; train, test: judging.Features.

    -> dict: top1, per_class {class name: share right}, C; and decision values (V, classes) of the test videos, NaN
    where a video failed, which is wrong.
    """
    split, read, test_read = test.split, train.read(), test.read()
    labels, test_labels = np.array(train.split.labels), np.array(split.labels)
    groups = np.array(sources(args.dataset, train.split.paths))
    svm = fit_svm(train.x[name][read], labels[read], args.C, groups[read], args.seed, max(1, args.workers))
    values = svm.decision_function(test.x[name][test_read])                     # (V,) for two classes, else (V, K)
    values = np.stack([-values, values], axis=1) if values.ndim == 1 else values
    scores = np.full((len(test_labels), len(split.classes)), np.nan)
    scores[test_read] = -np.inf                                                 # classes without a training video
    scores[np.ix_(test_read, svm.classes_)] = values
    right = np.zeros(len(test_labels), bool)
    right[test_read] = scores[test_read].argmax(axis=1) == test_labels[test_read]
    return dict(top1=float(right.mean()), C=float(svm[-1].C), per_class=per_class(split, right)), scores


def main(argv=None):
    args = parse_args(argv)
    rank, _, device = init_distributed()
    network = load_for_judging(args)
    print(f"{device.type}: {vars(args)}")
    networks = random_beside(network, args, device)
    if rank == 0:
        check_writable(out=result_folder(args, args.checkpoint, args.arch) / "linear_probe.json")

    # Features
    scanned = scan_parts(args, ("train", "test"))
    for (train, _), (test, _) in scanned:
        check_parts(train, test)
    features = extract_parts(networks, args, scanned, device)
    if rank:
        return

    # Classifiers
    results, rows = [], []
    for number, (train, test) in zip(args.split, features):
        result = dict(split=number, train=count_videos(train.split, train.failed),
                      test=count_videos(test.split, test.failed), chance=most_frequent(test.split))
        values = {}
        for name in networks:
            result[name], values[name] = probe(train, test, name, args)
        results.append(result)
        first = next(iter(networks))                                            # the checkpoint, if there is one
        rows += predictions(test.split, values[first], test.failed, test.split.classes, "decision values", split=number)
    top1 = {name: float(np.mean([result[name]["top1"] for result in results])) for name in networks}
    write_accuracy(args, "linear SVM", f"linear_probe-{args.dataset}", network,
                   "mean and standard deviation of the training set", top1, results, rows)


if __name__ == "__main__":
    run(main)
