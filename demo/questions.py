"""Questions about a scene, and the answers of ten simulated annotators.

A question has a kind, several wordings and a list of (answer, weight). The usual phrase is first; shorter and
differently worded answers follow. Sometimes an annotator misreads the scene: the answer is then drawn for a scene that
differs in one fact.
"""
from collections import Counter
from dataclasses import dataclass

from demo.world import ANIMALS, COLUMNS, KINDS, LANDMARKS, change_one_fact

ON = {"house": "on the roof of", "car": "on top of"}  # all other hosts: under
LAND_NOUN = {"meadow": "grass", "beach": "sand", "snowfield": "snow", "street": "street"}
# as in VQA v2, the type of a question is the longest of these prefixes that it starts with
QUESTION_TYPES = (
    "what color is the", "what colors are on the", "what is on the", "what is in the", "what is next to",
    "what is standing", "what is under the", "what is beside the", "what is the weather", "what is the ground",
    "what is the cat", "what is the dog", "what is the bird", "what kind of weather", "what kind of place",
    "what time of day", "what animal", "what two", "what might the", "what", "which two", "which", "when was this",
    "where is the", "where can the", "where", "who owns the", "why is the", "how many", "how", "is there a", "is there an",
    "is the", "is it", "is", "can you see a", "can you see an", "do")
MISREADING_SHARE = 0.055                             # probability that an annotator misreads the scene
BACKGROUND_SHARE = 0.27                              # probability of a question about weather, time or place
USUAL = 0.75                                         # factor on the weight of the usual phrase; lower gives more variety
MISREADINGS = 3                                      # misread versions of one scene


@dataclass(frozen=True)
class Question:
    """`topic` names the fact asked for; it finds the same question for a misread scene. `options`: (answer, weight)."""

    kind: str
    topic: str
    wordings: tuple[str, ...]
    options: tuple[tuple[str, float], ...]


def ask(scene, rng, num_long=3, num_short=2, misread=change_one_fact):
    """Random questions about `scene`: dicts with question, question_type, kind, the usual answer and ten answers.

    misread: (scene, rng) -> the scene that an annotator sees who misreads it.
    """
    long, short, vague = long_questions(scene), short_questions(scene, rng), vague_questions(scene, rng)
    misread = [misread(scene, rng) for _ in range(MISREADINGS)]
    misread = [{question.topic: question for question in long_questions(other) + background_questions(other)}
               for other in misread]
    chosen = [rng.choice(background_questions(scene))] if rng.random() < BACKGROUND_SHARE else []
    chosen += _spread(long, num_long - len(chosen), rng) + rng.sample(short, min(num_short, len(short)))
    if rng.random() < 0.25:
        chosen.append(rng.choice(vague))
    return [_answered(question, misread, rng) for question in chosen]


def question_type(question):
    """The longest of QUESTION_TYPES that `question` starts with, or "none of the above"."""
    text = question.lower()
    starts = [start for start in QUESTION_TYPES if text.startswith(start + " ")]
    return max(starts, key=len, default="none of the above")


def _spread(questions, number, rng):
    """Up to `number` random questions, of different kinds if possible."""
    order = rng.sample(questions, len(questions))
    seen, ranked = Counter(), []
    for question in order:
        ranked.append((seen[question.kind], len(ranked), question))
        seen[question.kind] += 1
    return [question for _, _, question in sorted(ranked, key=lambda entry: entry[:2])[:number]]


def _answered(question, misread, rng):
    wording = rng.choice(question.wordings)
    answers = []
    for _ in range(10):
        options = question.options
        if rng.random() < MISREADING_SHARE:
            other = rng.choice(misread).get(question.topic)
            options = other.options if other else options
        texts, weights = zip(*options, strict=True)
        answers.append(rng.choices(texts, (weights[0] * USUAL, *weights[1:]))[0])
    return {"question": wording, "question_type": question_type(wording), "kind": question.kind,
            "usual": question.options[0][0], "answers": answers}


def long_questions(scene):
    """Questions whose usual answer has three or more words."""
    questions = []
    for thing in scene.things:
        questions.append(_where(scene, thing))
        if thing.trim and thing.kind in ("house", "boat", "kite", "ball"):
            questions.append(_colors(thing))
        if thing.kind in ANIMALS:
            questions.append(_doing(scene, thing))
        visitor = scene.visitor_of(thing)
        if visitor:
            questions.append(_visitor(thing, visitor))
    for thing in scene.grounded():
        if not scene.visitor_of(thing):
            questions.append(_column(thing))
        others = scene.neighbours(thing)
        if len(others) == 1 and thing.kind in LANDMARKS:
            questions.append(_beside(thing, others[0]))
    questions += _groups(scene)
    return questions


def a(*words):
    """The words after "a" or "an"."""
    return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))


def noun_phrase(thing):
    """Names of a thing as (phrase, weight), the usual one first."""
    size = {"small": "little", "big": "large"}[thing.size]
    return ((a(thing.size, thing.color, thing.kind), 69), (a(thing.color, thing.kind), 14),
            (f"{thing.size} {thing.color} {thing.kind}", 6), (f"{thing.color} {thing.kind}", 5),
            (a(size, thing.color, thing.kind), 4), (a(thing.kind), 2))


def _spot(scene, thing):
    """Position of a thing: (preposition, the other thing or None, a place that names no other thing)."""
    side = "in the middle" if thing.column == 1 else f"on the {COLUMNS[thing.column]} side"
    if thing.layer in ("on", "under"):
        host = scene.host_of(thing)
        return ON.get(host.kind, "under"), host, side
    if thing.layer == "sky":
        below = [other for other in scene.grounded() if other.column == thing.column]
        return "high above", below[0] if below else None, "up in the sky"
    others = scene.neighbours(thing)
    return "next to", others[0] if len(others) == 1 else None, side


def _where(scene, thing):
    kind = thing.kind
    wordings = (f"Where is the {kind}?", f"Where is the {kind} in this picture?", f"Where can the {kind} be found?",
                f"Where is the {kind} located?")
    preposition, other, place = _spot(scene, thing)
    if other:
        options = ((f"{preposition} the {other.color} {other.kind}", 70), (f"{preposition} the {other.kind}", 14),
                   (f"by the {other.kind}", 4), (f"{preposition} {a(other.kind)}", 5), (place, 7))
    else:
        plain = f"on the {LAND_NOUN[scene.ground]}" if thing.layer == "ground" else "in the sky"
        options = ((place, 76), (place.removesuffix(" side"), 10), (plain, 14))
    return Question("where", f"where {kind}", wordings, options)


def _colors(thing):
    one, two = thing.color, thing.trim
    return Question("colors", f"colors {thing.kind}",
                    (f"What color is the {thing.kind}?", f"What colors are on the {thing.kind}?",
                     f"What color is the {thing.kind} in the picture?"),
                    ((f"{one} and {two}", 72), (f"{two} and {one}", 9), (one, 9), (f"{one} with {two}", 5),
                     (f"{one}, {two}", 5)))


def _doing(scene, animal):
    kind, (preposition, other, _) = animal.kind, _spot(scene, animal)
    if preposition == "on the roof of":
        place = "on the roof"
    elif other:
        place = f"{preposition} the {other.kind}"
    else:
        place = "in the sky" if animal.layer == "sky" else f"on the {LAND_NOUN[scene.ground]}"
    return Question("doing", f"doing {kind}", (f"What is the {kind} doing?", f"What is the {kind} up to?",
                                               f"What is the {kind} doing right now?"),
                    ((f"{animal.action} {place}", 72), (animal.action, 13), (f"it is {animal.action}", 8),
                     (f"just {animal.action}", 7)))


def _visitor(host, visitor):
    preposition = ON.get(host.kind, "under")
    return Question("visitor", f"visitor {host.kind}",
                    (f"What is {preposition} the {host.kind}?", f"What can be seen {preposition} the {host.kind}?"),
                    ((a(visitor.color, visitor.kind), 70), (a("small", visitor.color, visitor.kind), 10),
                     (a(visitor.kind), 10), (visitor.kind, 5), (f"the {visitor.color} {visitor.kind}", 5)))


def _column(thing):
    name = COLUMNS[thing.column]
    side = "in the middle" if name == "middle" else f"on the {name}"
    wordings = (f"What is {side}?", f"What is {side} of the picture?", f"What is standing {side}?")
    return Question("column", f"column {name}", wordings, noun_phrase(thing))


def _beside(thing, other):
    return Question("beside", f"beside {thing.kind}",
                    (f"What is next to the {thing.kind}?", f"What is beside the {thing.kind}?"), noun_phrase(other))


def _groups(scene):
    """Questions about everything in the sky, and about pairs of things."""
    questions, flying, grounded = [], scene.flying(), scene.grounded()
    wordings = ("What is in the sky?", "What is in the air?", "What is up in the sky?")
    if len(flying) == 1:
        questions.append(Question("sky", "sky", wordings, noun_phrase(flying[0])))
    pairs = [("sky", flying, wordings)] if len(flying) == 2 else []
    if len(grounded) == 2:
        pairs.append(("two things", grounded, ("What two things are on the ground?",
                                               "Which two things stand on the ground?")))
    animals = [thing for thing in sorted(scene.things, key=lambda thing: thing.column) if thing.kind in ANIMALS]
    if len(animals) == 2:
        pairs.append(("two animals", animals, ("Which two animals are there?", "What two animals can you see?")))
    for topic, (one, two), texts in pairs:
        questions.append(Question("pair" if topic != "sky" else "sky", topic, texts, (
            (f"{a(one.kind)} and {a(two.kind)}", 70), (f"{a(two.kind)} and {a(one.kind)}", 12),
            (f"{one.kind} and {two.kind}", 14), (f"the {one.kind} and the {two.kind}", 8))))
    return questions


def background_questions(scene):
    """Questions about weather, time and place. They fit every scene."""
    clear = {"day": "warm and sunny", "evening": "mild and clear", "night": "dark and clear"}[scene.time]
    weather = {"clear": clear, "cloudy": "grey and cloudy", "rainy": "wet and rainy", "snowy": "cold and snowy"}
    first, second = weather[scene.weather].split(" and ")
    time = {"day": ("around the middle of the day", "day"), "evening": ("sometime in the evening", "evening"),
            "night": ("very late at night", "night")}[scene.time]
    place = {"meadow": ("a green grassy meadow", "a meadow", "meadow"), "beach": ("a sandy beach by the sea", "a beach",
             "beach"), "snowfield": ("a field covered in snow", "snow", "a snowy field"),
             "street": ("a street in the city", "a city street", "city")}[scene.ground]
    return [
        Question("weather", "weather", ("What is the weather like?", "What kind of weather is it?",
                                        "What is the weather in this picture?"),
                 ((f"{first} and {second}", 73), (second, 12), (f"{second} and {first}", 9), (f"it is {second}", 6))),
        Question("time", "time", ("What time of day is it?", "When was this picture made?"),
                 ((time[0], 76), (time[1], 16), (f"it is {time[1]}", 8))),
        Question("place", "place", ("What kind of place is this?", "What is the ground like here?"),
                 ((place[0], 76), (place[1], 15), (place[2], 9)))]


def short_questions(scene, rng):
    """Questions with an answer of one or two words. The filter of mini_vqa_v2.py drops them."""
    kinds = [thing.kind for thing in scene.things]
    asked = rng.choice(kinds if rng.random() < 0.5 else KINDS)
    present = "yes" if asked in kinds else "no"
    things = rng.choice(scene.things)
    animals = str(sum(kind in ANIMALS for kind in kinds))
    dark, rain = "yes" if scene.time == "night" else "no", "yes" if scene.weather == "rainy" else "no"
    questions = [
        ("is there", (f"Is there {a(asked)}?", f"Can you see {a(asked)}?"), ((present, 94), (f"{present} there is", 6))),
        ("how many", ("How many animals are there?", "How many animals can you see?"), ((animals, 90), ("1", 10))),
        ("how many", ("How many things are in the sky?",), ((str(len(scene.flying())), 85), ("1", 15))),
        ("yes no", ("Is it night?", "Is it dark outside?"), ((dark, 95), ("almost", 5))),
        ("yes no", ("Is it raining?", "Is the weather wet?"), ((rain, 95), ("a bit", 5))),
        ("size", (f"Is the {things.kind} big or small?",), ((things.size, 88), ("medium", 12))),
        ("side", (f"Is the {things.kind} on the left or on the right?",),
         ((COLUMNS[things.column], 86), (f"the {COLUMNS[things.column]}", 14)))]
    plain = [thing for thing in scene.things if not thing.trim]
    if plain:
        thing = rng.choice(plain)
        wordings = (f"What color is the {thing.kind}?", f"What color is the {thing.kind} in the picture?")
        questions.append(("color", wordings, (
            (thing.color, 90), (f"light {thing.color}", 6), (f"dark {thing.color}", 4))))
    one = [thing for thing in scene.things if thing.kind in ANIMALS]
    if len(one) == 1:
        questions.append(("animal", ("What animal is this?", "What animal do you see?"),
                          ((one[0].kind, 70), (a(one[0].kind), 30))))
    return [Question(kind, f"{kind} {wordings[0]}", wordings, options) for kind, wordings, options in questions]


def vague_questions(scene, rng):
    """Questions on which annotators disagree. The filter of mini_vqa_v2.py drops them."""
    thing = rng.choice(scene.things)
    whose = tuple(f"{who} {where}" for who in ("a boy", "an old man", "some girl", "a farmer", "my neighbor")
                  for where in ("next door", "from the city", "in the house", "I do not know", "with a hat"))
    reasons = tuple(f"{start} {end}" for start in ("because", "maybe", "I think", "probably", "no idea but")
                    for end in ("someone left it", "it likes it here", "it is lost", "it waits", "it has fun"))
    thoughts = tuple(f"{what} {when}"
                     for what in ("warm milk", "going home", "a holiday", "nothing much", "old friends")
                     for when in ("tonight", "right now", "of course", "tomorrow", "as ever"))
    texts, topic = (thoughts, "thought") if thing.kind in ANIMALS else (whose, "owner")
    wording = f"What might the {thing.kind} be thinking of?" if topic == "thought" else f"Who owns the {thing.kind}?"
    return [Question("vague", topic, (wording,), tuple((text, 1) for text in texts)),
            Question("vague", "reason", (f"Why is the {thing.kind} here?",), tuple((text, 1) for text in reasons))]
