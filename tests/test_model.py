"""The model: the freeze boundary, what trains, and that every way of answering gives the same words."""
import copy
import itertools
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from common.device import Precision
from evaluation.generation import answer_dataset
from features.arrays import fingerprint
from features.store import build_store
from model import FUSIONS, ConstantFusion, GatedFusion, ModelConfig, VQAModel
from preprocess import VQADataset, read_rows
from training.step import answer_loss
from vocab import END, PAD, START, UNK, Vocab

ALL_BLOCKS = 4


@pytest.fixture
def make_dataset(make_model, make_store, data_dir):
    """make_dataset(clip_layers=0, ...) -> (model, VQADataset of all rows at its freeze boundary)."""
    rows = read_rows(data_dir)
    vocab = Vocab.build(rows["answer"])

    def make(**config):
        model = make_model(len(vocab), answer_max_len=8, **config)
        return model, VQADataset(rows, vocab, 8, make_store(model))
    return make


@pytest.mark.parametrize("trainable", [0, 1, 2, ALL_BLOCKS])
@pytest.mark.parametrize("image_pooling", ["pooled", "attention"])
def test_stored_states_equal_a_live_forward_at_every_freeze_boundary(trainable, image_pooling, make_model, make_store,
                                                                     encoders, pixels):
    model = make_model(clip_layers=trainable, gpt2_layers=trainable, image_pooling=image_pooling)
    store = make_store(model)
    live = encoders.image.visual(encoders.image.normalize(torch.from_numpy(pixels.pixels[:20])))
    stored, tokens = model.encode_image_trainable(store.image_states[:20])
    torch.testing.assert_close(stored, F.normalize(live, dim=-1), atol=1e-5, rtol=0)
    assert (tokens is None) == (image_pooling == "pooled")
    for question, row in store.row_of_question.items():
        tokens = encoders.question.tokenizer(question, return_tensors="pt")
        hidden = encoders.question.gpt2(**tokens).last_hidden_state  # without padding, to check the padded path
        length = int(store.question_lengths[row])
        states = store.question_states[row:row + 1]
        stored = model.encode_question_trainable(states, torch.arange(store.question_states.shape[1])[None] < length)
        torch.testing.assert_close(stored, F.normalize(hidden.mean(1), dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trainable", [0, 1, ALL_BLOCKS])
def test_in_bf16_stored_states_equal_a_live_forward_and_only_frozen_blocks_are_rounded(trainable, make_model, encoders, pixels,
                                                                                       tmp_path, monkeypatch):
    """As on a CPU with AMX, for encoders of any width. Training goes on in float32, from states in bf16."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr("common.device.BF16_WIDTH", 1)
    model, stores = make_model(clip_layers=trainable, gpt2_layers=trainable), {}
    for amp in ("off", "auto"):
        precision = Precision("cpu", amp)
        stores[amp] = build_store(model.place(precision), encoders, pixels, ["What?"], tmp_path, precision)
    rounded = torch.bfloat16 if trainable != ALL_BLOCKS else torch.float32
    assert {parameter.dtype for blocks in model.frozen_blocks() for block in blocks for parameter in block.parameters()} == (
        {rounded} if trainable != ALL_BLOCKS else set())
    assert {weight.dtype for weight in model.trainable_weights().values()} == {torch.float32}
    states = stores["auto"].image_states
    assert states.dtype == (rounded if trainable else torch.float32)
    live = model.encode_image_frozen(encoders.image.normalize(torch.from_numpy(pixels.pixels[:16])))
    torch.testing.assert_close(live, states[:16])
    batch = {"image_states": states[:1], "image_row": torch.zeros(1, dtype=torch.long), "attention_mask": torch.ones(1, 1),
             "question_row": torch.zeros(1, dtype=torch.long), "question_states": stores["auto"].question_states[:1, :1]}
    if not trainable:
        batch["question_states"] = stores["auto"].question_states[:1]
    assert model(batch, torch.tensor([[START]])).dtype == torch.float32
    features = [model.encode_image_trainable(stores[amp].image_states)[0] for amp in stores]
    assert F.cosine_similarity(*features).min() > 0.999
    assert torch.equal(*features) == (trainable == ALL_BLOCKS)  # the store of float32 was not taken for that of bf16


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX")
def test_bf16_hardly_turns_the_features_of_encoders_of_real_size():
    import open_clip
    from transformers import GPT2Config, GPT2Model
    torch.manual_seed(0)
    text_tower = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    config = open_clip.get_model_config("ViT-B-32-quickgelu") | {"text_cfg": text_tower}
    model = VQAModel(open_clip.CLIP(**config).visual, GPT2Model(GPT2Config(n_layer=6, vocab_size=512)), 9, ModelConfig()).eval()
    inputs = torch.randn(4, 3, 224, 224), (torch.randint(512, (4, 16)), torch.ones(4, 16))
    features = []
    for amp in ("off", "auto"):
        model.place(Precision("cpu", amp))
        features.append((model.encode_image(inputs[0])[0], model.encode_question(*inputs[1])))
    for one, other in zip(*features, strict=True):
        assert not torch.equal(one, other) and F.cosine_similarity(one, other).min() > 0.999


def test_frozen_parts_stay_in_eval_mode_and_unfrozen_blocks_train(make_model):
    model = make_model(clip_layers=1, gpt2_layers=2).train()
    gpt2 = model.question_encoder
    assert not gpt2.drop.training and not gpt2.h[1].training and gpt2.h[2].training and gpt2.h[3].attn.resid_dropout.training
    assert not model.image_encoder.transformer.resblocks[2].training and model.image_encoder.transformer.resblocks[3].training
    assert model.fusion.training and not model.eval().question_encoder.h[3].training


def test_parameter_groups_hold_the_unfrozen_parameters_by_origin(make_model):
    model = make_model(clip_layers=1, gpt2_layers=1)
    groups = {name: set(map(id, parameters)) for name, parameters in model.parameter_groups().items()}
    visual, gpt2 = model.image_encoder, model.question_encoder
    expected = [*visual.transformer.resblocks[-1].parameters(), *visual.ln_post.parameters(), visual.proj]
    assert groups["clip"] == set(map(id, expected))
    assert groups["gpt2"] == set(map(id, [*gpt2.h[-1].parameters(), *gpt2.ln_f.parameters()]))
    assert set(make_model().parameter_groups()) == {"head"}


@pytest.mark.parametrize("config, message", [
    ({"clip_layers": 5}, "--clip-layers 5"), ({"inputs": "typo"}, "the model's inputs 'typo' is none of "),
    ({"fusion": "typo"}, "the model's fusion 'typo' is none of "),
    ({"image_pooling": "typo"}, "the model's image_pooling 'typo' is none of "),
    ({"question_max_len": 65}, "--question-max-len 65 is more than the 64 positions"),
    ({"image_pooling": "attention", "hidden_size": 18}, "--hidden-size 18 must be a multiple of 4")], ids=str)
def test_settings_that_do_not_fit_are_refused_when_the_model_is_built(config, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model(**config)


def test_a_training_step_changes_no_frozen_weight(make_dataset):
    model, dataset = make_dataset(clip_layers=1, gpt2_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = set(model.trainable_weights())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for rows in torch.arange(len(dataset)).split(30):
        loss, words = answer_loss(model, dataset.batch(rows))
        (loss / words).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trainable
    assert any("resblocks.3" in name for name in changed) and any(".h.3." in name for name in changed)


def test_teacher_forced_logits_equal_step_by_step_logits(make_dataset):
    model, dataset = make_dataset(num_layers=2)
    batch = dataset.batch(torch.arange(12))
    inputs = batch["answer_ids"][:, :-1]
    context, _ = model.encode(batch)
    hidden, steps = None, []
    for step in range(inputs.shape[1]):
        logits, hidden = model.decoder(context, inputs[:, step:step + 1], hidden)
        steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), model(batch, inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_an_answer_does_not_depend_on_its_batch(beam_size, make_dataset):
    model, dataset = make_dataset(clip_layers=1, gpt2_layers=1)
    together, confidence, _ = model.generate(dataset.batch(torch.arange(len(dataset))), beam_size)
    for row in range(0, len(dataset), 17):
        alone, alone_confidence, _ = model.generate(dataset.batch(torch.tensor([row])), beam_size)
        assert torch.equal(alone[0], together[row])
        torch.testing.assert_close(alone_confidence[0], confidence[row], atol=1e-5, rtol=1e-4)


def sharpened(model, factor=8.0):
    """Random weights give nearly flat distributions. Sharper ones make the searches differ."""
    with torch.no_grad():
        model.decoder.output.weight.mul_(factor)
        model.decoder.output.bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


def random_context(rows, seed):
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def test_beam_search_with_one_beam_equals_greedy_search(make_model):
    model, context = sharpened(make_model(vocab_size=12)), random_context(40, seed=2)
    greedy_ids, greedy_score = model.decoder.greedy_search(context, 6)
    beam_ids, beam_score = model.decoder.beam_search(context, 6, 1)
    assert torch.equal(greedy_ids, beam_ids[:, 0])
    torch.testing.assert_close(greedy_score, beam_score[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("beam_size", [1, 2, 3, 5, 12])
def test_the_best_beam_never_scores_below_the_greedy_answer(beam_size, make_model):
    """A row stopped once K answers had ended, even poor ones while a better one was still alive."""
    for seed, factor in enumerate((1, 4, 8, 20, 40)):
        decoder, context = sharpened(make_model(vocab_size=12), factor).decoder, random_context(60, seed)
        _, greedy = decoder.greedy_search(context, 7)
        ids, scores = decoder.beam_search(context, 7, beam_size)
        assert (scores[:, 0] >= greedy - 1e-5).all()
        assert all(len({tuple(beam) for beam in row.tolist() if beam[0] != PAD}) == (score > -torch.inf).sum()
                   for row, score in zip(ids, scores, strict=True)), "no answer twice"


@torch.no_grad()
def test_a_sure_model_writes_the_same_answer_with_a_beam(make_model):
    """Each word has a probability of 97 %. Beam 2 ended at once with what the first word left over."""
    decoder = make_model(vocab_size=12).decoder

    def sure(context, answer_ids, hidden):  # from <start> to word 4, then to the next word, up to word 9 and <end>
        following = torch.where(answer_ids == START, 4, torch.where(answer_ids == 9, END, answer_ids + 1)).clamp(max=11)
        probabilities = torch.full((*answer_ids.shape, 12), 0.03 / 11).scatter(2, following.unsqueeze(-1), 0.97)
        return probabilities.log(), context.unsqueeze(0)
    decoder.forward = sure
    for beam_size in (1, 2, 3):
        ids, scores = decoder.beam_search(torch.zeros(3, 16), 16, beam_size)
        assert ids[:, 0, :7].tolist() == 3 * [[4, 5, 6, 7, 8, 9, END]]
        assert scores[:, 0].tolist() == pytest.approx(3 * [math.log(0.97)], abs=1e-4)


@torch.no_grad()
def test_two_poor_answers_that_ended_do_not_stop_a_better_one(make_model):
    """A row stopped once K answers had ended. "4" and "4 5" end at once; "6 6 6 6 6 6 6 6" starts worse and ends far better."""
    decoder = make_model(vocab_size=12).decoder

    def forward(context, answer_ids, hidden):
        number = torch.zeros(1, len(answer_ids), 1) if hidden is None else hidden + 1  # words written before this one
        rows = []
        for word, step in zip(answer_ids[:, 0].tolist(), number[0, :, 0].tolist(), strict=True):
            likely = {START: {4: 0.5, 6: 0.3}, 4: {END: 0.4, 5: 0.35}, 6: {6: 0.25} if step == 1 else {6: 0.97}}.get(word)
            likely = {END: 0.97} if likely is None or step == 8 else likely
            rest = (1 - sum(likely.values())) / (12 - len(likely))
            rows.append([likely.get(index, rest) for index in range(12)])
        return torch.tensor(rows).log().unsqueeze(1), number
    decoder.forward = forward
    _, greedy = decoder.greedy_search(torch.zeros(1, 16), 16)
    ids, scores = decoder.beam_search(torch.zeros(1, 16), 16, 2)
    assert ids[0, 0, :9].tolist() == [6] * 8 + [END] and ids[0, 1, :3].tolist() == [4, 5, END]
    assert scores[0, 0] > scores[0, 1] > greedy[0]


@torch.no_grad()
def test_a_beam_that_prunes_nothing_finds_the_best_of_all_answers(make_model):
    words, length = [4, 5, 6], 4  # three words besides the special ones, at most three of them and <end>
    model, context = sharpened(make_model(vocab_size=7)), random_context(5, seed=3)
    ids, scores = model.decoder.beam_search(context, length, 120)
    answers = [[*answer, END] for n in range(1, length) for answer in itertools.product(words, repeat=n)]
    for row in range(5):
        expected = []
        for answer in answers:
            logits, _ = model.decoder(context[row:row + 1], torch.tensor([[START, *answer[:-1]]]))
            log_probs = logits[0].log_softmax(-1)
            expected.append((log_probs[range(len(answer)), answer].mean().item(), answer))
        best_score, best = max(expected)
        assert [index for index in ids[row, 0].tolist() if index != PAD] == best
        assert scores[row, 0].item() == pytest.approx(best_score, abs=1e-5)
        finite = scores[row][scores[row] > -torch.inf]
        assert len(finite) == len(answers) and (finite.diff() <= 0).all()


@torch.no_grad()
def test_answers_end_and_never_hold_unknown_words(make_model):
    model, context = sharpened(make_model(vocab_size=12)), random_context(6, seed=4)
    model.decoder.output.bias[[UNK, PAD, START]] = 50.0
    model.decoder.output.bias[END] = -50.0
    for ids in (model.decoder.greedy_search(context, 5)[0], model.decoder.beam_search(context, 5, 3)[0][:, 0]):
        assert (ids[:, -1] == END).all() and not torch.isin(ids[:, :-1], torch.tensor([PAD, START, UNK])).any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_confidence_is_the_probability_of_the_whole_answer(fusion, make_dataset):
    model, dataset = make_dataset(fusion=fusion)
    batch = dataset.batch(torch.arange(10))
    ids, confidence, gate = sharpened(model).generate(batch)
    inputs = torch.cat([torch.full((10, 1), START), ids[:, :-1]], dim=1)
    log_probs = model(batch, inputs).log_softmax(-1).gather(2, ids.unsqueeze(-1)).squeeze(-1)
    written = ids != PAD
    expected = (log_probs * written).sum(1).exp()
    torch.testing.assert_close(confidence, expected, atol=1e-5, rtol=1e-4)
    assert {"gated": ((gate > 0) & (gate < 1)).all(), "constant": (gate == 0.5).all(), "concat": gate.isnan().all()}[fusion]


def test_the_constant_fusion_is_the_gated_one_with_a_gate_of_one_half():
    image, question = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    fusions = []
    for kind in (GatedFusion, ConstantFusion):
        torch.manual_seed(0)
        fusions.append(kind(16, 0.0))
    with torch.no_grad():
        fusions[0].gate.weight.zero_()
        fusions[0].gate.bias.zero_()
    assert torch.equal(fusions[0](image, question)[0], fusions[1](image, question)[0])
    assert {name for name, _ in fusions[1].named_parameters()} == {
        name for name, _ in fusions[0].named_parameters() if not name.startswith("gate.")}


def test_rows_that_share_an_image_or_a_question_get_the_same_logits_as_copies(make_dataset):
    """A batch holds each distinct image and question once."""
    model, dataset = make_dataset(clip_layers=2, gpt2_layers=2)
    batch = dataset.batch(torch.tensor([0, 1, 2, 5, 3, 0]))
    assert len(batch["image_states"]) == 2 and len(batch["question_states"]) == 3
    copied = {**batch, "image_states": batch["image_states"][batch["image_row"]],
              "question_states": batch["question_states"][batch["question_row"]],
              "attention_mask": batch["attention_mask"][batch["question_row"]],
              "image_row": torch.arange(6), "question_row": torch.arange(6)}
    torch.testing.assert_close(model(batch, batch["answer_ids"]), model(copied, batch["answer_ids"]))


@pytest.mark.parametrize("image_pooling", ["pooled", "attention"])
@pytest.mark.parametrize("inputs, states", [("question", "image_states"), ("image", "question_states")])
def test_a_blind_model_ignores_the_other_input(inputs, states, image_pooling, make_dataset):
    model, dataset = make_dataset(inputs=inputs, image_pooling=image_pooling)
    batch = dataset.batch(torch.arange(6))
    before = model(batch, batch["answer_ids"])
    batch[states] = batch[states].flip(0)
    assert torch.equal(model(batch, batch["answer_ids"]), before)


def test_bf16_autocast_gives_nearly_the_same_logits(make_dataset):
    model, dataset = make_dataset(clip_layers=1, gpt2_layers=1)
    batch = dataset.batch(torch.arange(20))
    exact = model(batch, batch["answer_ids"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch, batch["answer_ids"])
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05


def test_a_batch_that_does_not_fit_the_memory_is_answered_in_halves(make_dataset, monkeypatch):
    model, dataset = make_dataset()
    whole, generate = answer_dataset(model, dataset, Precision("cpu")), model.generate

    def small_device(batch, *rest):
        if len(batch["image_row"]) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(batch, *rest)
    monkeypatch.setattr(model, "generate", small_device)
    halved = answer_dataset(model, dataset, Precision("cpu"))
    assert [answer.text for answer in halved] == [answer.text for answer in whole]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_logits_and_gradients(make_dataset):
    """torch.compile may reorder sums: 1e-4 in float32, for batches of different sizes."""
    model, dataset = make_dataset(clip_layers=2, gpt2_layers=1)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    for size in (12, 7):
        batch = dataset.batch(torch.arange(size))
        logits = [each(batch, batch["answer_ids"]) for each in (model, compiled)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    for one in logits:
        one.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(compiled.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-3)


def test_the_fingerprint_changes_with_one_weight(encoders):
    before = fingerprint(encoders.image.visual.state_dict())
    with torch.no_grad():
        encoders.image.visual.ln_post.bias[3] += 1e-6
    assert fingerprint(encoders.image.visual.state_dict()) != before
