"""Which images and questions a model was trained on, and how many rows of another split are among them.

Images are compared by a hash of their files' bytes, not by their names: a moved or renamed copy is the same image. A copy
that was resized or encoded again is another one. `image_digests` is {image_path: hex digest of the file's bytes}, without
the images that cannot be read.
"""
import hashlib

import torch

from common.files import SPLITS


def image_hashes(rows, image_digests):
    """The hash of each row's image: (N,) int64, the first 64 bits of its digest."""
    number = {path: int(digest[:16], 16) - 2 ** 63 for path, digest in image_digests.items()}
    return torch.tensor([number[path] for path in rows["image_path"]], dtype=torch.int64)


def question_hashes(rows, image_digests):
    """The hash of each row's image and question together: (N,) int64."""
    digests = (hashlib.blake2b(f"{image_digests[path]} {question}".encode(), digest_size=8).digest()
               for path, question in zip(rows["image_path"], rows["question"], strict=True))
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def trained_hashes(rows, image_digests, earlier=None):
    """What a checkpoint holds as `trained_on`: {"images", "questions"}, the distinct hashes of its training rows, sorted.

    `earlier`: the `trained_on` of an earlier stage, which is added.
    """
    own = {"images": image_hashes(rows, image_digests), "questions": question_hashes(rows, image_digests)}
    return {name: torch.cat([hashes, earlier[name]] if earlier else [hashes]).unique() for name, hashes in own.items()}


def count_trained(rows, image_digests, trained_on):
    """How many of `rows` were trained on. Rows whose image cannot be read do not count.

    {"images": trained images, "of_images": all, "questions": rows that show such an image, "of_questions": all,
    "same_questions": rows whose question about their image was trained on}
    """
    rows = rows[rows["image_path"].isin(list(image_digests))]
    images = image_hashes(rows, image_digests)
    trained = torch.isin(images, trained_on["images"])
    same = torch.isin(question_hashes(rows, image_digests), trained_on["questions"])
    return {"images": len(images[trained].unique()), "of_images": len(images.unique()), "questions": int(trained.sum()),
            "of_questions": len(rows), "same_questions": int(same.sum())}


def refuse_trained(counts, name, checkpoint, allow):
    """Raise ValueError if `checkpoint` was trained on images of the rows called `name`; `counts` is of `count_trained`.

    With `allow` (--allow-trained-images) it is a printed warning.
    """
    if not counts["images"]:
        return
    text = (f"{checkpoint} was trained on {counts['images']} of {counts['of_images']} {name} images ({counts['questions']} of "
            f"{counts['of_questions']} questions show them, {counts['same_questions']} were trained on themselves): a score on "
            "them says little about new images")
    if not allow:
        raise ValueError(f"{text}. Leave these rows out, build the data with the --seed that it was trained with, or train "
                         "again with all rows of an image in one split. --allow-trained-images turns this into a warning")
    print(f"warning: {text}")


def report_leaks(rows, image_digests):
    """Print how many rows of validation and test show an image that is also in training. Only readable images count."""
    rows = rows[rows["image_path"].isin(list(image_digests))]
    images = image_hashes(rows, image_digests)
    in_split = {split: torch.tensor((rows["split"] == split).to_numpy()) for split in SPLITS}
    leaked = torch.isin(images, images[in_split["train"]])
    found = [f"{(leaked & in_split[split]).sum()} of {in_split[split].sum()} {split} rows" for split in ("val", "test")
             if (leaked & in_split[split]).any()]
    if found:
        print(f"warning: {' and '.join(found)} show an image that is also in training (files of equal bytes): their scores "
              "would be too high. fine_tune.py and test.py refuse them, unless --allow-trained-images is given; give all rows "
              "of an image the same value in the column 'split' and train again")
