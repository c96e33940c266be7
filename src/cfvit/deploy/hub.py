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
    found = read_calibration(Path(folder)) if (Path(folder) / CALIBRATION_FILE).is_file() else None
    found = found if found is not None and found.exit == model.exit else None
    if found is not None:
        rows[0] = (rows[0][0], found.coarse_accuracy.value, macs.coarse)
        rows[1] = (rows[1][0], found.fine_accuracy.value, macs.both)
        rows.insert(1, (f"{found.threshold:.3f}, calibrated", found.accuracy.value, found.gmacs.value * 1e9))
    return fill_template("deploy/templates/card.md.j2", model=model, name=name, macs=macs, rows=rows, found=found)
