"""Fuzzers: random cases from a seed, each of which must end well or in an error of the package.

`python -m fuzz saves 10000 0` runs ten thousand damaged saves from seed 0 on.
"""
