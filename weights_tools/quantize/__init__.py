"""AWQ int4 from a float checkpoint: python -m weights_tools.quantize FOLDER OUT

    prompts -> what each linear is given -> smooth -> cut -> round to 4 bits -> pack, one decoder layer after the other

README.md says which file holds what.
"""
from weights_tools.quantize.clipping import clip
from weights_tools.quantize.inputs import Inputs, read_statistics, watched
from weights_tools.quantize.job import quantize_folder
from weights_tools.quantize.layer import METHODS, Recipe, quantize_layer
from weights_tools.quantize.rounding import GROUP, ROUNDINGS, grid, nearest, quantize_linear, steps_off
from weights_tools.quantize.smoothing import ALPHAS, search, search_layer, smooth_layer, smoothing

__all__ = ["ALPHAS", "GROUP", "METHODS", "ROUNDINGS", "Inputs", "Recipe", "clip", "grid", "nearest", "quantize_folder",
           "quantize_layer", "quantize_linear", "read_statistics", "search", "search_layer", "smooth_layer",
           "smoothing", "steps_off", "watched"]
