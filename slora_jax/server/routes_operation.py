"""For those who run the server: is it alive, is it ready, what does it do."""

from collections.abc import Sequence
from importlib import resources
import itertools
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, Response

import slora_jax
from slora_jax.server.content_hash import script_hashes
from slora_jax.server.depends import ServiceDep

router = APIRouter()

_PAGE = resources.files("slora_jax.server").joinpath("status.html").read_text(encoding="utf-8")
_POLICY = (
    f"default-src 'none'; connect-src 'self'; style-src {script_hashes(_PAGE, 'style')}; "
    f"script-src {script_hashes(_PAGE, 'script')}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/", include_in_schema=False)
async def status_page() -> HTMLResponse:
    """A page that draws /status. It holds nothing of its own, so that it needs no key."""
    return HTMLResponse(_PAGE, headers={"content-security-policy": _POLICY, "referrer-policy": "no-referrer"})


@router.get("/health")
async def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(service: ServiceDep) -> JSONResponse:
    """200 if calls are taken, 503 while loading and while shutting down."""
    return JSONResponse({"status": service.phase}, 200 if service.phase == "ready" else 503)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": slora_jax.__version__}


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    return Response(service.metrics.render(await service.snapshot()), media_type=CONTENT_TYPE_LATEST)


@router.get("/status")
async def status(service: ServiceDep) -> dict[str, Any]:
    """What the status page shows. page_map: runs of [kind, count]; an adapter's pages have its digest as their kind."""
    now = await service.snapshot()
    answer: dict[str, Any] = {
        "phase": service.phase,
        "model": service.config.model_name,
        "version": slora_jax.__version__,
        "started": service.started,
    }
    if now is not None:
        answer |= {
            "stats": now.stats,
            "requests": now.requests[:200],
            "adapters": now.adapters,
            "page_map": _runs(now.pages),
        }
    return answer


def _runs(pages: Sequence[str | None]) -> list[tuple[str, int]]:
    return [(kind or "free", len(list(run))) for kind, run in itertools.groupby(pages)]
