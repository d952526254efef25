"""Captions for the pretraining of CLIP: short statements about a scene, in words that no answer of the demo uses.

A caption is a list of words from a small closed vocabulary, such as "car red-colored tiny ground-left". Every statement
can be checked against every scene, so a batch knows exactly which captions are true of which images.
"""
from demo import world

PLACES = {(layer, column): f"{layer}-{name}" for layer in ("sky", "ground", "on", "under")
          for column, name in enumerate(world.COLUMNS)}
SIZE_WORDS = {"small": "tiny", "big": "huge"}
RELATIONS = ("on", "under", "beside", "above")
SPECIALS = ("<pad>", "<start>", "<end>")                 # <end> has the largest id: open_clip pools there
CONTEXT_LENGTH = 20


def vocabulary():
    """All words of captions, `<pad>` first and `<end>` last."""
    things = {word: None for words in (world.KINDS, (f"{color}-colored" for color in world.COLORS),
                                       (f"{color}-trimmed" for color in (*world.COLORS, "not")), SIZE_WORDS.values(),
                                       PLACES.values(), (f"is-{action}" for action in (*world.ACTIONS, "flying")),
                                       (f"{relation}-a" for relation in RELATIONS), world.TIMES, world.WEATHERS,
                                       world.GROUNDS, ("alone", "sky-empty", "and")) for word in words}
    return [SPECIALS[0], SPECIALS[1], *things, SPECIALS[2]]


def statements(scene):
    """All statements that are true of `scene`, each once, in a fixed order."""
    found = [scene.time, scene.weather, scene.ground, f"{scene.time} {scene.weather}"]
    if not scene.flying():
        found.append("sky-empty")
    for thing in scene.things:
        found += _placed(thing)
        found += _relations(scene, thing)
    return list(dict.fromkeys(found))


def mirrored(statement):
    """`statement` for the mirror image: left and right exchanged."""
    sides = {"left": "right", "right": "left"}
    return " ".join("-".join(sides.get(part, part) for part in word.split("-")) for word in statement.split())


def column_statements(scene):
    """For each of the three columns: the true statements about its things, without places."""
    return [[text for thing in scene.things if thing.column == column for text in _appearance(thing)] for column in range(3)]


def _appearance(thing):
    """Statements about kind, color, size, trim and action."""
    kind, color, size = thing.kind, f"{thing.color}-colored", SIZE_WORDS[thing.size]
    found = [kind, f"{kind} {color}", f"{kind} {size}", f"{kind} {color} {size}"]
    if kind in world.TWO_TONED:
        trim = f"{thing.trim or 'not'}-trimmed"
        found += [f"{kind} {trim}", f"{kind} {color} {trim}"]
    if thing.action:
        found.append(f"{kind} is-{thing.action}")
    return found


def _placed(thing):
    """Statements about appearance, and about appearance together with the place."""
    kind, color, place = thing.kind, f"{thing.color}-colored", PLACES[thing.layer, thing.column]
    size = SIZE_WORDS[thing.size]
    found = [*_appearance(thing), f"{kind} {place}", f"{color} {place}", f"{size} {place}", f"{kind} {color} {place}",
             f"{kind} {color} {size} {place}"]
    if thing.trim:
        found.append(f"{color} {thing.trim}-trimmed {place}")
    if thing.action:
        found.append(f"{kind} is-{thing.action} {place}")
    return found


def _relations(scene, thing):
    """Statements about what a thing is on, under, beside or above. They name kinds, and kinds with colors."""
    kind, color = thing.kind, f"{thing.color}-colored"
    pairs = []
    host = scene.host_of(thing)
    if host:
        pairs.append((thing.layer, host))
    pairs += [("beside", other) for other in scene.neighbours(thing)]
    if thing.layer == "sky":
        pairs += [("above", other) for other in scene.grounded() if other.column == thing.column]
    found = []
    for relation, other in pairs:
        other_color = f"{other.color}-colored"
        found += [f"{kind} {relation}-a {other.kind}", f"{kind} {color} {relation}-a {other.kind}",
                  f"{kind} {relation}-a {other.kind} {other_color}"]
    if thing.layer == "ground" and not scene.neighbours(thing):
        found.append(f"{kind} alone")
    return found
