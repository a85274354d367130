"""Draw tensors and stages, without numpy or matplotlib, for notebooks, reports and files.

    from minivl import show

    show.heat(attention, "query", "key")          squares, dark is large
    show.overlay(image, weights)                  a picture with a map of its patches over it
    show.tiles(image, max_num=6)                  how a picture is cut, and what it costs
    show.patches(tile), show.unshuffle(x)         where patches go: a row of vectors, visual tokens
    show.bars, show.curve, show.strip             numbers by name, numbers along an axis, stages with their shapes
    show.bars({"before": [...], "after": [...]}, names)     two series, each with its colour
    show.growing([20, 21, 22], layers=4, ...)     the boxes of a KV cache, step by step
    show.dials, show.look, show.sharing           RoPE as arrows, attention in a plane, who reads which kv head
    show.stream                                   what each branch adds to a residual stream
    show.word, show.rounding                      the bits of a packed word, where weights are rounded to
    show.beside(one, another)                     drawings next to each other

Each returns an Svg. The last line of a notebook cell shows it, as a PNG: JupyterLab shows no SVG of a notebook that it
did not run, GitHub's viewer spoils it. `.save(path)` writes the SVG, whose squares and dots say their value under the
mouse. It is drawn on a white card of its own, so that it is readable on any page; nothing is told by colour alone, and
`.about` says it in words.
"""
from minivl.show.bits import rounding, word
from minivl.show.charts import bars, curve
from minivl.show.geometry import dials, look, sharing, stream
from minivl.show.growth import growing
from minivl.show.maps import heat, overlay
from minivl.show.squares import patches, unshuffle
from minivl.show.stages import strip, tiles
from minivl.show.svg import FAINT, INK, Svg, beside, embedded, text
