"""The command line. Each command is a thin layer over the library; torch is loaded when needed."""

from cfvit.cli import bench, calibrate, deploy, evaluate, models, predict, train  # each adds its commands
from cfvit.cli.application import app, main
