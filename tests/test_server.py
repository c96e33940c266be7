"""The server answers as the predictor does, and refuses in one line whatever it cannot answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cfvit import CoarseToFineViT, Predictor, eval_transform, load, open_image
from cfvit.deploy.server import Settings, create_app

Client = httpx.AsyncClient
KEY = "quite secret"


@pytest.fixture(scope="module")
def model(colour_model: Path) -> CoarseToFineViT:
    return load(colour_model)


@pytest.fixture(scope="module")
def predictor(model: CoarseToFineViT) -> Predictor:
    return Predictor(model, compile=False)


@pytest.fixture(scope="module")
def photos(colours: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((colours / "val").rglob("*.png"))]


@pytest.fixture
def served(predictor: Predictor) -> Callable[..., None]:
    """``served(use, **settings)``: runs ``await use(client)`` against a server with such settings."""

    def run(use: Callable[[Client], Awaitable[Any]], **settings: Any) -> None:
        async def main() -> None:
            app = create_app(predictor, Settings(name="colours", **settings))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with app.router.lifespan_context(app), Client(transport=transport, base_url="http://test") as client:
                client.service = app.state.service  # pyright: ignore[reportAttributeAccessIssue]
                await use(client)

        asyncio.run(main())

    return run


def test_predictions_are_those_of_the_predictor(
    served: Callable[..., None], predictor: Predictor, photos: list[bytes]
) -> None:
    transform = eval_transform(predictor.model.data_config)
    expected = predictor(torch.stack([transform(open_image(photo)) for photo in photos]))
    assert 0 < expected.stage.sum() < len(photos)

    async def use(client: Client) -> None:
        single = await asyncio.gather(*(client.post("/predict", content=photo) for photo in photos))
        answers = [response.raise_for_status().json()["predictions"][0] for response in single]
        form = await client.post("/predict", files=[("image", (f"{n}.png", p)) for n, p in enumerate(photos)])
        assert form.status_code == 413 or form.json()["error"]
        assert [answer["index"] for answer in answers] == expected.logits.argmax(1).tolist()
        assert [answer["stage"] for answer in answers] == expected.stage.tolist()

    served(use)
