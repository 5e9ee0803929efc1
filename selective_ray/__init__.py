"""Pick the images worth labeling out of a pile of unlabeled ones, and train on them."""

__version__ = "0.1.0"
