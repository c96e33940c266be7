"""A saved model on the Hugging Face Hub, with a card that tells what it costs. `cfvit.load` reads it from there."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from cfvit.calibration.calibrated import CALIBRATION_FILE, read_calibration
from cfvit.checkpoints import load
from cfvit.errors import CfvitError, first_line
from cfvit.files import fill_template
from cfvit.modeling.cost import count_macs
from cfvit.modeling.weights import CONFIG_FILE, WEIGHTS_FILE

CARD_FILE = "README.md"


def push_to_hub(folder: str | Path, name: str, *, private: bool = False) -> None:
    """Uploads a saved folder in one commit: the model, its calibration, and its card.

    The card is the folder's ``README.md``; if there is none, `model_card` writes it. No other file is uploaded.

    Args:
        folder: of `cfvit.save` or `cfvit train`.
        name: ``OWNER/NAME``; the repository is made if it is not there.
        private: a new repository is not public.

    Raises:
        CfvitError: no model there, or the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    load(folder)  # nothing is uploaded that does not load
    own = (folder / file for file in (CONFIG_FILE, WEIGHTS_FILE, CALIBRATION_FILE, CARD_FILE))
    files: dict[str, Path | bytes] = {path.name: path for path in own if path.is_file()}
    if CARD_FILE not in files:
        files[CARD_FILE] = model_card(folder, name).encode()
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        operations = [huggingface_hub.CommitOperationAdd(file, content) for file, content in files.items()]
        api.create_commit(name, operations, commit_message="A model of cfvit")
    except Exception as error:  # the network, the Hub and its client raise errors of any kind
        raise CfvitError(
            f"{folder} is not pushed to {name} ({first_line(error)}): check the network, the name and `hf auth login`"
        ) from error


def model_card(folder: str | Path, name: str) -> str:
    """A card in Markdown: how to use a saved model, and what it costs at each eta. The licence is left open.

    Raises:
        CfvitError: no model there.
    """
    model = load(folder)
    macs, record = count_macs(model), Path(folder) / CALIBRATION_FILE
    found = read_calibration(record.parent) if record.is_file() else None
    if found is not None and found.exit != model.exit:
        found = None
    rows: list[tuple[str, float | None, float]] = [
        ("0: coarse stage alone", found and found.coarse_accuracy.value, macs.coarse),
        ("1: every image in both stages", found and found.fine_accuracy.value, macs.both),
    ]
    if found is not None:
        rows.insert(1, (f"{found.threshold:.3f}, calibrated", found.accuracy.value, found.gmacs.value * 1e9))
    return fill_template("deploy/templates/card.md.j2", model=model, name=name, macs=macs, rows=rows, found=found)
