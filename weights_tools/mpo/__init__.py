"""Mixed Preference Optimization: what a model learns from pairs of answers, one preferred to the other."""
