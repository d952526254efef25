"""Language-model training of the demo's small GPT-2, and its byte-pair tokenizer, on questions about pretraining scenes."""
import random

import torch
from tqdm import tqdm

from demo.questions import background_questions, long_questions, short_questions, vague_questions
from demo.world import sample_partition

END = "<|endoftext|>"
VOCAB_SIZE = 512
QUESTIONS_PER_TEXT = 4        # all about one scene, so that earlier questions help to predict later ones
CONTEXT = 64
LOG_EVERY = 50                # steps
MODEL = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": CONTEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0}


def question_texts(number, seed):
    """`number` texts. Each has QUESTIONS_PER_TEXT questions about one pretraining scene."""
    texts = []
    for index in range(number):
        rng = random.Random(f"questions {seed}:{index}")
        scene = sample_partition(rng, demo=False)
        asked = [*long_questions(scene), *background_questions(scene), *short_questions(scene, rng),
                 *vague_questions(scene, rng)]
        texts.append(" ".join(rng.choice(rng.choice(asked).wordings) for _ in range(QUESTIONS_PER_TEXT)))
    return texts


def train_tokenizer(texts):
    """A transformers tokenizer: byte-level BPE as in GPT-2, with at most VOCAB_SIZE tokens, learned from `texts`."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2TokenizerFast
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCAB_SIZE, min_frequency=2, special_tokens=[END], show_progress=False)
    return GPT2TokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, unk_token=END,
                             model_max_length=CONTEXT)


def train_gpt2(texts, held_out, cfg, log):
    """Train on `texts`. Returns the language model and its tokenizer. Calls `log(row)` every LOG_EVERY steps.

    `cfg`: the Config of pretrain_encoders.py.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(cfg.seed)
    steps = cfg.gpt2_steps
    tokenizer = train_tokenizer(texts)
    end = tokenizer.convert_tokens_to_ids(END)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **MODEL))
    ids, held_out_ids = (encode(tokenizer, part, end) for part in (texts, held_out))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.gpt2_learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.gpt2_learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(cfg.seed)
    total = 0.0
    bar = tqdm(range(1, steps + 1), desc="GPT-2", unit="step")
    for step in bar:
        loss = lm_loss(model, ids[torch.randint(len(ids), (cfg.gpt2_batch_size,), generator=generator)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % LOG_EVERY == 0 or step == steps:
            with torch.no_grad():
                held_out_loss = lm_loss(model, held_out_ids).item()
            log({"step": step, "loss": total / ((step - 1) % LOG_EVERY + 1), "held_out_loss": held_out_loss})
            bar.set_postfix(held_out=f"{held_out_loss:.3f}")
            total = 0.0
    return model, tokenizer


def encode(tokenizer, texts, end):
    """Ids (N, CONTEXT) of END, text, END. The rest of a row is -100, which the loss ignores."""
    rows = torch.full((len(texts), CONTEXT), -100)
    for number, encoded in enumerate(tokenizer(texts)["input_ids"]):
        row = [end, *encoded, end][:CONTEXT]
        rows[number, :len(row)] = torch.tensor(row)
    return rows


def lm_loss(model, labels):
    """Mean cross-entropy of the next token in nats. `labels`: ids (B, L), -100 for padding."""
    labels = labels[:, :int((labels != -100).sum(1).max())]
    return model(input_ids=labels.clamp(min=0), labels=labels).loss
