"""The paths of the server, the bodies that they take, and the sentences with which errors are answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pretrain.serving.counts import CONTENT_TYPE
from pretrain.serving.gate import Gate
from pretrain.serving.limits import RETRY_AFTER, Refused
from pretrain.serving.service import PATHS, Service

# fail_fast: a list of thousands of wrong values is one error.
Pictures = Annotated[list[str], Field(fail_fast=True, description="JPEG, PNG or WebP files, in base64")]
Texts = Annotated[list[str], Field(fail_fast=True, description="texts; each is cut at the model's length")]


class Answer(JSONResponse):
    """JSON in ASCII: answers repeat clients' names and fields, and JSON can hold half a surrogate pair, which UTF-8
    cannot."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Embed(Body):
    pictures: Pictures = []
    texts: Texts = []


class Similarity(Body):
    pictures: Pictures
    texts: Texts


class Caption(Body):
    pictures: Pictures


class Predict(Body):
    pictures: Pictures
    names: Annotated[list[str] | None, Field(description="of classes, for weights that have none of their own")] = None
    best: Annotated[int, Field(description="classes of each picture")] = 5


def make_app(service: Service) -> Gate:
    """The application behind its Gate. It closes the service when the server ends."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # No pages of documentation, since they would load scripts from elsewhere; /openapi.json has all of it.
    app = FastAPI(title="Imglish", docs_url=None, redoc_url=None, lifespan=life)
    gate = Gate(app, service.limits, service.counts, (*PATHS, "/health", "/metrics", "/openapi.json"))
    _add_answers(app, service)
    _add_errors(app)

    @app.get("/health")
    async def health() -> Answer:
        """200 as long as the server can answer, with what it can and its limits; else 503."""
        return Answer(service.health())

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        """What was done so far, for Prometheus."""
        return PlainTextResponse(service.metrics(gate.held), media_type=CONTENT_TYPE)

    return gate


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/embed")
    async def embed(body: Embed, request: Request) -> Answer:
        """Unit vectors of pictures and texts, in the order in which they came."""
        return Answer(await service.embed(body.pictures, body.texts, request.state.deadline))

    @app.post("/similarity")
    async def similarity(body: Similarity, request: Request) -> Answer:
        """Cosines: a row for each picture, a column for each text."""
        return Answer(await service.similarity(body.pictures, body.texts, request.state.deadline))

    @app.post("/caption")
    async def caption(body: Caption, request: Request) -> Answer:
        """A text for each picture."""
        return Answer(await service.caption(body.pictures, request.state.deadline))

    @app.post("/predict")
    async def predict(body: Predict, request: Request) -> Answer:
        """The best classes of each picture."""
        return Answer(await service.predict(body.pictures, body.names, body.best, request.state.deadline))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Answer:
        return _error(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Answer:
        first: Any = error.errors()[0]
        place = ".".join(str(part)[:60] for part in first["loc"] if part != "body") or "body"
        detail = f" ({first['ctx']['error']})" if first["type"] == "json_invalid" else ""
        return _error(400, f"{place}: {first['msg']}{detail}")

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Answer:
        return _error(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> Answer:
        return _error(500, "the server made a mistake; its log says which")


def _error(status: int, sentence: str) -> Answer:
    headers = {"Retry-After": str(RETRY_AFTER)} if status == 503 else None
    return Answer({"error": sentence}, status, headers)
