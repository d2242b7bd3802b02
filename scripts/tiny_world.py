"""The data of the tiny models: flat shapes that move as a prompt says, and measurements of videos of them.

Used by training, evaluation and tests. Coordinates are fractions of the picture's side, x to the right, y down.
A scene has one moving shape, which the prompt names, and may have a second one, which stays still; only the prompt
tells which one moves. `render` draws scenes from signed distances; `find_shapes` and `observe` look at
pixels alone (a fitted background, hue, area, centroid), so they work on any video.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "still")
SPEEDS = ("slowly", "", "quickly")

# Hue range, least saturation, least value of each name; white is what has almost no saturation.
HUES = ((-0.03, 0.025), (0.06, 0.115), (0.14, 0.18), (0.27, 0.42), (0.47, 0.535), (0.58, 0.69), (0.74, 0.84))
VALUE_MIN = (0.7, 0.8, 0.8, 0.45, 0.7, 0.6, 0.5)
DISTANCE = (0.13, 0.25, 0.37)  # travelled in one clip, per speed
GROWTH = (1.25, 1.5, 1.85)  # last radius over first, per speed; its inverse for "shrinks"
DIRECTION = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
MAX_RADIUS = 0.30  # of a grown shape
EXTENT = (1.0, 1.3, 1.44)  # from a shape's centre to its farthest point, over its radius
AREA = (math.pi, 1.84**2, 3 * math.sqrt(3) * 0.72**2)  # of a shape, over its radius squared
TURNS = (1, 8, 12)  # how many turns of a shape are tried when one is named

_SIDEWAYS = (
    "{the} {name} {slowly} moves {way}",
    "{the} {name} moves {way} {slowly}",
    "{the} {name} {slowly} moves to the {way}",
    "{the} {name} is {slowly} moving {way}",
    "{name} moving {way} {slowly}",
    "move {the} {name} {way} {slowly}",
)
_VERTICAL = tuple(phrase for phrase in _SIDEWAYS if "to the" not in phrase)
_PHRASES = {
    "left": _SIDEWAYS,
    "right": _SIDEWAYS,
    "up": (*_VERTICAL, "{the} {name} {slowly} rises"),
    "down": (*_VERTICAL, "{the} {name} {slowly} falls"),
    "grows": (
        "{the} {name} {slowly} grows",
        "{the} {name} grows {slowly}",
        "{the} {name} {slowly} gets bigger",
        "{the} {name} is {slowly} growing",
        "{name} growing {slowly}",
        "make {the} {name} {slowly} bigger",
    ),
    "shrinks": (
        "{the} {name} {slowly} shrinks",
        "{the} {name} shrinks {slowly}",
        "{the} {name} {slowly} gets smaller",
        "{the} {name} is {slowly} shrinking",
        "{name} shrinking {slowly}",
        "make {the} {name} {slowly} smaller",
    ),
    "still": (
        "{the} {name} stays still",
        "{the} {name} does not move",
        "{the} {name} is not moving",
        "{name} standing still",
        "keep {the} {name} still",
    ),
}


def is_held_out(colour: int | Tensor, shape: int | Tensor, motion: int | Tensor) -> bool | Tensor:
    """Return whether a colour x shape x motion combination is held out from training (one sixth are)."""
    return (colour + 2 * shape + motion) % 6 == 0


@dataclass
class Scenes:
    """A batch of `n` scenes; index 0 of the second axis is the named, moving shape, 1 the still one."""

    colour: Tensor  # [n, 2] index into COLOURS
    shape: Tensor  # [n, 2] index into SHAPES
    motion: Tensor  # [n] index into MOTIONS
    speed: Tensor  # [n] index into SPEEDS
    two: Tensor  # [n] bool: the still shape is there
    centre: Tensor  # [n, 2, 2] first-frame x, y
    radius: Tensor  # [n, 2] of a circle; squares and triangles are scaled to nearly the same area
    rotation: Tensor  # [n, 2] radians
    rgb: Tensor  # [n, 2, 3] in [0, 1]
    shading: Tensor  # [n, 2, 2] relative change of brightness per radius along x, y
    softness: Tensor  # [n] width of an edge, pixels of a 64-pixel picture
    background: Tensor  # [n, 2, 3] the two colours of the gradient
    gradient: Tensor  # [n, 3] x, y of the gradient's direction and its offset; zeros: a plain background
    radial: Tensor  # [n] bool: the gradient runs from the centre outwards (never in training)

    def __len__(self) -> int:
        return len(self.motion)

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def cat(parts: list[Scenes]) -> Scenes:
        return Scenes(**{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])})


def _hsv_to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    k = (torch.tensor([5.0, 3.0, 1.0]) + h[..., None] * 6) % 6
    return v[..., None] * (1 - s[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _draw_colours(colour: Tensor, rand) -> Tensor:
    hues, value_min = torch.tensor([*HUES, (0.0, 1.0)]), torch.tensor([*VALUE_MIN, 0.94])
    low, high = hues[colour].unbind(-1)
    white = colour == COLOURS.index("white")
    hue = low + (high - low) * rand(*colour.shape)
    saturation = torch.where(white, 0.05 * rand(*colour.shape), 0.75 + 0.25 * rand(*colour.shape))
    value = value_min[colour] + (1 - value_min[colour]) * rand(*colour.shape) ** 0.5
    return _hsv_to_rgb(hue % 1, saturation, value)


def _candidates(n: int, rand, two: float, alike: float, held_out: bool, radial: bool) -> tuple[Scenes, Tensor]:
    """Draw random scenes, and return them with a [n] mask of those that are valid."""
    pick = lambda k, *shape: (rand(*shape) * k).long()  # noqa: E731
    colour, shape, motion, speed = pick(8, n, 2), pick(3, n, 2), pick(7, n), pick(3, n)
    colour[:, 1] = torch.where(rand(n) < alike, colour[:, 0], colour[:, 1])  # then the shape's name must decide
    shape[:, 1] = torch.where(rand(n) < 0.2, shape[:, 0], shape[:, 1])  # then the colour's name must decide
    speed = torch.where((rand(n) < 0.4) | (motion == MOTIONS.index("still")), 1, speed)
    has_two = rand(n) < two
    radius = 0.09 + 0.13 * rand(n, 2)
    radius[:, 1].clamp_(max=0.18)
    background = _hsv_to_rgb(rand(n, 2), 0.5 * rand(n, 2), 0.08 + 0.82 * rand(n, 2))
    kind = rand(n)
    background[:, 1] = torch.where((kind < 0.4)[:, None], background[:, 0], background[:, 1])
    angle = 2 * math.pi * rand(n)
    scenes = Scenes(
        colour=colour,
        shape=shape,
        motion=motion,
        speed=speed,
        two=has_two,
        centre=rand(n, 2, 2),
        radius=radius,
        rotation=(rand(n, 2) - 0.5) * 0.4,
        rgb=_draw_colours(colour, rand),
        shading=(rand(n, 2, 2) - 0.5) * 0.25 * (rand(n, 2, 1) < 0.3),
        softness=1.0 + 1.2 * rand(n),
        background=background,
        gradient=torch.stack([angle.cos(), angle.sin(), (rand(n) - 0.5) * 0.4], -1),
        radial=torch.full((n,), radial),
    )
    last_centre, last_radius = positions(scenes, torch.ones(1))
    last_centre, last_radius = last_centre[:, 0], last_radius[:, 0]
    ok = (last_radius <= MAX_RADIUS).all(-1) & (last_radius >= 0.06).all(-1)
    for centre, r in ((scenes.centre, radius), (last_centre, last_radius)):
        inside = ((centre > 0.9 * r[..., None]) & (centre < 1 - 0.9 * r[..., None])).all(-1)
        ok &= inside[:, 0] & (inside[:, 1] | ~has_two)
    middle = (scenes.centre[:, 0] + last_centre[:, 0]) / 2
    half = (last_centre[:, 0] - scenes.centre[:, 0]).abs() / 2
    gap = ((scenes.centre[:, 1] - middle).abs() - half).clamp(min=0).norm(dim=-1)
    reach = torch.tensor(EXTENT)[shape] * torch.maximum(radius, last_radius)
    apart = gap > reach.sum(-1) + 0.03
    same_name = (colour[:, 0] == colour[:, 1]) & (shape[:, 0] == shape[:, 1])
    ok &= ~has_two | (apart & ~same_name)
    contrast = (scenes.rgb[:, :, None] - background[:, None]).norm(dim=-1).amin(-1)
    ok &= (contrast[:, 0] > 0.4) & ((contrast[:, 1] > 0.4) | ~has_two)
    return scenes, ok & (is_held_out(colour[:, 0], shape[:, 0], motion) == held_out)


def sample_scenes(
    n: int,
    generator: torch.Generator,
    *,
    two: float = 0.5,
    alike: float = 0.2,
    held_out: bool = False,
    radial: bool = False,
) -> Scenes:
    """Draw `n` scenes; motions are equally frequent.

    two: the share of scenes with a second, still shape. alike: at least this share of those are of one colour, so that
    the outline's name decides. held_out: named shapes from the combinations kept from training, else from the others.
    radial: backgrounds of a kind that training never shows.
    """
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    kept: list[Scenes] = []
    want = torch.randperm(n, generator=generator) % len(MOTIONS)
    want_two = rand(n) < two
    need = torch.stack([torch.bincount(want[want_two == b], minlength=len(MOTIONS)) for b in (False, True)])
    while need.sum() > 0:
        scenes, ok = _candidates(max(1024, 12 * int(need.sum())), rand, two, alike, held_out, radial)
        for second in (0, 1):
            for motion in range(len(MOTIONS)):
                match = (ok & (scenes.motion == motion) & (scenes.two == bool(second))).nonzero()[:, 0]
                match = match[: int(need[second, motion])]
                need[second, motion] -= len(match)
                kept.append(scenes[match])
    return Scenes.cat(kept)[torch.randperm(n, generator=generator)]


def positions(scenes: Scenes, progress: Tensor) -> tuple[Tensor, Tensor]:
    """Return centres `[n, F, 2, 2]` and radii `[n, F, 2]` at `progress` `[F]` in [0, 1] of the clip."""
    n, frames = len(scenes), len(progress)
    step = DIRECTION[scenes.motion] * torch.tensor(DISTANCE)[scenes.speed][:, None]
    growth = torch.tensor(GROWTH)[scenes.speed]
    growth = torch.where(scenes.motion == MOTIONS.index("shrinks"), 1 / growth, growth)
    growth = torch.where(scenes.motion < MOTIONS.index("grows"), 1.0, growth)
    growth = torch.where(scenes.motion == MOTIONS.index("still"), 1.0, growth)
    centre = scenes.centre[:, None].expand(n, frames, 2, 2).clone()
    radius = scenes.radius[:, None].expand(n, frames, 2).clone()
    centre[:, :, 0] += step[:, None] * progress[:, None]
    radius[:, :, 0] *= 1 + (growth - 1)[:, None] * progress
    return centre, radius


def render(scenes: Scenes, num_frames: int = 17, size: int = 64, frames: Tensor | None = None) -> Tensor:
    """Draw scenes as `[n, 3, F, size, size]` fp32 in [-1, 1].

    frames: `[k]` indices of the frames wanted out of `num_frames`; all of them by default.
    """
    index = torch.arange(num_frames) if frames is None else frames
    centre, radius = positions(scenes, index / max(num_frames - 1, 1))
    axis = (torch.arange(size) + 0.5) / size
    y, x = axis[:, None], axis[None, :]
    gx, gy, offset = (g[:, None, None] for g in scenes.gradient.unbind(-1))
    along = torch.where(
        scenes.radial[:, None, None], ((x - 0.5) ** 2 + (y - 0.5) ** 2) * 2, 0.5 + (x - 0.5) * gx + (y - 0.5) * gy
    )
    along = (along + offset).clamp(0, 1)[:, None]  # [n, 1, H, W]
    first, second = (c[:, :, None, None] for c in scenes.background.unbind(1))
    picture = (first + (second - first) * along)[:, :, None].repeat(1, 1, len(index), 1, 1)
    for i in (1, 0):
        rows = (scenes.two | (i == 0)).nonzero()[:, 0]
        if not len(rows):
            continue
        shown = scenes[rows]
        c, r = centre[rows][:, :, i, :, None, None], radius[rows][:, :, i, None, None]
        dx, dy = x - c[:, :, 0], y - c[:, :, 1]  # [n, F, H, W]
        cover = 0.5 - _distance(shown, i, dx, dy, r) * (64 / shown.softness[:, None, None, None])
        cover = cover.clamp(0, 1)[:, None]
        sx, sy = (s[:, None, None, None] for s in shown.shading[:, i].unbind(-1))
        light = 1 + (sx * dx + sy * dy) / r
        paint = (shown.rgb[:, i, :, None, None, None] * light[:, None]).clamp(0, 1)
        picture[rows] = torch.lerp(picture[rows], paint, cover)
    return picture * 2 - 1


def _distance(scenes: Scenes, i: int, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to shape `i` of each scene, negative inside."""
    out = torch.empty(torch.broadcast_shapes(dx.shape, dy.shape))
    for shape, name in enumerate(SHAPES):
        rows = (scenes.shape[:, i] == shape).nonzero()[:, 0]
        if len(rows):
            turn = scenes.rotation[rows, i][:, None, None, None]
            out[rows] = _outline(name, dx[rows], dy[rows], radius[rows], turn)
    return out


def _outline(shape: str, x: Tensor, y: Tensor, radius: Tensor | float, turn: Tensor) -> Tensor:
    """Signed distance of points, given from its centre, to a shape turned by `turn` radians. AREA follows from it."""
    if shape == "circle":
        return (x * x + y * y).sqrt() - radius
    x, y = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.92 * radius
    slope = x.abs() * (math.sqrt(3) / 2) - y / 2  # an upright triangle, its centroid at the centre
    return torch.maximum(slope, y) - 0.72 * radius


def prompt_for(scenes: Scenes, i: int, rng: random.Random | None = None) -> str:
    """Return the prompt of scene `i`: a random paraphrase, or without `rng` the plainest sentence."""
    motion = MOTIONS[int(scenes.motion[i])]
    phrase = rng.choice(_PHRASES[motion]) if rng else _PHRASES[motion][0]
    text = phrase.format(
        the=rng.choice(("the", "the", "the", "a")) if rng else "the",
        name=f"{COLOURS[int(scenes.colour[i, 0])]} {SHAPES[int(scenes.shape[i, 0])]}",
        slowly=SPEEDS[int(scenes.speed[i])],
        way=motion,
    )
    text = " ".join(text.split())
    if rng and rng.random() < 0.2:
        text = text[0].upper() + text[1:]
    if rng and rng.random() < 0.2:
        text += "."
    return text


def corpus() -> list[str]:
    """List every sentence that `prompt_for` can say, for training a tokenizer."""
    sentences = set()
    for motion, phrases in _PHRASES.items():
        for phrase in phrases:
            for colour in COLOURS:
                for shape in SHAPES:
                    for speed in SPEEDS:
                        text = phrase.format(the="the", name=f"{colour} {shape}", slowly=speed, way=motion)
                        sentences.add(" ".join(text.split()))
    return sorted(sentences)


@dataclass(frozen=True)
class Found:
    """One shape seen in a frame. centre: x, y; area: fraction of the picture; mask: `[H, W]` bool."""

    colour: str
    shape: str
    centre: tuple[float, float]
    area: float
    mask: Tensor


def find_shapes(frame: Tensor, min_area: float = 0.004) -> list[Found]:
    """Find the shapes in `frame` `[H, W, 3]` uint8 or [0, 1] float, largest first.

    The background is a quadratic in x, y fitted to the pixels that agree with it; what differs from it is cut into
    connected regions. Their median colour names them, and the outline that covers them best, of the same area, about
    the same centre, turned in any way.
    """
    from scipy import ndimage  # of the test extra; training, which only draws, does without

    rgb = frame.float() / 255 if frame.dtype == torch.uint8 else frame.float()
    height, width, _ = rgb.shape
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    basis = torch.stack([torch.ones_like(x), x, y, x * x, y * y, x * y], -1).reshape(-1, 6).double()
    flat = rgb.reshape(-1, 3).double()
    border = torch.zeros(height, width, dtype=torch.float64)
    border[:3], border[-3:], border[:, :3], border[:, -3:] = 1, 1, 1, 1
    some = torch.arange(height * width).reshape(height, width)[::2, ::2].flatten()  # enough for six numbers
    fitted, pixels, weight = basis[some], flat[some], border.flatten()[some, None] + 0.05
    fit = torch.zeros(6, 3, dtype=torch.float64)
    for _ in range(20):  # iteratively reweighted least squares with a redescending weight
        ridge = 1e-6 * torch.eye(6, dtype=torch.float64)
        fit = torch.linalg.solve(fitted.T @ (weight * fitted) + ridge, fitted.T @ (weight * pixels))
        weight = (1 / (1 + ((pixels - fitted @ fit).norm(dim=-1, keepdim=True) / 0.06) ** 2)) ** 2
    difference = (flat - basis @ fit).norm(dim=-1)
    labelled: Any = ndimage.label((difference > 0.17).reshape(height, width).numpy())  # 4-connected
    labels, count = labelled
    found = []
    for label in range(1, count + 1):
        mask = torch.from_numpy(labels == label)
        area = mask.float().mean().item()
        if area < min_area:
            continue
        centre = (x[mask].mean().item(), y[mask].mean().item())
        found.append(
            Found(_name_colour(rgb[mask]), _name_outline(mask, x - centre[0], y - centre[1], area), centre, area, mask)
        )
    return sorted(found, key=lambda f: -f.area)


def _name_colour(rgb: Tensor) -> str:
    r, g, b = rgb.median(0).values.tolist()
    top, low = max(r, g, b), min(r, g, b)
    if top == low or (top - low) / top < 0.35:
        return "white"
    hue = {r: (g - b), g: 2 * (top - low) + b - r, b: 4 * (top - low) + r - g}[top] / (top - low) / 6
    middles = [(low + high) / 2 for low, high in HUES]
    gaps = [abs((hue - m + 0.5) % 1 - 0.5) for m in middles]
    return COLOURS[gaps.index(min(gaps))]


def _name_outline(mask: Tensor, dx: Tensor, dy: Tensor, area: float) -> str:
    best, name = 0.0, ""
    for shape, factor, turns in zip(SHAPES, AREA, TURNS, strict=True):
        turn = (torch.arange(turns) / turns * 2 * math.pi / (3 if shape == "triangle" else 4))[:, None, None]
        tried = _outline(shape, dx, dy, math.sqrt(area / factor), turn) < 0
        overlap = ((tried & mask).sum((-1, -2)) / (tried | mask).sum((-1, -2))).max().item()
        if overlap > best:
            best, name = overlap, shape
    return name


@dataclass(frozen=True)
class Track:
    """One shape followed through a video: as it was first and last seen, and what it did in between."""

    first: Found
    last: Found | None
    motion: str


def observe(video: Tensor) -> list[Track]:
    """Follow every shape of the first frame of `video` `[F, H, W, 3]` to the last frame, and name its motion.

    A shape is followed by its colour and place, frame by frame; one that is lost moves as "gone".
    """
    tracks = []
    frames = [find_shapes(frame) for frame in video]
    for first in frames[0]:
        at: Found | None = first
        for found in frames[1:]:
            at = _follow(at, found) if at is not None else None
        tracks.append(Track(first, at, name_motion(first, at)))
    return tracks


def _follow(at: Found, found: list[Found]) -> Found | None:
    near = [f for f in found if f.colour == at.colour and _apart(f, at) < 0.12]
    return min(near, key=lambda f: _apart(f, at), default=None)


def _apart(a: Found, b: Found) -> float:
    return math.dist(a.centre, b.centre)


def name_motion(first: Found, last: Found | None) -> str:
    """Name the motion that took a shape from `first` to `last`."""
    if last is None:
        return "gone"
    dx, dy = last.centre[0] - first.centre[0], last.centre[1] - first.centre[1]
    if max(abs(dx), abs(dy)) > 0.06:
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    ratio = last.area / first.area
    return "grows" if ratio > 1.2 else "shrinks" if ratio < 0.83 else "still"
