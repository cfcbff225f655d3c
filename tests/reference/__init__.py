"""Whole-model oracles written from the descriptions of the models. They import nothing from the package."""
