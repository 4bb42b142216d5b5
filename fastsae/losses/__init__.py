"""The training loss: unexplained variance, the activation's penalty, and the aux loss (aux-k).

The fused step (train/step.py) computes the same loss, and its gradients, without autograd.

    error    = sum |y - recon|^2                                     y = x, or a transcoder's target
    FVU      = error / sum |y - mean(y)|^2                           over the batch of N tokens
    residual = y - recon, held constant
    aux      = sum |aux codes W_dec - residual|^2 / sum |residual - mean(residual)|^2
    loss     = FVU + N penalty / sum |y - mean(y)|^2 + auxk_coef * min(n_dead / k_aux, 1) * aux

With error="log_fvu" it is log FVU, and the other two terms are divided by FVU, held constant: the
gradient is that of the loss above, divided by FVU. As the error falls, gradients keep their size,
and Adam's second moment, which remembers the first large ones for a thousand steps, does not slow
training down.

With layer_norm, x stands for the normalized tokens. The penalty is per token, so that
its coefficient is relative to a token's squared error, as in papers. With nested
prefixes of the dictionary, the error is the mean of the prefixes' errors. With multi_k, a
reconstruction from 4 k latents counts an eighth as much. The aux codes of a token are its k_aux
best-ranked dead latents (Gao et al. 2024, arXiv:2406.04093, A.2). Their encoder rows are trained as
well as their decoder rows.
"""

from .auxk import auxk_gradients, default_k_aux
from .loss import TrainingLoss, training_loss
from .objective import Objective
from .variance import fraction, total_variance

__all__ = [
    "Objective",
    "TrainingLoss",
    "auxk_gradients",
    "default_k_aux",
    "fraction",
    "total_variance",
    "training_loss",
]
