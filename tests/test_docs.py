"""What the documentation shows can be used: manifests are YAML of known kinds, and their options exist; links lead
somewhere, and the list of modules has all of them.
"""

from pathlib import Path
import re

import pytest
import yaml

from sharding.launch import parser as launcher
from slora_jax.cli.parser import parse_arguments

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("benchmarks/**/*.md"), *ROOT.glob("examples/*.md")]
KINDS = {
    "Deployment": "apps/v1",
    "Service": "v1",
    "InferencePool": "inference.networking.k8s.io/v1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
}


def manifests() -> list[dict]:
    blocks = re.findall(r"```yaml\n(.*?)```", (DOCS / "kubernetes.md").read_text(encoding="utf-8"), re.DOTALL)
    return [document for block in blocks for document in yaml.safe_load_all(block)]


def containers(value) -> list[dict]:
    if isinstance(value, dict):
        return value.get("containers", []) + [c for v in value.values() for c in containers(v)]
    return [c for v in value for c in containers(v)] if isinstance(value, list) else []


def test_manifests_are_of_known_kinds():
    found = {m["kind"]: m["apiVersion"] for m in manifests()}
    assert found == KINDS
    pool = next(m for m in manifests() if m["kind"] == "InferencePool")
    pods = [m["spec"] for m in manifests() if m["kind"] in ("Deployment", "LeaderWorkerSet")]
    templates = [s.get("template") or s["leaderWorkerTemplate"]["leaderTemplate"] for s in pods]
    for template in templates:
        labels = template["metadata"]["labels"]
        assert pool["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("container", [c for m in manifests() for c in containers(m)], ids=lambda c: c["name"])
def test_the_servers_options_exist(container):
    assert all(isinstance(argument, str) for argument in container["args"])
    if container["args"][0] == "slora-jax":
        arguments = container["args"][1:]
    else:
        assert container["args"][:3] == ["python", "-m", "sharding.launch"]
        launch = launcher().parse_args(container["args"][3:])
        assert launch.module == "slora_jax"
        arguments = launch.args
    args = parse_arguments(arguments)
    assert args.command == "serve" and args.host == "0.0.0.0" and (args.api_keys or args.allow_anonymous)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            assert container[probe]["httpGet"]["path"] in ("/ready", "/health")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_architecture_names_every_module():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    modules = {path.stem for path in (ROOT / "slora_jax").glob("[!_]*.py")}
    assert not {module for module in modules if f"`{module}`" not in text}
