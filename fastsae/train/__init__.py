from .config import TrainConfig
from .interrupt import Interrupted
from .trainer import Trainer

__all__ = ["Interrupted", "TrainConfig", "Trainer"]
