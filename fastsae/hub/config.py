"""Settings of a push."""

import re
from dataclasses import dataclass

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Where an SAE is pushed to, and what its model card says that its files do not."""

    repository: str
    """Repository on the Hub, such as organization/name; it is created if needed."""

    private: bool = False
    """Create the repository as private. Pushing to an existing public one is then an error."""

    license: str | None = None
    """License of the SAE, by its identifier on the Hub, such as mit or apache-2.0 (default: the
    card states none)."""

    base_model: str | None = None
    """Hub id of the model whose activations the SAE takes (default: the run's model, if it is
    organization/name)."""

    native_only: bool = False
    """Leave out the layouts of SAELens and sparsify, which hold the same weights again."""

    message: str = "Upload SAE"
    """Commit message."""

    def __post_init__(self):
        for name in ("repository", "base_model"):
            value = getattr(self, name)
            if value is not None and not HUB_ID.fullmatch(value):
                raise ValueError(f"{name} must be organization/name on the Hub, got {value!r}")
        if self.license is not None and not re.fullmatch(r"[\w.-]+", self.license, re.ASCII):
            raise ValueError(
                f"license must be an identifier such as apache-2.0, got {self.license!r}"
            )
        if not self.message.strip():
            raise ValueError("message must not be empty")
