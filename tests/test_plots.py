"""The charts: right numbers in them, sound PNGs."""
import math

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from common.plotting import ACCENT, WRONG
from evaluation.bootstrap import expected_calibration_error
from evaluation.charts import draw_calibration, draw_scores
from evaluation.metrics import METRICS
from evaluation.report import score_bars
from training.curves import draw_curves


def metrics(value=59.4, human=83.0, verdict="beats the strongest floor (wrong_picture)", **floors):
    """A metrics file in which all metrics have the same values."""
    def table(value):
        return {metric.name: {"value": value, "ci95": [None, None] if value is None else [value - 2, value + 2]}
                for metric in METRICS}
    return {"num_questions": 1234, "num_images": 567, "interval": "95 % interval by image", "verdict": verdict,
            "scores": table(value), "floors": {name: table(floor) for name, floor in floors.items()},
            "ceilings": {"human": table(human)}}


def log(losses, **rates):
    """A training log with these validation losses and learning rates."""
    return [{"epoch": float(epoch), "train_loss": loss - 0.1, "val_loss": loss, "val_bleu": 50.0}
            | {f"learning_rate_{name}": values[epoch] for name, values in rates.items()} for epoch, loss in enumerate(losses)]


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """Calls a drawing function and returns its figure."""
    def draw(function, *arguments):
        figures, savefig = [], Figure.savefig
        with monkeypatch.context() as patched:
            patched.setattr(Figure, "savefig", lambda figure, path: (figures.append(figure), savefig(figure, path)))
            function(*arguments, tmp_path / "chart.png")
        with Image.open(tmp_path / "chart.png") as image:
            image.load()
            assert image.width >= 700 and image.height >= 200
        assert [path.name for path in tmp_path.iterdir()] == ["chart.png"]
        return figures[0]
    return draw


def words_of(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_score_bars_take_the_strongest_floor_of_each_metric():
    content = metrics(most_frequent=30.0, wrong_picture=20.0)
    content["floors"]["wrong_picture"]["exact_match"]["value"] = 35.0
    content["scores"]["chrf"] = {"value": None, "ci95": [None, None]}
    bars = {bar["name"]: bar for bar in score_bars(content)}
    assert "chrf" not in bars, "a metric that could not be measured is left out"
    assert (bars["bleu_1"]["floor"], bars["bleu_1"]["ends"]) == (30.0, ["most frequent 30.0", "one annotator 83.0"])
    assert (bars["exact_match"]["floor"], bars["exact_match"]["floors"]) == (35.0, [30.0, 35.0])
    bare = score_bars(metrics(human=None))[0]
    assert (bare["floor"], bare["annotator"], bare["ends"][0]) == (None, None, "no floor")


def test_the_chart_of_scores_names_floor_annotator_and_verdict(figure_of):
    words = words_of(figure_of(draw_scores, metrics(nearest_question=28.5)))
    for expected in ("Mean sentence BLEU", "nearest question 28.5 · one annotator 83.0", "59.4  [57.4, 61.4]",
                     "The model beats the strongest floor (wrong image).", "1,234 questions on 567 images"):
        assert expected in words
    assert " · ".join(score_bars(metrics(human=None))[0]["ends"]) in words_of(figure_of(draw_scores, metrics(human=None)))


def test_every_text_of_the_chart_of_scores_stays_in_its_place(figure_of):
    """The marked interval of few images, and names too long for one line, ran out of the chart and into the bars."""
    few = metrics(most_frequent_per_question_type=28.5) | {"interval": "95 % interval by image, too narrow: only 29 images"}
    few["floors"] = {"most frequent answer to the same question": few["floors"].popitem()[1]}
    figure = figure_of(draw_scores, few)
    renderer, axes = FigureCanvasAgg(figure).get_renderer(), figure.axes[0]
    assert any(few["interval"] in word for word in words_of(figure))
    assert all(text.get_window_extent(renderer).x1 <= figure.bbox.x1 for text in figure.texts)
    names = [text for text in axes.texts if "one annotator" in text.get_text()]
    assert names and all(text.get_window_extent(renderer).x1 <= axes.bbox.x0 for text in names)


@pytest.mark.parametrize("floor, colour", [(30.0, ACCENT), (70.0, WRONG)])
def test_a_score_below_its_floor_has_another_colour(floor, colour, figure_of):
    axes = figure_of(draw_scores, metrics(human=None, most_frequent=floor)).axes[0]
    assert {matplotlib.colors.to_hex(patch.get_facecolor()) for patch in axes.patches} == {colour}


def test_curves_mark_the_first_epoch_of_lowest_validation_loss_in_every_stage(figure_of):
    figure = figure_of(draw_curves, [("Stage 1", log([6.0, 3.0, 2.0, 2.5], head=[0.0, 1e-3, 5e-4, 1e-5])),
                                     ("Stage 2", log([2.0, 1.5, 1.5], head=[0.0, 1e-4, 1e-5], clip=[0.0, 1e-5, 1e-6]))])
    words = words_of(figure)
    assert "best: epoch 2, loss 2.000" in words
    assert "best: epoch 1, loss 1.500" in words  # epoch 2 is as low, but later
    losses, rates = figure.axes[:2], figure.axes[-2:]
    assert losses[0].get_ylim() == losses[1].get_ylim(), "both stages are on one scale"
    assert [axes.get_yscale() for axes in rates] == ["log", "log"] and rates[0].get_ylim()[0] > 1e-7
    assert [text.get_text() for text in rates[1].get_legend().get_texts()] == ["head", "clip"]


def test_the_loss_axis_shows_the_trained_epochs_and_names_epoch_0_at_its_edge(figure_of):
    """Epoch 0 of stage 1 squeezed all other losses into the bottom tenth of the axis."""
    figure = figure_of(draw_curves, [("Stage 1", log([6.53, 0.9, 0.5])), ("Stage 2", log([0.5, 0.7, 0.4]))])
    low, top = figure.axes[0].get_ylim()
    assert 0 < low < 0.3 and 0.9 < top < 1.2
    assert [text.get_text() for axes in figure.axes[:2] for text in axes.texts if "epoch 0" in text.get_text()] == [
        "↑ epoch 0: 6.43", "↑ epoch 0: 6.53"]
    for axes in figure.axes[:2]:
        assert all(low < loss < top for line in axes.get_lines()[:2] for loss in line.get_ydata() if loss == loss)


def test_equal_learning_rates_are_one_line_and_named_once(figure_of):
    rates = {"head": [0.0, 1e-3], "clip": [0.0, 1e-3], "gpt2": [0.0, 1e-3], "fusion": [0.0, 1e-4]}
    axes = figure_of(draw_curves, [("Stage 2", log([2.0, 1.0], **rates))]).axes[-1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["head, clip, gpt2", "fusion"]
    assert len(axes.get_lines()) == 3  # the third one marks the best epoch


def test_the_legend_of_a_short_stage_fits_beside_a_long_stage(figure_of):
    stage_2 = log([1.0] * 4, **dict.fromkeys(("head", "clip", "gpt2"), [1e-3] * 4))
    figure = figure_of(draw_curves, [("Stage 1", log([2.0] * 30)), ("Stage 2", stage_2)])
    legend = figure.axes[-1].get_legend().get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("rows, expected", [
    (log([5.0, 4.0, math.nan, math.inf], head=[0.0, 1e-3, 1e-3, 1e-3]), ["best: epoch 1, loss 4.000"]),  # a diverged run
    (log([5.0], head=[0.0]), ["best: epoch 0, loss 5.000"]),  # before the first step
    (log([math.nan]), [])])
def test_curves_of_a_diverged_run_and_before_the_first_step(rows, expected, figure_of):
    words = words_of(figure_of(draw_curves, [("Stage 1", rows)]))
    assert [word for word in words if word.startswith("best")] == expected


def test_calibration_draws_every_bin_and_counts_all_answers(figure_of):
    error, table = expected_calibration_error([0.05, 0.5, 0.54, 0.95], [1, 0, 1, 1])
    figure = figure_of(draw_calibration, table, error, 0.25)
    assert {"expected calibration error 0.490, Brier score 0.250 over 4 answers",
            "probability of the whole answer"} <= set(words_of(figure))
    assert len(figure.axes[0].patches) == 4
