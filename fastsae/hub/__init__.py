"""The Hugging Face hub: SAEs pushed with a model card and the layouts of other libraries.

Importing this package gives `SAE` its method `push_to_hub`. It is attached here, and not defined
with the class, because it writes the formats and numbers of packages that are built on the class.
"""

from fastsae.nn import SAE

from .card import model_card
from .config import PushConfig
from .push import Pushed, push_to_hub, upload
from .repository import write_repository

__all__ = ["PushConfig", "Pushed", "model_card", "push_to_hub", "upload", "write_repository"]

SAE.push_to_hub = push_to_hub
