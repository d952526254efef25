"""Floating-point operations of encoders and training steps, by counting.

A block of width W on T tokens needs T (2 M + 4 T W) operations. M is the number of weights in its matrices (12 W^2 in CLIP
and GPT-2); attention needs 2 T W per token for its scores and as many for its weighted sum. A backward pass counts as two
forward passes: gradients of the weights, and of the inputs. Norms, activations, fusion and decoder are left out; together
they are below one percent of encoders of real size.
"""


def encoder_operations(model, image_tokens, question_tokens):
    """{"image": (frozen, trainable), "question": (frozen, trainable)}: forward operations of one image and one question."""
    image, question = model.image_encoder, model.question_encoder
    patches = 2 * image.conv1.weight.numel() * (image_tokens - 1)  # one token is the class token
    counted = {}
    for name, blocks, trainable, tokens, first in (
            ("image", image.transformer.resblocks, model.clip_layers, image_tokens, patches),
            ("question", question.h, model.gpt2_layers, question_tokens, 0)):
        each = [block_operations(block, tokens) for block in blocks]
        boundary = len(each) - trainable
        counted[name] = first + sum(each[:boundary]), sum(each[boundary:])
    return counted


def block_operations(block, tokens):
    """Operations of a forward pass of one block on one sequence of `tokens`."""
    weights = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 2)
    width = next(parameter.numel() for parameter in block.parameters() if parameter.dim() == 1)  # the first norm's
    return tokens * (2 * weights + 4 * tokens * width)


def step_operations(model, batch):
    """Operations of a step of stage 2: forward and backward of the trainable blocks, once per distinct input of `batch`."""
    (images, image_tokens), (questions, question_tokens) = (batch[name].shape[:2] for name in ("image_states",
                                                                                              "question_states"))
    counted = encoder_operations(model, image_tokens, question_tokens)
    return 3 * (images * counted["image"][1] + questions * counted["question"][1])


def operations_ratio(model, rows, tokenizer, epochs):
    """Operations of the plain loop over `epochs`, divided by those of training from the cache.

    The plain loop runs both encoders forward for every row and epoch, and the trainable blocks backward. From the cache,
    the frozen blocks run once per distinct image and question, the trainable blocks once per epoch and distinct input.
    All questions count with the mean length of `rows`.
    """
    lengths = [len(ids) for ids in tokenizer(list(rows["question"]))["input_ids"]]
    counted = encoder_operations(model, model.image_encoder.positional_embedding.shape[0], sum(lengths) / len(lengths))
    plain = epochs * len(rows) * sum(frozen + 3 * trainable for frozen, trainable in counted.values())
    cached = sum(rows[column].nunique() * (counted[name][0] + epochs * 3 * counted[name][1])
                 for name, column in (("image", "image_path"), ("question", "question")))
    return plain / cached
