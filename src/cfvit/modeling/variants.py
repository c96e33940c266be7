"""Names of the method's variants, as configurations, recipes and the command line spell them."""

from typing import Literal

Selection = Literal["attention", "negative", "random"]
"""Which cells are split: those with the highest class attention, as in the paper, the lowest, or any (Table 4)."""

Reuse = Literal["mlp", "linear", "none", "class_token", "uninformative"]
"""What the fine stage takes over of the coarse features: the paper's way, and the variants of its Table 5."""

CoarseLoss = Literal["kl", "ce"]
"""What the coarse stage learns from: the fine stage's answer (Eq. 14), or the label (Eq. 15, Table 8)."""

Stages = Literal["both", "coarse", "backbone"]
"""What a run trains: both stages; the coarse one alone, a plain ViT of the coarse grid; or the plain ViT itself."""

Mode = Literal["eager", "accelerated", "compiled"]
"""How a network is timed: as torch runs it, with linear layers packed for the processor, through ``torch.compile``."""
