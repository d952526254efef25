"""The last step of `make demo`: prints one table with floors, both stages and one annotator, and where the files are.

Reads the metrics and the results CSV that test.py wrote for each stage. Writes nothing.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

from common import settings
from evaluation.bootstrap import paired_difference
from evaluation.metrics import HEADLINE
from evaluation.report import join_results

PRIORS = ("most_frequent", "most_frequent_per_question_type")  # floors without image and model


@dataclass
class Config:
    stage_1: str = "output/demo/stage_1"
    """path prefix of stage 1's files: STAGE_1_metrics.json and STAGE_1_results.csv"""
    stage_2: str = "output/demo/vqa_test"
    """path prefix of stage 2's files"""
    results_dir: str = "results/demo"
    """sample images and gallery of stage 2"""


def main(cfg):
    stage_1, stage_2 = (json.loads(Path(f"{prefix}_metrics.json").read_text(encoding="utf-8"))
                        for prefix in (cfg.stage_1, cfg.stage_2))
    print_table(stage_1, stage_2)
    results = [f"{prefix}_results.csv" for prefix in (cfg.stage_1, cfg.stage_2)]
    table = join_results(*results)
    before, after = (table[f"sentence_bleu_{side}"].astype(float) for side in "ab")
    difference, low, high = paired_difference(after, before, table["image_id_a"].tolist())
    verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable: the interval includes zero"
    print(f"\nstage 2 against stage 1, paired by question: {difference:+.1f} [{low:+.1f}, {high:+.1f}] BLEU, {verdict}")
    model, human, wrong_image = (scores[HEADLINE]["value"] for scores in (
        stage_2["scores"], stage_2["ceilings"]["human"], stage_2["floors"]["wrong_picture"]))
    prior = max(stage_2["floors"][name][HEADLINE]["value"] for name in PRIORS)
    print(f"stage 2 reaches {100 * (model - prior) / (human - prior):.0f} % of the way from the better most-frequent floor to "
          f"one annotator; with a wrong image its score is {wrong_image - prior:+.1f} relative to that floor")
    print(f"stage 2 {stage_2['verdict'].replace('_', ' ')}")
    print(f"\nanswers  {results[1]}\nscores   {cfg.stage_2}_metrics.json\nimages   {cfg.results_dir}/overview.png\n"
          f"gallery  {cfg.results_dir}/index.html")


def print_table(stage_1, stage_2):
    """Print floors, stages and the annotator's score, from low to high. Arguments: contents of two metrics files."""
    lines = [(f"floor: {name.replace('_', ' ').replace('picture', 'image')}", scores)
             for name, scores in stage_2["floors"].items()]
    lines += [("stage 1: frozen encoders", stage_1["scores"]), ("stage 2: last blocks unfrozen", stage_2["scores"]),
              ("ceiling: one annotator", stage_2["ceilings"]["human"])]
    print(f"\n{stage_2['num_questions']} test questions on {stage_2['num_images']} images, scores 0 to 100 "
          "[95 % interval by image]")
    print(f"{'':<40}{'mean sentence BLEU':>20}  {'':<14}{'exact match':>12}{'VQA accuracy':>14}")
    for label, scores in lines:
        low, high = scores[HEADLINE]["ci95"]
        print(f"{label:<40}{scores[HEADLINE]['value']:>20.1f}  {f'[{low:.1f}, {high:.1f}]':<14}"
              f"{scores['exact_match']['value']:>12.1f}{scores['vqa_accuracy']['value']:>14.1f}")


if __name__ == "__main__":
    settings.run(main, Config)
