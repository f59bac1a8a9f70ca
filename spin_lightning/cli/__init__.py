"""The command line. ``main`` answers ``--help`` before anything heavy is imported."""

from spin_lightning.cli.commands import config_folder, main, run

__all__ = ["config_folder", "main", "run"]
