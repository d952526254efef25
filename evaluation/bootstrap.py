"""Bootstrap intervals of scores, paired differences, the verdict and calibration.

Pure functions on arrays. All scores are 0 to 100 unless said otherwise.
"""
from collections import Counter

import numpy as np

DRAWS = 2000             # bootstrap draws of each interval
MIN_TYPE_ROWS = 20       # a type with fewer rows is left out of the tables
DRAWN_AT_ONCE = 1 << 21  # images drawn per step of the bootstrap: keeps its memory below about 100 MB


def bootstrap_mean(values, groups, draws=DRAWS, seed=42):
    """(mean, low, high) of `values`, with the 95 % percentile interval of a bootstrap that draws whole groups.

    values: (n,) or (n, k). All k columns use the same draws, and each result is then (k,). NaN marks a row without
    that score: it is left out of the mean. groups: n image names. The questions of one image are not independent, so
    they are drawn together. The mean of a draw is the sum over the drawn images divided by their number of rows.
    The mean is NaN if no row has a score. One group alone gives no interval: low and high are NaN.
    Raises ValueError without rows.
    """
    table = np.asarray(values, dtype=np.float64)
    if not len(table):
        raise ValueError("there are no rows to score")
    flat = table.reshape(len(table), -1)  # (n, k)
    names, group_of_row = np.unique([str(group) for group in groups], return_inverse=True)
    scored = ~np.isnan(flat)
    sums = np.zeros((len(names), 2 * flat.shape[1]))  # per group: k sums, then k numbers of rows
    np.add.at(sums, group_of_row, np.hstack([np.where(scored, flat, 0.0), scored]))
    low, high = _percentiles(sums, draws, np.random.default_rng(seed))
    mean = _ratios(sums.sum(0))
    if table.ndim == 1:
        return float(mean[0]), float(low[0]), float(high[0])
    return mean, low, high


def _ratios(sums):
    """(..., 2k) sums and counts -> (..., k) means, NaN if the count is zero."""
    total, count = np.split(sums, 2, axis=-1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _percentiles(sums, draws, generator):
    """2.5 % and 97.5 % percentiles, (k,) each, of the means over `draws` samples of the groups with replacement.

    scipy.stats.bootstrap gives the same intervals and is 6 to 13 times slower: it copies the rows of every draw. Here
    a draw is how often each group was drawn, and one matrix product gives the sums of all draws.
    """
    num_groups = len(sums)
    step = max(1, DRAWN_AT_ONCE // num_groups)
    means = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = generator.integers(num_groups, size=(size, num_groups))
        drawn += num_groups * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * num_groups).reshape(size, num_groups)
        means.append(_ratios(times.astype(np.float64) @ sums))
    means = np.concatenate(means)  # (draws, k)
    low, high = np.full((2, means.shape[1]), np.nan)
    has_interval = ~np.isnan(means).all(0) & (num_groups > 1)
    if has_interval.any():
        low[has_interval], high[has_interval] = np.nanpercentile(means[:, has_interval], (2.5, 97.5), axis=0)
    return low, high


def paired_difference(values_a, values_b, groups, draws=DRAWS, seed=42):
    """(difference, low, high): mean of a - b over the same rows, with its 95 % interval as in `bootstrap_mean`."""
    return bootstrap_mean(np.asarray(values_a, dtype=np.float64) - np.asarray(values_b, dtype=np.float64),
                          groups, draws, seed)


def summarise(scores_by_name, groups, draws=DRAWS, seed=42):
    """{NAME: (n,)} -> {NAME: {"value", "ci95": [low, high], "n"}}, rounded to 0.01.

    n is the number of rows that have the score. None stands for a missing mean or interval.
    """
    table = np.column_stack(list(scores_by_name.values()))
    columns = zip(*bootstrap_mean(table, groups, draws, seed), (~np.isnan(table)).sum(0), strict=True)
    return {name: {"value": _rounded(mean), "ci95": [_rounded(low), _rounded(high)], "n": int(count)}
            for name, (mean, low, high, count) in zip(scores_by_name, columns, strict=True)}


def _rounded(number):
    return None if np.isnan(number) else round(float(number), 2)


def by_type(scores_by_name, types, groups, minimum=MIN_TYPE_ROWS, draws=DRAWS, seed=42):
    """Scores per type, the most frequent type first: ({TYPE: {"n", NAME: as in `summarise`}}, hidden {TYPE: n}).

    types: n strings; an empty one counts as "unknown". Types with fewer than `minimum` rows are in `hidden`.
    """
    types = np.array([kind or "unknown" for kind in types])
    groups = np.array([str(group) for group in groups])
    table, hidden = {}, {}
    for kind, count in sorted(Counter(types.tolist()).items(), key=lambda item: (-item[1], item[0])):
        if count < minimum:
            hidden[kind] = count
            continue
        rows = types == kind
        scores = {name: values[rows] for name, values in scores_by_name.items()}
        table[kind] = {"n": count, **summarise(scores, groups[rows], draws, seed)}
    return table, hidden


def verdict(values, floors, groups, annotator=None, unit="mean sentence BLEU", draws=DRAWS, seed=42):
    """One line: does the model beat its strongest floor beyond the interval, and how far is it to one annotator?

    values: (n,) scores of the model; floors: {NAME: (n,)}; annotator: (n,) scores of one annotator, NaN if unknown,
    or None. The difference is paired by row and resampled by image. It counts only if its interval, rounded as
    printed, excludes zero.
    """
    name = max(floors, key=lambda floor: floors[floor].mean())
    difference, low, high = (round(x, 1) + 0.0 for x in paired_difference(values, floors[name], groups, draws, seed))
    measured = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}] {unit}"
    if np.isnan(low):
        return f"stands {difference:+.1f} {unit} from the strongest floor ({name}), but one image gives no interval"
    if high < 0:
        return f"is below the strongest floor ({name}): {measured}"
    if low <= 0:
        return f"does not beat the strongest floor ({name}): {measured}, an interval that includes zero"
    beats = f"beats the strongest floor ({name}) by {difference:.1f} [{low:.1f}, {high:.1f}] {unit}"
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


def expected_calibration_error(confidence, correct, bins=10):
    """(error, table): the mean gap between confidence and accuracy over equal bins, weighted by the rows of each bin.

    confidence: (n,) in 0 to 1; correct: (n,) 0 or 1; the error is 0 to 1 (Guo et al. 2017). table: one {"low", "high",
    "n", "confidence", "accuracy"} for each bin (low, high] with rows. Raises ValueError outside 0 to 1 or without rows.
    """
    from sklearn.calibration import calibration_curve
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=bins)  # of the bins with rows
    edges = np.linspace(0, 1, bins + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=bins)  # bins as in calibration_curve
    filled = np.flatnonzero(counts)
    error = np.average(abs(accuracy - mean_confidence), weights=counts[filled])
    return float(error), [
        {"low": float(edges[number]), "high": float(edges[number + 1]), "n": int(counts[number]),
         "confidence": float(mean), "accuracy": float(share)}
        for number, mean, share in zip(filled, mean_confidence, accuracy, strict=True)]
