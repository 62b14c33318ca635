"""Logged scalars as a table that spreadsheets and pandas open."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from mmengine.visualization.vis_backend import BaseVisBackend, force_init_env

from convnext_mm.checkpoint.write import write_text
from convnext_mm.registry import VISBACKENDS, register


@register(VISBACKENDS)
class CSVVisBackend(BaseVisBackend):
    """Backend of MMEngine's visualizer that writes ``scalars.csv``.

    One row for each record of ``scalars.json``: what training logs every
    ``interval`` iterations, and the metrics of each validation. The first column is
    ``step``, the others are named as there; a row leaves out what its record does
    not have. A resumed run writes into the folder of its own timestamp, as MMEngine's
    backends do.

    Args:
        save_dir: Folder of the file, ``WORK_DIR/TIMESTAMP/vis_data`` from the runner.
        scalar_save_file: Name of the file.

    Examples:
        One line in a config adds it to the visualizer of the base config:

        >>> visualizer = dict(vis_backends=[
        ...     dict(type='LocalVisBackend'), dict(type='convnext_mm.CSVVisBackend')])
    """

    def __init__(self, save_dir: str, scalar_save_file: str = 'scalars.csv') -> None:
        super().__init__(save_dir)
        self._scalar_save_file = scalar_save_file
        self._columns: list[str] = []

    def _init_env(self) -> None:
        os.makedirs(self._save_dir, exist_ok=True)
        self._path = Path(self._save_dir, self._scalar_save_file)
        if self._path.is_file():
            self._columns = self._read()[0]

    @property
    @force_init_env
    def experiment(self) -> Path:
        """The file."""
        return self._path

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Appends a row of one value.

        Args:
            name: Column.
            value: Number, or a tensor or array of one.
            step: Iteration, or epoch.
        """
        self.add_scalars({name: value}, step)

    @force_init_env
    def add_scalars(
        self,
        scalar_dict: dict[str, Any],
        step: int = 0,
        file_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Appends a row.

        Args:
            scalar_dict: Column to value; a ``step`` in it goes before ``step``.
            step: Iteration, or epoch.
            file_path: Of other backends.

        Raises:
            OSError: The disk is full, or refuses it.
        """
        row = {'step': step, **scalar_dict}
        row = {k: v.item() if hasattr(v, 'item') else v for k, v in row.items()}
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen([*self._columns, *new])
        with open(self._path, 'a', newline='') as file:
            csv.DictWriter(file, self._columns, lineterminator='\n').writerow(row)

    def _widen(self, columns: list[str]) -> None:
        """Gives the file these columns; what it held stays."""
        rows = self._read()[1] if self._path.is_file() else []
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        write_text(self._path, text.getvalue())
        self._columns = columns

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        with open(self._path, newline='') as file:
            reader = csv.DictReader(file)
            return [*(reader.fieldnames or [])], [*reader]
