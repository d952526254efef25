"""A page that answers questions about an image and shows why, as `python test.py --explain` does. Needs requirements-app.txt.

Reads a checkpoint. Listens on this machine only, unless --host says otherwise, and sends nothing elsewhere. Uploaded images
are deleted when it ends. The model is loaded once; questions are answered one after the other.
"""
import html
import os
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

from common import settings  # first: before torch
from common.images import UNREADABLE, open_image
from demo.drawing import draw_scene
from demo.make_scenes import JPEG_QUALITY, demo_scene, image_ids_of, make_questions
from evaluation.drawing import draw_explanation
from evaluation.generation import load
from evaluation.relevance import explain
from features.trained_model import CheckpointConfig
from preprocess import data_folder, read_rows, rows_of_split

NUM_EXAMPLES, SEED = 6, 42
INTRODUCTION = """# Ask about an image
The model knows images and questions like the examples. Confidence: its probability for the whole answer."""
STYLE = """
#answer { min-height: 7.5rem; padding-top: 1.5rem } #answer p { margin: 0 } #why { padding-top: 1.7rem }
#answer strong { font-size: 1.6rem; line-height: 1.3 } #examples td .container { width: 3rem; height: 3rem }
@media (max-width: 700px) { #sides > div { display: contents } #examples { order: 1 } }  /* on a phone examples come last */
"""


@dataclass
class Config(CheckpointConfig):
    checkpoint: str = "demo/vqa_checkpoint.pt"
    """the model"""
    data_dir: str | None = None
    """folder or CSV whose test split gives the examples; without it they are scenes of the demo's test split"""
    host: str = "127.0.0.1"
    """address to listen on; with 0.0.0.0 other machines can ask too"""
    port: int = 7860
    """port to listen on"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""


def data_examples(data_dir):
    """[image file, question] of random rows of the test split, at most one per image."""
    rows = rows_of_split(read_rows(data_dir, need_answers=False), "test").drop_duplicates("image_path")
    rows = rows.sample(min(NUM_EXAMPLES, len(rows)), random_state=SEED)
    files = [data_folder(data_dir) / path for path in rows["image_path"]]
    return [[str(file), question] for file, question in zip(files, rows["question"], strict=True) if file.is_file()]


def scene_examples(folder):
    """[image file, question] of the first scenes in the demo's test split. They are drawn into `folder`."""
    examples = []
    for image_id in image_ids_of("test")[:NUM_EXAMPLES]:
        scene, rng = demo_scene(SEED, image_id)
        examples.append([str(folder / f"{image_id}.jpg"), make_questions(image_id, scene, rng)[0]["question"]])
        draw_scene(scene).save(examples[-1][0], quality=JPEG_QUALITY)
    return examples[::-1]  # the model gets the last one right and the first one wrong


def describe(answer):
    """The answer as HTML: its words, confidence and gate. The picture shows the rest."""
    gate = "" if answer.gate is None else f" · gate {answer.gate:.2f} (weight of the image in the mix)"
    return (f"<p><strong>{html.escape(answer.text or '(no words)')}</strong></p>"
            f"<p>confidence {answer.confidence:.2f}{gate}</p>")


def build_page(gr, answerer, examples):
    """The page. gr: the module gradio. examples: list of [image file, question]."""
    def ask(upload, question):
        """Yield (answer as HTML, drawn explanation): first without the explanation, which takes longer."""
        path = upload["path"] if upload else ""
        try:
            if not path or not question.strip():
                raise ValueError("Type a question about the image." if path else "Choose an image." if question.strip() else
                                 "Choose an image and type a question about it.")
            # gradio checks only paths that come with `meta`. The same words whether or not there is such a file
            if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(os.environ["GRADIO_TEMP_DIR"])):
                raise ValueError("This is no uploaded image.")
            image = open_image(path)
        except UNREADABLE as error:
            yield f'<p role="alert">{html.escape(str(error).replace(path, Path(path).name))}</p>', None
            return
        answer = describe(answerer(image, question))
        yield answer, None
        yield answer, draw_explanation(explain(answerer, image, question))

    with gr.Blocks(title="Ask about an image", analytics_enabled=False) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row(elem_id="sides"):
            with gr.Column():
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=300, buttons=[])
                question = gr.Textbox(label="Question", placeholder=examples[0][1] if examples else "", max_length=300,
                                      elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                below = gr.Column(elem_id="examples")
            with gr.Column():
                answer = gr.HTML(label="Answer", show_label=True, container=True, elem_id="answer")
                why = gr.Image(label="Why this answer", interactive=False, format="png", buttons=["fullscreen"], elem_id="why",
                               alt_text="The regions and words that the answer depends on")
        with below:
            chosen = gr.Examples(examples, [image, question]).load_input_event
        # without gradio's preprocessing, as `open_image` reads more kinds of images, and says what is wrong with one
        call = {"fn": ask, "inputs": [image, question], "outputs": [answer, why], "preprocess": False,
                "show_progress_on": why, "trigger_mode": "always_last"}
        gr.on([button.click, question.submit], **call, api_name="ask")
        chosen.then(**call, api_visibility="private")
    return page


def require_free_port(host, port):
    """Raise OSError of one line if the page cannot listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} ({error}): choose another --port or --host") from error


def main(cfg):
    settings.check_ranges(cfg, port=(1, 65535))
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError(f"gradio cannot be imported ({error}): pip install -r requirements-app.txt") from error
    require_free_port(cfg.host, cfg.port)
    answerer = load(cfg.checkpoint, cfg.device, cfg)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where uploads lie
        os.environ["no_proxy"] = f"localhost,{cfg.host},{os.environ.get('no_proxy', '')}"  # gradio asks the page if it runs
        examples = data_examples(cfg.data_dir) if cfg.data_dir else scene_examples(Path(folder))
        page = build_page(gr, answerer, examples)
        page.launch(server_name=cfg.host, server_port=cfg.port, share=False, quiet=True, prevent_thread_lock=True,
                    footer_links=[], run_history=False, max_file_size="100mb", css=STYLE, theme=gr.themes.Default(
                        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]))
        print(f"open {page.local_url} in a browser; Ctrl-C ends the page", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    settings.run(main, Config)
