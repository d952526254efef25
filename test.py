"""Answer a split with a trained checkpoint and score it between its floors and ceilings.

Reads a checkpoint and the data folder. Writes vqa_test_results.csv, vqa_test_metrics.json, and into `results_dir` a
gallery page, sample images with their answers, and two charts. Also:
    python test.py --test-csv other.csv                                     score all rows of another CSV
    python test.py --image photo.jpg --question "What is on the table?"     one question about one image
    python test.py --image photo.jpg --question "..." --explain             and what its answer depends on
    python test.py --data-csv questions.csv                                 your own questions, without answers
    python test.py --data-csv questions.csv --results-json answers.json     the same for VQA's evaluation server
    python test.py --compare A.csv B.csv                                    B - A, paired by question
    python test.py --compare A1.csv A2.csv --against B1.csv B2.csv          B - A over paired seeds
    python test.py --baselines-only                                         floors and one annotator, no model
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import settings  # first: before torch
from common.files import RUN_FILES, is_text, require_separate, write_json
from evaluation.baselines import (
    blind_floors,
    cross_validated_floors,
    oracle_ceiling,
    vocabulary_limited_labels,
    wrong_images,
)
from evaluation.drawing import draw_prediction
from evaluation.fonts import report_missing_characters
from evaluation.generation import MAX_BEAM_SIZE, answer_dataset, load
from evaluation.metrics import choose_bleu_tokenizer
from evaluation.report import evaluate, print_table
from evaluation.results import answer_name, read_question_ids, result_rows, write_explanation, write_results, write_results_json
from features.overlap import count_trained, refuse_trained
from features.trained_model import CheckpointConfig, find_local, read_checkpoint
from preprocess import build_datasets, data_folder, data_paths, is_csv, read_held_out, read_rows


@dataclass
class Config(CheckpointConfig):
    checkpoint: str = "output/fine_tuning/vqa_checkpoint.pt"
    """the model; output/feature_extraction/vqa_checkpoint.pt is stage 1's; hf:USER/REPO is the vqa_checkpoint.pt of a hub
    repository"""
    data_dir: str = "mini_vqa_v2"
    """folder with metadata.csv and images, or a CSV with the columns image_path, question, answer"""
    allow_outside: bool = False
    """an image_path may be absolute or contain .., and so leave the folder of the CSV"""
    split: Literal["train", "val", "test"] = "test"
    """the rows to answer"""
    test_csv: str | None = None
    """answer and score all rows of this CSV instead; its column split does not count"""
    results_csv: str = "output/vqa_test_results.csv"
    """one row per question"""
    metrics_json: str = "output/vqa_test_metrics.json"
    """scores, floors, ceilings, intervals"""
    results_json: str | None = None
    """answers in the format of VQA's evaluation server, one line for every question; None = not written"""
    results_dir: str = "results"
    """gallery page, sample images and charts"""
    num_pictures: int = 12
    """sample images with question, answers and prediction, chosen at random with the seed"""
    beam_size: int = 1
    """1 = greedy search; more = beam search, ranked by mean log probability"""
    batch_size: int = 2048
    """questions answered at once; it does not change the answers"""
    question_only_checkpoint: str | None = "output/question_only/vqa_checkpoint.pt"
    """a model trained with --inputs question, as one more floor; the default file may be missing; None = without this floor"""
    true_answers: str | None = None
    """JSON file {question_id: text} with the best possible answers, if they are known; scored as the ceiling `oracle`"""
    allow_trained_images: bool = False
    """only warn if the checkpoint was trained on images of the split"""
    bleu_tokenize: Literal["13a", "intl", "zh", "ja-mecab", "ko-mecab", "char"] = "13a"
    """sacrebleu's tokenizer of BLEU: zh for Chinese, ja-mecab for Japanese, char for any script without spaces"""
    image: str | None = None
    """answer `question` about this image instead"""
    question: str | None = None
    """the question about `image`"""
    explain: bool = False
    """draw what the answer about `image` depends on: parts of the image, words of the question, other answers"""
    data_csv: str | None = None
    """answer this CSV with the columns image_path and question instead; nothing is scored"""
    compare: tuple[str, ...] | None = None
    """two results CSVs A and B to compare instead: B - A; or with `against` all results of A, one per seed"""
    against: tuple[str, ...] | None = None
    """as many results of B, in the order of the seeds of `compare`"""
    baselines_only: bool = False
    """score floors and one annotator on all rows of data_dir, in five folds by image; needs no image and no model"""
    cache_dir: str = "cache"
    """stored outputs of the frozen blocks"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""
    workers: int = 0
    """processes that decode images; 0 = one per core"""
    seed: int = 42
    """of the sample images and of the wrong-image floor"""


def check_settings(cfg):
    settings.check_ranges(cfg, beam_size=(1, MAX_BEAM_SIZE), batch_size=settings.COUNT, seed=settings.SEED,
                          workers=settings.WORKERS, num_pictures=(0, 10_000))
    modes = {"--compare": cfg.compare, "--baselines-only": cfg.baselines_only or None, "--image": cfg.image,
             "--data-csv": cfg.data_csv, "--test-csv": cfg.test_csv}
    if len(chosen := [flag for flag, value in modes.items() if value is not None]) > 1:
        raise ValueError(f"{' and '.join(chosen)} cannot be used together: choose one of them")
    if chosen and chosen != ["--test-csv"] and cfg.true_answers is not None:
        raise ValueError(f"--true-answers cannot be used with {chosen[0]}: it is for answers that are scored")
    if chosen and chosen[0] not in ("--data-csv", "--test-csv") and cfg.results_json is not None:
        raise ValueError(f"--results-json cannot be used with {chosen[0]}: it is for answers to a data set")
    for flag, path in (("--data-csv", cfg.data_csv), ("--test-csv", cfg.test_csv)):
        if path is not None and not (is_csv(path) and Path(path).is_file()):
            raise FileNotFoundError(f"{flag} {path} is no CSV file that exists")
    blind = cfg.question_only_checkpoint
    if blind not in (None, Config.question_only_checkpoint) and not Path(blind).is_file():
        raise FileNotFoundError(f"--question-only-checkpoint {blind} not found: train it with --inputs question, or leave the "
                                "flag out")
    if cfg.against is not None and cfg.compare is None:
        raise ValueError("--against names the results of B: give those of A with --compare")
    if cfg.compare is not None and not cfg.against and len(cfg.compare) != 2:
        raise ValueError(f"--compare needs two results, or as many as --against; it has {len(cfg.compare)}")
    if (cfg.image is None) != (cfg.question is None):
        raise ValueError("--image and --question go together: one image, one question about it")
    if cfg.explain and cfg.image is None:
        raise ValueError("--explain is for one answer: give --image and --question; of a split or a CSV, --num-pictures sample "
                         "images are explained in --results-dir")
    if cfg.question is not None and not (cfg.question.strip() and is_text(cfg.question)):
        raise ValueError(f"--question {cfg.question!a:.60} is empty or no valid UTF-8 text")


def choose_paths(cfg):
    """`cfg` with the CSV to answer as data_dir. If no split is scored, default outputs change: those of a split are kept.

    Raises ValueError if an output would replace an input.
    """
    outputs = {"metrics_json": "output/baselines_metrics.json"} if cfg.baselines_only else {}
    if cfg.data_csv is not None:
        outputs = {"results_csv": "output/own_results.csv", "results_dir": "results/own"}
    for name, path in outputs.items():
        if getattr(cfg, name) == getattr(Config, name):
            print(f"{getattr(Config, name)} is for answered splits: writing {path} instead")
            cfg = dataclasses.replace(cfg, **{name: path})
    data_flag = "--test-csv" if cfg.test_csv else "--data-csv" if cfg.data_csv else "--data-dir"
    if data_flag != "--data-dir":  # all rows of the CSV are answered
        cfg = dataclasses.replace(cfg, data_dir=cfg.test_csv or cfg.data_csv, split="test")
    run_files = [Path(cfg.checkpoint).parent / name for name in RUN_FILES]
    inputs = {data_flag: data_paths(cfg.data_dir), "--checkpoint": [cfg.checkpoint, *run_files],
              "--question-only-checkpoint": [cfg.question_only_checkpoint], "--true-answers": [cfg.true_answers]}
    files = output_files(cfg)
    require_separate(files, {"--results-dir": cfg.results_dir}, inputs)
    for flag, path in files.items():
        suffix = f".{flag.rpartition('-')[2]}"
        if Path(path).exists() and Path(path).suffix.lower() != suffix:  # an image, or a checkpoint
            raise ValueError(f"{flag} {path} exists and is no {suffix} file: choose another one")
    return cfg


def output_files(cfg):
    """{flag: path} of the files that are written besides those in --results-dir."""
    optional = {} if cfg.results_json is None else {"--results-json": cfg.results_json}
    return {"--results-csv": cfg.results_csv, "--metrics-json": cfg.metrics_json, **optional}


def load_tested(cfg):
    """The Answerer of --checkpoint. Raises ValueError if an output would replace a file of its encoders."""
    answerer = load(cfg.checkpoint, cfg.device, cfg)
    trained = answerer.trained
    trained.encoders.print_sizes()
    local = {f"--{name.replace('_', '-')}": Path(find_local(value, trained.path).removeprefix("local-dir:"))
             for name, value in trained.encoders.names.items() if value}
    require_separate(output_files(cfg), {}, {flag: [path, *path.glob("*")] for flag, path in local.items()})
    return answerer


def answer_split(cfg):
    """Answer and score one split, or all rows of `test_csv`; write and print everything."""
    answerer, question_ids = load_tested(cfg), read_question_ids(cfg)
    rows, held_out = read_scored_rows(cfg)
    dataset, trained = load_dataset(answerer, rows, cfg), answerer.trained
    tested, answer_max_len = dataset.rows.to_dict("records"), trained.model.config.answer_max_len
    texts = trained.checkpoint["training_texts"]  # {column: one text per training row}
    train_rows = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
    trained_images = count_trained(dataset.rows, dataset.store.image_digests, trained.checkpoint["trained_on"])
    if cfg.split != "train":  # training rows are asked for by name
        refuse_trained(trained_images, cfg.split, cfg.checkpoint, cfg.allow_trained_images)
    ceilings = {"vocabulary": vocabulary_limited_labels(dataset.rows["answer"], trained.vocab, answer_max_len),
                **oracle_ceiling(dataset.rows["question_id"], cfg.true_answers)}

    answers = answers_of(answerer, dataset, cfg)
    # a training row must not find its own label among the training answers
    floors = cross_validated_floors(tested) if cfg.split == "train" else blind_floors(train_rows, tested)
    floors |= question_only_floor(trained, rows, cfg)
    image_index = wrong_images(dataset, cfg.seed)
    if image_index is not None:
        floors["wrong_picture"] = [floor.text for floor in answers_of(answerer, dataset, cfg, image_index)]
    scores, metrics = evaluate(tested, floors, [answer.text for answer in answers], ceilings,
                               [answer.confidence for answer in answers], held_out, [row["answer"] for row in train_rows])

    metrics = {"checkpoint": str(cfg.checkpoint), "split": None if cfg.test_csv else cfg.split, "test_csv": cfg.test_csv,
               "trained_images": trained_images, **metrics}
    write_json(cfg.metrics_json, metrics)
    print_table(metrics)
    results = result_rows(tested, answers, data_folder(cfg.data_dir), scores)
    write_results_json(question_ids, results, texts["answer"], cfg)
    write_results(results, metrics, cfg, answerer)
    print(f"\nanswers {cfg.results_csv}, scores {cfg.metrics_json}, gallery {Path(cfg.results_dir) / 'index.html'}")


def read_scored_rows(cfg):
    """(rows of `data_dir`, entries of `read_held_out`). All rows of --test-csv are in the split that is scored."""
    rows = read_rows(cfg.data_dir, allow_outside=cfg.allow_outside, use_split=cfg.test_csv is None)
    if cfg.test_csv is not None:
        print(f"answering all {len(rows)} rows of {cfg.test_csv}; its column split does not count")
    else:
        print(f"answering {(rows['split'] == cfg.split).sum()} of {len(rows)} rows of {cfg.data_dir}, those of the split "
              f"{cfg.split}" + "; --test-csv answers all rows of a CSV" * is_csv(cfg.data_dir))
    return rows, read_held_out(cfg.data_dir, rows, None if cfg.test_csv else cfg.split)


def load_dataset(answerer, rows, cfg):
    """The VQADataset of `cfg.split`."""
    folder, trained = data_folder(cfg.data_dir), answerer.trained
    # a sample image must not replace an image of the data
    image_folders = {str((folder / path).parent) for path in rows["image_path"].unique()}
    require_separate({}, {"--results-dir": cfg.results_dir}, {"image_path": sorted(image_folders)})
    return build_datasets(trained.model, trained.encoders, trained.vocab, rows, folder, cfg, answerer.precision,
                          (cfg.split,), max_unreadable=1)[cfg.split]  # a bad image costs its own rows only


def answers_of(answerer, dataset, cfg, image_index=None):
    return answer_dataset(answerer.trained.model, dataset, answerer.precision, cfg.batch_size, cfg.beam_size, image_index)


def question_only_floor(trained, rows, cfg):
    """{"question_only": texts} of the question-only model; {} if there is none that was trained on the same data."""
    if cfg.question_only_checkpoint is None or not (path := Path(cfg.question_only_checkpoint)).is_file():
        return {}
    blind = read_checkpoint(path)
    if blind.get("data") != trained.checkpoint.get("data"):
        print(f"{path} was trained on other rows, answers or images than {cfg.checkpoint}: it is left out as a floor")
        return {}
    if (inputs := blind["model_config"]["inputs"]) != "question":
        raise ValueError(f"--question-only-checkpoint {path} was trained with --inputs {inputs}, not --inputs question")
    blind = load(path, cfg.device, cfg)
    dataset = load_dataset(blind, rows, cfg)
    return {"question_only": [floor.text for floor in answers_of(blind, dataset, cfg)]}


def answer_csv(cfg):
    """Answer the questions of a user's CSV; write predictions and gallery, without scores."""
    answerer, question_ids = load_tested(cfg), read_question_ids(cfg)
    rows = read_rows(cfg.data_csv, need_answers=False, allow_outside=cfg.allow_outside, use_split=False)
    dataset = load_dataset(answerer, rows, cfg)
    answers = answers_of(answerer, dataset, cfg)
    results = result_rows(dataset.rows.to_dict("records"), answers, data_folder(cfg.data_csv))
    write_results_json(question_ids, results, answerer.trained.checkpoint["training_texts"]["answer"], cfg)
    write_results(results, None, cfg, answerer)
    print(f"answers {cfg.results_csv}, gallery {Path(cfg.results_dir) / 'index.html'}; not scored")


def answer_one(cfg):
    """Answer one question about one image; print the answer and draw it under the image, or what it depends on."""
    answerer, asked = load(cfg.checkpoint, cfg.device, cfg), (cfg.image, cfg.question)
    target = Path(cfg.results_dir) / answer_name(*asked, "why" if cfg.explain else "answer")
    if cfg.explain:
        answer = write_explanation(answerer, *asked, cfg.beam_size, target)
    else:
        answer = answerer(*asked, cfg.beam_size)
        row, = result_rows([{"image_path": cfg.image, "question": cfg.question, "answer": "", "answers": []}], [answer], Path())
        draw_prediction(row, target)
    report_missing_characters([cfg.question, answer.text])
    for name, value in (("question", cfg.question), ("answer", answer.text), ("confidence", f"{answer.confidence:.2f}"),
                        ("image", target)):
        print(settings.printable(f"{name}: {value}"))


def score_baselines(cfg):
    """Score floors and one annotator on all rows, without images and without a model."""
    table = read_rows(cfg.data_dir, allow_outside=cfg.allow_outside)
    rows, held_out = table.to_dict("records"), read_held_out(cfg.data_dir, table)
    _, metrics = evaluate(rows, cross_validated_floors(rows), held_out=held_out)
    write_json(cfg.metrics_json, metrics)
    print_table(metrics)
    print(f"\nscores {cfg.metrics_json}")


def main(cfg):
    check_settings(cfg)
    choose_bleu_tokenizer(cfg.bleu_tokenize)
    if cfg.compare is not None:
        from evaluation.comparison import print_comparison
        sides = (cfg.compare, cfg.against) if cfg.against else (cfg.compare[:1], cfg.compare[1:])
        print_comparison(*sides)
        return
    cfg = choose_paths(cfg)
    if cfg.baselines_only:
        score_baselines(cfg)
    elif cfg.image is not None:
        answer_one(cfg)
    elif cfg.data_csv is not None:
        answer_csv(cfg)
    else:
        answer_split(cfg)


if __name__ == "__main__":
    settings.run(main, Config)
