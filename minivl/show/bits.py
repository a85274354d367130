"""Draw what int4 is: the boxes of a packed word, the levels that weights are rounded to."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from minivl import awq
from minivl.limits import InputError
from minivl.show.maps import matrix
from minivl.show.svg import BLUE, FAINT, GREEN, INK, ORANGE, Svg, text


def word(packed: torch.Tensor | int, *, title: str = "") -> Svg:
    """Draw one packed int32 as eight boxes of four bits, and which of eight neighbouring columns each box holds."""
    value = int(packed) & 0xFFFFFFFF
    step = 84.0
    top = 62 if title else 38
    low = top + 150
    body = text(4, 17, title or "", weight="bold")
    body += text(4, top - 24, f"the word {value:#010x}, its highest bits left", size=11, colour=FAINT)
    said = []
    for nibble, column in enumerate(awq.PACK_ORDER):
        digit = value >> 4 * nibble & 0xF
        x = 6 + (7 - nibble) * step
        under = 6 + column * step
        colour = (BLUE, ORANGE)[column % 2]
        body += f'<polyline points="{x + step / 2:.1f},{top + 58} {under + step / 2:.1f},{low}" fill="none" ' \
                f'stroke="{colour}" stroke-width="2"/>'
        body += text(x + step / 2, top - 5, f"bits {4 * nibble + 3} .. {4 * nibble}", anchor="middle", size=10,
                     colour=FAINT)
        for bit in range(4):
            on = digit >> 3 - bit & 1
            body += f'<rect x="{x + 3 + 19.5 * bit:.1f}" y="{top}" width="19.5" height="26" ' \
                    f'fill="{colour if on else "white"}" stroke="{colour}"/>'
            body += text(x + 12.75 + 19.5 * bit, top + 18, on, anchor="middle", colour="white" if on else colour)
        body += f'<rect x="{x + 3:.1f}" y="{top + 26}" width="78" height="32" fill="white" stroke="{colour}" ' \
                'stroke-width="2"/>'
        body += text(x + step / 2, top + 47, f"{digit:x}", anchor="middle", size=16, weight="bold", colour=colour)
        body += f'<rect x="{under + 12:.1f}" y="{low}" width="60" height="30" rx="4" fill="{colour}"/>'
        body += text(under + step / 2, low + 20, digit, anchor="middle", size=14, weight="bold", colour="white")
        body += text(under + step / 2, low + 45, f"column {column}", anchor="middle", size=11)
        said.append(f"bits {4 * nibble + 3} to {4 * nibble} are {digit}, column {column}")
    for x, colour, words in ((6, BLUE, "even columns, from the low half"),
                             (250, ORANGE, "odd columns, from the high half")):
        body += f'<rect x="{x}" y="{low + 57}" width="12" height="12" fill="{colour}"/>'
        body += text(x + 18, low + 67, words, size=11)
    return Svg(body, 12 + 8 * step, low + 78, f"{title or 'a packed word'}: {value:#010x}, " + "; ".join(said))


def rounding(w: torch.Tensor | Sequence, methods: dict[str, tuple], *, title: str = "", width: float = 640) -> Svg:
    """Draw to which levels weights are rounded: w [n], and {name: (levels [16], rounded w [n]), ...}.

    Weights are dots on the upper line of each method, its levels strokes on the lower one; a line leads from each
    weight to where it goes. All methods have one axis, with zero in it.
    """
    w = matrix(w)[0].tolist()
    sets = {name: (matrix(levels)[0].tolist(), matrix(rounded)[0].tolist()) for name, (levels, rounded)
            in methods.items()}
    if not sets or any(len(rounded) != len(w) for _, rounded in sets.values()):
        raise InputError(f"{len(w)} weights need at least one method that says where each of them goes")
    every = [0.0, *w, *(x for both in sets.values() for part in both for x in part)]
    low, high = min(every), max(every)
    left, right = 96.0, width - 30

    def across(value):
        return left + (right - left) * (value - low) / (high - low or 1.0)

    body = text(4, 17, title, weight="bold") if title else ""
    top = 54.0 if title else 32.0
    said = []
    for (name, (levels, rounded)), colour in zip(sets.items(), (BLUE, ORANGE, GREEN)):
        body += text(4, top - 16, name, weight="bold", colour=colour)
        for y, words in ((top, "weights"), (top + 56, "levels")):
            body += text(left - 14, y + 4, words, anchor="end", size=11, colour=FAINT)
            body += f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="{FAINT}" stroke-opacity="0.5"/>'
        for a, b in zip(w, rounded):
            body += f'<polyline points="{across(a):.1f},{top} {across(b):.1f},{top + 56}" fill="none" ' \
                    f'stroke="{colour}" stroke-opacity="0.6"/>'
            body += (f'<circle cx="{across(a):.1f}" cy="{top}" r="3.6" fill="{colour}">'
                     f'<title>{a:.4g} -> {b:.4g}</title></circle>')
        for level in levels:
            body += f'<line x1="{across(level):.1f}" x2="{across(level):.1f}" y1="{top + 48:.1f}" ' \
                    f'y2="{top + 64:.1f}" stroke="{INK}" stroke-width="1.6"/>'
        worst = max(abs(a - b) for a, b in zip(w, rounded))
        for value in dict.fromkeys((low, 0.0, high)):
            body += text(across(value), top + 79, f"{value:.3g}", anchor="middle", size=11, colour=FAINT)
        body += text(right, top - 16, f"largest error {worst:.3g}", anchor="end", size=11, colour=colour)
        said.append(f"{name} rounds to levels from {min(levels):.3g} to {max(levels):.3g}, largest error {worst:.3g}")
        top += 122
    return Svg(body, width, top - 32, f"{title or 'rounding'}: {len(w)} weights from {min(w):.3g} to {max(w):.3g}; "
               + "; ".join(said))
