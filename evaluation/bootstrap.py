"""Bootstrap intervals of scores, paired differences, the verdict and calibration.

Pure functions on arrays. All scores are 0 to 100 unless said otherwise.
"""
from collections import Counter

import numpy as np

UNIT = "mean sentence BLEU"  # of the values in a verdict
DRAWS = 2000             # bootstrap draws of each interval
BINS = 10                # of the calibration
MIN_TYPE_ROWS = 20       # a type with fewer rows is left out of the tables
MIN_IMAGES = 30          # with fewer images the percentile interval is too narrow, and the tables say so


def bootstrap_draws(values, groups, draws=DRAWS, seed=42):
    """(means (k,), drawn means (draws, k)) of the k columns of `values` (n, k), all from the same draws of groups.

    groups: n image names. The questions of one image are not independent, so they are drawn together. The mean of a
    draw is the sum over the drawn images divided by their number of rows. NaN marks a row without that score: it is
    left out. A mean is NaN if no row has a score. One group alone gives no draws: they are NaN. Raises ValueError
    without rows.
    """
    import pandas as pd
    if not len(values):
        raise ValueError("there are no rows to score")
    by_group = pd.DataFrame(np.asarray(values, dtype=np.float64)).groupby(np.asarray(groups))
    sums = np.hstack([by_group.sum(), by_group.count()])  # (groups, 2k): k sums, then k numbers of rows
    num_groups, generator = len(sums), np.random.default_rng(seed)
    # A draw is how often each group was drawn. scipy.stats.bootstrap gives the same intervals and is 6 to 13 times slower.
    counts = (np.bincount(generator.integers(num_groups, size=num_groups), minlength=num_groups) for _ in range(draws))
    drawn = _ratios(np.array([times @ sums for times in counts]))  # (draws, k)
    return _ratios(sums.sum(0)), drawn if num_groups > 1 else np.full_like(drawn, np.nan)


def _ratios(sums):
    """(..., 2k) sums and counts -> (..., k) means, NaN if the count is zero."""
    total, count = np.split(sums, 2, axis=-1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _interval(drawn):
    """(low, high), each (k,): 95 % percentile interval of each column of `drawn` (draws, k) or (draws,)."""
    import pandas as pd
    return tuple(pd.DataFrame(drawn).quantile([0.025, 0.975]).to_numpy())


def interval_name(num_images, over="by image"):
    """What the brackets in tables hold. With fewer than MIN_IMAGES images it says that the interval is too narrow."""
    few = f", too narrow: only {num_images} image{'s' * (num_images != 1)}" if num_images < MIN_IMAGES else ""
    return f"95 % interval {over}{few}"


def bootstrap_mean(values, groups, draws=DRAWS, seed=42):
    """(mean, low, high) of `values`, with the 95 % percentile interval of `bootstrap_draws`.

    values: (n,), or (n, k) for k results from the same draws.
    """
    table = np.asarray(values, dtype=np.float64)
    means, drawn = bootstrap_draws(table[:, None] if table.ndim == 1 else table, groups, draws, seed)
    return tuple(numbers.reshape(table.shape[1:])[()] for numbers in (means, *_interval(drawn)))


def paired_difference(values_a, values_b, groups):
    """(difference, low, high): mean of a - b over the same rows, with its 95 % interval as in `bootstrap_mean`."""
    return bootstrap_mean(np.asarray(values_a) - np.asarray(values_b), groups)


def difference_over_seeds(values_a, values_b, groups, draws=DRAWS, seed=42):
    """(difference, low, high): mean of a - b over s paired seeds and n rows, with a 95 % interval over seeds and images.

    values_a, values_b: (s, n). One seed gives `paired_difference`. Each draw adds two deviations from the mean: that of
    drawn images with all seeds, and that of s - 1 seeds drawn with replacement, with all images. Drawing s - 1 of s
    makes the variance of the seeds unbiased (Rao and Wu 1988). Drawing both at once would count what varies with seed
    and image together three times instead of twice. Simulated coverage is 94 to 96 % with three or five seeds, and
    less if only the seed varies (74 % with three seeds, 88 % with five).
    """
    differences = np.asarray(values_a) - np.asarray(values_b)
    means, drawn = bootstrap_draws(differences.T, groups, draws, seed)  # (s,), (draws, s)
    num_seeds = len(means)
    generator = np.random.default_rng([seed, 1])  # not the stream that draws the images
    chosen = generator.integers(num_seeds, size=(draws, max(1, num_seeds - 1)))
    (low,), (high,) = _interval(drawn.mean(1) + means[chosen].mean(1) - means.mean())
    return means.mean(), low, high


def share_of_way(values, floor, reference, groups, reference_groups=None):
    """(share, low, high) in %: how far the mean of `values` is on the way from that of `floor` to that of `reference`.

    100 * (values - floor) / (reference - floor), each a mean; the interval is that of `bootstrap_draws`. values, floor:
    (n,) of the same rows. reference: (n,), or (m,) of other rows with `reference_groups`, m image names. NaN where a
    row has no reference. All three are NaN unless the reference is above the floor in every draw.
    """
    table = np.column_stack([values, floor, reference if reference_groups is None else np.full(len(values), np.nan)])
    if reference_groups is not None:
        missing = np.full(len(reference), np.nan)
        table = np.vstack([table, np.column_stack([missing, missing, reference])])
        groups = [*groups, *reference_groups]
    model, start, end = np.vstack(bootstrap_draws(table, groups)).T  # (1 + draws,) each, the means of all rows first
    if not (end[0] > start[0]) or (end <= start).any():
        return np.nan, np.nan, np.nan
    share = 100 * (model - start) / (end - start)
    (low,), (high,) = _interval(share[1:])
    return share[0], low, high


def summarise(scores_by_name, groups):
    """{NAME: (n,)} -> {NAME: {"value", "ci95": [low, high], "n"}}.

    Rounded to 0.0001: rounding 43.147 to 43.15 and then to 0.1 for display would give 43.2.
    n is the number of rows that have the score. None stands for a missing mean or interval.
    """
    table = np.column_stack(list(scores_by_name.values()))
    columns = zip(*bootstrap_mean(table, groups), (~np.isnan(table)).sum(0), strict=True)
    return {name: {"value": _rounded(mean), "ci95": [_rounded(low), _rounded(high)], "n": int(count)}
            for name, (mean, low, high, count) in zip(scores_by_name, columns, strict=True)}


def _rounded(number):
    return None if np.isnan(number) else round(float(number), 4)


def by_type(scores_by_name, types, groups, min_rows=MIN_TYPE_ROWS):
    """Scores per type, the most frequent type first: ({TYPE: {"n", NAME: as in `summarise`}}, hidden {TYPE: n}).

    types: n strings; an empty one counts as "unknown". Types with fewer than `min_rows` rows are in `hidden`.
    """
    types = np.array([kind or "unknown" for kind in types])
    groups = np.asarray(groups)
    table, hidden = {}, {}
    for kind, count in sorted(Counter(types.tolist()).items(), key=lambda item: (-item[1], item[0])):
        rows = types == kind
        if count < min_rows:
            hidden[kind] = count
        else:
            scores = {name: values[rows] for name, values in scores_by_name.items()}
            table[kind] = {"n": count, **summarise(scores, groups[rows])}
    return table, hidden


def verdict(values, floors, groups, references=()):
    """One line: does the model beat its strongest floor beyond the interval, and how far is it to each reference?

    values: (n,) scores of the model; floors: {NAME: (n,)}; references: list of (name, scores, groups) as in
    `way_to_reference`. The difference is paired by row and resampled by image. It counts only if its interval, rounded as
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
    line = f"beats the strongest floor ({name}) by {difference:.1f} [{low:.1f}, {high:.1f}] {UNIT}"
    ways = [way_to_reference(values, floors[name], groups, *reference) for reference in references]
    if shares := [text for text, is_share in ways if is_share]:
        line += f"; from that floor it reaches {' and '.join(shares)}"
    return "; ".join([line, *(text for text, is_share in ways if not is_share)])


def way_to_reference(values, floor, groups, name, reference, reference_groups):
    """(text, True) with the share of the way to the reference `name`, or (text, False) with the reason why there is none.

    reference: (n,) scores of the same rows, NaN if unknown; with `reference_groups` (m,) scores of other rows, on the
    images of that name.
    """
    known = ~np.isnan(reference)
    if not known.any():
        return f"{name} is unknown, since no question has a second annotation", False
    where = ""
    if reference_groups is None and not known.all():
        where = f" (on the {known.sum()} of {len(known)} questions with a second annotation)"
        values, floor, reference, groups = (np.asarray(column)[known] for column in (values, floor, reference, groups))
    share, low, high = share_of_way(values, floor, reference, groups, reference_groups)
    if np.isnan(share):
        return f"{name} is not clearly above that floor{where}", False
    interval = "" if np.isnan(low) else f" [{low:.0f}, {high:.0f}]"
    return f"{share:.0f} %{interval} of the way to {name}{where}", True


def brier_score(confidence, correct):
    """The mean of (confidence - correct)^2, 0 to 1, 0 is best (Brier 1950). confidence: (n,) in 0 to 1; correct: (n,) bool."""
    return float(np.mean((np.asarray(confidence) - np.asarray(correct)) ** 2))


def expected_calibration_error(confidence, correct):
    """(error, table): the mean gap between confidence and accuracy over equal bins, weighted by the rows of each bin.

    confidence: (n,) in 0 to 1; correct: (n,) 0 or 1; the error is 0 to 1 (Guo et al. 2017). table: a DataFrame with
    low, high, n, confidence and accuracy of each bin (low, high] with rows. Raises ValueError outside 0 to 1 or without rows.
    """
    import pandas as pd
    from sklearn.calibration import calibration_curve
    accuracy, mean_confidence = calibration_curve(correct, confidence, n_bins=BINS)  # of the bins with rows
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=BINS)  # bins as in calibration_curve
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:], "n": counts})[counts > 0]
    error = np.average(abs(accuracy - mean_confidence), weights=table["n"])
    return float(error), table.assign(confidence=mean_confidence, accuracy=accuracy)
