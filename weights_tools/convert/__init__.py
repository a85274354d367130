"""From the original layout of InternVL to transformers' own (-hf) and back: python -m weights_tools.convert"""
