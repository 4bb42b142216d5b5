from .config import TrainConfig
from .interrupt import Interrupted
from .run_folder import resumed_config, stored_config
from .trainer import Trainer

__all__ = ["Interrupted", "TrainConfig", "Trainer", "resumed_config", "stored_config"]
