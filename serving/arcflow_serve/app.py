"""The web application: the endpoint for images, and around it models, state, documentation and the page."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arcflow_serve.accept import find_model
from arcflow_serve.errors import UNAVAILABLE, ServiceError
from arcflow_serve.generation import REQUEST_ID, Generation
from arcflow_serve.keys import Keys
from arcflow_serve.models import Model
from arcflow_serve.replies import error_response, new_request_id, unexpected
from arcflow_serve.schema import GenerationRequest
from arcflow_serve.service import Engine
from arcflow_serve.settings import Settings

#: What the page may load: nothing but what it holds itself, and this service.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FAVICON = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#4051b5"/>'
    b'<path d="M3 12A6 6 0 0 1 13 12" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)
IMAGES_PATH = "/v1/images/generations"
_ERRORS = {"description": "An error, in OpenAI's shape."}


def create_app(engine: Engine, settings: Settings, behind_ray: bool = False) -> ASGIApp:
    """The application, which passes every checked request to `engine`; Ray's proxy gives every reply a request id."""
    app = FastAPI(
        title="ArcFlow", description="OpenAI's images API for ArcFlow bundles.", docs_url=None, redoc_url=None
    )
    keys = Keys(settings.api_keys)
    _add_errors(app)
    _add_pages(app)
    _add_state(app, engine)
    _add_models(app, engine, keys)
    generation = Generation(engine, settings, keys)
    app.add_api_route(
        IMAGES_PATH,
        generation.handle,
        methods=["POST"],
        summary="Generate images",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": GenerationRequest.model_json_schema()}},
            }
        },
        responses=dict.fromkeys((400, 401, 404, 408, 413, 415, 429, 500, 503), _ERRORS),
    )
    direct = _Direct(app, generation)
    return WithRaysRequestId(direct) if behind_ray else WithRequestId(direct)


class _Direct:
    """Passes requests for images to `generation`, past FastAPI's layers, and all others to `app`.

    FastAPI has a route for them too, for its documentation. Its layers take time and do nothing for such a request.
    """

    def __init__(self, app: ASGIApp, generation: Generation) -> None:
        self._app, self._generation = app, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        wanted = scope["type"] == "http" and scope["path"] == IMAGES_PATH and scope["method"] == "POST"
        await (self._generation if wanted else self._app)(scope, receive, send)


class WithRaysRequestId:
    """Reads the request id that Ray's proxy adds to the headers of each request, and to its reply."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http":
            scope[REQUEST_ID] = dict(scope["headers"]).get(b"x-request-id", b"unknown").decode("latin-1")
        await self._app(scope, receive, send)


class WithRequestId:
    """Gives every reply a request id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        scope[REQUEST_ID] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


def _add_errors(app: FastAPI) -> None:
    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = error.status_code
        message = {404: "there is nothing at this address; see /docs", 405: "this address has other methods"}
        code = {404: "not_found", 405: "method_not_allowed"}
        wrapped = ServiceError(status, code.get(status, "http_error"), message.get(status, str(error.detail)))
        response = error_response(wrapped)
        response.headers.update(error.headers or {})
        return response

    async def on_any(request: Request, error: Exception) -> Response:
        return unexpected(error, request.scope[REQUEST_ID])

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_any)


def _add_pages(app: FastAPI) -> None:
    page = (resources.files("arcflow_serve") / "page" / "index.html").read_bytes()

    async def show_page(_: Request) -> Response:
        headers = {
            "content-security-policy": _PAGE_POLICY,
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }
        return HTMLResponse(page, headers=headers)

    async def show_favicon(_: Request) -> Response:
        return Response(_FAVICON, media_type="image/svg+xml", headers={"cache-control": "max-age=86400"})

    async def show_docs(_: Request) -> Response:
        assert app.openapi_url is not None
        return get_swagger_ui_html(
            openapi_url=app.openapi_url,
            title="ArcFlow",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/favicon.ico",
        )

    for path, handler in {"/": show_page, "/favicon.ico": show_favicon, "/docs": show_docs}.items():
        app.add_route(path, handler, methods=["GET"])
    static = resources.files(fastapi_offline) / "static"
    app.mount("/docs/static", StaticFiles(directory=str(static)))


def _add_state(app: FastAPI, engine: Engine) -> None:
    def state(reasons: list[str], well: str, ill: str) -> Response:
        body = {"status": ill if reasons else well, "reasons": reasons}
        return Response(json.dumps(body), UNAVAILABLE if reasons else 200, media_type="application/json")

    @app.get("/health", summary="Live", description="Status 503 if the process should be started anew.")
    async def health() -> Response:
        return state(engine.not_healthy(), "ok", "failing")

    @app.get("/ready", summary="Ready", description="Status 503 if no requests should be sent now.")
    async def ready() -> Response:
        return state(engine.not_ready(), "ready", "not ready")

    @app.get("/metrics", summary="Metrics", description="In Prometheus' format.")
    async def metrics() -> Response:
        return Response(engine.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_models(app: FastAPI, engine: Engine, keys: Keys) -> None:
    def guarded(handler: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                keys.client(request.headers.get("authorization"))
                return Response(json.dumps(handler(request)), media_type="application/json")
            except ServiceError as e:
                return error_response(e)

        return answer

    def every(_: Request) -> Any:
        return {"object": "list", "data": [_describe(m) for m in engine.models.values()]}

    def one(request: Request) -> Any:
        return _describe(find_model(engine.models, request.path_params["name"]))

    app.add_api_route("/v1/models", guarded(every), methods=["GET"], summary="The bundles")
    app.add_api_route("/v1/models/{name}", guarded(one), methods=["GET"], summary="One bundle")


def _describe(model: Model) -> dict[str, Any]:
    """A model as OpenAI lists it, and what a request may ask of it."""
    m, plain = model.manifest, model.check("", None, None, None, 0)
    limits = {
        "family": m.family,
        "size": f"{plain.width_px}x{plain.height_px}",
        "size_multiple_px": m.latents.vae_scale_factor * m.latents.patch_size,
        "width_px": [m.ranges.width_px.min, m.ranges.width_px.max],
        "height_px": [m.ranges.height_px.min, m.ranges.height_px.max],
        "num_inference_steps": plain.num_inference_steps,
        "guidance_scale": plain.guidance_scale,
        "true_cfg_scale": m.true_cfg_scale,
        "loras": list(model.loras),
    }
    return {"id": model.name, "object": "model", "created": model.created, "owned_by": "arcflow", "arcflow": limits}
