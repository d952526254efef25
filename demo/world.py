"""The content of a cartoon scene: kinds, colors, places, relations. Drawing and language are in other files.

A scene is a set of discrete facts (`Scene.description`). The drawing adds the exact position of each thing. A hash of
the description assigns each scene either to the demo or to the pretraining of the encoders, never to both.
"""
import dataclasses
import random
import zlib
from dataclasses import dataclass

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
ANIMALS = ("cat", "dog", "bird")
FLYERS = ("kite", "balloon", "bird")
VISITORS = ("cat", "dog", "bird", "ball")            # can be on or under a host
HOSTS = {"house": "on", "car": "on", "tree": "under", "umbrella": "under"}
LANDMARKS = ("house", "tree", "car", "boat")         # used in answers with "next to"
TWO_TONED = ("house", "boat", "kite", "balloon", "ball", "umbrella")
KINDS = ("house", "tree", "car", "boat", "umbrella", "cat", "dog", "bird", "kite", "balloon", "ball", "flower")
SIZES = ("small", "big")
COLUMNS = ("left", "middle", "right")
TIMES = ("day", "evening", "night")
WEATHERS = ("clear", "cloudy", "rainy", "snowy")
GROUNDS = ("meadow", "beach", "snowfield", "street")
ACTIONS = ("sitting", "sleeping", "running")
# (color, kind) that no training image of the demo shows: its test asks for new phrases of known words
HELD_OUT = frozenset((COLORS[(3 * number + shift) % len(COLORS)], kind) for number, kind in enumerate(KINDS)
                     for shift in range(2 + number % 2))
IMAGE_SIZES = ((240, 180), (200, 200), (180, 220), (260, 180), (220, 200), (200, 240))

NUM_THINGS_WEIGHTS = (10, 30, 35, 25)                # 1 to 4 things
FAMILY = 4                                           # images of a pretraining family: one scene and changed copies
DEMO_SHARE = 4                                       # one description in four belongs to the demo


@dataclass(frozen=True)
class Thing:
    """One thing. `layer` is "sky", "ground", or its relation ("on", "under") to the host in the same column."""

    kind: str
    color: str
    trim: str | None
    size: str
    action: str | None
    layer: str
    column: int


@dataclass(frozen=True)
class Scene:
    """All facts of an image. `look` is the seed of the drawing's random offsets. `image_size`: width, height in pixels."""

    time: str
    weather: str
    ground: str
    things: tuple[Thing, ...]
    look: int = 0
    image_size: tuple[int, int] = (240, 180)

    def description(self):
        """The facts as one string. Two drawings of the same facts have the same description."""
        things = sorted(f"{thing.kind}/{thing.color}/{thing.trim}/{thing.size}/{thing.action}/{thing.layer}/{thing.column}"
                        for thing in self.things)
        return "|".join([self.time, self.weather, self.ground, *things])

    def mirrored(self):
        """The same scene with left and right exchanged."""
        return dataclasses.replace(self, things=tuple(dataclasses.replace(thing, column=2 - thing.column)
                                                      for thing in self.things))

    def host_of(self, thing):
        """The host that `thing` is on or under, or None."""
        if thing.layer not in ("on", "under"):
            return None
        return next(other for other in self.things if other.layer == "ground" and other.column == thing.column)

    def visitor_of(self, host):
        """The thing on or under `host`, or None."""
        return next((other for other in self.things if host.layer == "ground" and other.layer in ("on", "under")
                     and other.column == host.column), None)

    def grounded(self):
        """Things on the ground, left to right. Things on or under a host are not included."""
        return sorted((thing for thing in self.things if thing.layer == "ground"), key=lambda thing: thing.column)

    def flying(self):
        """Things in the sky, left to right."""
        return sorted((thing for thing in self.things if thing.layer == "sky"), key=lambda thing: thing.column)

    def neighbours(self, thing):
        """Things on the ground in the columns next to `thing`."""
        return [other for other in self.grounded() if thing.layer == "ground" and abs(other.column - thing.column) == 1]


def belongs_to_demo(scene):
    """True if the demo may show this scene, False if pretraining may."""
    return zlib.crc32(scene.description().encode()) % DEMO_SHARE == 0


def sample_scene(rng):
    """A random scene, drawn with `rng` (random.Random)."""
    num_things = rng.choices(range(1, 5), NUM_THINGS_WEIGHTS)[0]
    kinds = rng.sample(KINDS, num_things)
    things = []
    for kind in sorted(kinds, key=lambda kind: kind not in HOSTS):  # hosts first, then visitors
        place = _free_place(kind, things, rng)
        if place is not None:
            things.append(_dress(kind, *place, rng))
    return Scene(time=rng.choices(TIMES, (55, 23, 22))[0],
                 weather=rng.choices(WEATHERS, (40, 20, 20, 20))[0], ground=rng.choice(GROUNDS),
                 things=tuple(things), look=rng.randrange(2 ** 32), image_size=rng.choice(IMAGE_SIZES))


def sample_partition(rng, demo):
    """A random scene that belongs to the demo, or to pretraining with demo=False."""
    while True:
        scene = sample_scene(rng)
        if belongs_to_demo(scene) == demo:
            return scene


def without_held_out(scene, rng):
    """The same scene, but each thing of a HELD_OUT color has another one."""
    for index, thing in enumerate(scene.things):
        if (thing.color, thing.kind) in HELD_OUT:
            allowed = [color for color in COLORS if color != thing.trim and (color, thing.kind) not in HELD_OUT]
            scene = _replace_thing(scene, index, color=rng.choice(allowed))
    return scene


def family_of(seed, number):
    """FAMILY scenes for pretraining: a random scene and changed copies. None of them belongs to the demo."""
    rng = random.Random(f"pretraining {seed}:{number}")
    scenes = [sample_partition(rng, demo=False)]
    while len(scenes) < FAMILY:
        scene = change_one_fact(rng.choice(scenes), rng)
        if not belongs_to_demo(scene):
            scenes.append(scene)
    return scenes


def change_one_fact(scene, rng):
    """A copy of `scene` with one fact changed, or with the colors or places of two things exchanged."""
    change = rng.choice((_recolor, _recolor, _exchange_colors, _exchange_colors, _rekind, _resize, _redo, _move, _move,
                         _rebackground))
    return change(scene, rng)


def _dress(kind, layer, column, rng):
    """Draw color, trim, size and action of a thing at a known place."""
    color = rng.choice(COLORS)
    trim = None
    if kind in TWO_TONED and rng.random() < 0.65:
        trim = rng.choice([other for other in COLORS if other != color])
    size = "small" if layer in ("on", "under") else rng.choice(SIZES)
    return Thing(kind, color, trim, size, _action(kind, layer, rng), layer, column)


def _action(kind, layer, rng):
    if kind not in ANIMALS:
        return None
    if layer == "sky":
        return "flying"
    if kind == "bird":
        return "sitting"
    return rng.choice(ACTIONS if layer == "ground" else ACTIONS[:2])


def _free_place(kind, things, rng):
    """A random free (layer, column) for `kind`, or None if no place is free."""
    taken = {(thing.layer, thing.column) for thing in things}
    sky = [("sky", column) for column in range(3) if kind in FLYERS and ("sky", column) not in taken]
    ground = [("ground", column) for column in range(3) if ("ground", column) not in taken]
    hosted = []
    if kind in VISITORS:
        hosted = [(HOSTS[host.kind], host.column) for host in things if host.layer == "ground" and host.kind in HOSTS
                  and (HOSTS[host.kind], host.column) not in taken]
    choices = [group for group in (sky, sky, hosted, hosted, ground) if group]
    return rng.choice(rng.choice(choices)) if choices else None


def _replace_thing(scene, index, **facts):
    things = list(scene.things)
    things[index] = dataclasses.replace(things[index], **facts)
    return dataclasses.replace(scene, things=tuple(things))


def _recolor(scene, rng):
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    field = "trim" if thing.trim and rng.random() < 0.5 else "color"
    others = [color for color in COLORS if color not in (thing.color, thing.trim)]
    return _replace_thing(scene, index, **{field: rng.choice(others)})


def _exchange_colors(scene, rng):
    if len(scene.things) < 2:
        return _recolor(scene, rng)
    first, second = rng.sample(range(len(scene.things)), 2)
    one, two = scene.things[first], scene.things[second]
    if one.color == two.color or two.color == one.trim or one.color == two.trim:
        return _recolor(scene, rng)
    return _replace_thing(_replace_thing(scene, first, color=two.color), second, color=one.color)


def _rekind(scene, rng):
    index = rng.randrange(len(scene.things))
    thing = scene.things[index]
    present = [other.kind for other in scene.things]
    group = KINDS
    if scene.visitor_of(thing):
        group = [kind for kind in HOSTS if HOSTS[kind] == scene.visitor_of(thing).layer]
    elif thing.layer == "sky":
        group = FLYERS
    elif thing.layer != "ground":
        group = VISITORS
    kinds = [kind for kind in group if kind not in present]
    if not kinds:
        return _recolor(scene, rng)
    kind = rng.choice(kinds)
    trim = thing.trim if kind in TWO_TONED else None
    return _replace_thing(scene, index, kind=kind, trim=trim, action=_action(kind, thing.layer, rng))


def _resize(scene, rng):
    free = [index for index, thing in enumerate(scene.things) if thing.layer in ("sky", "ground")]
    index = rng.choice(free)
    return _replace_thing(scene, index, size="big" if scene.things[index].size == "small" else "small")


def _redo(scene, rng):
    animals = [index for index, thing in enumerate(scene.things) if thing.kind in ("cat", "dog")]
    if not animals:
        return _recolor(scene, rng)
    index = rng.choice(animals)
    return _replace_thing(scene, index, action=_action(scene.things[index].kind, scene.things[index].layer, rng))


def _move(scene, rng):
    """Permute the columns of the sky or of the ground. Things on or under a host move with the host."""
    layers = ("sky",) if rng.random() < 0.3 and scene.flying() else ("ground", "on", "under")
    columns = [0, 1, 2]
    rng.shuffle(columns)
    things = tuple(dataclasses.replace(thing, column=columns[thing.column]) if thing.layer in layers else thing
                   for thing in scene.things)
    return dataclasses.replace(scene, things=things)


def _rebackground(scene, rng):
    field, values = rng.choice((("time", TIMES), ("weather", WEATHERS), ("ground", GROUNDS)))
    return dataclasses.replace(scene, **{field: rng.choice([v for v in values if v != getattr(scene, field)])})
