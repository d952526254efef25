"""Answer a split with a trained checkpoint and score it between its floors and ceilings.

Reads a checkpoint and the data folder; writes vqa_test_results.csv, vqa_test_metrics.json, and into
`results_dir` a gallery page, sample pictures with their answers, and the scores as charts. Also:
    python test.py --image photo.jpg --question "What is on the table?"     one question, one picture
    python test.py --data-csv questions.csv                                 your own, without answers
    python test.py --compare A.csv B.csv                                    two results, paired by question
    python test.py --baselines-only                                         floors and the human, no model
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from common import settings
from common.device import Precision
from common.files import is_text, write_json
from evaluation.generation import answer_image, answer_rows, exchanged_images, picture_row, spelled_labels
from evaluation.results import complete_rows, draw_results, file_name, write_results
from features.pixels import decode_images
from features.store import build_store
from preprocess import SPLITS, VQADataset, data_folder, read_rows, rows_of_split
from training.checkpoint import read_checkpoint, restore_model


@dataclass
class Config:
    checkpoint: str = "output/fine_tuning/vqa_checkpoint.pt"
    """the model; output/feature_extraction/vqa_checkpoint.pt is stage 1's"""
    data_dir: str = "mini_vqa_v2"
    """folder with metadata.csv and pictures, or a CSV with the columns image_path, question, answer"""
    split: str = "test"
    """train, val or test"""
    results_csv: str = "output/vqa_test_results.csv"
    """one row per question"""
    metrics_json: str = "output/vqa_test_metrics.json"
    """scores, floors, ceilings, intervals"""
    results_dir: str = "results"
    """gallery page and pictures"""
    num_pictures: int = 12
    """sample pictures with question, answers and prediction, drawn with the seed"""
    beam_size: int = 1
    """1 = greedy; more = beam search, ranked by mean log probability"""
    batch_size: int = 2048
    """questions answered at once; an answer does not depend on it"""
    question_only_checkpoint: str = "output/question_only/vqa_checkpoint.pt"
    """a model trained with --inputs question; a further floor where the file is there"""
    image: str | None = None
    """answer `question` about this picture instead"""
    question: str | None = None
    """the question about `image`"""
    data_csv: str | None = None
    """answer this CSV of image_path and question instead; an answer column is not needed and not scored"""
    compare: tuple[str, str] | None = None
    """two results CSVs to compare instead"""
    baselines_only: bool = False
    """floors and the human ceiling over all rows of data_dir in five folds by picture; no pictures, no model"""
    cache_dir: str = "cache"
    """stored outputs of the frozen blocks"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    workers: int = 0
    """processes that decode pictures; 0 = one per core"""
    seed: int = 42
    """of the sample and of the wrong-picture control"""


def check_settings(cfg):
    settings.check_range(cfg, "beam_size", low=1, high=256)
    settings.check_range(cfg, "batch_size", low=1, high=1_000_000)
    settings.check_range(cfg, "seed", low=0, high=settings.MAX_SEED)
    settings.check_range(cfg, "workers", low=0, high=256)
    settings.check_range(cfg, "num_pictures", low=0, high=10_000)
    if cfg.split not in SPLITS:
        raise ValueError(f"--split {cfg.split} is none of {', '.join(SPLITS)}")
    modes = {"--compare": cfg.compare, "--baselines-only": cfg.baselines_only or None, "--image": cfg.image,
             "--data-csv": cfg.data_csv}
    if len(chosen := [flag for flag, value in modes.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(chosen)} are different things to do: choose one of them")
    if (cfg.image is None) != (cfg.question is None):
        raise ValueError("--image and --question go together: one picture, one question about it")
    if cfg.question is not None and not cfg.question.strip():
        raise ValueError("--question is empty")
    if cfg.question is not None and not is_text(cfg.question):
        raise ValueError(f"--question {cfg.question!a:.60} is no valid UTF-8 text")


def load_model(path, rows, folder, cfg, precision):
    """(model, vocab, sizes, function that makes a dataset of rows, rows with a readable picture) of a checkpoint."""
    checkpoint, encoders, vocab, model = restore_model(path)
    model.to(precision.device)
    sizes = checkpoint["sizes"]
    pixels = decode_images(folder, rows["image_path"], encoders.image, cfg.cache_dir, cfg.workers,
                             sizes["picture_decoder"])
    rows = pixels.readable(rows)
    store = build_store(model, encoders, pixels, rows["question"], sizes["question_max_len"], cfg.cache_dir, precision)
    return model, vocab, sizes, lambda part: VQADataset(part, vocab, sizes["answer_max_len"], store), rows


def answer_split(cfg):
    """Answer and score one split; write and print everything."""
    from evaluation.report import evaluate_predictions, print_table
    precision = Precision(cfg.device)
    data = read_checkpoint(cfg.checkpoint).get("data")  # a missing checkpoint should be noticed first
    rows = read_rows(cfg.data_dir)
    rows_of_split(rows, cfg.split)
    folder = data_folder(cfg.data_dir)
    model, vocab, sizes, make_dataset, rows = load_model(cfg.checkpoint, rows, folder, cfg, precision)
    dataset = make_dataset(rows_of_split(rows, cfg.split))

    def answers(image_index=None):
        return answer_rows(model, vocab, dataset, sizes["answer_max_len"], precision, cfg.batch_size, cfg.beam_size,
                           image_index)

    predictions, confidences, gates = answers()
    floors = question_only_floor(cfg, rows, folder, precision, data)
    exchanged = exchanged_images(dataset, cfg.seed)
    if exchanged is not None:
        floors["wrong_picture"] = answers(exchanged)[0]
    tested = dataset.rows.to_dict("records")
    scores, metrics = evaluate_predictions(tested, rows_of_split(rows, "train").to_dict("records"), predictions, floors,
                                           spelled_labels(dataset.rows["answer"], vocab, sizes["answer_max_len"]))
    metrics = {"checkpoint": str(cfg.checkpoint), "split": cfg.split, **metrics}
    complete_rows(tested, predictions, confidences, gates, folder)
    for number, row in enumerate(tested):
        row.update(sentence_bleu=scores["mean_sentence_bleu"][number], exact_match=scores["exact_match"][number],
                   vqa_accuracy=scores["vqa_accuracy"][number])
    write_results(tested, cfg.results_csv)
    write_json(cfg.metrics_json, metrics)
    print_table(metrics)
    draw_results(tested, metrics, cfg)
    print(f"\nanswers {cfg.results_csv}, scores {cfg.metrics_json}, gallery {Path(cfg.results_dir) / 'index.html'}")


def question_only_floor(cfg, rows, folder, precision, data):
    """Answers of the question-only model as a floor {name: texts}; empty where there is none trained on the same `data`."""
    path = Path(cfg.question_only_checkpoint)
    if not path.is_file():
        return {}
    checkpoint = read_checkpoint(path)
    inputs = checkpoint["sizes"]["inputs"]
    if checkpoint.get("data") != data:
        print(f"{path} was trained on other rows, answers or pictures than {cfg.checkpoint}: it is left out as a floor")
        return {}
    if inputs != "question":
        raise ValueError(f"--question-only-checkpoint {path} was trained with --inputs {inputs}, not --inputs question")
    model, vocab, sizes, make_dataset, rows = load_model(path, rows, folder, cfg, precision)
    texts, _, _ = answer_rows(model, vocab, make_dataset(rows_of_split(rows, cfg.split)), sizes["answer_max_len"], precision,
                              cfg.batch_size, cfg.beam_size)
    return {"question_only": texts}


def answer_csv(cfg):
    """Answer the questions of a user's CSV; predictions and gallery, no scores."""
    precision = Precision(cfg.device)
    read_checkpoint(cfg.checkpoint)
    if not Path(cfg.data_csv).exists():
        raise FileNotFoundError(f"--data-csv {cfg.data_csv}: no such file")
    rows = read_rows(cfg.data_csv, need_answers=False)
    model, vocab, sizes, make_dataset, rows = load_model(cfg.checkpoint, rows, data_folder(cfg.data_csv), cfg, precision)
    dataset = make_dataset(rows)
    said = answer_rows(model, vocab, dataset, sizes["answer_max_len"], precision, cfg.batch_size, cfg.beam_size)
    rows = dataset.rows.to_dict("records")
    complete_rows(rows, *said, data_folder(cfg.data_csv))
    write_results(rows, cfg.results_csv)
    draw_results(rows, None, cfg)
    print(f"answers {cfg.results_csv}, gallery {Path(cfg.results_dir) / 'index.html'}; not scored")


def answer_one(cfg):
    """Answer one question about one picture; print the answer and save the picture with it."""
    from evaluation.gallery import draw_prediction
    precision = Precision(cfg.device)
    checkpoint, encoders, vocab, model = restore_model(cfg.checkpoint)
    model.to(precision.device).eval()
    said = answer_image(cfg.image, cfg.question, model, encoders, vocab, checkpoint["sizes"], precision, cfg.beam_size)
    target = Path(cfg.results_dir) / f"{file_name(Path(cfg.image).stem)}_answer.png"
    draw_prediction(picture_row(cfg.image, cfg.question, *said), target)
    print(f"question: {cfg.question}\nanswer: {said[0]}\nconfidence: {said[1]:.2f}\npicture: {target}")


def score_baselines(cfg):
    """Floors and the human ceiling over all rows, without pictures and without a model."""
    from evaluation.report import evaluate_baselines, print_table
    metrics = evaluate_baselines(read_rows(cfg.data_dir).to_dict("records"))
    write_json(cfg.metrics_json, metrics)
    print_table(metrics)
    print(f"\nscores {cfg.metrics_json}")


def beside_the_evaluation(cfg, **outputs):
    """`cfg` with other default outputs: a side mode must not write over the last evaluation of a model."""
    defaults = {name: value for name, value in outputs.items() if getattr(cfg, name) == getattr(Config, name)}
    for name, value in defaults.items():
        print(f"{getattr(Config, name)} is for a model's evaluation: writing {value} instead")
    return dataclasses.replace(cfg, **defaults)


def main(cfg):
    check_settings(cfg)
    if cfg.compare is not None:
        from evaluation.report import print_comparison
        print_comparison(*cfg.compare)
    elif cfg.baselines_only:
        score_baselines(beside_the_evaluation(cfg, metrics_json="output/baselines_metrics.json"))
    elif cfg.image is not None:
        answer_one(cfg)
    elif cfg.data_csv is not None:
        answer_csv(beside_the_evaluation(cfg, results_csv="output/own_results.csv", results_dir="results/own"))
    else:
        answer_split(cfg)


if __name__ == "__main__":
    settings.run(main, Config)
