"""Draws a `Scene` with Pillow, at twice the final size. Reducing it then gives smooth edges."""
import math
import random
from functools import partial

from PIL import Image, ImageDraw

PAINT = {"red": (220, 50, 47), "orange": (245, 140, 35), "yellow": (252, 214, 60), "green": (60, 165, 80),
         "blue": (50, 115, 220), "purple": (135, 75, 190), "pink": (248, 150, 190), "white": (250, 250, 246)}
WOOD, INK, GLASS, SKIN = (125, 85, 55), (45, 45, 55), (200, 228, 240), (245, 150, 60)
SKY = {"day": ((105, 180, 245), (205, 233, 250)), "evening": ((235, 120, 95), (253, 215, 150)),
       "night": ((18, 24, 62), (66, 76, 130))}
LAND = {"meadow": (142, 203, 104), "beach": (242, 222, 165), "snowfield": (238, 243, 249), "street": (160, 162, 168)}
DIM = {"day": 1.0, "evening": 0.9, "night": 0.62}     # brightness of the land
SCALE = {"small": 0.25, "big": 0.43}                  # height of a thing, as a share of the image's shorter side
HEIGHT_OF = {"cat": 0.8, "dog": 0.8, "bird": 0.85, "ball": 0.95, "car": 1.05, "umbrella": 1.05}  # beside other things
HALF_WIDTH = {"cat": 0.74, "dog": 0.74, "bird": 0.7, "car": 0.62, "boat": 0.56, "house": 0.55, "umbrella": 0.56}
OVERSAMPLING = 2


def draw_scene(scene):
    """`scene` as an RGB PIL image of size `scene.image_size`."""
    return draw_with_boxes(scene)[0]


def draw_with_boxes(scene):
    """(image of `draw_scene`, {thing: its box (left, top, right, bottom) in pixels of the image}).

    A box holds all that is drawn of the thing. Another thing may cover parts of it.
    """
    rng = random.Random(scene.look)
    width, height = (OVERSAMPLING * side for side in scene.image_size)
    horizon = round(height * rng.uniform(0.56, 0.62))
    image = _sky(scene, width, height)
    draw = ImageDraw.Draw(image)
    jitter = {(layer, column): (rng.uniform(-0.035, 0.035), rng.uniform(-0.03, 0.03), rng.choice((-1, 1)),
                                rng.uniform(0.94, 1.06))
              for layer in ("sky", "ground", "on", "under") for column in range(3)}
    _heavens(draw, scene, width, height, horizon, rng)
    _land(draw, scene, width, height, horizon, rng)
    pens = {thing: _place(draw, scene, thing, width, height, jitter) for thing in
            sorted(scene.things, key=lambda thing: ("sky", "ground", "on", "under").index(thing.layer))}
    _precipitation(draw, scene, width, height, rng)
    return image.reduce(OVERSAMPLING), {thing: pen.touched(width, height) for thing, pen in pens.items()}


def _place(draw, scene, thing, width, height, jitter):
    """Compute position and scale of `thing`, then draw it. Returns the pen."""
    _, dy, facing, _ = jitter[thing.layer, thing.column]
    x, y, scale = _position(thing, width, height, jitter)
    if thing.layer == "sky":
        y = height * (0.30 + dy) + scale / 2
    elif thing.layer in ("on", "under"):
        host = scene.host_of(thing)
        x, y, host_scale = _position(host, width, height, jitter)
        if thing.layer == "on":
            y -= host_scale * {"house": 0.93, "car": 0.58}[host.kind]
        else:
            x += facing * host_scale * 0.27
            y += height * 0.03
        x = _inside(x, width, scale, thing.kind)
    pen = Pen(draw, x, y, scale, facing)
    DRAW[thing.kind](pen, PAINT[thing.color], PAINT[thing.trim] if thing.trim else None, thing)
    return pen


def _position(thing, width, height, jitter):
    """(x, y, height) in pixels of a thing on the ground."""
    dx, dy, _, stretch = jitter[thing.layer, thing.column]
    scale = min(width, height) * SCALE[thing.size] * HEIGHT_OF.get(thing.kind, 1.0) * stretch
    return _inside(width * ((1 + 2 * thing.column) / 6 + dx), width, scale, thing.kind), height * (0.86 + dy), scale


def _inside(x, width, scale, kind):
    """`x`, moved so that the whole thing is inside the image."""
    reach = scale * HALF_WIDTH.get(kind, 0.45)
    return min(max(x, reach), width - reach)


class Pen:
    """Draws in coordinates of one thing: origin at the middle of its foot, y upwards, 1 = its height.

    `facing` is 1, or -1 to mirror the thing.
    """

    def __init__(self, draw, x, y, scale, facing):
        self.draw, self.x, self.y, self.scale, self.facing = draw, x, y, scale, facing
        self.line_width = max(2, round(scale / 32))
        self.points = []  # all that were drawn, in pixels of the large image

    def at(self, point):
        self.points.append((self.x + self.facing * point[0] * self.scale, self.y - point[1] * self.scale))
        return self.points[-1]

    def touched(self, width, height):
        """The box around all drawn points, in pixels of the final image; `width` and `height` are those of the large one."""
        columns, rows = zip(*self.points, strict=True)
        return tuple(value / OVERSAMPLING for value in (
            max(0, min(columns)), max(0, min(rows)), min(width, max(columns)), min(height, max(rows))))

    def box(self, left, bottom, right, top):
        (x0, y0), (x1, y1) = self.at((left, bottom)), self.at((right, top))
        return (min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))

    def outlined(self, fill):
        return {"fill": fill, "outline": shade(fill, 0.55), "width": self.line_width}

    def polygon(self, points, fill):
        self.draw.polygon([self.at(point) for point in points], **self.outlined(fill))

    def oval(self, left, bottom, right, top, fill):
        self.draw.ellipse(self.box(left, bottom, right, top), **self.outlined(fill))

    def block(self, left, bottom, right, top, fill, radius=0.0):
        self.draw.rounded_rectangle(self.box(left, bottom, right, top), radius * self.scale, **self.outlined(fill))

    def line(self, points, fill=INK, width=1.0):
        self.draw.line([self.at(point) for point in points], fill=fill, width=round(self.line_width * width),
                       joint="curve")

    def pie(self, left, bottom, right, top, start, end, fill):
        self.draw.pieslice(self.box(left, bottom, right, top), start, end, **self.outlined(fill))

    def dot(self, x, y, radius, fill=INK):
        self.draw.ellipse(self.box(x - radius, y - radius, x + radius, y + radius), fill=fill)


def shade(color, factor):
    """A darker (factor < 1) or lighter (factor > 1) `color`."""
    return tuple(min(255, round(channel * factor)) for channel in color)


def mix(one, two, share):
    """A mix of two colors; `share` (0 to 1) is the part of `two`."""
    return tuple(round(a + (b - a) * share) for a, b in zip(one, two, strict=True))


def _sky(scene, width, height):
    top, bottom = SKY[scene.time]
    grey = {"day": (150, 162, 172), "evening": (160, 130, 130), "night": (45, 48, 62)}[scene.time]
    share = {"clear": 0.0, "cloudy": 0.55, "rainy": 0.8, "snowy": 0.5}[scene.weather]
    top, bottom = mix(top, grey, share), mix(bottom, grey, share * 0.7)
    mask = Image.linear_gradient("L").resize((1, height))
    column = Image.composite(Image.new("RGB", (1, height), bottom), Image.new("RGB", (1, height), top), mask)
    return column.resize((width, height), Image.Resampling.NEAREST)


def _heavens(draw, scene, width, height, horizon, rng):
    """Sun, moon and stars in clear weather, clouds otherwise."""
    free = [column for column in range(3) if all(thing.column != column for thing in scene.flying())]
    x = width * ((1 + 2 * rng.choice(free or [0])) / 6 + rng.uniform(-0.1, 0.1))
    radius, y = min(width, height) * 0.085, height * rng.uniform(0.13, 0.2)
    if scene.time == "night":
        for _ in range(34 if scene.weather == "clear" else 6):
            sx, sy, size = rng.uniform(0, width), rng.uniform(0, horizon), rng.choice((1, 2, 2, 3))
            draw.circle((sx, sy), size, fill=(255, 250, 215))
    if scene.weather == "clear":
        if scene.time == "night":
            draw.circle((x, y), radius, fill=(250, 243, 205))
            for cx, cy, share in ((-0.3, -0.2, 0.22), (0.3, 0.25, 0.16), (0.25, -0.4, 0.12)):
                draw.circle((x + cx * radius, y + cy * radius), share * radius, fill=(228, 218, 172))
        else:
            if scene.time == "evening":
                y, radius = horizon - radius * 0.25, radius * 1.35
            for step in range(12):
                angle = math.pi * step / 6
                draw.line((x + 1.25 * radius * math.cos(angle), y + 1.25 * radius * math.sin(angle),
                           x + 1.6 * radius * math.cos(angle), y + 1.6 * radius * math.sin(angle)),
                          fill=(255, 215, 80), width=4)
            draw.circle((x, y), radius, fill=(255, 222, 70) if scene.time == "day" else (255, 165, 60))
        if scene.time == "day" and len(free) > 1:
            _cloud(draw, (x + width * 0.35) % width, y * 0.8, radius * 0.7, (255, 255, 255))
        return
    color = {"cloudy": (232, 236, 240), "rainy": (112, 120, 132), "snowy": (214, 222, 232)}[scene.weather]
    color = mix(color, (70, 75, 105), 0.45) if scene.time == "night" else color
    for step in range(4):
        _cloud(draw, width * (step + rng.uniform(0.25, 0.75)) / 4, height * rng.uniform(0.05, 0.13),
               radius * rng.uniform(0.9, 1.25), color)


def _cloud(draw, x, y, radius, color):
    for dx, dy, share in ((-1.3, 0.25, 0.75), (0, 0, 1), (1.3, 0.25, 0.8), (0.6, 0.3, 0.8), (-0.6, 0.3, 0.8)):
        cx, cy, r = x + dx * radius, y + dy * radius, share * radius
        draw.ellipse((cx - r, cy - r * 0.8, cx + r, cy + r * 0.8), fill=color)


def _land(draw, scene, width, height, horizon, rng):
    color = mix((20, 25, 60), LAND[scene.ground], DIM[scene.time])
    if scene.ground == "beach":
        sea = mix((20, 25, 60), (60, 150, 200), DIM[scene.time])
        draw.rectangle((0, horizon, width, height), fill=sea)
        for _ in range(5):
            x, y = width * rng.random(), horizon + height * rng.uniform(0.02, 0.07)
            draw.arc((x - 14, y - 4, x + 14, y + 10), 200, 340, fill=shade(sea, 1.25), width=3)
        shore = horizon + height * 0.1
        points = [(width * t / 8, shore + height * 0.012 * math.sin(t * 1.6 + 1)) for t in range(9)]
        draw.polygon([*points, (width, height), (0, height)], fill=color)
        for _ in range(26):
            x, y = rng.uniform(0, width), rng.uniform(shore + height * 0.04, height)
            draw.ellipse((x - 2, y - 1, x + 2, y + 2), fill=shade(color, 0.88))
    elif scene.ground == "street":
        for step in range(6):
            x, top = width * step / 6, horizon - height * rng.uniform(0.06, 0.2)
            wall = mix((20, 25, 60), (176, 172, 186) if step % 2 else (192, 186, 196), DIM[scene.time])
            draw.rectangle((x, top, x + width / 6 - 3, horizon + 2), fill=wall)
            lit = (255, 225, 130) if scene.time == "night" else shade(wall, 0.82)
            for wx in (0.25, 0.6):
                draw.rectangle((x + width / 6 * wx, top + 12, x + width / 6 * wx + 9, top + 24), fill=lit)
        draw.rectangle((0, horizon, width, height), fill=shade(color, 1.12))
        draw.rectangle((0, horizon + height * 0.1, width, height), fill=shade(color, 0.72))
        for step in range(-1, 6):
            x = width * (step + 0.4) / 5
            draw.rectangle((x, height * 0.945, x + width * 0.1, height * 0.965), fill=shade(color, 1.3))
    else:
        hill = shade(color, 0.9 if scene.ground == "meadow" else 0.95)
        draw.ellipse((-width * 0.3, horizon - height * 0.09, width * 0.7, height * 1.1), fill=hill)
        draw.ellipse((width * 0.35, horizon - height * 0.05, width * 1.4, height * 1.1), fill=shade(hill, 0.97))
        draw.rectangle((0, horizon + height * 0.05, width, height), fill=color)
        draw.ellipse((-width * 0.2, horizon + height * 0.01, width * 1.2, horizon + height * 0.3), fill=color)
        for _ in range(30):
            x, y = rng.uniform(0, width), rng.uniform(horizon + height * 0.09, height)
            if scene.ground == "meadow":
                draw.line((x - 4, y - 7, x, y, x + 4, y - 7), fill=shade(color, 0.82), width=2)
            else:
                draw.ellipse((x - 5, y - 2, x + 5, y + 2), fill=shade(color, 0.94))


def _precipitation(draw, scene, width, height, rng):
    if scene.weather == "rainy":
        for _ in range(60):
            x, y = rng.uniform(0, width), rng.uniform(-10, height)
            draw.line((x, y, x - 7, y + 20), fill=(190, 212, 235), width=2)
    elif scene.weather == "snowy":
        for _ in range(70):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.choice((3, 4, 5))
            draw.circle((x, y), r, fill=(255, 255, 255))


def _house(pen, main, trim, thing):
    roof = trim or shade(main, 0.78)
    pen.block(0.16, 0.7, 0.28, 1.0, shade(roof, 0.8))
    pen.block(-0.42, 0, 0.42, 0.56, main)
    pen.polygon([(-0.54, 0.54), (0, 1.0), (0.54, 0.54)], roof)
    pen.block(-0.3, 0, -0.08, 0.36, WOOD)
    pen.block(0.08, 0.18, 0.3, 0.4, GLASS)
    pen.line([(0.19, 0.18), (0.19, 0.4)])


def _tree(pen, main, trim, thing):
    pen.polygon([(-0.09, 0), (0.09, 0), (0.06, 0.5), (-0.06, 0.5)], WOOD)
    for left, bottom, right, top in ((-0.42, 0.36, 0.06, 0.76), (-0.06, 0.36, 0.42, 0.76), (-0.3, 0.5, 0.3, 1.02)):
        pen.oval(left, bottom, right, top, main)
    pen.draw.ellipse(pen.box(-0.24, 0.42, 0.24, 0.8), fill=main)


def _car(pen, main, trim, thing):
    pen.polygon([(-0.32, 0.36), (-0.2, 0.62), (0.18, 0.62), (0.34, 0.36)], main)
    pen.polygon([(-0.23, 0.38), (-0.15, 0.56), (-0.02, 0.56), (-0.02, 0.38)], GLASS)
    pen.polygon([(0.04, 0.38), (0.04, 0.56), (0.15, 0.56), (0.25, 0.38)], GLASS)
    pen.block(-0.6, 0.1, 0.6, 0.4, main, 0.08)
    pen.dot(0.55, 0.29, 0.05, (255, 240, 150))
    for x in (-0.33, 0.33):
        pen.dot(x, 0.12, 0.13, INK)
        pen.dot(x, 0.12, 0.06, (190, 190, 195))


def _boat(pen, main, trim, thing):
    sail = trim or shade(main, 1.15)
    pen.line([(0, 0.2), (0, 1.0)], WOOD, 2)
    pen.polygon([(0.04, 0.32), (0.04, 0.98), (0.46, 0.32)], sail)
    pen.polygon([(-0.04, 0.32), (-0.04, 0.86), (-0.36, 0.32)], sail)
    pen.polygon([(-0.55, 0.28), (0.55, 0.28), (0.38, 0.02), (-0.38, 0.02)], main)
    for x in (-0.5, -0.25, 0, 0.25):
        pen.pie(x - 0.02, -0.08, x + 0.27, 0.12, 0, 180, (90, 170, 225))


def _umbrella(pen, main, trim, thing):
    pen.line([(0, 0), (0, 0.9)], WOOD, 2)
    pen.pie(-0.55, 0.1, 0.55, 1.0, 180, 360, main)
    if trim:
        pen.pie(-0.2, 0.1, 0.2, 1.0, 180, 360, trim)
    for x in (-0.55, -0.2, 0.2):
        pen.draw.arc(pen.box(x, 0.48, x + (0.4 if x == -0.2 else 0.35), 0.62), 180, 360, fill=INK, width=pen.line_width)
    pen.dot(0, 1.01, 0.035)


def _face(pen, x, y, radius, main):
    """Head with eyes and nose."""
    pen.oval(x - radius, y - radius, x + radius, y + radius, main)
    for dx in (-0.35, 0.45):
        pen.dot(x + dx * radius, y + 0.2 * radius, 0.15 * radius)
    pen.dot(x + 0.08 * radius, y - 0.2 * radius, 0.16 * radius, (230, 110, 120))


def _cat_head(pen, x, y, main):
    for side in (-1, 1):
        pen.polygon([(x + side * 0.23, y + 0.02), (x + side * 0.2, y + 0.36), (x + side * 0.03, y + 0.19)], main)
    _face(pen, x, y, 0.23, main)
    for side in (-1, 1):
        pen.line([(x + side * 0.1, y - 0.06), (x + side * 0.34, y - 0.02)])
        pen.line([(x + side * 0.1, y - 0.09), (x + side * 0.33, y - 0.13)])


def _dog_head(pen, x, y, main):
    _face(pen, x, y, 0.22, main)
    pen.oval(x + 0.08, y - 0.19, x + 0.4, y + 0.04, shade(main, 1.12))
    pen.dot(x + 0.36, y - 0.02, 0.06)
    pen.oval(x - 0.32, y - 0.26, x - 0.1, y + 0.18, shade(main, 0.62))


def _animal(pen, main, trim, thing, head):
    """A cat or a dog: sitting, sleeping or running. Head and tail differ."""
    tail = [(-0.3, 0.12), (-0.52, 0.2), (-0.56, 0.5)] if thing.kind == "cat" else [(-0.26, 0.2), (-0.5, 0.36)]
    if thing.action == "sitting":
        pen.line(tail, shade(main, 0.7), 3.5)
        pen.oval(-0.34, 0.0, 0.3, 0.62, main)
        pen.block(0.04, 0.0, 0.2, 0.34, main, 0.06)
        head(pen, 0.08, 0.7, main)
    elif thing.action == "sleeping":
        pen.line([(-0.5, 0.12), (-0.72, 0.06)], shade(main, 0.7), 3.5)
        pen.oval(-0.62, 0.0, 0.36, 0.42, main)
        head(pen, 0.36, 0.24, main)
        for x, y, size in ((0.5, 0.58, 0.07), (0.66, 0.76, 0.1)):
            pen.line([(x - pen.facing * size, y + size), (x + pen.facing * size, y + size),
                      (x - pen.facing * size, y - size), (x + pen.facing * size, y - size)], (245, 245, 255), 1.2)
    else:
        pen.line([(-0.46, 0.44), (-0.7, 0.62), (-0.74, 0.82)] if thing.kind == "cat" else [(-0.46, 0.46), (-0.7, 0.66)],
                 shade(main, 0.7), 3.5)
        for x, foot in ((-0.4, -0.66), (-0.3, -0.36), (0.2, 0.34), (0.3, 0.66)):
            pen.line([(x, 0.3), (foot, 0.04)], shade(main, 0.7), 4)
        pen.oval(-0.54, 0.22, 0.46, 0.58, main)
        head(pen, 0.5, 0.64, main)


def _bird(pen, main, trim, thing):
    dark = shade(main, 0.75)
    if thing.action == "flying":
        pen.polygon([(-0.1, 0.5), (-0.5, 1.0), (0.16, 0.56)], dark)
        pen.polygon([(-0.3, 0.4), (-0.72, 0.56), (-0.7, 0.28)], dark)
        pen.oval(-0.44, 0.22, 0.34, 0.62, main)
        pen.polygon([(-0.12, 0.42), (-0.34, 0.96), (0.18, 0.48)], main)
    else:
        for x in (-0.06, 0.08):
            pen.line([(x, 0.2), (x, 0.0), (x + 0.1, 0.0)], SKIN, 1.5)
        pen.polygon([(-0.2, 0.34), (-0.66, 0.2), (-0.58, 0.46)], dark)
        pen.oval(-0.38, 0.14, 0.34, 0.68, main)
        pen.oval(-0.3, 0.24, 0.08, 0.5, dark)
    y = 0.58 if thing.action == "flying" else 0.74
    pen.polygon([(0.44, y + 0.08), (0.74, y - 0.02), (0.44, y - 0.1)], SKIN)
    pen.oval(0.1, y - 0.2, 0.52, y + 0.22, main)
    pen.dot(0.36, y + 0.06, 0.045)


def _kite(pen, main, trim, thing):
    trim = trim or shade(main, 0.85)
    lean = 0.1 if thing.layer == "sky" else 0.34
    top, right, bottom, left, middle = (lean, 1.0), (0.4, 0.5), (-lean, 0.12), (-0.36, 0.68), (0.02, 0.6)
    tail = [bottom, (-0.3, 0.0), (-0.14, -0.14), (-0.36, -0.28)]
    if thing.layer == "ground":
        tail = [bottom, (-0.5, 0.08), (-0.6, 0.0), (-0.78, 0.06)]
    pen.line(tail, INK, 1)
    for x, y in tail[1:]:
        pen.polygon([(x - 0.08, y + 0.05), (x + 0.08, y - 0.05), (x + 0.08, y + 0.05), (x - 0.08, y - 0.05)], trim)
    for points, fill in (((top, right, middle), main), ((right, bottom, middle), trim),
                         ((bottom, left, middle), main), ((left, top, middle), trim)):
        pen.polygon(points, fill)


def _balloon(pen, main, trim, thing):
    for x in (-0.16, 0.16):
        pen.line([(x, 0.2), (x * 2, 0.5)], WOOD)
    pen.oval(-0.4, 0.26, 0.4, 1.06, main)
    if trim:
        pen.oval(-0.2, 0.26, 0.2, 1.06, trim)
    pen.block(-0.15, 0.0, 0.15, 0.2, WOOD, 0.03)


def _ball(pen, main, trim, thing):
    pen.oval(-0.34, 0.0, 0.34, 0.68, main)
    if trim:
        for start in (20, 140, 260):
            pen.pie(-0.34, 0.0, 0.34, 0.68, start, start + 60, trim)
    pen.dot(0.0, 0.34, 0.07, (255, 255, 255))


def _flower(pen, main, trim, thing):
    pen.line([(0, 0), (0, 0.6)], (40, 130, 60), 3)
    for side in (-1, 1):
        pen.polygon([(0, 0.08), (side * 0.3, 0.3), (side * 0.06, 0.28)], (70, 170, 80))
    for step in range(6):
        x, y = 0.22 * math.cos(step * math.pi / 3), 0.7 + 0.22 * math.sin(step * math.pi / 3)
        pen.oval(x - 0.15, y - 0.15, x + 0.15, y + 0.15, main)
    pen.dot(0, 0.7, 0.13, (235, 180, 40))


DRAW = {"house": _house, "tree": _tree, "car": _car, "boat": _boat, "umbrella": _umbrella,
        "cat": partial(_animal, head=_cat_head), "dog": partial(_animal, head=_dog_head), "bird": _bird,
        "kite": _kite, "balloon": _balloon, "ball": _ball, "flower": _flower}
