"""Where quantisation hurts: python -m weights_tools.quantize.hurts PARENT QUANTISED [QUANTISED ...]"""
from weights_tools.quantize.hurts.measure import Report, measure

__all__ = ["Report", "measure"]
