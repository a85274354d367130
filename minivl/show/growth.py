"""Draw the KV cache as it grows: a box for each token in each layer, a row of boxes for each step."""
from __future__ import annotations

from collections.abc import Iterable, Sequence

from minivl.limits import InputError
from minivl.show.svg import FAINT, INK, ORANGE, Svg, text

KEPT = "rgb(200,216,233)"
NEW = ORANGE


def growing(lengths: Sequence[int], layers: int, box_bytes: int, *, read: Iterable[str] = (), title: str = "",
            width: float = 640) -> Svg:
    """Draw a cache after each step: `lengths` tokens are in it, one column each, of one box for each of `layers`.

    Dark boxes are written in that step, pale ones were kept. `box_bytes`: keys and values of one token in one layer.
    `read`: what each step has read, in words.
    """
    lengths = [int(n) for n in lengths]
    read = [str(words) for words in read] or [f"step {i}" for i in range(len(lengths))]
    if not lengths or len(read) != len(lengths) or layers < 1 or any(a > b for a, b in zip([0, *lengths], lengths)):
        raise InputError(f"a cache of {layers} layers with {lengths} tokens after {len(read)} steps does not grow; "
                         "give a layer or more, and for each step its tokens, no fewer than before")
    label = 7 * max(map(len, read)) + 16
    ends = [f"{n} tokens x {layers} layers x {box_bytes:,} = {n * layers * box_bytes:,} bytes" for n in lengths]
    wide = min(14.0, (width - label) / max(lengths[-1], 1))
    high = max(1.5, min(9.0, 54 / layers))
    gap = 1.5 if wide > 5 and high > 4 else 0.0
    body = text(4, 16, title, weight="bold") if title else ""
    y = 30.0 if title else 8.0
    for x, colour, words in ((label, NEW, "written in this step"), (label + 160, KEPT, "kept from before")):
        body += f'<rect x="{x}" y="{y:.1f}" width="11" height="11" fill="{colour}" stroke="{INK}" stroke-width="0.5"/>'
        body += text(x + 16, y + 10, words, size=11)
    y += 24
    before = 0
    for n, words, end in zip(lengths, read, ends):
        body += text(label - 8, y + layers * high / 2 + 4, words, anchor="end")
        for t in range(n):
            for layer in range(layers):
                body += (f'<rect x="{label + t * wide:.1f}" y="{y + layer * high:.1f}" width="{wide - gap:.1f}" '
                         f'height="{high - gap:.1f}" fill="{NEW if t >= before else KEPT}">'
                         f'<title>token {t}, layer {layer}: {box_bytes:,} bytes</title></rect>')
        body += text(label, y + layers * high + 12, end, size=11, colour=FAINT)
        y += layers * high + 24
        before = n
    body += text(label, y + 8, "one column: a token; one row: a layer (the first at the top)", size=11, colour=FAINT)
    about = f"{title or 'a growing cache'}: " + "; ".join(f"{words}: {end}" for words, end in zip(read, ends))
    across = max(label + wide * lengths[-1], label + 6.2 * max(map(len, ends)), label + 340)
    return Svg(body, across + 8, y + 16, about)
