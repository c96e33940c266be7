"""Speed beside the plain backbone and beside other ways of saving, in one process and in turn."""

from typing import Literal

EngineName = Literal["eager", "torch", "compiled", "onnx", "onnx-int8", "openvino", "openvino-int8"]
"""torch as it is, with packed layers where these are faster, through ``torch.compile``; graphs of `cfvit.export`.

The command line reads it from here, without torch, which ``--help`` does not wait for.
"""
