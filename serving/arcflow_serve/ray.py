"""The service on Ray Serve: `serve run arcflow_serve.ray:application bundle=BUNDLE`.

Two deployments: Ingress has the web application of `arcflow serve`, and Generator the lanes, one replica for each GPU.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from arcflow_runtime.backends import AUTO, ON_CPU
from arcflow_runtime.errors import RequestError
from arcflow_serve.app import create_app
from arcflow_serve.keys import read_keys
from arcflow_serve.models import describe_models, open_models
from arcflow_serve.remote import Progress, RemoteEngine, Work, work_on
from arcflow_serve.service import Service
from arcflow_serve.settings import Settings, parse_size

_log = logging.getLogger("arcflow.serve")
GENERATOR = "Generator"
#: How often the number of running replicas is read.
_WATCH_S = 1.0
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 5.0, 30.0


@dataclass(frozen=True)
class Scale:
    """The number of replicas and of ingress processes.

    Attributes:
        min_replicas: replicas of the generator that always run.
        max_replicas: most replicas; with GPUs, the number of GPUs of the cluster.
        ingress_replicas: processes that speak HTTP.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    ingress_replicas: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise RequestError(
                f"min_replicas must be from 1 to max_replicas, got {self.min_replicas} and {self.max_replicas}"
            )
        if self.ingress_replicas < 1:
            raise RequestError(f"ingress_replicas must be at least 1, got {self.ingress_replicas}")


class Generator:
    """One replica: bundles, lanes and a queue, as in `arcflow serve`, without HTTP."""

    def __init__(self, bundles: list[Path], settings: Settings) -> None:
        self._service = Service(open_models(bundles, settings), settings)
        self._service.start()

    async def generate(self, work: Work) -> AsyncIterator[Progress]:
        """Generate a job's images."""
        async for progress in work_on(self._service, work):
            yield progress

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that raises."""
        if reasons := self._service.not_healthy():
            raise RuntimeError("; ".join(reasons))

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()


class Ingress:
    """One process that speaks HTTP; it loads no engine, and passes every checked request to a generator."""

    def __init__(self, generator: DeploymentHandle, bundles: list[Path], settings: Settings) -> None:
        stream = generator.options(stream=True)
        replicas = _Replicas(serve.get_replica_context().app_name)

        async def call(work: Work) -> AsyncGenerator[Progress, None]:
            response = stream.generate.remote(work)
            try:
                async for progress in response:
                    yield progress
            finally:
                response.cancel()

        models = describe_models(bundles, settings)
        engine = RemoteEngine(models, settings, call, (RayActorError,), lambda: replicas.running)
        self._app = create_app(engine, settings, behind_ray=True)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


class _Replicas:
    """Counts the running generators, in a thread, because asking Ray blocks."""

    def __init__(self, application: str) -> None:
        self.running = 0
        self._application = application
        threading.Thread(target=self._watch, name="arcflow-replicas", daemon=True).start()

    def _watch(self) -> None:
        ended = threading.Event()
        while not ended.wait(_WATCH_S):
            try:
                deployments = serve.status().applications[self._application].deployments
                self.running = deployments[GENERATOR].replica_states.get("RUNNING", 0)
            except Exception as e:
                # While the controller of Ray Serve is started anew, requests go on.
                _log.warning("the number of replicas is unknown: %s: %s", type(e).__name__, e)


def application(arguments: Mapping[str, Any]) -> serve.Application:
    """Build the application; `serve run` and `serve deploy` call this.

    Args:
        arguments: `bundle`, a path that every node must have, a name on the hub, or a list of them; `api_keys`, a file
            of keys on this machine; the fields of `Scale`; and those of `Settings`, of which `warm_up` is written
            WIDTHxHEIGHT. The values may be text, which for `loras` and `warm_up` is one of them.

    Raises:
        RequestError: an argument is unknown, missing or wrong.
    """
    given = dict(arguments)
    bundles = _bundles(given.pop("bundle", None))
    keys = read_keys(Path(given.pop("api_keys")) if "api_keys" in given else None)
    known = [field.name for kind in (Scale, Settings) for field in dataclasses.fields(kind)]
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "bundle"], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise RequestError(f"unknown argument {name!r} of arcflow_serve.ray:application{hint}")
    given |= {"loras": [_absolute(path) for path in _several(given.get("loras", ()))]}
    try:
        given |= {"warm_up": [parse_size(str(size)) for size in _several(given.get("warm_up", ()))]}
    except ValueError as e:
        raise RequestError(f"warm_up {e}") from None
    settings = dataclasses.replace(_parse(Settings, given), api_keys=keys)
    return _build(bundles, settings, _parse(Scale, given))


def _bundles(given: Any) -> list[Path]:
    if not given:
        raise RequestError("bundle must be the path of a bundle, or a list of paths; got none")
    return [_absolute(path) if Path(str(path)).exists() else Path(str(path)) for path in _several(given)]


def _several(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (list, tuple)) else [given]


def _absolute(path: object) -> Path:
    # Ray's processes have other working directories.
    return Path(str(path)).absolute()


def _parse(kind: type[Any], given: Mapping[str, Any]) -> Any:
    """A dataclass of the arguments that are its fields, converted from text where they are text."""
    types, values = get_type_hints(kind), {}
    for name in given.keys() & types.keys():
        try:
            values[name] = TypeAdapter(types[name]).validate_python(given[name])
        except ValidationError as e:
            message = e.errors(include_url=False)[0]["msg"].replace("Input should be ", "")
            raise RequestError(f"{name} must be {message}, got {given[name]!r}") from None
    return kind(**values)


def _build(bundles: list[Path], settings: Settings, scale: Scale) -> serve.Application:
    if settings.backend == AUTO:
        raise RequestError(
            f"backend must be named, got {AUTO!r}: whether a replica needs a GPU is decided before there is a replica"
        )
    full = settings.lanes * settings.max_batch
    threads = settings.lanes * (settings.engine_threads or 1)
    generator = serve.deployment(
        Generator,
        name=GENERATOR,
        ray_actor_options={"num_cpus": threads} if settings.backend in ON_CPU else {"num_cpus": 1, "num_gpus": 1},
        # A full batch in each lane, and another one that waits, so that no lane is idle between two.
        max_ongoing_requests=2 * full,
        autoscaling_config={
            "min_replicas": scale.min_replicas,
            "max_replicas": scale.max_replicas,
            # Requests in a replica, running and waiting. With more than full batches, only the wait gets longer.
            "target_ongoing_requests": full,
        },
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=scale.ingress_replicas,
        # The ingress mostly waits for replicas. A core that Ray reserves for it could not generate images.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_connections,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )
    return ingress.bind(generator.bind(bundles, settings), bundles, settings)
