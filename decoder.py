"""The answer decoder: a GRU that is taught word by word, and writes by greedy or beam search.

Shapes: B batch, A answer tokens, H hidden, L layers, V vocabulary, K beam.
"""
import torch
from torch import nn

from vocab import END, PAD, START, UNK


class AnswerDecoder(nn.Module):
    """A GRU over [word embedding; context], one word at a time."""

    def __init__(self, vocab_size, hidden_size, num_layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size, padding_idx=PAD)
        self.start = nn.Linear(hidden_size, num_layers * hidden_size)
        self.gru = nn.GRU(2 * hidden_size, hidden_size, num_layers, batch_first=True,
                          dropout=dropout if num_layers > 1 else 0.0)
        self.norm = nn.LayerNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, vocab_size)
        never_written = torch.zeros(vocab_size, dtype=torch.bool)
        never_written[[PAD, START, UNK]] = True
        self.register_buffer("never_written", never_written, persistent=False)

    def first_hidden(self, context):
        """context (B, H) -> the GRU's hidden state before the first word (L, B, H)."""
        start = torch.tanh(self.start(context))                          # (B, L * H)
        return start.unflatten(1, (self.gru.num_layers, -1)).transpose(0, 1).contiguous()

    def forward(self, context, answer_ids, hidden=None):
        """context (B, H), answer_ids (B, A), hidden (L, B, H) or None at the start -> logits (B, A, V), hidden.

        Always in float32: it is small, and under autocast a GRU's output follows its hidden state's dtype.
        """
        with torch.autocast(context.device.type, enabled=False):
            context = context.float()
            hidden = self.first_hidden(context) if hidden is None else hidden
            words = self.dropout(self.embedding(answer_ids))                 # (B, A, H)
            context = context.unsqueeze(1).expand(-1, words.shape[1], -1)    # (B, A, H)
            states, hidden = self.gru(torch.cat([words, context], dim=-1), hidden)
            return self.output(self.dropout(self.norm(states))), hidden

    def next_word(self, context, previous, hidden, step, answer_max_len):
        """Log probabilities (B, V) of the word at `step`, -inf where it may not stand, and the new hidden state.

        The first word is never the end, the last one always is.
        """
        logits, hidden = self(context, previous.unsqueeze(1), hidden)
        log_probs = logits[:, 0].log_softmax(-1)                         # (B, V)
        # fill_ on slices: an assignment by index would copy from the host, and wait, at every word
        forbidden = self.never_written.clone()
        if step == answer_max_len - 1:
            forbidden.fill_(True)
        forbidden[END:END + 1].fill_(step == 0 and answer_max_len > 1)
        return log_probs.masked_fill(forbidden, -torch.inf), hidden

    def greedy_search(self, context, answer_max_len):
        """The likeliest word at each step: ids (B, A), mean log probability (B,)."""
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
            if context.device.type == "cpu" and finished.all():  # elsewhere the look would stall the device
                break
        return answer_ids, total / length

    def beam_search(self, context, answer_max_len, beam_size):
        """The best K answers of each row: ids (B, K, A), mean log probability (B, K), best first, -inf if fewer exist.

        An answer is finished when its end is among the K best continuations; a row stops at K finished ones.
        """
        rows, K = context.shape[0], beam_size
        vocab_size = self.output.out_features
        context = context.repeat_interleave(K, dim=0)                    # (B * K, H)
        alive_ids = context.new_full((rows, K, answer_max_len), PAD, dtype=torch.long)
        alive = context.new_full((rows, K), -torch.inf, dtype=torch.float)
        alive[:, 0] = 0.0  # all beams are equal at first: only one may grow
        best_ids, best = alive_ids.clone(), torch.full_like(alive, -torch.inf)
        word, hidden = alive_ids.new_full((rows * K,), START), None
        for step in range(answer_max_len):
            log_probs, hidden = self.next_word(context, word, hidden, step, answer_max_len)
            grown = alive.unsqueeze(-1) + log_probs.view(rows, K, -1)    # (B, K, V)
            # 2K candidates leave K alive even if K of them end
            scores, flat = grown.flatten(1).topk(min(2 * K, K * vocab_size))
            source, word = flat // vocab_size, flat % vocab_size         # (B, 2K) each
            ids = alive_ids.gather(1, source.unsqueeze(-1).expand(-1, -1, answer_max_len))
            ids[:, :, step] = word
            ends = word == END
            among_best = torch.arange(ends.shape[1], device=ends.device) < K
            ended = scores.masked_fill(~(ends & among_best), -torch.inf) / (step + 1)
            best, order = torch.cat([best, ended], dim=1).topk(K)        # (B, K)
            best_ids = torch.cat([best_ids, ids], dim=1).gather(1, order.unsqueeze(-1).expand(-1, -1, answer_max_len))
            alive, order = scores.masked_fill(ends, -torch.inf).topk(K)  # (B, K)
            alive = alive.masked_fill((best > -torch.inf).all(1, keepdim=True), -torch.inf)
            alive_ids = ids.gather(1, order.unsqueeze(-1).expand(-1, -1, answer_max_len))
            word = word.gather(1, order).flatten()                       # (B * K,)
            source = source.gather(1, order) + torch.arange(rows, device=source.device).unsqueeze(1) * K
            hidden = hidden[:, source.flatten()]
        return best_ids, best
