"""The last step of `make demo`: prints one table with floors, both stages, one annotator and the ceiling, the files, and
three commands to go on with.

The ceiling is an oracle: the usual phrase for the true scene. Reads the metrics and the results CSV that test.py wrote
for each stage. Writes nothing.
"""
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

from common import settings
from evaluation.baselines import display_name
from evaluation.bootstrap import paired_difference
from evaluation.comparison import join_results
from evaluation.metrics import HEADLINE
from evaluation.report import annotator_line, verdict_sentence


@dataclass
class Config:
    stage_1: str = "output/demo/stage_1"
    """path prefix of stage 1's files: STAGE_1_metrics.json and STAGE_1_results.csv"""
    stage_2: str = "output/demo/vqa_test"
    """path prefix of stage 2's files"""
    results_dir: str = "results/demo"
    """sample images and gallery of stage 2"""
    checkpoint: str = "output/demo/fine_tuning/vqa_checkpoint.pt"
    """of stage 2"""
    data_dir: str = "demo/mini_vqa_v2"
    """the demo's data set"""


def main(cfg):
    stage_1 = read_metrics("--stage-1", cfg.stage_1, "scores")
    stage_2 = read_metrics("--stage-2", cfg.stage_2, "scores", "floors.wrong_picture", "floors.most_frequent", "ceilings.human",
                           "ceilings.oracle", "by_training_label")
    results = [f"{prefix}_results.csv" for prefix in (cfg.stage_1, cfg.stage_2)]
    table = join_results(*results)
    groups, before, after = (table[name] for name in ("image_id_a", "sentence_bleu_a", "sentence_bleu_b"))
    print_table(stage_1, stage_2)
    difference, low, high = paired_difference(after, before, groups)
    verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable: the interval includes zero"
    print(f"\nstage 2 against stage 1, paired by question: {difference:+.1f} [{low:+.1f}, {high:+.1f}] BLEU, {verdict}")
    print(f"stage 2: {verdict_sentence(stage_2)}")
    values = {name: scores[HEADLINE]["value"] for name, scores in stage_2["floors"].items()}
    wrong_image = values.pop("wrong_picture")
    blind = max(values, key=values.get)
    print(f"With a wrong image it scores {wrong_image:.1f}, the strongest floor without image {values[blind]:.1f} "
          f"({display_name(blind)}).")
    print(f"\nanswers  {results[1]}\nscores   {cfg.stage_2}_metrics.json\nimages   {cfg.results_dir}/overview.png\n"
          f"gallery  {cfg.results_dir}/index.html")
    right = table[(table["exact_match_b"] == 100) & table["answer_b"].str.match("an? ")]  # answers that name a thing
    row = (right if len(right) else table).sort_values("confidence_b", ascending=False, kind="stable").iloc[0]
    print_next_commands(row, cfg)


def read_metrics(flag, prefix, *names):
    """Contents (dict) of a metrics file. Raises ValueError if one of the tables `names` is missing, or a score in them."""
    path = f"{prefix}_metrics.json"
    try:
        metrics = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {prefix}: {path} cannot be read ({error}): run `make demo`, or name other files") from error
    for name in names:
        table = metrics
        for key in name.split("."):
            table = table.get(key) if isinstance(table, dict) else None
        if not table or "null" in json.dumps(table):
            raise ValueError(f"{flag} {prefix}: {path} has no {name}, or a score in it is null: run test.py as `make demo` "
                             "does, with --true-answers and at least two images")
    return metrics


def print_table(stage_1, stage_2):
    """Print floors, both stages, one annotator and the oracle; of stage 2 also seen and unseen labels.

    stage_1, stage_2: contents of two metrics files.
    """
    lines = [(f"floor: {display_name(name)}", scores) for name, scores in stage_2["floors"].items()]
    lines += [("stage 1: frozen encoders", stage_1["scores"]), ("stage 2: last blocks unfrozen", stage_2["scores"])]
    lines += [(f"    labels {kind} in training, n = {scores['n']:,}", scores)
              for kind, scores in stage_2["by_training_label"].items()]
    lines += [(annotator_line(stage_2), stage_2["ceilings"]["human"]),
              ("ceiling: oracle, knows the true scene", stage_2["ceilings"]["oracle"])]
    print(f"\n{stage_2['num_questions']} test questions on {stage_2['num_images']} images, scores 0 to 100 "
          f"[{stage_2['interval']}]")
    print(f"{'':<40}{'mean sentence BLEU':>20}  {'':<14}{'exact match':>12}{'VQA accuracy':>14}")
    for label, scores in lines:
        low, high = scores[HEADLINE]["ci95"]
        print(f"{label:<40}{scores[HEADLINE]['value']:>20.1f}  {f'[{low:.1f}, {high:.1f}]':<14}"
              f"{scores['exact_match']['value']:>12.1f}{scores['vqa_accuracy']['value']:>14.1f}")


def print_next_commands(row, cfg):
    """Print three commands to copy. `row`: the tested question that the second one asks again."""
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    image = Path(cfg.data_dir) / row["image_path_b"]
    commands = {
        "look at all answers": ["-m", "webbrowser", (Path(cfg.results_dir) / "index.html").resolve().as_uri()],
        f"ask about an image; label: {row['answer_b']}": [
            "test.py", "--checkpoint", cfg.checkpoint, "--image", image, "--question", row["question_b"], "--explain"],
        "train on your own CSV with the columns image_path, question, answer": ["train.py", "--data-dir", "folder/my.csv"]}
    for purpose, command in commands.items():
        print(f"\n# {purpose}\n{shlex.join(map(str, [python, *command]))}")


if __name__ == "__main__":
    settings.run(main, Config)
