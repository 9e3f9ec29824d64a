"""The data of the reference experiment: texts and token datasets."""
