"""The demo's last step: both stages between floors and ceiling in one table, and where to look.

Reads what test.py wrote for stage 1 and stage 2 (metrics and results); prints, writes nothing.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' shared modules lie one folder up

from common import settings
from evaluation.bootstrap import paired_difference
from evaluation.report import HEADLINE, join_results

PRIORS = ("most_frequent", "most_frequent_per_question_type")


@dataclass
class Config:
    stage_1: str = "output/demo/stage_1"
    """stage 1's files: STAGE_1_metrics.json and STAGE_1_results.csv"""
    stage_2: str = "output/demo/vqa_test"
    """stage 2's files: STAGE_2_metrics.json and STAGE_2_results.csv"""
    results_dir: str = "results/demo"
    """pictures and gallery of stage 2"""


def main(cfg):
    metrics = [json.loads(Path(f"{prefix}_metrics.json").read_text(encoding="utf-8")) for prefix in (cfg.stage_1, cfg.stage_2)]
    print_table(*metrics)
    results = [f"{prefix}_results.csv" for prefix in (cfg.stage_1, cfg.stage_2)]
    table = join_results(*results)
    before, after = (table[f"sentence_bleu_{side}"].astype(float).to_numpy() for side in "ab")
    difference, low, high = paired_difference(after, before, table["image_id_a"].tolist())
    certain = "more than its interval" if low > 0 else "an interval that includes zero" if high >= 0 else "for the worse"
    print(f"\nstage 2 against stage 1, paired by question: {difference:+.1f} [{low:+.1f}, {high:+.1f}] BLEU, {certain}")
    prior = max(metrics[1]["floors"][name][HEADLINE]["value"] for name in PRIORS)
    human, model = metrics[1]["ceilings"]["human"][HEADLINE]["value"], metrics[1]["scores"][HEADLINE]["value"]
    wrong_picture = metrics[1]["floors"]["wrong_picture"][HEADLINE]["value"]
    print(f"from the better prior to one annotator stage 2 goes {100 * (model - prior) / (human - prior):.0f} % of the way; "
          f"shown the wrong picture it is {wrong_picture - prior:+.1f} from that prior")
    print(f"stage 2 {metrics[1]['verdict']}")
    print(f"\nanswers  {results[1]}\nscores   {cfg.stage_2}_metrics.json\npictures {cfg.results_dir}/overview.png\n"
          f"gallery  {cfg.results_dir}/index.html")


def print_table(stage_1, stage_2):
    """Floors, both stages and the ceilings, from low to high."""
    lines = [(f"floor: {name.replace('_', ' ')}", table) for name, table in stage_2["floors"].items()]
    lines += [("stage 1: frozen encoders", stage_1["scores"]), ("stage 2: last blocks unfrozen", stage_2["scores"]),
              ("ceiling: one annotator", stage_2["ceilings"]["human"])]
    print(f"\n{stage_2['num_questions']} test questions on {stage_2['num_images']} pictures, scores 0 to 100 "
          "[95 % interval by picture]")
    print(f"{'':<40}{'mean sentence BLEU':>20}  {'':<14}{'exact match':>12}{'VQA accuracy':>14}")
    for label, table in lines:
        low, high = table[HEADLINE]["ci95"]
        print(f"{label:<40}{table[HEADLINE]['value']:>20.1f}  {f'[{low:.1f}, {high:.1f}]':<14}"
              f"{table['exact_match']['value']:>12.1f}{table['vqa_accuracy']['value']:>14.1f}")


if __name__ == "__main__":
    settings.run(main, Config)
