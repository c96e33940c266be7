"""How the command line spells engines; without torch, which ``--help`` does not wait for."""

from typing import Literal

EngineName = Literal["eager", "torch", "compiled", "onnx", "onnx-int8", "openvino", "openvino-int8"]
"""torch as it is, with packed layers where these are faster, through ``torch.compile``; graphs of `cfvit.export`."""
