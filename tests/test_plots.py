"""The figures: right numbers in them, sound PNGs, the same bytes for the same input."""
import math

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from evaluation import charts as plots


def metrics(floors=None, ceilings=None, **scores):
    def table(values):
        return {name: None if value is None else {"value": value, "ci95": [value - 2, value + 2]}
                for name, value in values.items()}
    return {"num_questions": 1234, "num_images": 567, "scores": table(scores or {"mean_sentence_bleu": 59.4}),
            "floors": {floor: table(values) for floor, values in (floors or {}).items()},
            "ceilings": {name: values and table(values) for name, values in (ceilings or {}).items()}}


def log(losses, **columns):
    return [{"epoch": float(epoch), "train_loss": None if epoch == 0 else loss - 0.1, "val_loss": loss}
            | {name: values[epoch] for name, values in columns.items()} for epoch, loss in enumerate(losses)]


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    """Calls a drawing function and gives back its figure instead of the file."""
    def draw(function, *arguments):
        figures = []
        with monkeypatch.context() as patched:
            patched.setattr(plots, "_save", lambda figure, path: figures.append(figure))
            function(*arguments, tmp_path / "unused.png")
        return figures[0]
    return draw


def words_of(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


STAGES = [("Stage 1", log([6.0, 3.0, 2.0, 2.5], learning_rate_head=[0.0, 1e-3, 5e-4, 1e-5])),
          ("Stage 2", log([2.0, 1.5, 1.5], learning_rate_head=[0.0, 1e-4, 1e-5], learning_rate_clip=[0.0, 1e-5, 1e-6],
                          val_bleu=[50.0, 55.0, 54.0]))]
BINS = [{"low": i / 10, "high": (i + 1) / 10, "n": 10 * i, "confidence": i / 10 + 0.05 if i else None,
         "accuracy": i / 12 if i else None} for i in range(10)]


def test_score_bars_pick_the_strongest_floor_score_by_score():
    rows = plots.score_bars(metrics(
        floors={"most_frequent": {"mean_sentence_bleu": 30.0, "exact_match": 5.0},
                "wrong_picture": {"mean_sentence_bleu": 20.0, "exact_match": 9.0}},
        ceilings={"human": {"mean_sentence_bleu": 80.0, "exact_match": None}, "vocabulary": None},
        mean_sentence_bleu=50.0, exact_match=25.0))
    assert [(row["label"], row["value"], row["floor"]) for row in rows] == [
        ("Mean sentence BLEU", 50.0, ("most frequent", 30.0)), ("Exact match", 25.0, ("wrong picture", 9.0))]
    assert [(row["human"], row["vocabulary"]) for row in rows] == [(80.0, None), (None, None)]


def test_a_score_that_could_not_be_measured_is_left_out_and_missing_floors_are_none():
    given = metrics(floors={"question_only": {"chrf": None}}, chrf=10.0, vqa_accuracy=None)
    given["scores"]["bleu_1"] = {"value": None, "ci95": None}
    rows = plots.score_bars(given)
    assert [(row["name"], row["floors"], row["floor"], row["human"]) for row in rows] == [("chrf", [], None, None)]


def test_the_picture_of_scores_names_floor_ceiling_and_verdict(figure_of):
    given = metrics({"nearest_neighbour": {"mean_sentence_bleu": 28.5}}, {"human": {"mean_sentence_bleu": 83.0}})
    given["verdict"] = "Beats the strongest floor."
    words = words_of(figure_of(plots.draw_scores, given))
    for expected in ("Mean sentence BLEU", "nearest neighbour 28.5  ·  one human 83.0", "59.4  [57.4, 61.4]",
                     "Beats the strongest floor.", "1,234 questions on 567 pictures"):
        assert expected in words
    assert "no floor  ·  no human ceiling" in words_of(figure_of(plots.draw_scores, metrics()))


def test_a_score_below_its_floor_is_drawn_in_another_colour(figure_of):
    def bar_colours(floor):
        axes = figure_of(plots.draw_scores, metrics({"most_frequent": {"mean_sentence_bleu": floor}})).axes[0]
        return [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in axes.patches]
    assert bar_colours(30.0) == [plots.ACCENT]
    assert bar_colours(70.0) == [plots.WRONG]


def test_curves_mark_the_first_epoch_of_lowest_validation_loss_in_every_stage(figure_of):
    figure = figure_of(plots.draw_curves, STAGES)
    words = words_of(figure)
    assert "chosen: epoch 2, loss 2.000" in words
    assert "chosen: epoch 1, loss 1.500" in words  # epoch 2 is as low, but later
    losses, rates = figure.axes[:2], figure.axes[-2:]
    assert losses[0].get_ylim() == losses[1].get_ylim(), "both stages are to be on one scale"
    assert [axes.get_yscale() for axes in rates] == ["log", "log"]
    assert [text.get_text() for text in rates[1].get_legend().get_texts()] == ["head", "clip"]


def test_the_names_of_a_short_stage_fit_beside_a_long_one(figure_of):
    stage_2 = log([1.0] * 4, **{f"learning_rate_{group}": [1e-3] * 4 for group in ("head", "clip", "gpt2")})
    figure = figure_of(plots.draw_curves, [("Stage 1", log([2.0] * 30)), ("Stage 2", stage_2)])
    legend = figure.axes[-1].get_legend().get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert legend.x1 <= figure.bbox.x1


def test_curves_of_a_diverged_run_and_of_the_first_moment(figure_of):
    assert "chosen: epoch 1, loss 4.000" in words_of(
        figure_of(plots.draw_curves, [("Stage 1", log([5.0, 4.0, math.nan, math.inf]))]))
    assert "chosen: epoch 0, loss 5.000" in words_of(
        figure_of(plots.draw_curves, [("Stage 1", log([5.0], learning_rate_head=[0.0]))]))
    assert not [word for word in words_of(figure_of(plots.draw_curves, [("Stage 1", log([math.nan]))]))
                if word.startswith("chosen")]


def test_calibration_counts_every_answer_and_skips_empty_bins(figure_of):
    figure = figure_of(plots.draw_calibration, BINS, 0.0834)
    assert "expected calibration error 0.083 over 450 answers" in words_of(figure)
    assert len(figure.axes[0].patches) == 9


@pytest.mark.parametrize("draw", [
    lambda path: plots.draw_scores(metrics({"most_frequent": {"mean_sentence_bleu": 30.0}}), path),
    lambda path: plots.draw_curves(STAGES, path),
    lambda path: plots.draw_calibration(BINS, 0.08, path),
], ids=["scores", "curves", "calibration"])
def test_pngs_are_sound_and_repeat_byte_for_byte(draw, tmp_path):
    draw(tmp_path / "first.png")
    with matplotlib.rc_context({"font.size": 20, "figure.dpi": 50}):  # somebody's own matplotlibrc
        draw(tmp_path / "second.png")
    with Image.open(tmp_path / "first.png") as picture:
        picture.load()
        assert picture.width >= 700 and picture.height >= 200
        assert "Software" not in picture.info
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.png", "second.png"]


def test_drawing_does_not_touch_the_settings_of_others(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.draw_calibration(BINS, 0.08, tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before
