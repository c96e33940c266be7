"""How a network is made ready to be timed."""

from typing import Literal

Mode = Literal["eager", "accelerated", "compiled"]
"""As torch runs it, with packed layers where these are faster, through ``torch.compile``."""
