"""Show tensors and stages as SVG, without numpy or matplotlib, for notebooks, reports and files.

    from minivl import show

    show.heat(attention, "query", "key")          squares, dark is large, the value under the mouse
    show.overlay(image, weights)                  a picture with a map of its patches over it
    show.tiles(image, max_num=6)                  how a picture is cut, and what it costs
    show.bars, show.curve, show.strip             numbers by name, numbers along an axis, stages with their shapes
    show.beside(one, another)                     drawings next to each other

Each returns an Svg: the last line of a notebook cell shows it, `.save(path)` writes it. It is drawn on a white card of
its own, so that it is readable on any page; nothing is told by colour alone.
"""
from minivl.show.charts import bars, curve
from minivl.show.maps import heat, overlay
from minivl.show.stages import strip, tiles
from minivl.show.svg import FAINT, INK, Svg, beside, embedded, text
