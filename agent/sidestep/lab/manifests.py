"""Manifests: files and directories of YAML or JSON to objects, checked before anything is touched."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.lab import podspec
from sidestep.lab.api.resources import KINDS, Kind
from sidestep.lab.cluster import LabError

SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object, with the place that it was read from for messages."""

    place: str
    kind: Kind
    body: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.body["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.body["metadata"].get("namespace") or "default") if self.kind.namespaced else ""

    @property
    def collection(self) -> str:
        """The path to create it at."""
        root = f"/apis/{self.kind.group}/{self.kind.version}" if self.kind.group else f"/api/{self.kind.version}"
        return (
            f"{root}/namespaces/{self.namespace}/{self.kind.plural}" if self.namespace else f"{root}/{self.kind.plural}"
        )

    def __str__(self) -> str:
        return f"{self.kind.kind} {self.namespace + '/' if self.namespace else ''}{self.name}"


def files(paths: Iterable[str]) -> Iterator[Path]:
    """Files as given; of a directory its manifests by name. Raises LabError."""
    for text in paths:
        path = Path(text)
        if path.is_dir():
            found = sorted(entry for entry in path.iterdir() if entry.suffix in SUFFIXES and entry.is_file())
            if not found:
                raise LabError(f"{path}: no file in it ends with {', '.join(SUFFIXES)}")
            yield from found
        elif path.exists():
            yield path
        else:
            raise LabError(f"{path}: there is no such file")


def read(paths: Iterable[str]) -> list[Manifest]:
    """Every object of every file, in order. Raises LabError: which file, which document, what is wrong."""
    found = []
    for path in files(paths):
        found += list(_read(path))
    return found


def _read(path: Path) -> Iterator[Manifest]:
    import yaml

    try:
        documents = list(yaml.load_all(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise LabError(f"{path}: not YAML{where}: {getattr(error, 'problem', None) or 'cannot be parsed'}") from None
    for number, document in enumerate(documents, 1):
        place = f"{path}, document {number}" if len(documents) > 1 else str(path)
        if document is None:
            continue
        if isinstance(document, Mapping) and document.get("kind") == "List":
            for item in document.get("items") or ():
                yield _object(place, item)
        else:
            yield _object(place, document)


def _object(place: str, document: Any) -> Manifest:
    if not isinstance(document, dict):
        raise LabError(f"{place}: not an object, but {type(document).__name__}")
    api_version, kind_name = document.get("apiVersion"), document.get("kind")
    if not api_version or not kind_name:
        raise LabError(f"{place}: no {'apiVersion' if not api_version else 'kind'}")
    meta = document.get("metadata")
    if not isinstance(meta, dict) or not meta.get("name"):
        raise LabError(f"{place}: {kind_name} without metadata.name")
    kind = next((item for item in KINDS if item.kind == kind_name and api_version in item.api_versions), None)
    if kind is None or "create" not in kind.verbs:
        known = ", ".join(f"{item.api_version} {item.kind}" for item in KINDS if "create" in item.verbs)
        raise LabError(f"{place}: unknown kind {api_version} {kind_name}; the lab knows {known}")
    manifest = Manifest(place, kind, document)
    _check_pod(manifest)
    return manifest


def _check_pod(manifest: Manifest) -> None:
    """What the kubelet part would refuse is refused before the lab exists."""
    body = manifest.body
    if manifest.kind.kind == "Deployment":
        template = (body.get("spec") or {}).get("template") or {}
        body = {"metadata": template.get("metadata") or {}, "spec": template.get("spec")}
    elif manifest.kind.kind != "Pod":
        return
    if not isinstance(body.get("spec"), dict):
        raise LabError(f"{manifest.place}: {manifest} has no spec")
    try:
        podspec.parse(body)
    except podspec.Refused as error:
        raise LabError(f"{manifest.place}: {manifest}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(f"{manifest.place}: {manifest} is malformed: {error!r}") from None
