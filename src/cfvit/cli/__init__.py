"""The command line. Each command is a thin layer over the library; torch is loaded when needed."""

from cfvit.cli import bench, calibrate, demo, evaluate, models, predict, reproduce, train  # each adds its commands
from cfvit.cli.application import app, main

__all__ = ["app", "bench", "calibrate", "demo", "evaluate", "main", "models", "predict", "reproduce", "train"]
