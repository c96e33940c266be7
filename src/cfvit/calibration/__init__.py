"""From logits of both stages to eta, and what it promises: pure functions that need no model.

``calibrate`` turns logits, labels and a target into a `Calibration`, ``check_drift`` compares it with
images in use. A model takes over its `Exit`: ``model.exit = calibration.exit``.
"""

from cfvit.calibration.calibrated import Calibration, Drift, Origin, calibrate, check_drift
from cfvit.calibration.targets import (
    Accuracy,
    Drop,
    GmacsBudget,
    LatencyBudget,
    Risk,
    Saving,
    SelectiveRisk,
    StageLatency,
    Target,
    choose_threshold,
)
from cfvit.calibration.tradeoff import Estimate, TradeOff, rank_images
