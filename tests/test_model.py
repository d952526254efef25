import copy
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F

from common.device import Precision
from evaluation.generation import answer_rows
from features.encoders import load_encoders
from preprocess import VQADataset, read_rows
from training.step import answer_loss
from vocab import END, PAD, START, UNK, Vocab

ALL_BLOCKS = 4


@pytest.fixture
def dataset_of(make_store, data_dir):
    """dataset_of(model) -> (VQADataset of all rows at the model's cut, vocab)."""
    rows = read_rows(data_dir)
    vocab = Vocab.build(rows["answer"])

    def make(model):
        return VQADataset(rows, vocab, 8, make_store(model)), vocab
    return make


def vocab_size(data_dir):
    return len(Vocab.build(read_rows(data_dir)["answer"]))


@pytest.mark.parametrize("trainable", [0, 1, 2, ALL_BLOCKS])
@pytest.mark.parametrize("image_pooling", ["pooled", "attention"])
def test_stored_states_equal_a_live_forward_at_every_cut(trainable, image_pooling, make_model, make_store, encoders, pixels):
    model = make_model(clip_layers=trainable, gpt2_layers=trainable, image_pooling=image_pooling)
    store = make_store(model)
    live = encoders.image.visual(encoders.image.normalize(torch.from_numpy(pixels.pixels[:20])))
    stored, tokens = model.encode_image_trainable(store.image_states[:20])
    torch.testing.assert_close(stored, F.normalize(live, dim=-1), atol=1e-5, rtol=0)
    assert (tokens is None) == (image_pooling == "pooled")
    for question, row in store.question_row.items():
        tokens = encoders.question.tokenizer(question, return_tensors="pt")
        hidden = encoders.question.gpt2(**tokens).last_hidden_state  # no padding here, as a check on the padded path
        length = int(store.question_lengths[row])
        states = store.question_states[row:row + 1]
        stored = model.encode_question_trainable(states, torch.arange(store.question_states.shape[1])[None] < length)
        torch.testing.assert_close(stored, F.normalize(hidden.mean(1), dim=-1), atol=1e-5, rtol=0)


def test_frozen_encoders_stay_in_eval_and_unfrozen_blocks_train(make_model):
    model = make_model(clip_layers=1, gpt2_layers=2).train()
    gpt2 = model.question_encoder
    assert not gpt2.drop.training and not gpt2.h[1].training and gpt2.h[2].training and gpt2.h[3].attn.resid_dropout.training
    assert not model.image_encoder.transformer.resblocks[2].training and model.image_encoder.transformer.resblocks[3].training
    assert model.fusion.training and not model.eval().question_encoder.h[3].training


def test_each_group_holds_its_own_parameters(make_model):
    model = make_model(clip_layers=1, gpt2_layers=1)
    groups = {name: set(map(id, parameters)) for name, parameters in model.parameter_groups().items()}
    visual = model.image_encoder
    expected = {id(p) for p in [*visual.transformer.resblocks[-1].parameters(), *visual.ln_post.parameters(), visual.proj]}
    assert groups["clip"] == expected
    gpt2 = model.question_encoder
    assert groups["gpt2"] == {id(p) for p in [*gpt2.h[-1].parameters(), *gpt2.ln_f.parameters()]}
    assert set(make_model().parameter_groups()) == {"head"}


def test_more_blocks_than_there_are_is_an_error(make_model):
    with pytest.raises(ValueError, match="--clip-layers 5"):
        make_model(clip_layers=5)


def test_a_training_step_changes_no_frozen_weight(make_model, dataset_of, data_dir):
    model = make_model(vocab_size(data_dir), clip_layers=1, gpt2_layers=1)
    dataset, _ = dataset_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = set(model.trainable_weights())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for batch in dataset.batches(30):
        loss, words = answer_loss(model, batch)
        (loss / words).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trainable
    # a query's bias shifts all scores of a softmax alike only for keys; all else must have moved
    assert any("resblocks.3" in name for name in changed) and any(".h.3." in name for name in changed)


def test_teacher_forced_logits_equal_step_by_step_logits(make_model, dataset_of, data_dir):
    model = make_model(vocab_size(data_dir), num_layers=2)
    dataset, _ = dataset_of(model)
    batch = dataset.batch(torch.arange(12))
    inputs = batch["answer_ids"][:, :-1]
    forced = model(batch, inputs)
    context, _ = model.encode(batch)
    hidden, steps = None, []
    for step in range(inputs.shape[1]):
        logits, hidden = model.decoder(context, inputs[:, step:step + 1], hidden)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), forced, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_answer_does_not_depend_on_its_batch(beam_size, make_model, dataset_of, data_dir):
    model = make_model(vocab_size(data_dir), clip_layers=1, gpt2_layers=1)
    dataset, _ = dataset_of(model)
    together, confidence, _ = model.generate(dataset.batch(torch.arange(len(dataset))), 8, beam_size)
    for row in range(0, len(dataset), 17):
        alone, alone_confidence, _ = model.generate(dataset.batch(torch.tensor([row])), 8, beam_size)
        assert torch.equal(alone[0], together[row])
        torch.testing.assert_close(alone_confidence[0], confidence[row], atol=1e-5, rtol=1e-4)


def sharpened(model, factor=8.0):
    """Random weights give nearly flat distributions: sharper ones make searches differ."""
    with torch.no_grad():
        model.decoder.output.weight.mul_(factor)
        model.decoder.output.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def test_beam_one_equals_greedy(make_model):
    model = sharpened(make_model(vocab_size=12))
    context = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))
    greedy_ids, greedy_score = model.decoder.greedy_search(context, 6)
    beam_ids, beam_score = model.decoder.beam_search(context, 6, 1)
    assert torch.equal(greedy_ids, beam_ids[:, 0])
    torch.testing.assert_close(greedy_score, beam_score[:, 0])


def test_a_beam_that_prunes_nothing_finds_the_exhaustive_optimum(make_model):
    words, length = [4, 5, 6], 4  # three words besides the specials, at most three of them and the end
    model = sharpened(make_model(vocab_size=7))
    context = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ids, scores = model.decoder.beam_search(context, length, 120)
        answers = [[*answer, END] for n in range(1, length) for answer in itertools.product(words, repeat=n)]
        for row in range(5):
            expected = []
            for answer in answers:
                logits, _ = model.decoder(context[row:row + 1], torch.tensor([[START, *answer[:-1]]]))
                log_probs = logits[0].log_softmax(-1)
                expected.append((log_probs[range(len(answer)), answer].mean().item(), answer))
            expected.sort(reverse=True)
            found = [index for index in ids[row, 0].tolist() if index != PAD]
            assert found == expected[0][1]
            assert scores[row, 0].item() == pytest.approx(expected[0][0], abs=1e-5)
            finite = scores[row][scores[row] > -torch.inf]
            assert len(finite) == len(answers) and (finite.diff() <= 0).all()


def test_answers_end_and_never_hold_unknown_words(make_model):
    model = sharpened(make_model(vocab_size=12))
    with torch.no_grad():
        model.decoder.output.bias[[UNK, PAD, START]] = 50.0
        model.decoder.output.bias[END] = -50.0
    context = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
    for ids in (model.decoder.greedy_search(context, 5)[0], model.decoder.beam_search(context, 5, 3)[0][:, 0]):
        assert (ids[:, -1] == END).all() and not torch.isin(ids[:, :-1], torch.tensor([PAD, START, UNK])).any()


def test_confidence_is_the_geometric_mean_of_what_was_written(make_model, dataset_of, data_dir):
    model = sharpened(make_model(vocab_size(data_dir)))
    dataset, _ = dataset_of(model)
    batch = dataset.batch(torch.arange(10))
    ids, confidence, gate = model.generate(batch, 8)
    inputs = torch.cat([torch.full((10, 1), START), ids[:, :-1]], dim=1)
    log_probs = model(batch, inputs).log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)
    written = ids != PAD
    expected = ((log_probs * written).sum(1) / written.sum(1)).exp()
    torch.testing.assert_close(confidence, expected, atol=1e-5, rtol=1e-4)
    assert ((gate > 0) & (gate < 1)).all()


def test_a_picture_seen_once_serves_all_its_questions(make_model, dataset_of, data_dir):
    """A batch holds each distinct picture and question once: the same logits as with one copy per row."""
    model = make_model(vocab_size(data_dir), clip_layers=2, gpt2_layers=2)
    dataset, _ = dataset_of(model)
    index = torch.tensor([0, 1, 2, 5, 3, 0])
    batch = dataset.batch(index)
    assert len(batch["image_states"]) == 2 and len(batch["question_states"]) == 3
    copied = {**batch, "image_states": batch["image_states"][batch["image_row"]],
              "question_states": batch["question_states"][batch["question_row"]],
              "attention_mask": batch["attention_mask"][batch["question_row"]],
              "image_row": torch.arange(6), "question_row": torch.arange(6)}
    torch.testing.assert_close(model(batch, batch["answer_ids"]), model(copied, batch["answer_ids"]))


@pytest.mark.parametrize("image_pooling", ["pooled", "attention"])
@pytest.mark.parametrize("inputs, states", [("question", "image_states"), ("image", "question_states")])
def test_a_blind_model_ignores_what_it_may_not_see(inputs, states, image_pooling, make_model, dataset_of, data_dir):
    model = make_model(vocab_size(data_dir), inputs=inputs, image_pooling=image_pooling)
    dataset, _ = dataset_of(model)
    batch = dataset.batch(torch.arange(6))
    before = model(batch, batch["answer_ids"])
    batch[states] = batch[states].flip(0)
    assert torch.equal(model(batch, batch["answer_ids"]), before)


def test_bf16_autocast_gives_nearly_the_same_answers(make_model, dataset_of, data_dir):
    model = make_model(vocab_size(data_dir), clip_layers=1, gpt2_layers=1)
    dataset, _ = dataset_of(model)
    batch = dataset.batch(torch.arange(20))
    exact = model(batch, batch["answer_ids"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch, batch["answer_ids"])
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05


def test_answers_that_do_not_fit_the_memory_are_found_in_halves(make_model, dataset_of, data_dir, monkeypatch):
    model = make_model(vocab_size(data_dir))
    dataset, vocab = dataset_of(model)
    (whole, *_), generate = answer_rows(model, vocab, dataset, 8, Precision("cpu")), model.generate

    def small_device(batch, *rest):
        if len(batch["image_row"]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(batch, *rest)
    monkeypatch.setattr(model, "generate", small_device)
    assert answer_rows(model, vocab, dataset, 8, Precision("cpu"))[0] == whole


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_logits_and_gradients(make_model, dataset_of, data_dir):
    """torch.compile may reorder sums: 1e-4 in float32, for batches of different sizes."""
    models = [make_model(vocab_size(data_dir), clip_layers=2, gpt2_layers=1)]
    models.append(copy.deepcopy(models[0]))
    models[1].compile_blocks()
    dataset, _ = dataset_of(models[0])
    for size in (12, 7):
        batch = dataset.batch(torch.arange(size))
        logits = [model(batch, batch["answer_ids"]) for model in models]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    for one in logits:
        one.square().mean().backward()
    for name, parameter in models[0].named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(models[1].get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-3)


def test_the_fingerprint_changes_with_one_weight(encoder_flags):
    first = load_encoders(encoder_flags[1], "", encoder_flags[3])
    from features.encoders import fingerprint
    before = fingerprint(first.image.visual, "")
    with torch.no_grad():
        first.image.visual.ln_post.bias[3] += 1e-6
    assert fingerprint(first.image.visual, "") != before
