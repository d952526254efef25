"""Bootstrap intervals of scores, paired differences, the verdict and calibration.

Pure functions on arrays. All scores are 0 to 100 unless said otherwise.
"""
from collections import Counter

import numpy as np
import pandas as pd

UNIT = "mean sentence BLEU"  # of the values in a verdict
DRAWS = 2000             # bootstrap draws of each interval
BINS = 10                # of the calibration
MIN_TYPE_ROWS = 20       # a type with fewer rows is left out of the tables


def bootstrap_mean(values, groups, draws=DRAWS, seed=42):
    """(mean, low, high) of `values`, with the 95 % percentile interval of a bootstrap that draws whole groups.

    values: (n,), or (n, k) for k results from the same draws. NaN marks a row without that score: it is left out.
    groups: n image names. The questions of one image are not independent, so they are drawn together. The mean of a
    draw is the sum over the drawn images divided by their number of rows. The mean is NaN if no row has a score. One
    group alone gives no interval: low and high are NaN. Raises ValueError without rows.
    """
    table = np.asarray(values, dtype=np.float64)
    if not len(table):
        raise ValueError("there are no rows to score")
    by_group = pd.DataFrame(table.reshape(len(table), -1)).groupby(np.asarray(groups))
    sums = np.hstack([by_group.sum(), by_group.count()])  # (groups, 2k): k sums, then k numbers of rows
    num_groups, generator = len(sums), np.random.default_rng(seed)
    # A draw is how often each group was drawn. scipy.stats.bootstrap gives the same intervals and is 6 to 13 times slower.
    drawn = (np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups) for _ in range(draws))
    means = _ratios(np.array([times @ sums for times in drawn]))  # (draws, k)
    if num_groups == 1:
        means[:] = np.nan
    low, high = pd.DataFrame(means).quantile([0.025, 0.975]).to_numpy()
    return tuple(numbers.reshape(table.shape[1:])[()] for numbers in (_ratios(sums.sum(0)), low, high))


def _ratios(sums):
    """(..., 2k) sums and counts -> (..., k) means, NaN if the count is zero."""
    total, count = np.split(sums, 2, axis=-1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def paired_difference(values_a, values_b, groups):
    """(difference, low, high): mean of a - b over the same rows, with its 95 % interval as in `bootstrap_mean`."""
    return bootstrap_mean(np.asarray(values_a) - np.asarray(values_b), groups)


def summarise(scores_by_name, groups):
    """{NAME: (n,)} -> {NAME: {"value", "ci95": [low, high], "n"}}, rounded to 0.01.

    n is the number of rows that have the score. None stands for a missing mean or interval.
    """
    table = np.column_stack(list(scores_by_name.values()))
    columns = zip(*bootstrap_mean(table, groups), (~np.isnan(table)).sum(0), strict=True)
    return {name: {"value": _rounded(mean), "ci95": [_rounded(low), _rounded(high)], "n": int(count)}
            for name, (mean, low, high, count) in zip(scores_by_name, columns, strict=True)}


def _rounded(number):
    return None if np.isnan(number) else round(float(number), 2)


def by_type(scores_by_name, types, groups):
    """Scores per type, the most frequent type first: ({TYPE: {"n", NAME: as in `summarise`}}, hidden {TYPE: n}).

    types: n strings; an empty one counts as "unknown". Types with fewer than MIN_TYPE_ROWS rows are in `hidden`.
    """
    types = np.array([kind or "unknown" for kind in types])
    groups = np.asarray(groups)
    table, hidden = {}, {}
    for kind, count in sorted(Counter(types.tolist()).items(), key=lambda item: (-item[1], item[0])):
        rows = types == kind
        if count < MIN_TYPE_ROWS:
            hidden[kind] = count
        else:
            scores = {name: values[rows] for name, values in scores_by_name.items()}
            table[kind] = {"n": count, **summarise(scores, groups[rows])}
    return table, hidden


def verdict(values, floors, groups, annotator=None):
    """One line: does the model beat its strongest floor beyond the interval, and how far is it to one annotator?

    values: (n,) scores of the model; floors: {NAME: (n,)}; annotator: (n,) scores of one annotator, NaN if unknown,
    or None. The difference is paired by row and resampled by image. It counts only if its interval, rounded as
    printed, excludes zero.
    """
    name = max(floors, key=lambda floor: floors[floor].mean())
    difference, low, high = (round(x, 1) + 0.0 for x in paired_difference(values, floors[name], groups))
    measured = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}] {UNIT}"
    if np.isnan(low):
        return f"stands {difference:+.1f} {UNIT} from the strongest floor ({name}), but one image gives no interval"
    if high < 0:
        return f"is below the strongest floor ({name}): {measured}"
    if low <= 0:
        return f"does not beat the strongest floor ({name}): {measured}, an interval that includes zero"
    beats = f"beats the strongest floor ({name}) by {difference:.1f} [{low:.1f}, {high:.1f}] {UNIT}"
    return beats + _way_to_annotator(values, floors[name], annotator)


def _way_to_annotator(values, floor, annotator):
    """The part of the verdict about one annotator, on the rows that have a second annotation."""
    known = np.zeros(len(values), dtype=bool) if annotator is None else ~np.isnan(annotator)
    if not known.any():
        return "; there is no annotator ceiling, since no question has a second annotation"
    gap = annotator[known].mean() - floor[known].mean()
    if gap <= 0:
        return "; one annotator does not score above that floor"
    share = 100 * (values[known].mean() - floor[known].mean()) / gap
    where = "" if known.all() else f" (on the {known.sum()} of {len(known)} questions with a second annotation)"
    return f" and reaches {share:.0f} % of the way from it to one annotator{where}"


def expected_calibration_error(confidence, correct):
    """(error, table): the mean gap between confidence and accuracy over equal bins, weighted by the rows of each bin.

    confidence: (n,) in 0 to 1; correct: (n,) 0 or 1; the error is 0 to 1 (Guo et al. 2017). table: a DataFrame with
    low, high, n, confidence and accuracy of each bin (low, high] with rows. Raises ValueError outside 0 to 1 or without rows.
    """
    from sklearn.calibration import calibration_curve
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=BINS)  # of the bins with rows
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=BINS)  # bins as in calibration_curve
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "n": counts})[counts > 0]
    error = np.average(abs(accuracy - mean_confidence), weights=table["n"])
    return float(error), table.assign(confidence=mean_confidence, accuracy=accuracy)
