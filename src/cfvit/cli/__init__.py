"""The command line. Each command is a thin layer over the library; torch is loaded when needed."""

from cfvit.cli import (  # each adds its commands
    bench,
    calibrate,
    demo,
    evaluate,
    export,
    models,
    predict,
    reproduce,
    serve,
    train,
)
from cfvit.cli.application import app, main
