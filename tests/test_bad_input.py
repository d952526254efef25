"""What users really have on their disks: odd images, absurd settings, folders without permission. A right result or one
clear line on stderr with exit status 2."""
import json
import os
import re
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call_script, call_scripts, start
from PIL import Image

from common.device import Precision
from common.files import atomic_write
from common.images import open_image
from evaluation.generation import Answerer
from features.arrays import open_array
from features.encoders import ImageEncoder
from features.pixels import decode_images
from features.trained_model import load_model, read_checkpoint
from fine_tune import read_stage_one_log
from training.checkpoint import save_checkpoint
from training.curves import draw_curves
from vocab import SPECIALS, Vocab

RED_ABOVE_BLUE = np.concatenate([np.full((20, 40, 3), (220, 30, 30), np.uint8), np.full((20, 40, 3), (30, 30, 220), np.uint8)])


# ---- images

def is_red_above_blue(image):
    """Whether the upper half of a Pillow image or of pixels (3, S, S) is red and the lower half blue."""
    pixels = np.asarray(image).astype(int)
    pixels = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
    upper, lower = pixels[len(pixels) // 4], pixels[-1 - len(pixels) // 4]
    return bool((upper[:, 0] > upper[:, 2] + 60).all() and (lower[:, 2] > lower[:, 0] + 60).all())


def save_turned(image, path):
    exif = Image.Exif()
    exif[274] = 6  # to be shown turned by 90 degrees clockwise
    image.rotate(90, expand=True).save(path, exif=exif, quality=95)


def save_heic(image, path):
    pytest.importorskip("pillow_heif").register_heif_opener()  # for writing
    image.save(path)


GREEN = Image.new("RGB", (40, 40), "green")  # the second frame of an animation
ODD = {  # name: (file name, function that saves the image in an odd form)
    "turned by EXIF": ("a.jpg", save_turned),
    "png named jpg": ("a.jpg", lambda image, path: image.save(path, format="PNG")),
    "four colours": ("a.jpg", lambda image, path: image.convert("CMYK").save(path, quality=95)),
    "palette with transparency": ("a.png", lambda image, path: image.quantize(8).save(path, transparency=7)),
    "animated": ("a.gif", lambda image, path: image.save(path, save_all=True, append_images=[GREEN])),
    "animated webp": ("a.webp", lambda image, path: image.save(path, save_all=True, append_images=[GREEN], lossless=True)),
    "transparent": ("a.png", lambda image, path: image.convert("RGBA").save(path)),
    "avif": ("a.avif", lambda image, path: image.save(path, quality=95)),
    "animated avif": ("a.avif", lambda image, path: image.save(path, save_all=True, append_images=[GREEN], quality=95)),
    "avif turned by EXIF": ("a.avif", save_turned),
    "heic": ("a.heic", save_heic),
    "odd name": ("an image, with spaces & ünïcödé.png", lambda image, path: image.save(path)),
}


def ask(image, encoders, model):
    """Ask one question about one image."""
    trained = SimpleNamespace(model=model, encoders=encoders, vocab=Vocab([*SPECIALS, "red", "blue"]))
    return Answerer(trained, Precision("cpu"))(image, "What is above?")


@pytest.mark.parametrize("name", ODD)
def test_odd_images_look_the_same_in_training_answering_and_the_gallery(name, encoders, make_model, tmp_path, monkeypatch):
    file_name, save = ODD[name]
    save(Image.fromarray(RED_ABOVE_BLUE), tmp_path / file_name)
    store = decode_images(tmp_path, [file_name], encoders.image, tmp_path / "cache", 1)
    assert not store.unreadable and is_red_above_blue(store.pixels[0]), "training"
    assert is_red_above_blue(open_image(tmp_path / file_name)), "the gallery"
    seen, true_normalize = [], ImageEncoder.normalize
    monkeypatch.setattr(ImageEncoder, "normalize", lambda self, pixels: seen.append(pixels) or true_normalize(self, pixels))
    model = make_model(vocab_size=6)
    answer = ask(tmp_path / file_name, encoders, model)
    assert is_red_above_blue(seen[0][0]), "answering"
    image = Image.open(tmp_path / file_name)
    assert [ask(image, encoders, model) for _ in range(2)] == [answer, answer]
    assert all((pixels == seen[0]).all() for pixels in seen), "as a Pillow image"


@pytest.mark.parametrize("entry", [(0x11a, 2, b"ab\0\0"), (0x10f, 11, b"ab\0\0"), (0x14a, 1, b"ab\0\0")],
                         ids=["a resolution of letters", "a maker that is a number", "a folder that is none"])
def test_a_damaged_exif_block_loses_neither_the_image_nor_its_orientation(entry, tmp_path):
    """Pillow's exif_transpose rewrites the block, which raises TypeError and more for these."""
    tag, kind, value = entry
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, 1) + value
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.fromarray(RED_ABOVE_BLUE).rotate(90, expand=True).save(tmp_path / "a.jpg", exif=block, quality=95)
    assert is_red_above_blue(open_image(tmp_path / "a.jpg"))


def test_sixteen_bit_grey_is_not_saturated(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "a.png")
    assert abs(int(np.asarray(open_image(tmp_path / "a.png"))[0, 0, 0]) - 30000 // 257) <= 1


def test_one_pixel_is_an_image(encoders, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    store = decode_images(tmp_path, ["a.png"], encoders.image, tmp_path / "cache", 1)
    assert (store.pixels[0, 0] == 255).all()


def save_truncated(path, file_format="PNG"):
    Image.effect_noise((60, 60), 90).save(path, file_format)
    path.write_bytes(path.read_bytes()[:-400])


UNREADABLE = {  # name: (reason in the message, function that makes such a file)
    "a folder": ("a folder", Path.mkdir),
    "a broken link": ("missing", lambda path: path.symlink_to("nowhere.png")),
    "a FIFO": ("no regular file", os.mkfifo),
    "a device": ("no regular file", lambda path: path.symlink_to("/dev/zero")),
    "zero bytes": ("cannot identify", Path.touch),
    "a web page": ("cannot identify", lambda path: path.write_text("<!doctype html><title>404</title>")),
    "truncated": ("truncated", save_truncated),
    "truncated avif": ("Truncated data|cannot identify", lambda path: save_truncated(path, "AVIF")),
    "far too large": ("pixels", lambda path: Image.new("1", (30_000, 30_000)).save(path)),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_image_is_named_with_the_reason(name, encoders, make_model, tmp_path):
    reason, spoil = UNREADABLE[name]
    spoil(tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"1 of 1 images cannot be read, more than 1%: a.png \(.*({reason})"):
        decode_images(tmp_path, ["a.png"], encoders.image, tmp_path / "cache", 1)
    assert not list((tmp_path / "cache").glob(".*")), "a partial store was left"
    with pytest.raises((ValueError, OSError), match="^image .*a.png"):
        ask(tmp_path / "a.png", encoders, make_model())


def test_control_characters_of_names_and_cells_are_escaped(encoders, train_flags, tmp_path, capsys):
    """An escape sequence in a file's name could rewrite the terminal, and a line end could add lines to a log."""
    name = "a\x1b[2J\nerror: \u202e\x9b.png"
    for path in [name, *map(str, range(200))]:
        Image.new("RGB", (8, 8)).save(tmp_path / path, "PNG") if path != name else (tmp_path / path).touch()
    assert decode_images(tmp_path, [name, *map(str, range(200))], encoders.image, tmp_path / "cache", 1).unreadable
    assert r"a\x1b[2J\nerror: \u202e\x9b.png (" in capsys.readouterr().out
    (tmp_path / "own.csv").write_text('image_path,question,answer,split\na.png,q,a,"x\x1b[2J\ny"\n')
    for flags in (["--data-dir", "own.csv"], ["--data-dir", "x\x1b[2J\ny.csv"]):
        assert r"x\x1b[2J\ny" in call_script("train.py", *train_flags, *flags, expect=2, cwd=tmp_path)


# ---- settings

@pytest.mark.parametrize("command", [
    "train.py --weight-decay inf", "train.py --batch-size 0", "train.py --batch-size -3", "train.py --hidden-size 1000000",
    "train.py --num-layers 1000", "train.py --epochs 1000000000", "train.py --seed -1", f"train.py --seed {10 ** 30}",
    "train.py --workers -1", "train.py --dropout 1", "train.py --answer-max-len 1", "train.py --question-max-len 0",
    "train.py --max-grad-norm nan", "train.py --label-smoothing 1", "fine_tune.py --clip-learning-rate 0",
    "fine_tune.py --clip-layers -1", "test.py --beam-size 0", "test.py --num-pictures -1", "test.py --batch-size 0"])
def test_absurd_settings_are_one_line_that_names_flag_and_value(command, tmp_path):
    script, *flags = command.split()
    assert " ".join(flags[:2]) in call_script(script, *flags, expect=2, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    ("--compare nowhere.csv b.csv", "--compare: nowhere.csv is not a results CSV"),
    ("--compare a.csv", "--compare needs two results, or as many as --against; it has 1"),
    ("--compare a.csv b.csv c.csv", "--compare needs two results, or as many as --against; it has 3"),
    ("--compare a.csv b.csv --against c.csv", "--compare has 2 results and --against 1"),
    ("--question-only-checkpoint blind.pt", "--question-only-checkpoint blind.pt not found: train it with --inputs question"),
    ("--against a.csv b.csv", "--against names the results of B: give those of A with --compare")])
def test_a_comparison_that_cannot_be_made_is_one_line(flags, message, tmp_path):
    """One file gave a box of the command line's parser instead."""
    assert message in call_script("test.py", *flags.split(), expect=2, cwd=tmp_path)


# ---- files of earlier runs

def test_a_checkpoint_of_the_first_format_says_so(tmp_path):
    """Its entries had other names: to list what it lacks would not help."""
    save_checkpoint(tmp_path / "old.pt", {"format": "generative-vqa checkpoint 1", "sizes": {}, "cut": {}})
    for script in ("fine_tune.py", "test.py"):
        error = call_script(script, "--checkpoint", "old.pt", expect=2, cwd=tmp_path)
        assert "old.pt has the format 'generative-vqa checkpoint 1'" in error and "train again" in error


def test_entries_that_an_older_checkpoint_lacks_get_their_defaults(stage_one, tmp_path):
    """A choice that is added to ModelConfig with today's behaviour as its default must not make old checkpoints useless."""
    content = read_checkpoint(stage_one / "vqa_checkpoint.pt")
    del content["model_config"]["image_pooling"]
    save_checkpoint(tmp_path / "older.pt", content)
    assert load_model(tmp_path / "older.pt").model.config.image_pooling == "pooled"


SPREADSHEETS = {  # name: (what a spreadsheet or an accident makes of stage 1's log, rows that can still be drawn)
    "semicolons": (lambda text: text.replace(",", ";"), 0),
    "decimal commas": (lambda text: text.replace(",", ";").replace(".", ","), 0),
    "empty": (lambda text: "", 0),
    "header only": (lambda text: text.split("\n")[0], 0),
    "a workbook": (lambda text: "PK\3\4" + text[::-1], 0),
    "no loss": (lambda text: text.replace("train_loss", "Spalte 2"), 0),
    "a column of words": (lambda text: text.replace("epoch", "a").replace("val_bleu", "epoch"), 2),
    "a date": (lambda text: text.replace("\n1,", "\n01.01.1970,"), 1),
    "infinite": (lambda text: text.replace("\n0,", "\ninf,"), 1),
    "blank rows": (lambda text: text.replace("\n", "\n" + "," * text.split("\n")[0].count(",") + "\n"), 2),
    "words as rates": (lambda text: text.replace("0.0,0,", "zero,none,"), 2),
}


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_stage_two_draws_what_can_be_read_of_the_log_of_stage_one(name, stage_one, tmp_path, capsys):
    """It was an error, although stage 2 needs no log."""
    damage, rows = SPREADSHEETS[name]
    checkpoint = read_checkpoint(stage_one / "vqa_checkpoint.pt")
    (tmp_path / "train_log.csv").write_text(damage((stage_one / "train_log.csv").read_text()))
    stages = read_stage_one_log(checkpoint, tmp_path)
    assert [len(log) for _, log in stages] == [rows] * (rows > 0)
    assert ("train_log.csv cannot be read" in capsys.readouterr().out) == (rows == 0)
    own = [{"epoch": epoch, "train_loss": 1.0, "val_loss": 1.0, "learning_rate_head": 0.1} for epoch in range(2)]
    draw_curves([*stages, ("fine tuning", own)], tmp_path / "loss_plot.png")


def test_stage_two_needs_only_the_checkpoint_of_stage_one(stage_one, data_dir, session_cache, tmp_path):
    shutil.copytree(stage_one, tmp_path / "run")
    for name in ("last.pt", "train_log.csv", "config.json"):
        (tmp_path / "run" / name).write_bytes(b"damaged")
    flags = ["--data-dir", data_dir, "--cache-dir", session_cache, "--epochs", 1, "--clip-layers", 0, "--gpt2-layers", 1]
    output = call_script("fine_tune.py", "--checkpoint", "run/vqa_checkpoint.pt", *flags, cwd=tmp_path)
    assert output.count("note: run/train_log.csv cannot be read") == 1 and "best epoch" in output
    assert "run/last.pt is not a checkpoint of this program, or is damaged" in call_script(
        "fine_tune.py", "--checkpoint", "run/last.pt", *flags, expect=2, cwd=tmp_path)


def test_stored_arrays_are_never_unpickled(tmp_path):
    np.save(tmp_path / "states.npy", np.array([{"a": 1}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        open_array(tmp_path / "states.npy", 2)


@pytest.mark.parametrize("kind", ["FIFO", "/dev/zero"])
@pytest.mark.parametrize("command", [
    "test.py --checkpoint {special}", "fine_tune.py --checkpoint {special}", "test.py --baselines-only --data-dir {special}",
    "test.py --baselines-only --data-dir a_folder", "test.py --compare {special} {special}",
    "test.py --data-csv {special} --checkpoint stage_one/vqa_checkpoint.pt"])
def test_a_device_or_fifo_is_refused_before_it_is_read(command, kind, stage_one, tmp_path):
    """Reading a FIFO waits for a writer for ever, and /dev/zero has no end."""
    (tmp_path / "a_folder").mkdir()
    (tmp_path / "stage_one").symlink_to(stage_one)
    for special in (tmp_path / "special.csv", tmp_path / "a_folder/metadata.csv"):
        os.mkfifo(special) if kind == "FIFO" else special.symlink_to(kind)
    script, *flags = command.format(special="special.csv").split()
    error = call_script(script, *flags, expect=2, cwd=tmp_path)
    assert re.search(r"\.csv is no (regular file|CSV file that exists)", error)


# ---- folders and locks

def test_an_output_dir_below_a_file_is_one_line(train_flags, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert "file/run" in call_script("train.py", *train_flags, "--output-dir", "file/run", expect=2, cwd=tmp_path)


def test_folders_without_write_permission(train_flags, stage_one, data_dir, session_cache, tmp_path):
    """Training needs to write: one line, and the folder stays empty. test.py only reads data, cache and checkpoint."""
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere, and setpriv is missing")
    for source, target in ((data_dir, "data"), (session_cache, "cache"), (stage_one, "stage_one")):
        shutil.copytree(source, tmp_path / target)
    (tmp_path / "locked").mkdir()
    for name in ("data", "cache", "stage_one", "locked"):
        for path in [*(tmp_path / name).rglob("*"), tmp_path / name]:
            path.chmod(0o555)
    train, rights = ["train.py", *train_flags, "--output-dir"], "=-dac_override,-dac_read_search"
    *errors, output = call_scripts(
        [*train, "locked"], [*train, "run", "--cache-dir", "locked"],
        ["test.py", "--data-dir", "data", "--cache-dir", "cache", "--num-pictures", 0, "--checkpoint",
         "stage_one/vqa_checkpoint.pt"],
        cwd=tmp_path, prefix=["setpriv", f"--bounding-set{rights}", f"--inh-caps{rights}"] if os.getuid() == 0 else [])
    assert all(re.fullmatch("error: .*Permission denied.*locked.*", error) for error in errors)
    assert not list((tmp_path / "locked").iterdir()) and not (tmp_path / "run").exists()
    assert "verdict:" in output


# ---- outputs

OWN_FILES = "--questions data/{}.json --annotations run/own.json --image-pattern {{image_id}}.jpg --no-pictures"


@pytest.mark.parametrize("command, message", [
    ("test.py --data-csv own.csv --results-csv own.csv", "--results-csv own.csv would overwrite own.csv, which --data-csv"),
    ("test.py --test-csv own.csv --metrics-json ./own.csv", "--metrics-json ./own.csv would overwrite own.csv, which"),
    ("test.py --data-csv output/own_results.csv", "--results-csv output/own_results.csv would overwrite"),
    ("test.py --data-dir data --results-csv data/metadata.csv", "would overwrite data/metadata.csv, which --data-dir names"),
    ("test.py --data-dir data --metrics-json data/qa_pairs.json", "would overwrite data/qa_pairs.json, which --data-dir names"),
    ("test.py --data-dir data --results-csv linked.csv", "would overwrite data/metadata.csv, which --data-dir names"),
    ("test.py --data-dir data --results-csv symbolic.csv", "would overwrite data/metadata.csv, which --data-dir names"),
    ("test.py --checkpoint c.pt --metrics-json c.pt", "--metrics-json c.pt would overwrite c.pt, which --checkpoint names"),
    ("test.py --question-only-checkpoint c.pt --metrics-json c.pt", "which --question-only-checkpoint names"),
    ("test.py --true-answers own.csv --metrics-json own.csv", "would overwrite own.csv, which --true-answers names"),
    ("test.py --results-csv new --metrics-json new", "--results-csv new would overwrite new, which --metrics-json names"),
    ("test.py --data-csv own.csv --results-json own.csv", "--results-json own.csv would overwrite own.csv, which --data-csv"),
    ("test.py --data-dir data --results-json data/qa_pairs.json", "--results-json data/qa_pairs.json would overwrite"),
    ("test.py --results-json m.json --metrics-json m.json", "m.json would overwrite m.json, which --results-json names"),
    ("test.py --results-json c.pt --checkpoint run/best.pt", "--results-json c.pt exists and is no .json file"),
    ("test.py --baselines-only --data-dir data --metrics-json data/metadata.csv", "which --data-dir names"),
    ("test.py --results-csv fifo", "--results-csv fifo exists and is no regular file"),
    ("test.py --results-csv data", "--results-csv data exists and is no regular file"),
    ("test.py --metrics-json /dev/null", "--metrics-json /dev/null exists and is no regular file"),
    ("test.py --results-dir c.pt", "--results-dir c.pt exists and is no folder"),
    ("test.py --metrics-json data/images/0059.png", "--metrics-json data/images/0059.png exists and is no .json file"),
    ("test.py --data-csv own.csv --results-csv c.pt", "--results-csv c.pt exists and is no .csv file"),
    ("test.py --checkpoint run/best.pt --results-csv run/last.pt", "would overwrite run/last.pt, which --checkpoint names"),
    ("test.py --checkpoint run/best.pt --metrics-json run/config.json", "overwrite run/config.json, which --checkpoint names"),
    ("train.py --data-dir samples.csv --output-dir .", "would overwrite samples.csv, which --data-dir names"),
    ("train.py --gpt2-model data --output-dir data/.", "--output-dir data/. would write into data, which --gpt2-model names"),
    ("train.py --clip-model local-dir:data --output-dir data", "which --clip-model names"),
    ("train.py --output-dir c.pt", "--output-dir c.pt exists and is no folder"),
    ("test.py --config run/own.json --metrics-json run/own.json", "run/own.json would overwrite run/own.json, which --config"),
    ("test.py --config run/own.json --results-json ./run/own.json", "--results-json ./run/own.json would overwrite"),
    (f"mini_vqa_v2.py {OWN_FILES.format('qa_pairs')} --output-dir data", "overwrite data/qa_pairs.json, which --questions"),
    (f"mini_vqa_v2.py {OWN_FILES.format('held_out_annotators')} --output-dir ./data", "which --questions names"),
    ("test.py --results-json c.pt/x.json", "--results-json c.pt/x.json: c.pt exists and is no folder"),
    ("test.py --results-dir c.pt/a/b", "--results-dir c.pt/a/b: c.pt exists and is no folder"),
    ("train.py --output-dir own.csv/run", "--output-dir own.csv/run: own.csv exists and is no folder"),
    ("mini_vqa_v2.py --output-dir own.csv/out", "own.csv exists and is no folder"),
    (f"test.py --metrics-json new/{'m' * 232}.json", "has a name of more than 230 bytes"),
    (f"test.py --results-dir {'ü' * 116}/new", "has a name of more than 230 bytes")])
def test_an_output_that_is_an_input_or_no_file_is_refused_before_anything_is_read(command, message, tmp_path):
    """The results of a night replaced the questions, or the checkpoint that gave them."""
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "output").mkdir()
    (tmp_path / "run").mkdir()
    for name in ("own.csv", "c.pt", "data/metadata.csv", "data/qa_pairs.json", "output/own_results.csv", "samples.csv",
                 "data/images/0059.png", "run/last.pt", "run/config.json", "data/held_out_annotators.json"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "run/own.json").write_text('{"beam_size": 3}')
    os.link(tmp_path / "data/metadata.csv", tmp_path / "linked.csv")
    (tmp_path / "symbolic.csv").symlink_to("data/metadata.csv")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    script, *flags = command.split()
    error = call_script(script, *flags, expect=2, cwd=tmp_path)
    assert message in error and "choose another one" in error
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() in ("precious", '{"beam_size": 3}') for path in before if path.is_file())


def test_stage_two_does_not_write_into_the_folder_of_an_encoder(stage_one, encoder_flags, data_dir, tmp_path):
    """It would replace GPT-2's config.json by its own."""
    flags = ("--checkpoint", stage_one / "vqa_checkpoint.pt", "--data-dir", data_dir, "--output-dir", encoder_flags[3])
    assert "which --gpt2-model names" in call_script("fine_tune.py", *flags, expect=2, cwd=tmp_path)


@pytest.mark.parametrize("flag, scheme, index, output", [
    ("--gpt2-model", "", 3, "--metrics-json enc/config.json"),
    ("--clip-model", "local-dir:", 1, "--data-csv own.csv --results-csv enc/notes.csv")])
def test_results_do_not_replace_a_file_of_an_encoder(flag, scheme, index, output, stage_one, encoder_flags, tmp_path):
    """The scores became the config.json of the checkpoint's own GPT-2: no script could load it again."""
    shutil.copytree(encoder_flags[index].removeprefix("local-dir:"), tmp_path / "enc")
    (tmp_path / "enc/notes.csv").write_text("precious")
    (tmp_path / "own.csv").write_text("image_path,question\nnone.png,What?\n")
    before = {path: path.read_bytes() for path in (tmp_path / "enc").iterdir()}
    flags = ("--checkpoint", stage_one / "vqa_checkpoint.pt", flag, f"{scheme}enc", *output.split())
    error = call_script("test.py", *flags, expect=2, cwd=tmp_path)
    assert f"would overwrite {output.split()[-1]}, which {flag} names" in error
    assert {path: path.read_bytes() for path in (tmp_path / "enc").iterdir()} == before


def test_outputs_may_lie_beside_the_csv(train_flags, data_dir, tmp_path):
    """They were refused with "would write into .", though nothing would have been replaced."""
    shutil.copytree(data_dir, tmp_path / "data")
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    call_script("train.py", *train_flags, "--data-dir", "metadata.csv", "--output-dir", ".", cwd=tmp_path / "data")
    flags = ("--data-csv", "metadata.csv", "--checkpoint", "vqa_checkpoint.pt", "--results-dir", ".", "--num-pictures", 1)
    call_script("test.py", *flags, cwd=tmp_path / "data")
    assert (tmp_path / "data/index.html").is_file() and (tmp_path / "data/last.pt").is_file()
    assert all(path.read_bytes() == content for path, content in before.items())


def test_results_are_not_written_among_the_images(stage_one, data_dir, tmp_path):
    """Without a question_id the first picture is 0.png, a name that one's own images may have."""
    shutil.copytree(data_dir / "images", tmp_path / "photos")
    (tmp_path / "own.csv").write_text("image_path,question\nphotos/0001.png,What?\n")
    flags = ("--checkpoint", stage_one / "vqa_checkpoint.pt", "--data-csv", "own.csv", "--results-dir", "photos")
    error = call_script("test.py", *flags, expect=2, cwd=tmp_path)
    assert "--results-dir photos would write into photos, which image_path names" in error


def test_a_device_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="fifo exists and is no regular file"), atomic_write(tmp_path / "fifo"):
        pass
    assert (tmp_path / "fifo").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_a_lock_blocks_only_as_long_as_its_process_runs(train_flags, tmp_path):
    """A killed run leaves its .lock file behind: the file alone must not block the next run."""
    (tmp_path / "run").mkdir()
    code = ("import time; from common.files import file_lock\n"
            "with file_lock('.lock', 'held'): print('locked', flush=True); time.sleep(100)")
    holder = start("-c", code, cwd=tmp_path / "run")
    assert holder.stdout.readline() == "locked\n"
    command = ["train.py", *train_flags, "--output-dir", "run"]
    assert "another run is writing to run" in call_script(*command, expect=2, cwd=tmp_path)
    holder.kill()
    holder.communicate()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    call_script(*command, cwd=tmp_path)
    assert not (tmp_path / "run/.lock").exists()


def test_only_one_of_many_processes_holds_a_lock(tmp_path):
    """The lock file is removed at the end: a process that opened it before must not hold a lock that nobody else sees."""
    code = ("import os, time; from common.files import file_lock\n"
            "end = time.time() + 1\n"
            "while time.time() < end:\n"
            "    try:\n"
            "        with file_lock('.lock', 'held'):\n"
            "            os.close(os.open('holder', os.O_CREAT | os.O_EXCL)); os.unlink('holder'); print('.', end='')\n"
            "    except ValueError: pass\n")
    processes = [start("-c", code, cwd=tmp_path) for _ in range(3)]
    assert all(process.communicate(timeout=60)[0] and process.returncode == 0 for process in processes)
    assert not list(tmp_path.iterdir())


def test_names_with_spaces_and_other_letters_work(train_flags, data_dir, tmp_path):
    folder = tmp_path / "Übung 1 – données"
    os.symlink(data_dir, tmp_path / "dátá folder")
    common = ["--data-dir", "dátá folder", "--cache-dir", folder / "cache dir"]
    call_script("train.py", *train_flags, *common, "--output-dir", folder / "stage 1", cwd=tmp_path)
    call_script("test.py", *common, "--checkpoint", folder / "stage 1/vqa_checkpoint.pt", "--results-dir", folder / "résultats",
                "--results-csv", folder / "r 1.csv", "--metrics-json", folder / "m 1.json", cwd=tmp_path)
    assert json.loads((folder / "m 1.json").read_text(encoding="utf-8"))["num_questions"] == 30
    assert (folder / "résultats/index.html").is_file()
