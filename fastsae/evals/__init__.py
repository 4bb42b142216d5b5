"""What a trained SAE keeps of its data, and of the model the data came from."""

from .reconstruction import Reconstruction, reconstruction

__all__ = ["Reconstruction", "reconstruction"]
