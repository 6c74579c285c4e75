"""What trainable and packed layers have in common: rows of centers, and how they cut the weight."""

from __future__ import annotations

from torch import Tensor, nn


class CenteredLayer(nn.Module):
    """A layer with `centers` [m] or [G, m]: row r belongs to the r-th of G equal runs of by_rows(weight) in row-major order."""

    centers: nn.Parameter

    def by_rows(self, value: Tensor) -> Tensor:
        """A view of the weight, or of what is shaped like it, in the order of the rows of centers and of storage."""
        return value

    def like_weight(self, rows: Tensor) -> Tensor:
        """The inverse of by_rows."""
        return rows

    @property
    def levels(self) -> int:
        """m, the number of centers a row."""
        return int(self.centers.shape[-1])

    @property
    def num_groups(self) -> int:
        """G, the number of rows of centers."""
        return 1 if self.centers.dim() == 1 else int(self.centers.shape[0])
