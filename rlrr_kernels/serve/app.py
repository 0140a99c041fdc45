"""The HTTP interface of a :class:`rlrr_kernels.serve.service.Service`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import Future
from importlib import resources
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.requests import ClientDisconnect

from rlrr_kernels.bank import UnknownAdapterError
from rlrr_kernels.serve.batcher import ClosedError
from rlrr_kernels.serve.images import FORMATS, TooManyPixelsError, UnknownFormatError
from rlrr_kernels.serve.logs import log
from rlrr_kernels.serve.reference import reference_page
from rlrr_kernels.serve.service import Answer, OverloadedError, Service
from rlrr_kernels.serve.store import MisfitError
from rlrr_kernels.train.data.images import ImageError
from rlrr_kernels.version import __version__

_T = TypeVar("_T")


class ClassProbability(BaseModel):
    """A class and how probable it is."""

    name: str = Field(examples=["defective"])
    probability: float = Field(ge=0, le=1, examples=[0.93])


class Classification(BaseModel):
    """The classes of an image, the most probable first."""

    adapter: str = Field(examples=["solar-cells"])
    classes: list[ClassProbability]


class AdapterEntry(BaseModel):
    """An adapter that can be asked for."""

    name: str = Field(examples=["solar-cells"])
    classes: list[str] = Field(description="In label order", examples=[["defective", "functional"]])


class AdapterList(BaseModel):
    """What the server knows."""

    model: str = Field(description="timm's name of the backbone", examples=["vit_base_patch16_224.augreg_in21k"])
    adapters: list[AdapterEntry]


class RescanResult(BaseModel):
    """What a look at the folder changed, by adapter name."""

    added: list[str]
    swapped: list[str]
    removed: list[str]
    failed: dict[str, str] = Field(description="name: why it is not served, or not in its new version")


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str


class State(BaseModel):
    """That the server is there."""

    status: str = Field(examples=["ok"])


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    texts = {
        400: "The image is damaged",
        401: "The bearer token is missing or wrong",
        403: "The server has no token, without which this is not done over the network",
        404: "There is no such adapter",
        408: "The body took too long",
        413: "The body has too many bytes, or the image too many pixels",
        415: "The body is no image of a format that is read",
        500: "The adapter cannot be read, or the server has a fault",
        503: "Too many requests are open, it took too long, the server stops, or the adapter was replaced by one that "
        "cannot be served; Retry-After says when to try again",
    }
    return {status: {"model": Problem, "description": texts[status]} for status in statuses}


_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "description": f"The bytes of an image file: {', '.join(FORMATS)}",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
        },
    }
}

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


async def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    service: Service = request.app.state.service
    return service


async def check_token(request: Request) -> None:
    """Raises 401 unless the request bears the token, where there is one."""
    token: str | None = request.app.state.token
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise HTTPException(401, "this server asks for a bearer token", {"WWW-Authenticate": "Bearer"})


Served = Annotated[Service, Depends(service_of)]

router = APIRouter()
guarded = APIRouter(dependencies=[Depends(check_token)])


@router.get("/", response_class=HTMLResponse, include_in_schema=False)
async def page() -> HTMLResponse:
    """A page to drop an image on."""
    text = resources.files("rlrr_kernels.serve").joinpath("page.html").read_text(encoding="utf-8")
    return HTMLResponse(text, headers=_PAGE_HEADERS)


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
def docs(request: Request) -> HTMLResponse:
    """The interface as a page, without scripts or anything from elsewhere."""
    return HTMLResponse(reference_page(request.app.openapi()), headers=_PAGE_HEADERS)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", tags=["operation"])
async def healthz() -> State:
    """That the process answers."""
    return State(status="ok")


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", tags=["operation"], responses=_problems(503))
async def readyz(request: Request, service: Served) -> State:
    """That requests are accepted: the backbone and its adapters are there, images are read, nothing is stopping."""
    if request.app.state.stopping:
        raise HTTPException(503, "the server is stopping", {"Retry-After": "5"})
    if service.is_stuck():
        raise HTTPException(503, "every reader is busy with an image that took too long", {"Retry-After": "5"})
    return State(status="ready")


@router.get("/metrics", tags=["operation"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(service: Served) -> Response:
    """What Prometheus reads."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@guarded.post(
    "/v1/classify",
    tags=["classification"],
    openapi_extra=_IMAGE_BODY,
    responses=_problems(400, 401, 404, 408, 413, 415, 500, 503),
)
async def classify(
    request: Request,
    service: Served,
    adapter: Annotated[str, Query(description="Name of the task", min_length=1, max_length=255)],
    top: Annotated[int | None, Query(description="Only so many classes; default: all", ge=1, le=10**6)] = None,
) -> Classification:
    """Classifies the image in the body with an adapter.

    Images for different adapters share the forward passes of the backbone.
    """
    answer = await _answer(request, service, adapter)
    ranked = sorted(zip(answer.classes, answer.probabilities, strict=True), key=lambda pair: -pair[1])
    return Classification(
        adapter=adapter, classes=[ClassProbability(name=name, probability=share) for name, share in ranked[:top]]
    )


@guarded.get("/v1/adapters", tags=["adapters"], responses=_problems(401))
def list_adapters(service: Served) -> AdapterList:
    """The adapters that can be asked for, and their classes."""
    entries = [AdapterEntry(name=name, classes=list(classes)) for name, classes in service.store.entries().items()]
    return AdapterList(model=service.model_name, adapters=entries)


@guarded.post("/v1/adapters/rescan", tags=["adapters"], responses=_problems(401, 403, 500))
def rescan(request: Request, service: Served) -> RescanResult:
    """Looks at the folder of adapters again: new ones are added, changed ones swapped, missing ones removed.

    Requests that were accepted end with the version that they began with. Only a server that asks for a token does this
    over the network; every one does it on SIGHUP.
    """
    if request.app.state.token is None:
        raise HTTPException(403, "this server has no token: start it with --token-file, or send it SIGHUP")
    try:
        changes = service.rescan()
    except OSError as error:
        raise HTTPException(500, str(error)) from error
    return RescanResult(
        added=list(changes.added), swapped=list(changes.swapped), removed=list(changes.removed), failed=changes.failed
    )


async def _answer(request: Request, service: Service, adapter: str) -> Answer:
    end = time.monotonic() + service.config.timeout
    try:
        service.enter()
    except OverloadedError as error:
        raise HTTPException(503, str(error), {"Retry-After": str(error.retry_after)}) from error
    reading: Future[Any] | None = None
    try:
        service.bank.info(adapter)  # before the body is read
        try:
            body = await _until(end, _read_body(request, int(service.config.body_mb * 1e6)))
        except TimeoutError as error:
            raise HTTPException(408, f"the body took longer than {service.config.timeout:g} s") from error
        reading = service.read(adapter, body, end - time.monotonic())
        held, image = await _until(end, asyncio.wrap_future(reading))
        return await _until(end, asyncio.wrap_future(service.classify(held, image, end - time.monotonic())))
    except ClientDisconnect as error:
        raise HTTPException(400, "the body ended early") from error
    except UnknownAdapterError as error:
        raise HTTPException(404, f"there is no adapter {adapter!r}") from error
    except UnknownFormatError as error:
        raise HTTPException(415, str(error)) from error
    except TooManyPixelsError as error:
        raise HTTPException(413, str(error)) from error
    except ImageError as error:
        raise HTTPException(400, str(error)) from error
    except (TimeoutError, ClosedError) as error:
        after = {"Retry-After": str(service.retry_after())}
        raise HTTPException(503, str(error) or f"it took longer than {service.config.timeout:g} s", after) from error
    except MisfitError as error:
        log(logging.ERROR, "adapter not served", adapter=adapter, reason=str(error))
        raise HTTPException(503, str(error), {"Retry-After": "60"}) from error
    except (OSError, ValueError) as error:
        log(logging.ERROR, "adapter cannot be read", adapter=adapter, reason=str(error))
        raise HTTPException(500, f"the adapter {adapter!r} cannot be read") from error
    finally:
        if reading is None:
            service.leave()
        else:  # a reader that was given up still has the image: its request stays open until it is done
            reading.add_done_callback(lambda _: service.leave())


async def _until(end: float, work: Awaitable[_T]) -> _T:
    """What ``work`` gives, or ``TimeoutError`` at the time ``end`` of ``time.monotonic``."""
    try:
        return await asyncio.wait_for(work, max(0.0, end - time.monotonic()))
    except asyncio.TimeoutError as error:  # another class than TimeoutError before Python 3.11
        raise TimeoutError(str(error)) from error


async def _read_body(request: Request, most: int) -> bytes:
    too_large = HTTPException(413, f"the body has more than {most / 1e6:g} megabytes", {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    if request.headers.get("content-type", "").startswith("multipart/"):
        raise HTTPException(415, "the body must be the bytes of an image file themselves, not a form")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


class _Observer:
    """Gives every request an id, counts and times the classifications, and logs a line for each."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, identity, status = time.monotonic(), uuid.uuid4().hex, 500

        async def observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", identity.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            seconds = time.monotonic() - begin
            if scope["path"] == "/v1/classify":
                self.service.metrics.requests.labels(str(status)).inc()
                self.service.metrics.seconds.observe(seconds)
            if scope["path"] not in ("/healthz", "/readyz", "/metrics"):
                log(
                    logging.INFO, "request", id=identity, method=scope["method"], path=scope["path"],
                    query=scope["query_string"].decode("latin-1"), status=status, ms=round(seconds * 1e3, 1),
                    client=(scope.get("client") or ("",))[0],
                )  # fmt: skip


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """The application; when it ends, the service finishes what it accepted.

    Args:
        service: what answers.
        token: that requests have to bear; None: none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        app.state.stopping = True
        done = await asyncio.to_thread(service.close)
        log(logging.INFO, "stopped", finished=done)

    app = FastAPI(
        title="rlrr serve",
        version=__version__,
        description="Classifies images with many adapters of one backbone.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.token, app.state.stopping = service, token, False
    app.include_router(guarded)
    app.include_router(router)
    app.add_middleware(_Observer, service=service)

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        log(logging.ERROR, "fault", path=request.url.path, exc_info=error)
        return JSONResponse({"detail": "the server has a fault; its log says more"}, 500)

    return app
