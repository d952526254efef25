"""The model: CLIP encodes the image, GPT-2 encodes the question, a fusion joins them, a GRU generates the answer.

The freeze boundary splits each encoder into two functions. Everything below the boundary is constant:
`encode_*_frozen` is computed once per image or question and stored. `encode_*_trainable` continues from there.

Shapes: B batch, T tokens of an image, Q question tokens, A answer tokens, W width of an encoder,
D_i / D_q width of its feature, H hidden, L GRU layers, V vocabulary, K beam.
"""
import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from vocab import END, PAD, START, UNK

ATTENTION_HEADS = 4


class GatedFusion(nn.Module):
    """A gate per unit mixes image and question. An MLP refines the mix (residual)."""

    def __init__(self, hidden_size, dropout):
        super().__init__()
        self.gate = nn.Linear(2 * hidden_size, hidden_size)
        self.refine = mlp(3 * hidden_size, hidden_size, dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, image, question):
        """image, question (B, H) -> context (B, H), gate (B, H) in 0..1: the weight of the image against the question."""
        pair = torch.cat([image, question], dim=-1)                      # (B, 2H)
        gate = self.weigh(pair)                                          # (B, H)
        mixed = gate * image + (1 - gate) * question                     # (B, H)
        return self.norm(mixed + self.refine(torch.cat([mixed, pair], dim=-1))), gate

    def weigh(self, pair):
        return torch.sigmoid(self.gate(pair))


class ConstantFusion(GatedFusion):
    """The gated fusion with the gate fixed at one half. It shows what the gate alone is worth."""

    def __init__(self, hidden_size, dropout):
        super().__init__(hidden_size, dropout)
        del self.gate  # after drawing its weights: with the same seed all other weights start equal

    def weigh(self, pair):
        return torch.full_like(pair[:, :pair.shape[1] // 2], 0.5)


class ConcatFusion(nn.Module):
    """An MLP over [image; question], without a gate and without the residual mix."""

    def __init__(self, hidden_size, dropout):
        super().__init__()
        self.refine = mlp(2 * hidden_size, hidden_size, dropout)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, image, question):
        """image, question (B, H) -> context (B, H), and NaN (B, H) in place of a gate."""
        context = self.norm(self.refine(torch.cat([image, question], dim=-1)))
        return context, torch.full_like(image, torch.nan)


def of_trainable_dtype(states):
    """States of frozen blocks in float32, the dtype of all other weights. Autocast casts by itself."""
    return states if torch.is_autocast_enabled(states.device.type) else states.float()


def mlp(input_size, hidden_size, dropout):
    return nn.Sequential(nn.Linear(input_size, 2 * hidden_size), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(2 * hidden_size, hidden_size))


# To add a fusion, write a class like those above and name it here. Nothing else needs to change.
FUSIONS = {"gated": GatedFusion, "constant": ConstantFusion, "concat": ConcatFusion}


@dataclass
class ModelConfig:
    """What the model is built from, besides encoders and vocabulary. train.py's flags inherit it, checkpoints hold it."""

    hidden_size: int = 256
    """width of fusion and decoder"""
    num_layers: int = 1
    """GRU layers"""
    dropout: float = 0.3
    """in fusion and decoder, 0 to below 1"""
    question_max_len: int = 32
    """GPT-2 tokens of a question; longer ones are truncated and counted"""
    answer_max_len: int = 16
    """words of an answer plus its end token; longer ones are truncated and counted. The default grows, up to 64, if over 1 %
    of the training answers are longer"""
    inputs: Literal["both", "question", "image"] = "both"
    """what the model may see; `question` is the blind baseline"""
    fusion: Literal[tuple(FUSIONS)] = "gated"
    """how image and question are joined"""
    decoder: Literal["gru", "classifier"] = "gru"
    """write the answer word by word; or choose one of the training answers, for comparison"""
    image_pooling: Literal["pooled", "attention"] = "pooled"
    """CLIP's pooled feature alone, or with attention of the question over the image's tokens"""

    def check_choices(self):
        """Raise ValueError if a field holds none of its choices."""
        for field in dataclasses.fields(ModelConfig):
            value, choices = getattr(self, field.name), get_args(field.type)
            if choices and value not in choices:
                raise ValueError(f"the model's {field.name} {value!r} is none of {', '.join(choices)}; a "
                                 "checkpoint needs the code that it was trained with")
        if self.image_pooling == "attention" and self.hidden_size % ATTENTION_HEADS:
            raise ValueError(f"--hidden-size {self.hidden_size} must be a multiple of {ATTENTION_HEADS}, the heads of "
                             "--image-pooling attention")


class AnswerSearch(nn.Module):
    """Greedy and beam search with the `forward` of a decoder below: (context, answer_ids, hidden) -> logits, hidden."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        forbidden_words = torch.zeros(vocab_size, dtype=torch.bool)
        forbidden_words[[PAD, START, UNK]] = True
        self.register_buffer("forbidden_words", forbidden_words, persistent=False)

    def next_word(self, context, previous, hidden, step, answer_max_len):
        """Log probabilities (B, V) of the next word, -inf for forbidden words, and the new hidden state.

        The first word is never <end>; the word at the last step is always <end>.
        """
        logits, hidden = self(context, previous.unsqueeze(1), hidden)
        log_probs = logits[:, 0].log_softmax(-1)                         # (B, V)
        # fill_ on slices: an assignment by index would copy from the host and synchronise at every word
        forbidden = self.forbidden_words.clone()
        if step == answer_max_len - 1:
            forbidden.fill_(True)
        forbidden[END:END + 1].fill_(step == 0)
        return log_probs.masked_fill(forbidden, -torch.inf), hidden

    def greedy_search(self, context, answer_max_len):
        """The most probable word at each step: ids (B, A), mean log probability (B,)."""
        rows = context.shape[0]
        answer_ids = context.new_full((rows, answer_max_len), PAD, dtype=torch.long)
        word, hidden = answer_ids.new_full((rows,), START), None
        total, length = context.new_zeros(rows, dtype=torch.float), context.new_zeros(rows, dtype=torch.float)
        finished = torch.zeros(rows, dtype=torch.bool, device=context.device)
        for step in range(answer_max_len):
            log_probs, hidden = self.next_word(context, word, hidden, step, answer_max_len)
            log_prob, word = log_probs.max(-1)
            answer_ids[:, step] = word.masked_fill(finished, PAD)
            total += log_prob.masked_fill(finished, 0.0)
            length += ~finished
            finished |= word == END
            if context.device.type == "cpu" and finished.all():  # on a GPU this check would synchronise at every word
                break
        return answer_ids, total / length

    def beam_search(self, context, answer_max_len, beam_size):
        """The best K answers of each row, best first: ids (B, K, A), mean log probability (B, K), -inf if fewer exist.

        A hypothesis is finished if its <end> is among the K best continuations. The greedy answer is one of them from the
        start, so the best answer never scores below it. An unfinished hypothesis is dropped if K others have a higher
        sum, or if no continuation could bring it among the K best finished ones.
        """
        rows, K = context.shape[0], beam_size
        greedy_ids, greedy_score = self.greedy_search(context, answer_max_len)
        context = context.repeat_interleave(K, dim=0)                    # (B * K, H)
        alive_ids = context.new_full((rows, K, answer_max_len), PAD, dtype=torch.long)
        alive = context.new_full((rows, K), -torch.inf, dtype=torch.float)
        alive[:, 0] = 0.0  # all K beams start identical: keep one, or they would stay identical
        best_ids, best = alive_ids.clone(), torch.full_like(alive, -torch.inf)
        best_ids[:, 0], best[:, 0] = greedy_ids, greedy_score
        word, hidden = alive_ids.new_full((rows * K,), START), None
        for step in range(answer_max_len):
            log_probs, hidden = self.next_word(context, word, hidden, step, answer_max_len)
            continued = alive.unsqueeze(-1) + log_probs.view(rows, K, -1)  # (B, K, V)
            # of 2K candidates at most K are <end>, so K can continue
            scores, flat = continued.flatten(1).topk(min(2 * K, K * self.vocab_size))
            source, word = flat // self.vocab_size, flat % self.vocab_size  # (B, 2K) each
            ids = alive_ids.gather(1, source.unsqueeze(-1).expand(-1, -1, answer_max_len))
            ids[:, :, step] = word
            ends = word == END
            among_best = torch.arange(ends.shape[1], device=ends.device) < K
            is_greedy = (ids == greedy_ids.unsqueeze(1)).all(-1)         # found already
            ended = scores.masked_fill(~(ends & among_best) | is_greedy, -torch.inf) / (step + 1)
            best, order = torch.cat([best, ended], dim=1).topk(K)        # (B, K)
            best_ids = torch.cat([best_ids, ids], dim=1).gather(1, order.unsqueeze(-1).expand(-1, -1, answer_max_len))
            alive, order = scores.masked_fill(ends, -torch.inf).topk(K)  # (B, K)
            # at best it goes on with words of probability 1 to the last step: the same sum over the most words
            alive = alive.masked_fill(alive / answer_max_len <= best[:, -1:], -torch.inf)
            alive_ids = ids.gather(1, order.unsqueeze(-1).expand(-1, -1, answer_max_len))
            word = word.gather(1, order).flatten()                       # (B * K,)
            source = source.gather(1, order) + torch.arange(rows, device=source.device).unsqueeze(1) * K
            hidden = hidden[:, source.flatten()]
            if context.device.type == "cpu" and alive.isneginf().all():
                break
        return best_ids, best


class AnswerDecoder(AnswerSearch):
    """A GRU over [word embedding; context], with teacher forcing in `forward`."""

    def __init__(self, vocab_size, hidden_size, num_layers, dropout):
        super().__init__(vocab_size)
        self.embedding = nn.Embedding(vocab_size, hidden_size, padding_idx=PAD)
        self.initial_hidden = nn.Linear(hidden_size, num_layers * hidden_size)
        self.gru = nn.GRU(2 * hidden_size, hidden_size, num_layers, batch_first=True,
                          dropout=dropout if num_layers > 1 else 0.0)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, vocab_size)

    def first_hidden(self, context):
        """context (B, H) -> the GRU's first hidden state (L, B, H)."""
        hidden = torch.tanh(self.initial_hidden(context))                # (B, L * H)
        return hidden.unflatten(1, (self.gru.num_layers, -1)).transpose(0, 1).contiguous()

    def forward(self, context, answer_ids, hidden=None):
        """context (B, H), answer_ids (B, A), hidden (L, B, H) or None at the start -> logits (B, A, V), hidden (L, B, H).

        Always in float32: the decoder is small, and under autocast a GRU returns the dtype of its hidden state.
        """
        with torch.autocast(context.device.type, enabled=False):
            context = context.float()
            hidden = self.first_hidden(context) if hidden is None else hidden
            words = self.dropout(self.embedding(answer_ids))                 # (B, A, H)
            context = context.unsqueeze(1).expand(-1, words.shape[1], -1)    # (B, A, H)
            states, hidden = self.gru(torch.cat([words, context], dim=-1), hidden)
            return self.output(self.dropout(self.norm(states))), hidden


class AnswerClassifier(AnswerSearch):
    """One linear layer over whole answers: <start>, then an answer as a single "word", then <end>. See `Vocab`."""

    CERTAIN_END = 20.0  # logit of the <end> that always follows; the others are 0

    def __init__(self, vocab_size, hidden_size, num_layers, dropout):
        super().__init__(vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, vocab_size)

    def forward(self, context, answer_ids, hidden=None):
        """As in `AnswerDecoder`; the hidden state is only passed through."""
        with torch.autocast(context.device.type, enabled=False):
            answers = self.output(self.dropout(context.float())).unsqueeze(1)           # (B, 1, V)
            end = torch.zeros_like(answers)
            end[..., END] = self.CERTAIN_END
            logits = torch.where((answer_ids == START).unsqueeze(-1), answers, end)     # (B, A, V)
            return logits, context.unsqueeze(0)


DECODERS = {"gru": AnswerDecoder, "classifier": AnswerClassifier}


class VQAModel(nn.Module):
    """The whole model. `image_encoder` is open_clip's VisionTransformer, `question_encoder` a GPT2Model.

    A batch is a dict. It holds each distinct image and question once: `image_states` (from `encode_image_frozen`),
    `question_states` (from `encode_question_frozen`) and `attention_mask`, 1 at real tokens.
    `image_row` and `question_row` (B,) are the index of each row's image and question among them.
    """

    def __init__(self, image_encoder, question_encoder, vocab_size, config):
        """Both encoders frozen, the rest with fresh weights. Raises ValueError if `config` (ModelConfig) does not fit."""
        super().__init__()
        config.check_choices()
        if config.question_max_len > question_encoder.config.n_positions:
            raise ValueError(f"--question-max-len {config.question_max_len} is more than the "
                             f"{question_encoder.config.n_positions} positions of the question encoder")
        self.config, self.image_encoder, self.question_encoder = config, image_encoder, question_encoder
        image_width, question_width = image_encoder.proj.shape[1], question_encoder.config.n_embd
        hidden_size = config.hidden_size
        # features have length 1, so their numbers are small: the norm brings both to one scale
        self.image_projection = nn.Sequential(nn.Linear(image_width, hidden_size), nn.LayerNorm(hidden_size))
        self.question_projection = nn.Sequential(nn.Linear(question_width, hidden_size), nn.LayerNorm(hidden_size))
        self.fusion = FUSIONS[config.fusion](hidden_size, config.dropout)
        if config.image_pooling == "attention":
            self.token_projection = nn.Linear(image_width, hidden_size)
            self.token_attention = nn.MultiheadAttention(hidden_size, ATTENTION_HEADS, batch_first=True)
        self.decoder = DECODERS[config.decoder](vocab_size, hidden_size, config.num_layers, config.dropout)
        self.image_dtype, self.question_dtype = None, None  # of the frozen blocks; None: float32, or that of autocast
        self.unfreeze(0, 0)

    # ---- the freeze boundary

    def unfreeze(self, clip_layers, gpt2_layers):
        """Train the last N blocks of each encoder with the final norm (and CLIP's projection). 0 freezes the whole encoder.

        Raises ValueError if an encoder has fewer blocks.
        """
        self.clip_layers, self.gpt2_layers = clip_layers, gpt2_layers
        image, question = self.image_encoder, self.question_encoder
        for flag, wanted, encoder, blocks, last_parts in (
                ("--clip-layers", clip_layers, image, image.transformer.resblocks, (image.ln_post, image.proj)),
                ("--gpt2-layers", gpt2_layers, question, question.h, (question.ln_f,))):
            if not 0 <= wanted <= len(blocks):
                raise ValueError(f"{flag} {wanted} is out of range: the encoder has {len(blocks)} blocks")
            encoder.requires_grad_(False)
            for part in (*blocks[len(blocks) - wanted:], *last_parts) if wanted else ():
                part.requires_grad_(True)
        self.train(self.training)

    def trainable_blocks(self):
        """The unfrozen blocks of CLIP and of GPT-2, as two lists."""
        image_blocks, question_blocks = self.image_encoder.transformer.resblocks, self.question_encoder.h
        return (list(image_blocks[len(image_blocks) - self.clip_layers:]),
                list(question_blocks[len(question_blocks) - self.gpt2_layers:]))

    def place(self, precision):
        """Move to the device, and the frozen blocks to the dtype that `precision` (common.device) gives them.

        Call it after `unfreeze`. The weights are rounded once: autocast would do it at every call, and be slower than float32.
        """
        image_blocks, question_blocks = self.frozen_blocks()
        self.image_dtype = precision.frozen_dtype(self.image_encoder.proj.shape[0]) if image_blocks else None
        self.question_dtype = precision.frozen_dtype(self.question_encoder.config.n_embd) if question_blocks else None
        for blocks, dtype in ((image_blocks, self.image_dtype), (question_blocks, self.question_dtype)):
            for block in blocks if dtype else ():
                block.to(dtype)
        return self.to(precision.device)

    def frozen_blocks(self):
        """The frozen blocks of CLIP and of GPT-2, as two lists."""
        image_blocks, question_blocks = self.image_encoder.transformer.resblocks, self.question_encoder.h
        return (list(image_blocks[:len(image_blocks) - self.clip_layers]),
                list(question_blocks[:len(question_blocks) - self.gpt2_layers]))

    def compile_blocks(self):
        """Compile every block of both encoders in place, for any number of rows and tokens."""
        # all blocks of an encoder share one compiled forward, in variants: training, eval, frozen, a single row
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in (*self.image_encoder.transformer.resblocks, *self.question_encoder.h):
            block.compile(dynamic=True)

    def train(self, mode=True):
        """Frozen parts stay in eval mode, so their dropout is off. GPT-2 has a dropout outside its blocks too."""
        super().train(mode)
        self.image_encoder.eval()
        self.question_encoder.eval()
        for blocks in self.trainable_blocks():
            for block in blocks:
                block.train(mode)
        return self

    def parameter_groups(self):
        """Trainable parameters by origin: {"head": [...], "clip": [...], "gpt2": [...]}, empty groups left out."""
        groups = {"head": [], "clip": [], "gpt2": []}
        origin = {"image_encoder": "clip", "question_encoder": "gpt2"}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[origin.get(name.split(".")[0], "head")].append(parameter)
        return {name: parameters for name, parameters in groups.items() if parameters}

    def trainable_weights(self):
        """{name: tensor} of the weights that training changes. The others come from the pretrained encoders."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    # ---- the encoders, each split at the freeze boundary

    @torch.no_grad()
    def encode_image_frozen(self, pixels):
        """Normalised pixels (B, 3, S, S) -> states at the freeze boundary (B, T, W).

        If all blocks are frozen and only the pooled feature is used: the feature (B, D_i).
        """
        states = self.image_encoder._embeds(pixels)                      # (B, T, W)
        states = states.to(self.image_dtype or states.dtype)
        for block in self.frozen_blocks()[0]:
            states = block(states)
        if self.clip_layers or self.config.image_pooling == "attention":
            return states
        return self.pool_image(of_trainable_dtype(states))[0]

    def encode_image_trainable(self, states):
        """Output of `encode_image_frozen` -> feature (B, D_i) of length 1, token features (B, T, D_i) or None."""
        if states.dim() == 2:
            return states, None
        states = of_trainable_dtype(states)
        for block in self.trainable_blocks()[0]:
            states = block(states)
        return self.pool_image(states)

    def pool_image(self, states):
        """Final norm and projection as in open_clip: states (B, T, W) -> (B, D_i), and (B, T, D_i) if tokens are used."""
        pooled, tokens = self.image_encoder._pool(states)
        feature = F.normalize((pooled @ self.image_encoder.proj).float(), dim=-1)
        if self.config.image_pooling != "attention":
            return feature, None
        return feature, F.normalize((tokens @ self.image_encoder.proj).float(), dim=-1)

    def encode_image(self, pixels):
        """pixels (B, 3, S, S) -> feature (B, D_i) of length 1, token features or None."""
        return self.encode_image_trainable(self.encode_image_frozen(pixels))

    @torch.no_grad()
    def encode_question_frozen(self, input_ids, attention_mask):
        """input_ids, attention_mask (B, Q), padded on the right -> states at the freeze boundary (B, Q, W).

        If all blocks are frozen: the feature (B, D_q). Attention is causal, so real tokens never see the padding.
        """
        gpt2 = self.question_encoder
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        states = gpt2.drop(gpt2.wte(input_ids) + gpt2.wpe(positions))    # (B, Q, W)
        states = states.to(self.question_dtype or states.dtype)
        for block in self.frozen_blocks()[1]:
            states = block(states)
        return states if self.gpt2_layers else self.pool_question(of_trainable_dtype(states), attention_mask)

    def encode_question_trainable(self, states, attention_mask):
        """Output of `encode_question_frozen` -> feature (B, D_q) of length 1."""
        if states.dim() == 2:
            return states
        states = of_trainable_dtype(states)
        for block in self.trainable_blocks()[1]:
            states = block(states)
        return self.pool_question(states, attention_mask)

    def pool_question(self, states, attention_mask):
        """Final norm, mean over real tokens, unit length: (B, Q, W) -> (B, D_q)."""
        states = self.question_encoder.ln_f(states).float()
        mask = attention_mask.unsqueeze(-1).to(states.dtype)             # (B, Q, 1)
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    def encode_question(self, input_ids, attention_mask):
        """input_ids, attention_mask (B, Q) -> feature (B, D_q) of length 1."""
        return self.encode_question_trainable(self.encode_question_frozen(input_ids, attention_mask), attention_mask)

    # ---- from features to words

    def encode(self, batch):
        """Batch of states -> context (B, H), gate (B, H)."""
        feature, tokens = self.encode_image_trainable(batch["image_states"])
        question = self.encode_question_trainable(batch["question_states"], batch["attention_mask"])
        image = self.image_projection(feature).index_select(0, batch["image_row"])            # (B, H)
        question = self.question_projection(question).index_select(0, batch["question_row"])  # (B, H)
        if self.config.inputs == "image":
            question = torch.zeros_like(question)  # before the attention, which would let the question choose tokens
        if tokens is not None:
            tokens = self.token_projection(tokens).index_select(0, batch["image_row"])        # (B, T, H)
            attended, _ = self.token_attention(question.unsqueeze(1), tokens, tokens, need_weights=False)
            image = image + attended.squeeze(1)
        if self.config.inputs == "question":
            image = torch.zeros_like(image)
        return self.fusion(image, question)

    def forward(self, batch, answer_ids):
        """Teacher forcing: batch of states, answer_ids (B, A) from <start> on -> logits (B, A, V), float32."""
        context, _ = self.encode(batch)
        return self.decoder(context, answer_ids)[0]

    @torch.no_grad()
    def generate(self, batch, beam_size=1):
        """Answers word by word: ids (B, A) that end in <end> and <pad>, confidence (B,) in 0..1, mean gate (B,).

        A = answer_max_len. Confidence is the probability of the whole answer: the product over its words and <end>.
        The gate is NaN for a fusion without a gate.
        """
        context, gate = self.encode(batch)
        answer_ids, confidences = self.search(context, beam_size)
        return answer_ids[:, 0], confidences[:, 0], gate.float().mean(-1)

    def search(self, context, beam_size=1):
        """context (B, H) -> the best K answers: ids (B, K, A) and confidence (B, K), 0 if fewer exist.

        K = beam_size; 1 is greedy search. Beams are ranked by the mean log probability.
        """
        length = self.config.answer_max_len
        if beam_size == 1:
            answer_ids, scores = (found.unsqueeze(1) for found in self.decoder.greedy_search(context, length))
        else:
            answer_ids, scores = self.decoder.beam_search(context, length, beam_size)
        num_words = (answer_ids != PAD).sum(-1).clamp(min=1)  # none if fewer than K answers exist
        return answer_ids, (scores * num_words).exp()
