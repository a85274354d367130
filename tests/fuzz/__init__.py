"""Altered files of every kind that minivl reads. A package, so that fuzz/json.py hides no `json`."""
