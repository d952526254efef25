"""Floating-point operations, counted: what encoders and training steps cost on any machine.

A block of width W, given T tokens, does T (2 M + 4 T W) of them, where M counts the numbers in its matrices (12 W^2 in
CLIP and GPT-2): 2 for each number and token, and for each token 2 T W for its scores and as many for its mix. Causal
attention is counted like the other one. A backward pass is two forward passes: one for the gradients of the weights, one
for those of the inputs. Norms, activations, fusion and decoder are left out: under one percent beside real encoders.
"""


def encoder_operations(model, image_tokens, question_tokens):
    """Operations of one picture and one question: {"image": (frozen, trainable), "question": (frozen, trainable)},
    forward only, at the model's cut."""
    image, question = model.image_encoder, model.question_encoder
    patches = 2 * image.conv1.weight.numel() * (image_tokens - 1)  # the first layer; the other token is not of the picture
    counted = {}
    for name, blocks, trainable, tokens, first in (
            ("image", image.transformer.resblocks, model.clip_layers, image_tokens, patches),
            ("question", question.h, model.gpt2_layers, question_tokens, 0)):
        each = [block_operations(block, tokens) for block in blocks]
        cut = len(each) - trainable
        counted[name] = first + sum(each[:cut]), sum(each[cut:])
    return counted


def block_operations(block, tokens):
    """Operations of one forward pass of a block for one sequence of `tokens`."""
    matrices = [parameter for parameter in block.parameters() if parameter.dim() == 2]
    width = next(parameter.numel() for parameter in block.parameters() if parameter.dim() == 1)  # the first norm's
    return tokens * (2 * sum(matrix.numel() for matrix in matrices) + 4 * tokens * width)


def step_operations(model, batch):
    """Operations that a step of stage 2 needs for `batch`: forward of the trainable blocks and twice as much backward.

    Each distinct picture and question counts once, with the tokens that the batch holds of it: a captured step computes
    more, since it has one copy for each row and the longest questions, but needs no more.
    """
    pictures, image_tokens = batch["image_states"].shape[:2]
    questions, question_tokens = batch["question_states"].shape[:2]
    counted = encoder_operations(model, image_tokens, question_tokens)
    return 3 * (pictures * counted["image"][1] + questions * counted["question"][1])


def times_fewer(model, num_rows, num_pictures, num_questions, image_tokens, question_tokens, epochs):
    """How many times fewer operations training from the cache does over `epochs` than the plain loop.

    Plain, in every epoch and for every row: both encoders forward, and backward through the trainable blocks. Cached: the
    frozen blocks once for each picture and distinct question, and in every epoch the trainable blocks forward and
    backward, for each picture and question once.
    """
    counted = encoder_operations(model, image_tokens, question_tokens)
    plain = epochs * num_rows * sum(frozen + 3 * trainable for frozen, trainable in counted.values())
    cached = sum(number * (counted[name][0] + epochs * 3 * counted[name][1])
                 for name, number in (("image", num_pictures), ("question", num_questions)))
    return plain / cached
