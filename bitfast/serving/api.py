"""The HTTP interface of a server: routes, answers, errors, deadlines. It runs without Ray as well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import cache, partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

import bitfast
from bitfast.serving import openapi
from bitfast.serving.bodies import received_body
from bitfast.serving.engine import Features
from bitfast.serving.inference_protocol import InferenceProtocol
from bitfast.serving.metrics import CONTENT_TYPE, Snapshot, exposition
from bitfast.serving.pages import Page, load_page
from bitfast.serving.refusals import Refusal
from bitfast.serving.requests import RAW, Images, media_type, parse_images, parse_top_k
from bitfast.serving.service import Service

DEFAULT_TOP_K = 5

logger = logging.getLogger("ray.serve")

FindService = Callable[[], Service]
FindSnapshots = Callable[[], Awaitable[Sequence[Snapshot]]]


def build_api(find_service: FindService, find_snapshots: FindSnapshots) -> FastAPI:
    """Return the ASGI application.

    Args:
        find_service: Returns what answers. Called for each request, not before.
        find_snapshots: Returns the metrics of all replicas.
    """
    api = FastAPI(
        title="bitfast",
        version=bitfast.__version__,
        summary="A Big Transfer (BiT) model behind HTTP.",
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # where to is a header of the client's
    )
    api.add_exception_handler(Refusal, _answer_refusal)
    api.add_exception_handler(HTTPException, _answer_http_exception)
    api.add_middleware(Measured, find_service=find_service)
    _add_pages(api, find_service, find_snapshots)
    _add_images(api, find_service)
    InferenceProtocol(find_service).add_routes(api)
    return api


# ---- errors, deadlines, metrics ---------------------------------------------------------------------


async def _answer_refusal(request: Request, refusal: Any) -> Response:
    return JSONResponse({"error": refusal.message}, refusal.status, refusal.headers)


async def _answer_http_exception(request: Request, error: Any) -> Response:
    messages = {
        404: f"there is no {request.url.path[:200]}; GET /openapi.json lists what there is",
        405: f"{request.method} is not allowed for {request.url.path}",
    }
    message = messages.get(error.status_code, str(error.detail))
    return JSONResponse({"error": message}, error.status_code, error.headers)


class Measured:
    """ASGI middleware: counts every request, and answers 504 when its time is over, 500 when code fails."""

    def __init__(self, app: Any, find_service: FindService) -> None:
        self._app = app
        self._find_service = find_service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service = self._find_service()
        service.ongoing_requests += 1
        started = time.perf_counter()
        status = 499  # the client hung up

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await asyncio.wait_for(
                self._app(scope, receive, counted), service.settings.request_timeout
            )
        except (asyncio.TimeoutError, Exception) as error:
            if status != 499:  # an answer is under way and cannot be changed
                raise
            await _failure(error, service)(scope, receive, counted)
        finally:
            service.ongoing_requests -= 1
            route = getattr(scope.get("route"), "path", "other")
            service.metrics.observe_request(route, status, time.perf_counter() - started)


def _failure(error: BaseException, service: Service) -> Response:
    if isinstance(error, asyncio.TimeoutError):
        seconds = service.settings.request_timeout
        message = f"the request was not answered within {seconds:g} seconds"
        return JSONResponse({"error": message}, 504)
    logger.error("a request failed", exc_info=error)
    return JSONResponse({"error": f"internal error: {type(error).__name__}"}, 500)


# ---- pages, health, metrics -------------------------------------------------------------------------


def _add_pages(api: FastAPI, find_service: FindService, find_snapshots: FindSnapshots) -> None:
    @cache
    def page(name: str) -> Page:
        return load_page(name, find_service().settings.served_name)

    @api.get("/", response_class=HTMLResponse, summary="A page that classifies dropped images")
    async def index() -> Response:
        body, headers = page("page.html")
        return Response(body, headers=headers)

    @api.get("/docs", response_class=HTMLResponse, summary="A page that shows this interface")
    async def documentation() -> Response:
        body, headers = page("docs.html")
        return Response(body, headers=headers)

    @api.get("/metrics", summary="All replicas' metrics for Prometheus", responses=openapi.METRICS)
    async def metrics() -> Response:
        return Response(exposition(await find_snapshots()), media_type=CONTENT_TYPE)


# ---- images -----------------------------------------------------------------------------------------


def _add_images(api: FastAPI, find_service: FindService) -> None:
    @api.post(
        "/classify",
        summary="The most probable labels of one image or several",
        openapi_extra=openapi.images(with_top_k=True),
        responses=openapi.CLASSIFY,
    )
    async def classify(request: Request) -> Response:
        service = find_service()
        top_k = parse_top_k(request.query_params.get("top_k"))
        classifier = service.engine.classifier

        def labels(features: Features, images: Images) -> list[dict[str, Any]]:
            count = top_k or images.top_k or DEFAULT_TOP_K
            best = classifier.best(classifier.scores(features.logits[None])[0], count)
            return [{"label": prediction.label, "score": prediction.score} for prediction in best]

        return await _answer(request, service, labels)

    @api.post(
        "/embed",
        summary="The pooled features of one image or several",
        openapi_extra=openapi.images(with_top_k=False),
        responses=openapi.EMBED,
    )
    async def embed(request: Request) -> Response:
        return await _answer(
            request, find_service(), lambda features, images: features.embedding.tolist()
        )


async def _answer(
    request: Request,
    service: Service,
    of_one: Callable[[Features, Images], Any],
) -> JSONResponse:
    """Return the answer about a request's image, or the list of answers about its images."""
    content_type = request.headers.get("content-type")
    form = media_type(content_type)  # refused before the body is read
    with service.admitted() as admission:
        body = await received_body(request, service)
        parse = partial(parse_images, body, content_type, service.settings.max_images)
        # Forms and JSON may be long; the bytes of an image are taken as they are.
        images = parse() if form == RAW else await service.in_pool(parse)
        admission.grow_to(len(images.files))
        results = await service.features_of_files(images.files)
    if not images.are_several:
        (result,) = results
        if isinstance(result, Refusal):
            raise result
        return JSONResponse(of_one(result, images), headers=_server_timing(result))

    def rendered() -> JSONResponse:
        answers = [
            {"error": result.message} if isinstance(result, Refusal) else of_one(result, images)
            for result in results
        ]
        all_failed = all(isinstance(result, Refusal) for result in results)
        return JSONResponse(answers, 422 if all_failed else 200)

    return await service.in_pool(rendered)


def _server_timing(features: Features) -> dict[str, str]:
    parts = [f"{name};dur={1000 * seconds:.1f}" for name, seconds in features.seconds.items()]
    return {"Server-Timing": ", ".join(parts)}


__all__ = ["build_api"]
