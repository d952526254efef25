"""The pictures with answers, the contact sheet and the gallery page; the page is also driven in headless Chromium."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import Browser, missing_browser
from PIL import Image, ImageDraw

from evaluation import gallery
from evaluation.results import file_name

ROOT = Path(__file__).parents[1]
ATTACK = """<img src=x onerror="window.hacked=1"> </script><script>window.hacked=1</script> <!-- & ' "\u2028"""
KINDS = ("what color is the", "how many", "where is the")


def make_row(folder, number=0, **changes):
    """One answered question; picture number % 5, every third right, every third partly right, every third wrong."""
    picture = folder / f"{number % 5}.jpg"
    if not picture.exists():
        Image.new("RGB", (400, 300), (40 * (number % 5), 120, 90)).save(picture)
    prediction = ("black and white", "black and brown", "a cat")[number % 3]
    exact, bleu = (100.0 if number % 3 == 0 else 0.0), (100.0, 55.0, 8.0)[number % 3]
    row = {"question_id": str(1000 + number), "image_id": str(number % 5), "image_path": f"images/{number % 5}.jpg",
           "picture_file": picture, "question": f"What color is thing {number}?", "answer": "black and white",
           "answers": ["black and white"] * 7 + ["white and black"] * 3, "prediction": prediction,
           "sentence_bleu": bleu, "exact_match": exact, "vqa_accuracy": exact, "confidence": (number * 37 % 101) / 101,
           "gate": 0.62, "question_type": KINDS[number % 3], "answer_type": "other" if number % 4 else "number"}
    return row | changes


def make_rows(folder, num_rows):
    return [make_row(folder, number) for number in range(num_rows)]


def unscored(row):
    return row | {"answer": "", "answers": [], "sentence_bleu": None, "exact_match": None, "vqa_accuracy": None,
                  "gate": None, "question_type": "", "answer_type": ""}


def make_metrics():
    def table(value):
        entry = {"value": value, "ci95": [value - 2, value + 2]}
        return {"mean_sentence_bleu": entry, "exact_match": entry}
    return {"checkpoint": "output/x.pt", "split": "test", "num_questions": 60, "num_images": 5, "signature": "v:2",
            "scores": table(60.0), "floors": {"most_frequent": table(30.0), f"<b>{ATTACK}": table(20.0)},
            "ceilings": {"human": table(80.0), "vocabulary": None},
            "by_answer_type": {"other": {"n": 45, **table(61.0)}}, "by_question_type": {},
            "verdict": "beats the strongest floor (most_frequent) by 30.0"}


def page_data(results_dir):
    page = (results_dir / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


@pytest.mark.parametrize(("exact", "bleu", "accuracy", "expected"), [
    (100.0, 100.0, 100.0, "right"), (100.0, 0.0, 0.0, "right"), (0.0, 30.0, 0.0, "partly"), (0.0, 29.9, 0.0, "wrong"),
    (0.0, 0.0, 0.1, "partly"), (0.0, 0.0, 0.0, "wrong"), (None, None, None, None)])
def test_grade(exact, bleu, accuracy, expected):
    assert gallery.grade({"exact_match": exact, "sentence_bleu": bleu, "vqa_accuracy": accuracy}) == expected


def test_partly_lies_between_sharing_one_word_of_three_and_sharing_two():
    sacrebleu = pytest.importorskip("sacrebleu")
    bleu = sacrebleu.metrics.BLEU(effective_order=True, lowercase=True)
    one_word = bleu.sentence_score("black and white", ["red and blue"]).score
    two_apart, two_together = (bleu.sentence_score(text, ["black and white"]).score
                               for text in ("black or white", "black and brown"))
    assert one_word < gallery.PARTLY_BLEU < two_apart < two_together


@pytest.mark.parametrize("text", ["short", "several words that need more than one line to be shown here", "x" * 200,
                                  "a\tb\nc\x00d", "\ud800 lone surrogate", "ما هو الشيء الموجود على الطاولة", "",
                                  "😀 👨‍👩‍👧 红色的书"])
def test_wrap_keeps_every_character_and_stays_within_the_width(text):
    font = gallery._font(24)
    lines = gallery.wrap(text, font, 150, 1000)
    assert all(font.getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == re.sub(r"[\s\x00\ud800]", "", text)


def test_wrap_says_that_it_cut():
    font = gallery._font(24)
    lines = gallery.wrap("one two three four five six seven eight nine ten", font, 150, 2)
    assert len(lines) == 2 and lines[-1].endswith("…") and font.getlength(lines[-1]) <= 150


@pytest.fixture
def written(monkeypatch):
    """The texts that the drawing functions write on their pictures."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda self, at, text, **options: (texts.append(text), draw_text(self, at, text, **options))[1])
    return texts


@pytest.mark.parametrize(("number", "mark"), [(0, "✓ right"), (1, "≈ partly right"), (2, "✗ wrong")])
def test_prediction_is_never_told_by_colour_alone(tmp_path, written, number, mark):
    row = make_row(tmp_path, number, confidence=0.417)
    gallery.draw_prediction(row, tmp_path / "7.png")
    for expected in (row["question"], row["prediction"], mark, "confidence 0.42", "10 humans", "7", "white and black",
                     "3"):
        assert expected in written
    with Image.open(tmp_path / "7.png") as picture:
        colours = {colour for _, colour in picture.getcolors(1 << 24)}
    assert tuple(bytes.fromhex(gallery.GRADES[gallery.grade(row)][2][1:])) in colours


def test_prediction_without_references_shows_no_mark(tmp_path, written):
    gallery.draw_prediction(unscored(make_row(tmp_path, prediction="")), tmp_path / "7.png")
    assert "No human answers" in written and "(no words)" in written
    assert not [text for text in written if text[:1] in "✓≈✗"]


def write_odd_pictures(folder):
    """One file of every kind that people have: name -> the size at which it is upright."""
    photo = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=turned)
    Image.new("I;16", (300, 200), 30000).save(folder / "sixteen.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("P").save(folder / "palette.gif")
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save(folder / "glass.png")
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    Image.new("RGB", (3000, 3), "red").save(folder / "wide.png")
    Image.new("RGB", (3, 3000), "red").save(folder / "tall.png")
    return {"turned.jpg": (200, 300), "sixteen.png": (300, 200), "cmyk.jpg": (300, 200), "palette.gif": (300, 200),
            "glass.png": (300, 200), "dot.png": (1, 1), "wide.png": (3000, 3), "tall.png": (3, 3000)}


def test_odd_pictures_and_texts_in_every_output(tmp_path):
    sizes = write_odd_pictures(tmp_path)
    texts = ("word ", "x", "ما هو ", "😀", "\x00", "\ud800", "", "红")
    rows = [make_row(tmp_path, image_path=name, picture_file=tmp_path / name, question=text * 30, prediction=text)
            for name, text in zip(sizes, texts, strict=True)]
    gallery.draw_overview(rows, tmp_path / "overview.png", columns=3)
    gallery.write_gallery(rows, None, tmp_path / "results")
    for row in rows:
        gallery.draw_prediction(row, tmp_path / "one.png")
        with Image.open(tmp_path / "one.png") as picture:
            assert picture.width == gallery.PICTURE_WIDTH and 250 < picture.height < 2000
    for row, shown in zip(rows, page_data(tmp_path / "results")["rows"], strict=True):
        with Image.open(tmp_path / "results" / shown["thumbnail"]) as thumbnail:
            assert max(thumbnail.size) <= gallery.THUMBNAIL_SIZE
            width, height = sizes[row["image_path"]]
            assert (thumbnail.width > thumbnail.height) == (width > height), "not upright"
            middle = thumbnail.convert("L").getpixel((thumbnail.width // 2, thumbnail.height // 2))
        if row["image_path"] == "sixteen.png":
            assert abs(middle - 30000 / 257) < 4  # 255 once: 16 bits saturated
        if row["image_path"] == "glass.png":
            assert middle > 250


def test_overview_has_the_asked_columns_and_refuses_nothing_to_draw(tmp_path):
    rows = make_rows(tmp_path, 5)
    widths = []
    for columns in (2, 4, 9):
        gallery.draw_overview(rows, tmp_path / "overview.png", columns=columns)
        with Image.open(tmp_path / "overview.png") as picture:
            widths.append((picture.width - gallery.CELL_GAP) / (gallery.CELL_WIDTH + gallery.CELL_GAP))
    assert widths == [2, 4, 5]
    with pytest.raises(ValueError, match="--num-pictures"):
        gallery.draw_overview([], tmp_path / "overview.png")


def test_unreadable_picture_is_named_and_the_old_page_stays(tmp_path):
    rows = make_rows(tmp_path, 3)
    gallery.write_gallery(rows, None, tmp_path / "results")
    before = (tmp_path / "results" / "index.html").read_bytes()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 this is no photo")
    rows.append(make_row(tmp_path, 3, image_path="broken.jpg", picture_file=tmp_path / "broken.jpg"))
    with pytest.raises(OSError, match=r"broken\.jpg cannot be read"):
        gallery.write_gallery(rows, None, tmp_path / "results")
    with pytest.raises(OSError, match=r"broken\.jpg cannot be read"):
        gallery.draw_prediction(rows[-1], tmp_path / "7.png")
    assert (tmp_path / "results" / "index.html").read_bytes() == before
    assert not (tmp_path / "7.png").exists()


def test_embedded_json_is_the_same_value_and_cannot_end_its_element():
    value = {ATTACK: [ATTACK, "é 红 \u2028 \u2029 \ud800", None, 1.5, True]}
    text = gallery.embed_json(value)
    assert json.loads(text) == value
    assert text.isascii() and not set("<>&") & set(text)
    with pytest.raises(ValueError):
        gallery.embed_json(float("nan"))


def test_page_holds_every_row_and_one_thumbnail_per_picture(tmp_path):
    rows = make_rows(tmp_path, 12)
    rows[4] |= {"question": ATTACK, "prediction": ATTACK, "answers": [ATTACK], "question_id": ATTACK}
    rows[5] |= {"image_path": "../../up.jpg"}
    results = tmp_path / "results"
    gallery.write_gallery(rows, make_metrics(), results)
    page = (results / "index.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert not re.findall(r"(?:src|href)=.?(?:https?:)?//", page)
    assert "SHA256" not in page and "PAGE_DATA" not in page
    data = page_data(results)
    assert [shown["question"] for shown in data["rows"]] == [row["question"] for row in rows]
    assert [shown["grade"] for shown in data["rows"]] == [gallery.grade(row) for row in rows]
    assert data["rows"][0]["answers"] == [["black and white", 7], ["white and black", 3]]
    assert data["verdict"] == "The model beats the strongest floor (most frequent) by 30.0."
    assert data["types"] == [{"name": "answer type: other", "n": 45, "values": [61.0, 61.0]}]
    thumbnails = {str(path.relative_to(results)) for path in results.glob("thumbnails/*")}
    assert {shown["thumbnail"] for shown in data["rows"]} == thumbnails and len(thumbnails) == 6
    assert sorted(path.name for path in results.iterdir()) == ["index.html", "thumbnails"]


def test_thumbnails_of_an_earlier_run_go_and_other_files_stay(tmp_path):
    results = tmp_path / "results"
    gallery.write_gallery(make_rows(tmp_path, 5), None, results)
    (results / "thumbnails" / "my notes.jpg").write_bytes(b"mine")
    gallery.write_gallery(make_rows(tmp_path, 2), None, results)
    assert len(list(results.glob("thumbnails/*"))) == 3
    assert (results / "thumbnails" / "my notes.jpg").read_bytes() == b"mine"


def test_outputs_repeat_byte_for_byte_whatever_the_hash_seed(tmp_path):
    code = ("import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import gallery, test_gallery as t\n"
            "rows = t.make_rows(Path(sys.argv[1]), 8); out = Path(sys.argv[2])\n"
            "gallery.write_gallery(rows, t.make_metrics(), out); gallery.draw_overview(rows, out / 'overview.png')\n"
            "gallery.draw_prediction(rows[0], out / '1.png')")
    make_rows(tmp_path, 5)
    outputs = []
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, tmp_path, tmp_path / seed], cwd=ROOT, check=True, timeout=60,
                       env={**os.environ, "PYTHONHASHSEED": seed, "TQDM_DISABLE": "1"})
        outputs.append({str(path.relative_to(tmp_path / seed)): path.read_bytes()
                        for path in sorted((tmp_path / seed).rglob("*")) if path.is_file()})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 8


@pytest.fixture(scope="module")
def browser():
    reason = missing_browser()
    if reason:
        pytest.skip(reason)
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def scored_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    rows = make_rows(folder, 60)
    rows[7] |= {"question": ATTACK, "prediction": ATTACK, "answers": [ATTACK, ATTACK], "answer": ATTACK,
                "question_id": ATTACK, "question_type": ATTACK, "answer_type": ATTACK}
    gallery.write_gallery(rows, make_metrics(), folder / "results")
    return folder / "results" / "index.html"


QUESTIONS = "return [...document.querySelectorAll('.card h3')].map(e => e.textContent)"
COUNT = "return document.getElementById('count').textContent"
CHOOSE = ("const e = document.querySelector(arguments[0]);"
          "if (e.type === 'radio') e.checked = true; else e.value = arguments[1];"
          "e.dispatchEvent(new Event('input', {bubbles: true}))")


def test_browser_search_and_filters(browser, scored_page):
    browser.open(scored_page)
    assert browser.run(COUNT) == "60 of 60 questions · page 1 of 3"
    assert len(browser.run(QUESTIONS)) == 24
    browser.click("#search")
    browser.keys("6? THING")
    assert browser.run(QUESTIONS) == [f"What color is thing {n}?" for n in (6, 16, 26, 36, 46, 56)]
    assert browser.run(COUNT).startswith("6 of 60 ")
    browser.run(CHOOSE, "[name=grade][value=right]")
    assert browser.run(QUESTIONS) == [f"What color is thing {n}?" for n in (6, 36)]
    assert browser.run("return document.querySelector('[value=wrong]').parentElement.textContent") == "✗ Wrong2"
    browser.run(CHOOSE, "#answer_type", "=number")
    assert browser.run(QUESTIONS) == ["What color is thing 36?"]
    browser.run(CHOOSE, "#question_type", "=how many")
    assert browser.run(QUESTIONS) == [] and "No question fits" in browser.run("return document.body.innerText")
    browser.click(".none button")
    assert browser.run(COUNT).startswith("60 of 60 ")


def test_browser_sorts_by_score_and_confidence(browser, scored_page):
    browser.open(scored_page)
    shown = ("return [...document.querySelectorAll('.card')]"
             ".map(e => +e.querySelectorAll('dd:not(.bar)')[arguments[0]].textContent)")
    for order, column, decreasing in (("best", 2, True), ("worst", 2, False), ("sure", 0, True), ("unsure", 0, False)):
        browser.run(CHOOSE, "#sort", order)
        values = browser.run(shown, column)
        assert values == sorted(values, reverse=decreasing) and len(set(values)) > (1 if column == 0 else 0)
    browser.run(CHOOSE, "#sort", "")
    assert browser.run(QUESTIONS)[0] == "What color is thing 0?"


def test_browser_pages_by_button_and_by_key_but_not_from_the_search_box(browser, scored_page):
    browser.open(scored_page)
    page = "return document.getElementById('page').textContent"
    browser.keys("j")
    browser.keys(browser.RIGHT)
    assert (browser.run(page), len(browser.run(QUESTIONS))) == ("3 / 3", 12)
    browser.keys(browser.RIGHT)
    assert browser.run(page) == "3 / 3"
    browser.keys("k")
    browser.keys(browser.LEFT)
    assert browser.run(page) == "1 / 3"
    browser.run("scrollTo(0, document.body.scrollHeight)")
    browser.click("#next")
    assert browser.run(page) == "2 / 3"
    top = browser.run("return document.getElementById('cards').getBoundingClientRect().top")
    assert 0 < top < 300, "the new page is to be seen from its first card"
    browser.keys("/")
    browser.keys("jk" + browser.RIGHT)
    assert browser.run("return document.getElementById('search').value") == "jk"
    assert browser.run(COUNT).startswith("0 of 60 ")
    browser.keys(browser.ESCAPE)
    assert browser.run(page) == "1 / 3"


def test_browser_shows_hostile_text_as_text(browser, scored_page):
    browser.open(scored_page)
    shown = browser.run("const card = document.querySelectorAll('.card')[7];"
                        "return [card.querySelector('h3').textContent, card.querySelector('.answer span').textContent,"
                        "card.querySelector('.humans span').textContent]")
    assert shown == [ATTACK] * 3
    assert browser.run("return [document.querySelectorAll('#cards img').length, document.querySelectorAll('b').length,"
                       "document.scripts.length]") == [24, 2, 2]
    browser.run("const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
                "document.body.append(s)")
    assert browser.run("return window.hacked") is None, "the page's policy is to stop any script that is not its own"


def test_browser_score_panel_and_pictures(browser, scored_page):
    browser.open(scored_page)
    text = browser.run("return document.getElementById('panel').innerText")
    for expected in ("The model beats the strongest floor", "Mean sentence BLEU", "60.0", "58.0 to 62.0",
                     "most frequent 30.0 · one human 80.0"):
        assert expected in text
    place = "const e = document.querySelector('.score ' + arguments[0]); return [e.style.left, e.style.width]"
    assert [browser.run(place, part) for part in (".band", ".gain", ".ci", ".dot")] == [
        ["30%", "50%"], ["30%", "30%"], ["58%", "4%"], ["60%", ""]]
    browser.wait("return document.querySelector('.card img').naturalWidth === 320")
    assert browser.run("return document.querySelector('.card').innerText.includes('white and black ×3')")


def test_browser_dark_light_and_narrow(browser, scored_page):
    browser.open(scored_page)
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = browser.run(colour)
    browser.click("#theme")
    after = browser.run(colour)
    browser.open(scored_page)
    assert before != after == browser.run(colour), "the choice is to outlast the page"
    browser.click("#theme")
    assert browser.run(colour) == before
    for width in (400, 700, 1000, 1400):
        browser.resize(width, 900)
        assert browser.run("return document.documentElement.scrollWidth") <= width
    unnamed = browser.run("return [...document.querySelectorAll('input, select, button, img')].filter(e => !e.hidden"
                          " && !(e.labels && e.labels.length) && !e.textContent.trim() && !e.alt)"
                          ".map(e => e.outerHTML)")
    assert unnamed == []


def test_browser_without_scores_offers_none(browser, tmp_path):
    rows = [unscored(row) for row in make_rows(tmp_path, 30)]
    gallery.write_gallery(rows, None, tmp_path / "results")
    browser.open(tmp_path / "results" / "index.html")
    hidden = browser.run("return arguments[0].map(id => document.getElementById(id).hidden)",
                         ["panel", "grades", "answer_type", "question_type"])
    assert hidden == [True] * 4
    orders = browser.run("return [...document.getElementById('sort').options].map(o => o.value)")
    assert orders == ["", "sure", "unsure"]
    assert browser.run(COUNT) == "30 of 30 questions · page 1 of 2"
    text = browser.run("return document.querySelector('.card').innerText")
    assert "confidence" in text and "BLEU" not in text and "null" not in text and "NaN" not in text


def test_browser_filters_ten_thousand_rows_without_a_visible_wait(browser, tmp_path):
    gallery.write_gallery(make_rows(tmp_path, 10_000), make_metrics(), tmp_path / "results")
    browser.open(tmp_path / "results" / "index.html")
    timed = f"const start = performance.now(); {CHOOSE}; document.body.offsetHeight; return performance.now() - start"
    waited = browser.run(timed, "#search", "thing 99?")
    assert browser.run(COUNT).startswith("100 of 10,000 ")
    assert waited < 1000  # milliseconds; 1,000 rows are promised, a tenth of this


def test_any_question_id_makes_a_file_name_that_is_its_own():
    assert file_name("262148000") == "262148000"
    assert len({file_name(text) for text in ("a/b", "a_b", "a b", "a:b")}) == 4
    for text in ("問" * 95, "x" * 300, "..", "../../etc/passwd", "\0", "\ud83d"):
        name = file_name(text)
        assert len(name.encode()) <= 120 and "/" not in name and "\0" not in name
