"""A saved model on the Hugging Face Hub, with a card that tells what it costs. `cfvit.load` reads it from there."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from cfvit.calibration.records import CALIBRATION_FILE, read_calibration
from cfvit.checkpoints import load
from cfvit.errors import CfvitError, first_line
from cfvit.modeling.cost import count_macs
from cfvit.modeling.weights import CONFIG_FILE, WEIGHTS_FILE

CARD_FILE = "README.md"


def push_to_hub(folder: str | Path, name: str, *, private: bool = False) -> None:
    """Uploads a saved folder in one commit: the model, its calibration, and its card.

    The card is the folder's ``README.md``; if there is none, `model_card` writes it. Other files stay at home.

    Args:
        folder: of `cfvit.save` or `cfvit train`.
        name: ``OWNER/NAME``; the repository is made if it is not there.
        private: a new repository is not public.

    Raises:
        CfvitError: no model there, or the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    own = folder / CARD_FILE
    card = own.read_bytes() if own.is_file() else model_card(folder, name).encode()
    files: dict[str, Path | bytes] = {
        file: folder / file for file in (CONFIG_FILE, WEIGHTS_FILE, CALIBRATION_FILE) if (folder / file).is_file()
    }
    load(folder)  # nothing is uploaded that does not load
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        operations = [
            huggingface_hub.CommitOperationAdd(file, content) for file, content in {**files, CARD_FILE: card}.items()
        ]
        api.create_commit(name, operations, commit_message="A model of cfvit")
    except Exception as error:  # the network, the Hub and its client raise whatever they like
        raise CfvitError(
            f"{folder} is not pushed to {name} ({first_line(error)}): check the network, the name and `hf auth login`"
        ) from error


def model_card(folder: str | Path, name: str) -> str:
    """A card in Markdown: how to use a saved model, and what it costs at each eta. The licence is left open.

    Raises:
        CfvitError: no model there.
    """
    model = load(folder)
    macs = count_macs(model)
    rows: list[tuple[str, float | None, float]] = [
        ("0: coarse stage alone", None, macs.coarse),
        ("1: every image in both stages", None, macs.both),
    ]
    source = ""
    if (Path(folder) / CALIBRATION_FILE).is_file():
        found = read_calibration(Path(folder))
        if found.exit == model.exit:
            rows[0] = (rows[0][0], found.coarse_accuracy.value, macs.coarse)
            rows[1] = (rows[1][0], found.fine_accuracy.value, macs.both)
            rows.insert(1, (f"{found.threshold:.3f}, calibrated", found.accuracy.value, found.gmacs.value * 1e9))
            source = f"Measured on the {found.images} images that eta was chosen on. Promise: {found.promise}.\n\n"
    table = "".join(
        f"| {eta} | {'-' if accuracy is None else f'{accuracy:.1f}'} | {cost / 1e9:.3f} | "
        f"{100 * (1 - cost / macs.backbone):.0f}% |\n"
        for eta, accuracy, cost in rows
    )
    height, width = model.image_size
    return f"""---
library_name: cfvit
pipeline_tag: image-classification
tags: [image-classification, vision-transformer, adaptive-inference, early-exit]
---

# {name.rpartition("/")[2]}

A coarse-to-fine vision transformer (CF-ViT, AAAI 2023).
Backbone {model.config.backbone}, {model.config.num_classes} classes, {height} x {width} pixels.
It answers easy images at a coarse glance. If the confidence is below eta, it reads the image again in detail.

```python
import cfvit

model = cfvit.load("hf-hub:{name}")
predictor = cfvit.Predictor(model, threshold={model.threshold if model.threshold is not None else 0.5})
```

| eta | top-1 % | GMACs | saving |
|---|---|---|---|
{table}
GMACs are billions of multiply-accumulates of an image. The saving is that of the plain ViT's {macs.backbone / 1e9:.3f}.

{source}The licence is not stated yet: add `license:` above.
"""
