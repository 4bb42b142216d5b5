from .callbacks import Callback, EarlyStopping, StopTraining
from .config import TrainConfig
from .interrupt import Interrupted
from .loggers import Logger, RunInfo
from .optim import Optimizer
from .recipes import RECIPES, recipe
from .run_folder import resumed_config, stored_config
from .summary import Origin
from .sweep import Sweep
from .trainer import Trainer

__all__ = [
    "RECIPES",
    "Callback",
    "EarlyStopping",
    "Interrupted",
    "Logger",
    "Optimizer",
    "Origin",
    "RunInfo",
    "StopTraining",
    "Sweep",
    "TrainConfig",
    "Trainer",
    "recipe",
    "resumed_config",
    "stored_config",
]
