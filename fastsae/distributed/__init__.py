"""Training in many processes: a mesh of them, and the share of an SAE that each one holds.

The engine is torch.distributed, started by torchrun. See docs/scaling.md.
"""

from .mesh import Axes as Axes
from .mesh import Mesh as Mesh
from .parallelize import parallelize as parallelize
from .parallelize import per_latent as per_latent
