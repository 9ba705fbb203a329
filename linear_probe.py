"""Linear SVM on frozen features (Table 1, "Linear").

    python linear_probe.py --checkpoint runs/toy-r3d18_narrow/backbone.pt
    python linear_probe.py --dataset ucf101 --data UCF-101 --annotations ucfTrainTestlist \\
        --checkpoint BACKBONE

Features are averaged over windows and crops and standardised by the training set (Sec. 3.4).
Writes OUT/linear_probe-DATASET.json and OUT/linear_probe-DATASET-predictions.jsonl, one line per
test video. Unreadable test videos count as errors and are named.
"""
from collections import Counter
from itertools import compress

import numpy as np
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from common import UserError, evaluation
from common.distributed import init_distributed, run
from common.flags import evaluation_defaults, evaluation_parser, fill_defaults, positive_float
from common.splits import check_test, sources


def parse_args(argv=None):
    def positive_float_or_auto(text):
        return text if text == "auto" else positive_float(text)

    parser = evaluation_parser(__doc__)
    parser.add_argument_group("classifier").add_argument(
        "--C", type=positive_float_or_auto, default=1e-3,
        help="the SVM's C (paper silent), or auto: the best of 1e-5 ... 1e-1 in cross-validation "
        "on the training set, 5-fold if it allows, with clips of one source video kept together")
    args = parser.parse_args(argv)
    return fill_defaults(parser, args, evaluation_defaults(args.dataset))


def count_folds(y, groups):
    """Folds of --C auto: 5, or as many as the smallest class has groups. UserError: fewer than 2"""
    fewest = min(Counter(label for label, _ in set(zip(y, groups))).values())
    if fewest < 2:
        raise UserError("--C auto needs two source videos per class: give a number such as 1e-3")
    return min(5, fewest)


def fit_svm(x, y, C=1e-3, groups=None, seed=0, jobs=1):
    """Standardise by the training set (Sec. 3.4), then fit a linear SVM (Table 1).

    x: (N, D), y: (N,), groups: (N,) kept together where C is "auto" -> fitted scikit-learn pipeline
    """
    svm = make_pipeline(StandardScaler(), LinearSVC(C=1e-3 if C == "auto" else C, dual="auto",
                                                    random_state=seed, max_iter=10000))
    if C == "auto":
        folds = StratifiedGroupKFold(count_folds(y, groups))
        svm = GridSearchCV(svm, {"linearsvc__C": 10.0 ** np.arange(-5, 0)}, cv=folds, n_jobs=jobs)
        return svm.fit(x, y, groups=groups).best_estimator_
    return svm.fit(x, y)


def fit_and_test(train, test, name, args):
    """Fit the SVM on the training features of the network `name` and test it (see Features).

    -> dict: top1, per_class {class name: accuracy}, C; decision values (V, classes) of the test
    videos, NaN where a video failed, which counts as an error.
    """
    split, read, test_read = test.split, train.readable(), test.readable()
    labels, test_labels = np.array(train.split.labels), np.array(split.labels)
    groups = np.array(sources(args.dataset, train.split.paths))
    svm = fit_svm(train.x[name][read], labels[read], args.C, groups[read], args.seed,
                  max(1, args.workers))
    values = svm.decision_function(test.x[name][test_read])     # (V,) for two classes, else (V, K)
    if values.ndim == 1:
        values = np.stack([-values, values], axis=1)
    scores = np.full((len(test_labels), len(split.classes)), np.nan)
    scores[test_read] = -np.inf                                 # classes without a training video
    scores[np.ix_(test_read, svm.classes_)] = values
    right = np.zeros(len(test_labels), bool)
    right[test_read] = scores[test_read].argmax(axis=1) == test_labels[test_read]
    result = dict(top1=float(right.mean()), C=float(svm[-1].C))
    return result | dict(per_class=evaluation.per_class(split, right)), scores


def main(argv=None):
    args = parse_args(argv)
    rank, device = init_distributed()
    networks = evaluation.load_networks(args, device)

    # Features
    parts = evaluation.load_parts(args, ("train", "test"))
    for train, test in parts:
        check_test(train, test)
        if args.C == "auto":
            read = [path in train.shapes for path in train.paths]
            groups = compress(sources(args.dataset, train.paths), read)
            count_folds(compress(train.labels, read), groups)   # fail before the features
    features = [[evaluation.extract(networks, split, args, device) for split in pair]
                for pair in parts]
    if rank:
        return

    # Classifiers
    results, rows = [], []
    first = next(iter(networks))                                # the checkpoint, if there is one
    for number, (train, test) in zip(args.split, features):
        result = dict(
            split=number, chance=evaluation.most_frequent(test.split),
            train=evaluation.counts(train.split, train.failed),
            test=evaluation.counts(test.split, test.failed))
        scores = {}
        for name in networks:
            result[name], scores[name] = fit_and_test(train, test, name, args)
        results.append(result)
        rows += evaluation.predictions(test.split, scores[first], test.failed, test.split.classes,
                                       "decision values", split=number)
    name = f"linear_probe-{args.dataset}"
    evaluation.write_accuracy(args, "linear SVM", name, networks[first], results, rows)


if __name__ == "__main__":
    run(main)
