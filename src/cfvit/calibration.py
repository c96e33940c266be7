"""From logits of both stages to eta, the confidence at which the coarse answer is given."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def choose_threshold(coarse: Tensor, fine: Tensor, labels: Tensor, max_drop: float) -> float:
    """The lowest eta that loses at most ``max_drop`` points of accuracy against the fine stage.

    From that eta upwards no higher one loses more either. Use images on which the model was not
    trained, and not those on which it will be scored.

    Args:
        coarse, fine: logits ``[n, classes]``.
        labels: class indices ``[n]``.
        max_drop: percentage points of top-1 accuracy below always going on.

    Returns:
        eta in [0, 1]; 1 where every image has to go on.
    """
    confidence = confidence_of(coarse).numpy()
    order = np.argsort(confidence, kind="stable")
    ranked = confidence[order]
    coarse_right = (coarse.argmax(-1) == labels).numpy()[order]
    fine_right = (fine.argmax(-1) == labels).numpy()[order]
    # right[k]: correct answers if the k least confident images go on
    right = np.append(0, fine_right.cumsum()) + np.append(coarse_right[::-1].cumsum()[::-1], 0)
    enough = right >= fine_right.sum() - max_drop / 100 * len(labels) - 1e-9
    # no eta separates images of equal confidence
    reachable = np.concatenate([[True], ranked[1:] > ranked[:-1], [True]])
    failing = np.flatnonzero(~enough & reachable)
    if len(failing) == 0:
        return 0.0
    go_on = next(k for k in range(failing[-1] + 1, len(reachable)) if reachable[k])
    if go_on == len(labels):
        return 1.0
    return min(float(ranked[go_on]), float(np.nextafter(1.0, 0.0)))  # at 1 all would go on


def confidence_of(logits: Tensor) -> Tensor:
    """The highest softmax probability, ``[n, classes] -> [n]`` in float32; -1 where it is not a number."""
    return logits.float().softmax(dim=-1).amax(dim=-1).nan_to_num(nan=-1.0)
