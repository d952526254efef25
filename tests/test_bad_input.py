"""What users really have on their disks: odd pictures, odd CSVs, odd settings. A right result or one clear line."""
import json
import os
import re
import struct

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common.images import open_image
from evaluation.generation import answer_image
from features.encoders import ImageEncoder
from features.pixels import decode_images
from preprocess import read_rows

RED_ABOVE_BLUE = np.concatenate([np.full((20, 40, 3), (220, 30, 30), np.uint8), np.full((20, 40, 3), (30, 30, 220), np.uint8)])


def is_red_above_blue(picture):
    """Whether the upper half of a Pillow picture or of pixels (3, S, S) is red and the lower half blue."""
    pixels = np.asarray(picture).astype(int)
    pixels = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
    upper, lower = pixels[len(pixels) // 4], pixels[-1 - len(pixels) // 4]
    return bool((upper[:, 0] > upper[:, 2] + 60).all() and (lower[:, 2] > lower[:, 0] + 60).all())


def save_odd(name, path):
    """Write the same picture in an odd form; returns where it is."""
    picture = Image.fromarray(RED_ABOVE_BLUE)
    if name == "turned by EXIF":
        exif = Image.Exif()
        exif[274] = 6  # to be shown turned by 90 degrees clockwise
        picture.rotate(90, expand=True).save(path / "a.jpg", exif=exif, quality=95)
        return path / "a.jpg"
    if name == "png named jpg":
        picture.save(path / "a.png")
        return (path / "a.png").rename(path / "a.jpg")
    if name == "four colours":
        picture.convert("CMYK").save(path / "a.jpg", quality=95)
        return path / "a.jpg"
    if name == "palette with transparency":
        picture.quantize(8).save(path / "a.png", transparency=7)
        return path / "a.png"
    if name == "animated":
        picture.save(path / "a.gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "green")])
        return path / "a.gif"
    if name == "animated webp":
        picture.save(path / "a.webp", save_all=True, append_images=[Image.new("RGB", (40, 40), "green")], lossless=True)
        return path / "a.webp"
    if name == "transparent":
        picture.convert("RGBA").save(path / "a.png")
        return path / "a.png"
    picture.save(path / name)
    return path / name


ODD = ["turned by EXIF", "png named jpg", "four colours", "palette with transparency", "animated", "animated webp",
       "transparent", "a picture, with spaces & ünïcödé.png"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_odd_pictures_look_the_same_in_training(decoder, name, encoders, tmp_path):
    path = save_odd(name, tmp_path)
    store = decode_images(tmp_path, [path.name], encoders.image, tmp_path / "cache", 1, decoder)
    assert not store.unreadable and is_red_above_blue(store.pixels[0])
    assert is_red_above_blue(open_image(path)), "the gallery's picture"


@pytest.mark.parametrize("entry", [(0x11a, 2, b"ab\0\0"), (0x10f, 11, b"ab\0\0"), (0x14a, 1, b"ab\0\0")],
                         ids=["a resolution of letters", "a maker that is a number", "a folder that is none"])
def test_a_damaged_exif_block_does_not_lose_the_picture_nor_its_turn(entry, tmp_path):
    """Turning with Pillow's exif_transpose writes the block anew, which raises TypeError and more for these."""
    tag, kind, value = entry
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, 1) + value
    block = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    Image.fromarray(RED_ABOVE_BLUE).rotate(90, expand=True).save(tmp_path / "a.jpg", exif=block, quality=95)
    assert is_red_above_blue(open_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_look_the_same_in_answering(name, encoders, make_model, tmp_path, monkeypatch):
    """One question about one picture goes through the same door as training."""
    from common.device import Precision
    from vocab import Vocab
    seen, true_normalize = [], ImageEncoder.normalize
    monkeypatch.setattr(ImageEncoder, "normalize", lambda self, pixels: seen.append(pixels) or true_normalize(self, pixels))
    vocab = Vocab(["<pad>", "<start>", "<end>", "<unk>", "red", "blue"])
    answer_image(save_odd(name, tmp_path), "What is above?", make_model(vocab_size=6), encoders, vocab,
                   {"question_max_len": 16, "answer_max_len": 4}, Precision("cpu"))
    assert is_red_above_blue(seen[0][0])


def test_sixteen_bit_grey_is_not_saturated(tmp_path):
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "a.png")
    assert abs(int(np.asarray(open_image(tmp_path / "a.png"))[0, 0, 0]) - 30000 // 257) <= 1


def test_one_pixel_is_a_picture(encoders, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    store = decode_images(tmp_path, ["a.png"], encoders.image, tmp_path / "cache", 1)
    assert (store.pixels[0, 0] == 255).all()


def spoil(name, path):
    """Make `path` something that cannot be read as a picture; returns the reason that is to be named."""
    if name == "a folder":
        path.mkdir()
        return "missing"
    if name == "a broken link":
        path.symlink_to("nowhere.png")
        return "missing"
    if name == "zero bytes":
        path.touch()
        return "cannot identify"
    if name == "a web page":
        path.write_text("<!doctype html><title>404</title>")
        return "cannot identify"
    if name == "truncated":
        Image.effect_noise((60, 60), 90).save(path)
        path.write_bytes(path.read_bytes()[:-400])
        return "truncated"
    Image.new("1", (30_000, 30_000)).save(path)
    return "pixels"


BROKEN = ["a folder", "a broken link", "zero bytes", "a web page", "truncated", "far too large"]


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_what_is_no_picture_is_named_with_its_reason(decoder, name, encoders, tmp_path):
    reason = spoil(name, tmp_path / "a.png")
    with pytest.raises(ValueError, match=re.escape("1 of 1 pictures cannot be read") + ".*" + re.escape(reason)):
        decode_images(tmp_path, ["a.png"], encoders.image, tmp_path / "cache", 1, decoder)
    assert not list((tmp_path / "cache").glob("*")), "a partial store was left"


@pytest.mark.parametrize("name", BROKEN)
def test_asking_about_what_is_no_picture_is_one_line(name, encoders, make_model, tmp_path):
    spoil(name, tmp_path / "a.png")
    with pytest.raises((ValueError, OSError), match="--image .*a.png"):
        answer_image(tmp_path / "a.png", "What?", make_model(), encoders, None, {}, None)


def write_own(folder, text, encoding="utf-8"):
    path = folder / "own.csv"
    path.write_bytes(text.encode(encoding))
    return path


LONG = "word " * 10_000


@pytest.mark.parametrize(("text", "encoding", "expected"), [
    ("image_path,question,answer\na.jpg,q,x\n", "utf-8-sig", ["x"]),
    ("image_path,question,answer\r\na.jpg,q,x\r\nb.jpg,q,y\r\n", "utf-8", ["x", "y"]),
    ('image_path,question,answer\na.jpg,"two\nlines","a\r\nb"\n', "utf-8", ["a\r\nb"]),
    ("image_path;question;answer\na.jpg;one, two;x\n", "utf-8", ["x"]),
    ("image_path\tquestion\tanswer\na.jpg\tq\tx\n", "utf-8", ["x"]),
    ("note,answer,question,image_path\nhello,x,q,a.jpg\n", "utf-8", ["x"]),
    ("image_path,question,answer\na.jpg,q,=1+1\nb.jpg,q,@cmd\n", "utf-8", ["=1+1", "@cmd"]),
    ("image_path,question,answer\na.jpg,q,😀 כלב كلب\n", "utf-8", ["😀 כלב كلب"]),
    (f"image_path,question,answer\na.jpg,q,{LONG}\n", "utf-8", [LONG]),
    ("image_path,question,answer\n\na.jpg,q,x\n\n", "utf-8", ["x"]),
    ("image_path,question,answer\na.jpg,q,n/a\na.jpg,q,NULL\n", "utf-8", ["n/a", "NULL"]),
], ids=["byte order mark", "CRLF", "quoted line breaks", "semicolons", "tabs", "other order and more columns", "formulas",
        "emoji and right to left", "ten thousand words", "empty lines", "looks missing"])
def test_csvs_as_people_have_them(text, encoding, expected, tmp_path):
    assert read_rows(write_own(tmp_path, text, encoding))["answer"].tolist() == expected


@pytest.mark.parametrize(("text", "encoding", "message"), [
    ("image_path,question,answer\na.jpg,q,x\n", "utf-16", "not a UTF-8 CSV"),
    ("image_path,question,answer\na.jpg,q,\xe9\n", "latin-1", "save it as CSV in UTF-8"),
    ("image_path,question,answer\na.jpg,q,x\0y\n", "utf-8", "NUL"),
    ("image_path,question,answer\na.jpg,q\n", "utf-8", "line 2: 2 cells, the header has 3"),
    ("image_path,question,answer\na.jpg,q,x,y\n", "utf-8", "line 2: 4 cells, the header has 3"),
    ('image_path,question,answer\na.jpg,"q,x\n', "utf-8", "line 2: unexpected end of data"),
    ("image_path,question,answer,answer\na.jpg,q,x,y\n", "utf-8", "the column 'answer' twice"),
    ("image_path,question,answer\n", "utf-8", "no row with question and answer"),
    ("", "utf-8", "is empty"),
    ("image_path,question,answer\n/etc/passwd,q,x\n", "utf-8", "does not lie inside"),
    ("image_path,question,answer\na/../../b.jpg,q,x\n", "utf-8", "does not lie inside"),
    ("image_path,question,answer\n..\\b.jpg,q,x\n", "utf-8", "does not lie inside"),
    ("question_id,image_path,question,answer\n7,a.jpg,q,x\n7,b.jpg,q,x\n", "utf-8", "question_id '7' occurs twice"),
], ids=["utf-16", "latin-1", "NUL", "too few cells", "too many cells", "open quote", "column twice", "no rows", "empty file",
        "absolute path", "path that leaves", "path that leaves by backslash", "question id twice"])
def test_bad_csvs_end_in_one_clear_line(text, encoding, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_rows(write_own(tmp_path, text, encoding))
    assert "own.csv" in str(error.value)


@pytest.mark.parametrize("content", [
    '[{"question_id": "0"', "{}", '"text"', "[1, 2]", "[" * 100_000, '[{"question": "q"}]',
    '[{"question_id": 0, "answers": "x"}]', '[{"question_id": 0, "answers": ["x", 3]}]', "null",
    '[{"question_id": 0, "answers": {"answer": "x"}}]'],
    ids=["cut off", "an object", "a text", "numbers", "deep", "no ids", "answers a text", "an answer a number", "null",
         "answers an object"])
def test_a_qa_pairs_json_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "metadata.csv").write_text("question_id,image_path,question,answer\n0,a.jpg,q,x\n")
    (tmp_path / "qa_pairs.json").write_text(content)
    if content == "{}":  # no entry: nothing to add, nothing to contradict
        assert read_rows(tmp_path)["answers"].tolist() == [["x"]]
        return
    with pytest.raises(ValueError, match="qa_pairs.json is not what mini_vqa_v2.py writes"):
        read_rows(tmp_path)


def test_the_words_of_a_ten_thousand_word_answer_are_cut_and_counted(capsys):
    from preprocess import report_answers
    from vocab import Vocab
    rows = pd.DataFrame({"answer": ["a cat", LONG], "split": "train"})
    report_answers(rows, Vocab.build(rows["answer"]), 16)
    assert "2 rows, 1 cut to 15 words" in capsys.readouterr().out


def test_all_rows_in_one_split_says_what_is_missing(run_script, encoder_flags, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    lines = [f"a.png,what is {number}?,answer {number % 3}" for number in range(30)]
    (tmp_path / "own.csv").write_text("\n".join(["image_path,question,answer", *lines]))
    error = run_script("train.py", "--data-dir", tmp_path / "own.csv", *encoder_flags, cwd=tmp_path, expect=2).stderr
    assert "no rows in the split" in error and error.count("\n") == 1


@pytest.mark.parametrize(("script", "flags", "message"), [
    ("train.py", ["--learning-rate", "nan"], "--learning-rate nan"),
    ("train.py", ["--learning-rate", "-1"], "--learning-rate -1"),
    ("train.py", ["--weight-decay", "inf"], "--weight-decay inf"),
    ("train.py", ["--batch-size", "0"], "--batch-size 0"),
    ("train.py", ["--batch-size", "-3"], "--batch-size -3"),
    ("train.py", ["--hidden-size", "1000000"], "--hidden-size 1000000"),
    ("train.py", ["--num-layers", "1000"], "--num-layers 1000"),
    ("train.py", ["--epochs", "1000000000"], "--epochs 1000000000"),
    ("train.py", ["--seed", "-1"], "--seed -1"),
    ("train.py", ["--seed", str(10 ** 30)], "--seed 1000"),
    ("train.py", ["--workers", "-1"], "--workers -1"),
    ("train.py", ["--dropout", "1"], "--dropout 1"),
    ("train.py", ["--capture"], "--capture"),
    ("fine_tune.py", ["--clip-learning-rate", "0"], "--clip-learning-rate 0"),
    ("fine_tune.py", ["--clip-layers", "-1"], "--clip-layers -1"),
    ("test.py", ["--beam-size", "0"], "--beam-size 0"),
    ("test.py", ["--num-pictures", "-1"], "--num-pictures -1"),
    ("test.py", ["--image", "a.png", "--question", " "], "--question"),
    ("test.py", ["--image", "a.png", "--question", "a \udcff"], "--question"),
    ("test.py", ["--image", "a.png", "--question", "What?", "--data-csv", "a.csv"], "--image and --data-csv"),
    ("test.py", ["--compare", "nowhere.csv", "b.csv"], "--compare nowhere.csv"),
], ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_absurd_settings_are_one_line(script, flags, message, run_script, encoder_flags, data_dir, tmp_path):
    needed = [*encoder_flags, "--data-dir", data_dir] if script == "train.py" else []
    error = run_script(script, *needed, *flags, cwd=tmp_path, expect=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "output" / "feature_extraction" / "vqa_checkpoint.pt").exists()


def test_an_output_that_cannot_be_written_is_one_line(run_script, encoder_flags, data_dir, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    error = run_script("train.py", *encoder_flags, "--data-dir", data_dir, "--output-dir", "file/run", "--epochs", 1,
                       cwd=tmp_path, expect=2).stderr
    assert error.startswith("error: ") and error.count("\n") == 1 and "file" in error


def test_names_with_spaces_and_other_letters_work(run_script, encoder_flags, data_dir, tmp_path):
    folder = tmp_path / "Übung 1 – données"
    os.symlink(data_dir, tmp_path / "dátá folder")
    common = ["--data-dir", "dátá folder", "--cache-dir", folder / "cache dir"]
    run_script("train.py", *encoder_flags, *common, "--epochs", 1, "--hidden-size", 16, "--output-dir", folder / "stage 1",
               cwd=tmp_path)
    run_script("test.py", *common, "--checkpoint", folder / "stage 1/vqa_checkpoint.pt", "--results-dir", folder / "résultats",
               "--results-csv", folder / "r 1.csv", "--metrics-json", folder / "m 1.json", cwd=tmp_path)
    assert json.loads((folder / "m 1.json").read_text(encoding="utf-8"))["num_questions"] == 30
    assert (folder / "résultats/index.html").is_file()


def test_caches_and_checkpoints_are_never_unpickled(tmp_path):
    """An array of objects, and a checkpoint of objects, are what a malicious file would be."""
    from features.arrays import open_array
    from training.checkpoint import read_checkpoint
    np.save(tmp_path / "states.npy", np.array([{"a": 1}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        open_array(tmp_path / "states.npy", 2)
    torch.save({"weights": type("Evil", (), {"__reduce__": lambda self: (print, ("executed",))})()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "c.pt")
