"""Zero-initialised control embeddings, summed and added to a denoiser's time embedding."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ctrl_ray.config.control import check_control_name
from ctrl_ray.errors import ConfigError


class ControlEmbeddings(nn.Module):
    """One float32 table per control with num_classes + 1 rows; the last row is the null label and stays zero.

    All rows start at zero, so that the augmented model equals the pre-trained one at initialisation (CTRL, section 4;
    a table per control composes, where the reference code has one joint table).
    """

    def __init__(self, num_classes: Mapping[str, int], embedding_dim: int | None) -> None:
        """embedding_dim: None where labels reach the denoiser in another way; then there are no tables."""
        super().__init__()
        for name, classes in num_classes.items():
            if classes < 2:
                raise ConfigError(f"control {name!r} has {classes} classes; expected at least 2")
            check_control_name(name)
        self.num_classes = dict(num_classes)
        self._null: dict[str, Tensor] = {}
        self.tables = nn.ModuleDict()
        if embedding_dim is None:
            return
        for name, classes in num_classes.items():
            self.tables[name] = nn.Embedding(classes + 1, embedding_dim, padding_idx=classes)
            nn.init.zeros_(self.table(name).weight)

    def table(self, name: str) -> nn.Embedding:
        """The table of one control, (num_classes + 1, embedding_dim)."""
        table = self.tables[name]
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def names(self) -> tuple[str, ...]:
        """Controls, in the order of the label columns."""
        return tuple(self.num_classes)

    @property
    def null_labels(self) -> tuple[int, ...]:
        """The null label (= num_classes) of every control."""
        return tuple(self.num_classes.values())

    def null(self, batch_size: int, device: torch.device | str = "cpu") -> Tensor:
        """Labels (B, C) that are all null."""
        key = str(device)
        if key not in self._null:  # made once for each device: making it at every step would wait for the GPU
            self._null[key] = torch.tensor(self.null_labels, dtype=torch.long, device=device)
        return self._null[key].expand(batch_size, -1)

    def forward(self, labels: Tensor) -> Tensor:
        """Sum of the controls' rows, (B, embedding_dim), for labels (B, C)."""
        rows = [table(labels[:, column]) for column, table in enumerate(self.tables.values())]
        return torch.stack(rows).sum(0)
