"""The dense PyTorch trainer of bench/quality.py."""

from functools import partial

from . import train_fastsae

train = partial(train_fastsae.train, dense=True)
